"""When a frontend stays awake for a lone client's next request; the clocks are played."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from forebay.frontend.data_plane import wakeful_wait
from forebay.frontend.data_plane.wakeful_wait import WakefulWait
from forebay.ipc.errors import Unavailable

ASLEEP_NS = 100_000
#: From one request to the next, where cores are kept awake.
AWAKE_CORES_GAP_NS = 20_000
#: A request comes so long after the answer before it, and its answer so long after it.
QUICK_NS, LATE_NS = 50_000, 1_000_000
#: Too late for who looks, but not if cores had to wake up.
SLEEPY_NS = 300_000


class FakeLatency:
    """A wish to the kernel."""

    def __init__(self, *, is_allowed: bool = True) -> None:
        self.is_held = False
        self.is_allowed = is_allowed

    def hold(self) -> None:
        if not self.is_allowed:
            raise Unavailable("may not")
        self.is_held = True

    def release(self) -> None:
        self.is_held = False


class Scene:
    """A loop that runs what it is given when told, a monotonic clock, and the CPU time of the process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, awake_ns: int) -> None:
        self.now_ns = 10**12
        self.cpu_ns = 0
        self.awake_ns = awake_ns
        self.is_awake = False
        self.looks = 0
        self.awake_gap_ns = AWAKE_CORES_GAP_NS
        self._soon: list[Callable[[], None]] = []
        self._later: list[tuple[float, Callable[[Any], None], Any]] = []
        self.latency: Any = None
        self.changes: list[bool] = []
        monkeypatch.setattr(wakeful_wait.time, "monotonic_ns", lambda: self.now_ns)
        monkeypatch.setattr(wakeful_wait.time, "process_time_ns", lambda: self.cpu_ns)
        monkeypatch.setattr(wakeful_wait.os, "sched_yield", self._note_look)
        loop: Any = self
        self.wait = WakefulWait(loop)

    def call_soon(self, callback: Callable[[], None]) -> None:
        self._soon.append(callback)

    def call_later(self, delay_s: float, callback: Callable[[Any], None], argument: Any) -> None:
        self._later.append((self.now_ns / 1e9 + delay_s, callback, argument))

    def keep_cores_awake(self, core_count: int, *, is_allowed: bool = True) -> None:
        self.latency = FakeLatency(is_allowed=is_allowed)
        self.wait.on_change = self.changes.append
        self.wait.allow_awake_cores(self.latency, core_count)

    def _note_look(self) -> None:
        self.looks += 1

    def turn(self) -> None:
        """Run what was to be run soon."""
        soon, self._soon = self._soon, []
        for callback in soon:
            callback()
        later, self._later = self._later, []
        for due_s, callback_later, argument in later:
            if due_s <= self.now_ns / 1e9:
                callback_later(argument)
            else:
                self._later.append((due_s, callback_later, argument))

    def ask(self, count: int, gap_ns: int = QUICK_NS) -> None:
        """Answer, and have the next request come after so long."""
        for _ in range(count):
            self.wait.begin(self.now_ns)
            looks = self.looks
            self.turn()
            self.is_awake = self.looks > looks
            are_cores_awake = self.latency is not None and self.latency.is_held and not self.is_awake
            self.cpu_ns += self.awake_ns if self.is_awake else ASLEEP_NS
            self.now_ns += min(gap_ns, self.awake_gap_ns) if are_cores_awake else gap_ns
            self.turn()
            self.wait.end()
            self.turn()


def test_stays_awake_if_it_costs_hardly_more_than_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, awake_ns=ASLEEP_NS * 6 // 5)
    scene.ask(256)
    assert not scene.is_awake
    scene.ask(256)
    assert scene.is_awake
    scene.ask(10_000)
    assert scene.is_awake


def test_sleeps_if_that_is_cheaper_and_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, awake_ns=ASLEEP_NS * 4 // 3)
    scene.ask(300)
    assert scene.is_awake
    scene.ask(300)
    assert not scene.is_awake
    scene.awake_ns = ASLEEP_NS
    scene.ask(2000)
    assert not scene.is_awake
    scene.ask(600)
    assert scene.is_awake


def test_does_not_wait_for_clients_that_take_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, awake_ns=ASLEEP_NS)
    scene.ask(600)
    assert scene.is_awake
    scene.ask(3, LATE_NS)
    assert scene.is_awake
    scene.ask(5, LATE_NS)
    assert not scene.is_awake
    scene.ask(40)
    assert scene.is_awake


def test_trial_with_a_client_that_took_its_time_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, awake_ns=ASLEEP_NS * 10)
    scene.ask(512, LATE_NS)
    scene.ask(2000)
    assert not scene.is_awake


def test_requests_that_nobody_expected_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, awake_ns=ASLEEP_NS)
    scene.ask(600)
    for _ in range(1000):
        scene.now_ns += LATE_NS
        scene.wait.end()
    scene.ask(1)
    assert scene.is_awake


def test_nobody_looks_any_more_once_the_request_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, awake_ns=ASLEEP_NS)
    scene.ask(600)
    looks = scene.looks
    scene.turn()
    assert scene.looks == looks


