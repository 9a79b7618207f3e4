"""Look-ups by name and version."""

from __future__ import annotations

import pytest
from fake_frontend import entry

from forebay.frontend.catalog_view import CatalogView, parse_version
from forebay.ipc.catalog import Catalog, ModelEntry
from forebay.ipc.errors import InvalidArgument, NotFound, NotReady


def view(*models: ModelEntry) -> CatalogView:
    return CatalogView(Catalog(generation=1, models=models))


def test_the_highest_ready_version_is_the_latest() -> None:
    """Spec H-062: by number, not by text or position."""
    models = view(entry("m", 9), entry("m", 10), entry("m", 2), entry("m", 11, "LOADING"))
    assert models.find("m").version == 10
    assert models.find("m", 2).version == 2
    assert [model.version for model in models.ready_versions("m")] == [2, 9, 10]
    assert models.ready_versions("nope") == ()


def test_each_miss_has_its_error() -> None:
    """Spec H-039..H-042."""
    models = view(entry("m"), entry("m", 2, "UNLOADING"), entry("bad", 1, "UNAVAILABLE"))
    with pytest.raises(NotFound, match=r"^Request for unknown model: 'nope' is not found$"):
        models.find("nope", 3)
    with pytest.raises(NotFound, match=r"^Request for unknown model: 'm' version 3 is not found$"):
        models.find("m", 3)
    with pytest.raises(NotFound, match=r"^Request for unknown model: 'bad' has no available versions$"):
        models.find("bad")
    with pytest.raises(NotReady, match=r"^Request for unknown model: 'm' version 2 is not at ready state$"):
        models.find("m", 2)


def test_a_model_without_versions_is_known_unless_nobody_has_loaded_it() -> None:
    """Spec R-008, H-211."""
    models = view(entry("hollow", 0, "UNAVAILABLE", has_no_version=True), entry("idle", 0, "UNAVAILABLE"))
    with pytest.raises(NotFound, match=r"^Request for unknown model: 'hollow' has no available versions$"):
        models.find("hollow")
    with pytest.raises(NotFound, match=r"^Request for unknown model: 'idle' is not found$"):
        models.find("idle")


def test_a_model_whose_worker_is_being_replaced_is_not_ready_instead_of_unknown() -> None:
    """Spec H-042: asking again in a moment helps, which a 404 would deny."""
    models = view(entry("m", 1, "UNAVAILABLE", route=7), entry("e", 1, "UNAVAILABLE", route=8, is_ensemble=True))
    with pytest.raises(NotReady, match=r"^Request for unknown model: 'm' version 1 is not at ready state$"):
        models.find("m")
    with pytest.raises(NotFound, match=r"^Request for unknown model: 'e' has no available versions$"):
        models.find("e")


def test_a_name_in_two_namespaces_is_ambiguous() -> None:
    """Spec R-015."""
    models = view(entry("m", namespace="a"), entry("m", namespace="b"))
    with pytest.raises(InvalidArgument, match="ambiguous"):
        models.find("m")
    with pytest.raises(InvalidArgument, match="ambiguous"):
        models.find("m", 1)


@pytest.mark.parametrize(
    ("text", "version"), [("", None), ("1", 1), ("007", 7), ("0", 0), ("9223372036854775807", 2**63 - 1)]
)
def test_versions_of_urls(text: str, version: int | None) -> None:
    assert parse_version(text) == version


@pytest.mark.parametrize("text", ["9223372036854775808", "1" * 10_000])
def test_versions_beyond_64_bits_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="should be an integral value > 0"):
        parse_version(text)
