"""How large outputs of varying size are expected to be."""

from __future__ import annotations

from forebay.ipc.ensemble.output_sizes import OutputSizes


def test_nothing_is_expected_of_what_was_never_seen() -> None:
    assert OutputSizes().expected("Y", 8) == 0


def test_expectations_grow_at_once_and_shrink_slowly() -> None:
    sizes = OutputSizes()
    sizes.learn("Y", 2, 2000)
    assert (sizes.expected("Y", 1), sizes.expected("Y", 3), sizes.expected("Z", 1)) == (1000, 3000, 0)
    sizes.learn("Y", 1, 40)
    assert 40 < sizes.expected("Y", 1) < 1000
    for _ in range(1000):
        sizes.learn("Y", 1, 40)
    assert 40 <= sizes.expected("Y", 1) < 40 + 64
    sizes.learn("Y", 1, 5000)
    assert sizes.expected("Y", 1) == 5000
