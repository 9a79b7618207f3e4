"""Following a repository: what is loaded, what is unloaded, and when nothing is (spec R-081, L-013)."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from forebay.engine.repository.config_problem import Problem
from forebay.engine.repository.fingerprint import Fingerprint
from forebay.engine.repository.found_model import FoundModel, unusable_model
from forebay.engine.supervisor.lifecycle import ModelLifecycle
from forebay.engine.supervisor.poller import RepositoryPoller
from forebay.ipc.errors import InvalidArgument

#: Model to what its directory is like; what begins with ``!`` is a configuration that cannot be read.
Look = dict[str, str] | Exception


def _found(name: str, digest: str) -> FoundModel:
    if digest.startswith("!"):
        return unusable_model(name, "r", Problem(digest))
    return FoundModel(name=name, repository="r", path=name, fingerprint=Fingerprint(digest, "", {}))


class FakeLifecycle:
    """Models that load at once, of a repository that is what the test says it is."""

    def __init__(self) -> None:
        #: What each look at the repository finds, one after the other; the last one stays. An error is raised.
        self.looks: list[Look] = [{}]
        self.models: dict[str, Any] = {}
        self.repository = self
        self.events: list[str] = []

    def scan(self) -> list[FoundModel]:
        look = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        if isinstance(look, Exception):
            raise look
        return [_found(name, digest) for name, digest in look.items()]

    async def load(self, name: str, found: FoundModel) -> None:
        digest = found.fingerprint.config if found.fingerprint is not None else found.problems[0].text
        self.events.append(f"load {name} {digest}")
        if digest == "breaks us":
            raise RuntimeError("a fault of ours")
        self.models[name] = SimpleNamespace(found=found)

    async def unload(self, name: str) -> None:
        self.events.append(f"unload {name}")

    def forget(self, name: str) -> None:
        del self.models[name]


def poll(lifecycle: FakeLifecycle, poller: RepositoryPoller, *looks: Look) -> list[str]:
    """Poll until the repository has come to rest, while it changes as ``looks`` say; return what was done."""
    lifecycle.looks = list(looks)
    lifecycle.events = []
    while asyncio.run(poller.poll()):
        pass
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


def test_a_repository_that_vanishes_while_a_model_settles_is_followed_when_it_is_back(
    lifecycle: FakeLifecycle, poller: RepositoryPoller
) -> None:
    gone = InvalidArgument("failed to stat file r: does not exist")
    assert poll(lifecycle, poller, {"a": "1"}, gone, {"a": "1"}) == ["load a 1"]
    assert poll(lifecycle, poller, {"a": "2"}, OSError(24, "Too many open files"), {"a": "2"}) == ["load a 2"]


def test_a_model_that_never_comes_to_rest_keeps_no_other_waiting(
    lifecycle: FakeLifecycle, poller: RepositoryPoller
) -> None:
    """A model that writes a log into its own directory, for example."""
    looks: list[Look] = [{"restless": str(number), "a": "1"} for number in range(5)]
    assert poll(lifecycle, poller, *looks) == ["load a 1", "load restless 4"]


def test_a_configuration_that_is_broken_in_another_way_is_tried_again(
    lifecycle: FakeLifecycle, poller: RepositoryPoller
) -> None:
    """What the index says of it is what is wrong with it now."""
    assert poll(lifecycle, poller, {"a": "!no such field"}) == ["load a !no such field"]
    assert poll(lifecycle, poller, {"a": "!no such field"}) == []
    assert poll(lifecycle, poller, {"a": "!no such value"}) == ["load a !no such value"]


def test_a_fault_with_one_model_ends_the_following_of_no_other(
    lifecycle: FakeLifecycle, poller: RepositoryPoller, capfd: pytest.CaptureFixture[str]
) -> None:
    assert poll(lifecycle, poller, {"a": "breaks us", "b": "1"}) == ["load a breaks us", "load b 1"]
    assert "failed to follow the changes of model 'a'" in capfd.readouterr().err
    assert poll(lifecycle, poller, {"a": "1", "b": "1"}) == ["load a 1"]


def test_an_interval_of_nothing_means_never(lifecycle: FakeLifecycle) -> None:
    """Triton polls only where ``--repository-poll-secs`` is more than 0 (spec F-025)."""
    lifecycle.looks = [{"a": "1"}]
    asyncio.run(RepositoryPoller(cast(ModelLifecycle, lifecycle), 0.0).run())
    assert lifecycle.events == []
