"""When a frontend and a worker share a core, and when they part."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from forebay.frontend.data_plane.core_sharing import CoreSharing, Pace
from forebay.ipc.wire import HEADER, Kind

PRODUCER = 7
QUICK_NS, SLOW_NS = 100_000, 5_000_000

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")


class Grant:
    """What of a grant matters here; its own doorbell and route."""

    def __init__(self, instance: int) -> None:
        self.instance = instance
        self.route = self
        self.pace = Pace()
        self.is_idle = True
        self.bell = self
        self.places: list[int] = []

    def ring(self, message: bytes) -> None:
        kind, _flags, _count, producer, place = HEADER.unpack(message)
        assert (kind, producer) == (Kind.PLACE, PRODUCER)
        self.places.append(place)


class Wait:
    """Counts what it is told."""

    def __init__(self) -> None:
        self.begun = self.ended = 0
        self.on_change: Callable[[bool], None] = lambda _are_awake: None

    def begin(self, _now_ns: int) -> None:
        self.begun += 1

    def end(self) -> None:
        self.ended += 1

    def break_off(self) -> None:
        self.begun = self.ended = 0


class Scene:
    """A frontend that asks workers one request at a time, and its cores."""

    def __init__(self) -> None:
        self.home = os.sched_getaffinity(0)
        self.wait: Any = Wait()
        self.cores = CoreSharing(PRODUCER, self.wait)
        self.cores.allow()
        self.now_ns = 10**12
        self.first, self.second = Grant(1), Grant(2)

    def begin(self, grant: Any, requests: int = 1) -> None:
        self.cores.begun(grant, requests)

    def ask(self, grant: Grant, count: int, elapsed_ns: int = QUICK_NS) -> None:
        for _ in range(count):
            self.begin(grant)
            self.now_ns += elapsed_ns
            self.cores.ended(grant.pace, elapsed_ns, self.now_ns)

    @property
    def shared(self) -> int | None:
        """The one core of this thread; None: it has all."""
        cores = os.sched_getaffinity(0)
        return None if cores == self.home else min(cores)


@pytest.fixture
def play() -> Iterator[Callable[[Callable[[Scene], None]], None]]:
    """Run in a thread of its own: whatever is left of it, the cores of pytest's stay."""
    with ThreadPoolExecutor(1) as thread:
        yield lambda scenario: thread.submit(lambda: scenario(Scene())).result()


Play = Callable[[Callable[[Scene], None]], None]


def test_worker_that_serves_one_request_at_a_time_comes_to_our_core(play: Play) -> None:
    def scenario(scene: Scene) -> None:
        scene.ask(scene.first, 200)
        assert scene.shared is None
        scene.ask(scene.first, 100)
        assert scene.shared is not None
        assert scene.first.places == [scene.shared + 1]

    play(scenario)


def test_second_worker_joins_when_it_is_asked_by_turns_with_the_first(play: Play) -> None:
    """As the steps of an ensemble are."""

    def scenario(scene: Scene) -> None:
        scene.ask(scene.first, 300)
        scene.ask(scene.second, 2)
        assert scene.shared is not None
        assert scene.second.places == scene.first.places == [scene.shared + 1]

    play(scenario)


def test_worker_that_is_asked_while_the_one_before_it_is_answered_joins(play: Play) -> None:
    """As the next step of an ensemble is."""

    def scenario(scene: Scene) -> None:
        for _ in range(300):
            scene.begin(scene.first)
            scene.first.is_idle = False
            scene.cores.answering = scene.first.instance
            scene.begin(scene.second)
            scene.first.is_idle = True
            scene.cores.answering = 0
            scene.cores.ended(scene.first.pace, QUICK_NS, scene.now_ns)
            scene.cores.ended(scene.second.pace, QUICK_NS, scene.now_ns)
        assert scene.shared is not None
        assert scene.second.places == scene.first.places == [scene.shared + 1]

    play(scenario)


