"""Version directories and policies."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.engine.repository.config import parse_config_text
from forebay.engine.repository.model_config_schema import ModelConfig
from forebay.engine.repository.normalise import normalise_defaults
from forebay.engine.repository.versions import NoVersionAvailable, choose_versions, find_versions


def config(policy: str) -> ModelConfig:
    made = parse_config_text(f'name: "m" {policy}')
    normalise_defaults(made)
    return made


def test_only_plain_numbers_are_versions() -> None:
    """Spec R-002, R-003."""
    found = find_versions(
        ["10", "1", "03", "x", "0", "1abc", "-1", "warmup", "initial_state", "configs", "9" * 30, "٣"]
    )
    assert found.numbers == (0, 1, 10)
    assert found.warnings == (
        "ignore version directory '-1' which fails to convert to integral number",
        "ignore version directory '03' which contains leading zeros in its directory name",
        "ignore version directory '1abc' which fails to convert to integral number",
        f"ignore version directory '{'9' * 30}' which fails to convert to integral number",
        "ignore version directory 'x' which fails to convert to integral number",
        "ignore version directory '٣' which fails to convert to integral number",
    )


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("", (3,)),
        ("version_policy { latest { num_versions: 2 } }", (2, 3)),
        ("version_policy { latest { num_versions: 9 } }", (1, 2, 3)),
        ("version_policy { all { } }", (1, 2, 3)),
        ("version_policy { specific { versions: [ 3, 1, 3 ] } }", (1, 3)),
    ],
)
def test_policies_choose_among_what_is_there(policy: str, expected: tuple[int, ...]) -> None:
    """Spec R-004..R-007."""
    assert choose_versions(config(policy), [3, 1, 2]).numbers == expected


def test_a_listed_version_that_is_missing_is_only_reported() -> None:
    """Spec R-007."""
    chosen = choose_versions(config("version_policy { specific { versions: [ 1, 9 ] } }"), [1, 2])
    assert chosen.numbers == (1,)
    assert chosen.errors == ("version 9 is specified for model 'm', but the version directory is not present",)


@pytest.mark.parametrize(
    ("policy", "available"),
    [
        ("", []),
        ("version_policy { all { } }", []),
        ("version_policy { specific { versions: 4 } }", [1]),
        ("version_policy { latest { } }", [1]),
    ],
)
def test_no_version_is_an_error(policy: str, available: list[int]) -> None:
    """Spec R-008."""
    with pytest.raises(NoVersionAvailable) as caught:
        choose_versions(config(policy), available)
    assert caught.value.text == "at least one version must be available under the version policy of model 'm'"


@given(st.lists(st.text(max_size=8)))
def test_any_directory_names_are_sorted_into_versions_and_warnings(names: list[str]) -> None:
    found = find_versions(names)
    assert list(found.numbers) == sorted(set(found.numbers))
    assert all(number >= 0 for number in found.numbers)