def test_client_that_leaves_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, awake_ns=ASLEEP_NS)
    scene.ask(600)
    scene.wait.begin(scene.now_ns)
    scene.turn()
    looks = scene.looks
    scene.now_ns += LATE_NS
    for _ in range(3):
        scene.turn()
    assert scene.looks == looks


def test_company_ends_the_wait_and_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, awake_ns=ASLEEP_NS)
    scene.ask(300)
    assert scene.is_awake
    scene.wait.begin(scene.now_ns)
    scene.wait.break_off()
    looks = scene.looks
    scene.turn()
    assert scene.looks == looks
    scene.cpu_ns += 10**9
    scene.ask(200)
    assert not scene.is_awake
    scene.ask(100)
    assert scene.is_awake


def test_what_a_trial_has_found_outlives_company(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, awake_ns=ASLEEP_NS)
    scene.keep_cores_awake(2)
    scene.ask(3 * 256 + 10)
    for _ in range(3):
        assert scene.latency.is_held
        scene.wait.break_off()
        assert not scene.latency.is_held
        scene.ask(1)


def test_trials_become_rare_while_they_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, awake_ns=ASLEEP_NS)
    scene.keep_cores_awake(2)
    for requests in (16384, 32768, 65536):
        scene.ask(3 * 256 + requests - 1)
        assert scene.latency.is_held
        scene.ask(1)
        assert not scene.latency.is_held


def test_after_company_the_next_trial_is_not_far(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, awake_ns=ASLEEP_NS)
    scene.keep_cores_awake(2)
    scene.ask(3 * 256 + 16384 + 3 * 256 + 10)
    assert scene.latency.is_held
    scene.wait.break_off()
    scene.ask(16383)
    assert scene.latency.is_held
    scene.ask(1)
    assert not scene.latency.is_held


def test_slow_wake_ups_do_not_speak_against_awake_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, awake_ns=ASLEEP_NS)
    scene.keep_cores_awake(2)
    scene.ask(3 * 256 + 1, SLEEPY_NS)
    assert scene.latency.is_held


def test_client_that_is_slow_even_so_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, awake_ns=ASLEEP_NS)
    scene.keep_cores_awake(2)
    scene.ask(3 * 256 + 1)
    assert scene.latency.is_held
    scene.awake_gap_ns = SLEEPY_NS
    scene.ask(100, SLEEPY_NS)
    scene.now_ns += 10**8
    scene.turn()
    scene.turn()
    assert not scene.latency.is_held


def test_client_that_cannot_be_looked_for_may_have_awake_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, awake_ns=ASLEEP_NS)
    scene.keep_cores_awake(2)
    scene.ask(256)
    scene.ask(100, LATE_NS)
    scene.ask(156)
    assert not scene.latency.is_held
    scene.ask(256)
    assert scene.latency.is_held
    scene.ask(10)
    assert scene.latency.is_held


def test_who_shares_a_core_is_told_whether_cores_are_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, awake_ns=ASLEEP_NS)
    scene.keep_cores_awake(2)
    scene.ask(3 * 256 - 1)
    assert scene.changes == [True]
    scene.wait.break_off()
    assert scene.changes == [True, False]


@pytest.mark.parametrize(("core_count", "is_chosen"), [(2, True), (4, True), (6, False)])
def test_cores_are_kept_awake_if_that_takes_no_more_core_time(
    monkeypatch: pytest.MonkeyPatch, core_count: int, *, is_chosen: bool
) -> None:
    """Requests come 2.5 times as fast: so many cores may be awake for each as cost the same as two that sleep."""
    scene = Scene(monkeypatch, awake_ns=ASLEEP_NS)
    scene.keep_cores_awake(core_count)
    scene.ask(512)
    assert not scene.latency.is_held
    scene.ask(200)
    assert scene.latency.is_held
    scene.ask(2000)
    assert scene.latency.is_held is is_chosen
    assert scene.is_awake is not is_chosen


def test_cores_sleep_while_sleep_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, awake_ns=ASLEEP_NS)
    scene.keep_cores_awake(4)
    scene.ask(3 * 256 + 16000)
    assert scene.latency.is_held
    scene.ask(500)
    assert not scene.latency.is_held
    scene.ask(3 * 256)
    assert scene.latency.is_held


def test_cores_may_sleep_soon_after_the_last_request(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, awake_ns=ASLEEP_NS)
    scene.keep_cores_awake(2)
    scene.ask(2000)
    assert scene.latency.is_held
    for _ in range(3):
        scene.now_ns += 10_100_000
        scene.turn()
    assert not scene.latency.is_held


def test_cores_may_sleep_soon_after_company_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, awake_ns=ASLEEP_NS)
    scene.keep_cores_awake(2)
    scene.ask(2000)
    for _ in range(300):
        scene.wait.begin(scene.now_ns)
        scene.wait.break_off()
        scene.now_ns += 100_000
        scene.turn()
    assert not scene.latency.is_held


def test_who_may_not_ask_the_kernel_after_all_looks_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, awake_ns=ASLEEP_NS)
    scene.keep_cores_awake(2, is_allowed=False)
    scene.ask(2000)
    assert scene.is_awake