@pytest.mark.parametrize("crowd", ["a batch of two", "another worker runs", "the scheduler is asked"])
def test_all_run_anywhere_again_as_soon_as_two_requests_are_in_flight(play: Play, crowd: str) -> None:
    def scenario(scene: Scene) -> None:
        scene.ask(scene.first, 300)
        if crowd == "a batch of two":
            scene.begin(scene.first, 2)
        elif crowd == "another worker runs":
            scene.begin(scene.first)
            scene.first.is_idle = False
            scene.begin(scene.second)
        else:
            scene.cores.crowded()
        assert scene.shared is None
        assert scene.first.places[-1] == 0
        assert 0 in scene.first.places
        assert not any(scene.second.places)

    play(scenario)


@contextlib.contextmanager
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a TCP connection, the frontend's first."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        client.connect(listener.getsockname())
        connection, _address = listener.accept()
        with connection:
            yield connection, client


def exchange_on(core: int, connection: socket.socket, client: socket.socket) -> None:
    """Send something from this core, so that it arrives there."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(os.sched_setaffinity, 0, {core}).result()
        thread.submit(client.send, b"request").result()
    assert connection.recv(7) == b"request"


def test_shared_core_is_the_clients_and_follows_it(play: Play) -> None:
    def scenario(scene: Scene) -> None:
        with connected() as (connection, client):
            scene.cores.client_fd = connection.fileno()
            scene.ask(scene.first, 300)
            scene.ask(scene.second, 1)
            for core, requests in ((max(scene.home), 1100), (min(scene.home), 2200)):
                exchange_on(core, connection, client)
                scene.ask(scene.first, requests)
                assert scene.shared == core
                assert scene.first.places[-1] == scene.second.places[-1] == core + 1

    play(scenario)


def test_client_that_moves_on_every_time_is_followed_less_and_less(play: Play) -> None:
    """The kernel moves it to the core that we leave free; each move of ours costs a slow request."""

    def scenario(scene: Scene) -> None:
        with connected() as (connection, client):
            scene.cores.client_fd = connection.fileno()
            moves = 0
            for _ in range(80):
                shared = scene.shared
                core = next(core for core in scene.home if core != shared)
                exchange_on(core, connection, client)
                scene.ask(scene.first, 200)
                moves += shared is not None and scene.shared != shared
            assert moves == 4

    play(scenario)


def test_requests_that_become_slow_end_it_for_a_long_time(play: Play) -> None:
    """Somebody else needs the core. Each time it is left alone for longer."""

    def scenario(scene: Scene) -> None:
        scene.ask(scene.first, 300)
        scene.ask(scene.first, 1, SLOW_NS)
        assert scene.shared is not None
        for requests in (4800, 9700):
            scene.ask(scene.first, 8, SLOW_NS)
            assert scene.shared is None
            scene.ask(scene.first, requests)
            assert scene.shared is None
            scene.ask(scene.first, 300)
            assert scene.shared is not None

    play(scenario)


def test_penance_is_short_again_after_it_has_gone_well_for_a_while(play: Play) -> None:
    def scenario(scene: Scene) -> None:
        scene.ask(scene.first, 300)
        for _ in range(3):
            scene.ask(scene.first, 8, SLOW_NS)
            scene.ask(scene.first, 60_000)
            assert scene.shared is not None
        scene.ask(scene.first, 8, SLOW_NS)
        scene.ask(scene.first, 5_300)
        assert scene.shared is not None

    play(scenario)


def test_models_that_take_different_times_are_asked_by_turns(play: Play) -> None:
    """A model that takes its usual time is not slow, whatever others take."""

    def scenario(scene: Scene) -> None:
        scene.ask(scene.second, 300, 10 * QUICK_NS)
        scene.ask(scene.first, 2000)
        scene.ask(scene.second, 300, 10 * QUICK_NS)
        assert scene.shared is not None

    play(scenario)


def test_model_that_is_met_while_a_core_is_shared_is_not_slow_for_being_new(play: Play) -> None:
    def scenario(scene: Scene) -> None:
        scene.ask(scene.first, 300)
        scene.ask(scene.second, 500, 10 * QUICK_NS)
        assert scene.shared is not None

    play(scenario)


def test_slow_model_ends_what_a_quick_one_has_begun(play: Play) -> None:
    """It has more to lose to a busy core than to gain from a warm one."""

    def scenario(scene: Scene) -> None:
        scene.ask(scene.second, 300, 2 * SLOW_NS)
        scene.ask(scene.first, 300)
        assert scene.shared is not None
        scene.ask(scene.second, 1, 2 * SLOW_NS)
        assert scene.shared is None

    play(scenario)


def test_request_is_not_awaited_while_a_worker_runs_the_next_step(play: Play) -> None:
    def scenario(scene: Scene) -> None:
        scene.ask(scene.first, 300)
        awaited = scene.wait.begun
        scene.begin(scene.first)
        scene.first.is_idle = False
        scene.cores.ended(scene.first.pace, QUICK_NS, scene.now_ns)
        assert scene.wait.begun == awaited

    play(scenario)


def test_next_request_is_awaited_only_while_a_core_is_shared(play: Play) -> None:
    def scenario(scene: Scene) -> None:
        scene.ask(scene.first, 200)
        assert scene.wait.begun == scene.wait.ended == 0
        scene.ask(scene.first, 100)
        assert scene.wait.begun == scene.wait.ended > 0
        scene.cores.crowded()
        assert scene.wait.begun == 0

    play(scenario)


def test_slow_model_does_not_share_and_a_quick_one_after_it_does(play: Play) -> None:
    def scenario(scene: Scene) -> None:
        scene.ask(scene.first, 1000, SLOW_NS)
        assert scene.shared is None
        assert scene.first.places == []
        scene.ask(scene.first, 500)
        assert scene.shared is not None

    play(scenario)


def test_model_that_calls_others_shares_as_soon_as_its_time_is_known(play: Play) -> None:
    def scenario(scene: Scene) -> None:
        scene.ask(scene.first, 600, 10 * QUICK_NS)
        assert scene.shared is not None
        scene.ask(scene.first, 100, 15 * QUICK_NS)
        assert scene.shared is not None

    play(scenario)


def test_nothing_is_shared_that_is_not_allowed(play: Play) -> None:
    def scenario(scene: Scene) -> None:
        scene.cores = CoreSharing(PRODUCER, scene.wait)
        scene.ask(scene.first, 1000)
        assert scene.shared is None
        assert scene.first.places == []

    play(scenario)


def test_nobody_shares_a_core_while_all_are_awake(play: Play) -> None:
    def scenario(scene: Scene) -> None:
        scene.ask(scene.first, 300)
        core = scene.shared
        assert core is not None
        scene.wait.on_change(True)
        assert scene.shared is None
        scene.ask(scene.first, 3000)
        scene.ask(scene.second, 300)
        assert scene.shared is None
        assert scene.first.places == [core + 1, 0]
        assert not scene.second.places
        assert scene.wait.begun == scene.wait.ended > 3000

    play(scenario)


def test_core_is_shared_again_when_cores_may_sleep(play: Play) -> None:
    def scenario(scene: Scene) -> None:
        scene.ask(scene.first, 300)
        scene.wait.on_change(True)
        scene.wait.on_change(False)
        core = scene.shared
        assert core is not None
        assert scene.first.places[-1] == core + 1

    play(scenario)


def test_company_ends_it_while_all_cores_are_awake(play: Play) -> None:
    def scenario(scene: Scene) -> None:
        scene.ask(scene.first, 300)
        scene.wait.on_change(True)
        scene.begin(scene.first, 2)
        scene.wait.on_change(False)
        assert scene.shared is None
        assert scene.first.places[-1] == 0

    play(scenario)


def test_requests_that_are_slow_while_all_cores_are_awake_end_nothing(play: Play) -> None:
    """Nobody is pinned: it is not our doing."""

    def scenario(scene: Scene) -> None:
        scene.ask(scene.first, 300)
        scene.wait.on_change(True)
        scene.ask(scene.first, 100, SLOW_NS)
        scene.wait.on_change(False)
        assert scene.shared is not None

    play(scenario)


def test_what_is_usual_is_not_learned_while_all_cores_are_awake(play: Play) -> None:
    """Else requests would seem slow as soon as cores sleep again."""

    def scenario(scene: Scene) -> None:
        scene.ask(scene.first, 300)
        usual_ns = scene.first.pace.usual_ns
        scene.wait.on_change(True)
        scene.ask(scene.first, 1000, QUICK_NS // 10)
        assert scene.first.pace.usual_ns == usual_ns

    play(scenario)
