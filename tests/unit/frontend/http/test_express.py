"""Requests of quiet models pass those of a crowded one within a turn."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from forebay.frontend.http.express import Express


class Quiet:
    """A connection; reads what its client has sent."""

    def __init__(self, express: Express) -> None:
        self.client, self.server = socket.socketpair()
        self.read: list[bytes] = []
        self.express = express
        connection: Any = self
        express.sort(connection, self.server.fileno(), is_quiet=True)

    def read_now(self) -> None:
        self.express.step()  # As every request does; it must not look again from within a look.
        self.read.append(self.server.recv(100))

    def close(self) -> None:
        self.client.close()
        self.server.close()


class Scene:
    """An express with the doorbell of an engine."""

    def __init__(self) -> None:
        self.bell, self.completions = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.answers: list[bytes] = []
        engine: Any = SimpleNamespace(
            completions_fd=self.completions.fileno(),
            take_answer_now=lambda: self.answers.append(self.completions.recv(100)),
            forget_crowds=lambda: None,
        )
        self.express = Express(engine)
        self.is_told_between_answers = engine.between_answers == self.express.step

    def turn(self, requests: int) -> None:
        for _ in range(requests):
            self.express.step()


@pytest.fixture
def scene() -> Iterator[Scene]:
    scene = Scene()
    yield scene
    scene.bell.close()
    scene.completions.close()


def test_connection_is_read_after_a_few_requests_of_the_crowd(scene: Scene) -> None:
    quiet = Quiet(scene.express)
    scene.turn(8)
    assert quiet.read == []
    quiet.client.send(b"request")
    scene.turn(8)
    assert quiet.read == [b"request"]
    quiet.close()


def test_answer_is_taken_after_a_few_requests_or_answers_of_the_crowd(scene: Scene) -> None:
    scene.bell.send(b"answer")
    scene.turn(8)
    assert scene.answers == [b"answer"]
    assert scene.is_told_between_answers


@pytest.mark.parametrize("is_closed", [False, True])
def test_connection_that_left_is_not_read(scene: Scene, is_closed: bool) -> None:
    """The event loop closes a descriptor before it says so."""
    quiet = Quiet(scene.express)
    fd = quiet.server.fileno()
    quiet.client.send(b"request")
    if is_closed:
        quiet.close()
    scene.express.leave(fd)
    scene.turn(8)
    assert quiet.read == []
    quiet.close()


def test_connection_whose_model_is_crowded_itself_is_not_read(scene: Scene) -> None:
    quiet = Quiet(scene.express)
    quiet.client.send(b"request")
    connection: Any = quiet
    scene.express.sort(connection, quiet.server.fileno(), is_quiet=False)
    scene.turn(8)
    assert quiet.read == []
    quiet.close()


def test_review_finds_who_has_asked_the_crowded_model_since_the_last(scene: Scene) -> None:
    """Also those that ask others in between."""
    scene.express.crowd = set()
    found: list[set[Any]] = []
    scene.express.on_review = lambda: found.append(set(scene.express.crowd or ()))
    quiet, busy = Quiet(scene.express), Quiet(scene.express)
    connection: Any = busy
    for is_quiet in (False, True):
        scene.express.sort(connection, busy.server.fileno(), is_quiet=is_quiet)
    scene.turn(8)
    assert found == [{busy}]
    assert scene.express.crowd == set()
    assert set(scene.express.quiet_connections) == {quiet, busy}
    quiet.close()
    busy.close()
