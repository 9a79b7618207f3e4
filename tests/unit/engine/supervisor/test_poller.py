"""Following a repository: what is loaded, what is unloaded, and when nothing is (spec R-081, L-013)."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from forebay.engine.repository.fingerprint import Fingerprint
from forebay.engine.repository.found_model import FoundModel
from forebay.engine.supervisor.lifecycle import ModelLifecycle
from forebay.engine.supervisor.poller import RepositoryPoller
from forebay.ipc.errors import InvalidArgument


class FakeLifecycle:
    """Models that load at once, of a repository that is what the test says it is."""

    def __init__(self) -> None:
        #: What each look at the repository finds, one after the other; the last one stays. An error is raised.
        self.looks: list[dict[str, str] | InvalidArgument] = [{}]
        self.models: dict[str, Any] = {}
        self.repository = self
        self.events: list[str] = []

    def scan(self) -> list[FoundModel]:
        look = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        if isinstance(look, InvalidArgument):
            raise look
        return [
            FoundModel(name=name, repository="r", path=name, fingerprint=Fingerprint(digest, "", {}))
            for name, digest in look.items()
        ]

    async def load(self, name: str, found: FoundModel) -> None:
        assert found.fingerprint is not None
        self.events.append(f"load {name} {found.fingerprint.config}")
        self.models[name] = SimpleNamespace(found=found)

    async def unload(self, name: str) -> None:
        self.events.append(f"unload {name}")

    def forget(self, name: str) -> None:
        del self.models[name]


def poll(lifecycle: FakeLifecycle, poller: RepositoryPoller, *looks: dict[str, str] | InvalidArgument) -> list[str]:
    """Poll once while the repository changes as ``looks`` say; return what was done."""
    lifecycle.looks = list(looks)
    lifecycle.events = []
    asyncio.run(poller.poll())
    return lifecycle.events


@pytest.fixture
def lifecycle() -> FakeLifecycle:
    return FakeLifecycle()


@pytest.fixture
def poller(lifecycle: FakeLifecycle) -> RepositoryPoller:
    return RepositoryPoller(cast(ModelLifecycle, lifecycle), 0.01, settle_s=0.001)


def test_new_changed_and_removed_models_are_followed(lifecycle: FakeLifecycle, poller: RepositoryPoller) -> None:
    assert poll(lifecycle, poller, {"a": "1"}) == ["load a 1"]
    assert poll(lifecycle, poller, {"a": "1"}) == []
    assert poll(lifecycle, poller, {"a": "2", "b": "1"}) == ["load a 2", "load b 1"]
    assert poll(lifecycle, poller, {"b": "1"}) == ["unload a"]


def test_a_model_that_is_being_written_is_loaded_when_it_has_settled(
    lifecycle: FakeLifecycle, poller: RepositoryPoller
) -> None:
    """What is loaded is what two looks in a row have seen."""
    assert poll(lifecycle, poller, {"a": "half"}, {"a": "more"}, {"a": "whole"}) == ["load a whole"]


def test_a_model_that_vanishes_while_it_settles_is_not_loaded(
    lifecycle: FakeLifecycle, poller: RepositoryPoller
) -> None:
    assert poll(lifecycle, poller, {"a": "1"}, {}) == []


def test_a_repository_that_cannot_be_read_unloads_nothing_and_is_reported_once(
    lifecycle: FakeLifecycle, poller: RepositoryPoller, capfd: pytest.CaptureFixture[str]
) -> None:
    poll(lifecycle, poller, {"a": "1"})
    gone = InvalidArgument("failed to stat file r: does not exist")
    for _ in range(3):
        assert poll(lifecycle, poller, gone) == []
    assert poll(lifecycle, poller, {"a": "1"}) == []
    printed = capfd.readouterr().err
    assert printed.count("failed to poll the model repository: failed to stat file r: does not exist") == 1
    assert printed.count("the model repository can be polled again") == 1
