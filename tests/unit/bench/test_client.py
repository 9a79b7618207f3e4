"""The load generator counts what a server does, right and wrong."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bench.load.client import Arrivals, LoadFailed, run_load

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="load.c needs a C compiler")

REQUEST = b"POST /echo HTTP/1.1\r\nHost: here\r\nContent-Length: 3\r\n\r\nabc"

#: From the number of a request, counted from one, to the status and body of its answer.
Answer = Callable[[int], tuple[int, bytes]]


@contextmanager
def running_server(answer: Answer) -> Generator[int, None, None]:
    """Run an HTTP server of one thread per connection; yield its port."""
    lock = threading.Lock()
    seen = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            nonlocal seen
            assert self.rfile.read(int(self.headers["Content-Length"])) == b"abc"
            with lock:
                seen += 1
                number = seen
            status, body = answer(number)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False
        request_queue_size = 64

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def test_closed_loop_counts_right_answers_and_orders_percentiles() -> None:
    with running_server(lambda number: (200, b"fine")) as port:
        calls: list[str] = []
        result = run_load(
            port,
            REQUEST,
            connections=4,
            idle_connections=10,
            duration_s=0.3,
            warmup_s=0.05,
            on_start=lambda: calls.append("start"),
            on_end=lambda: calls.append("end"),
        )
    assert calls == ["start", "end"]
    assert result.completed_count > 0
    assert result.error_count == 0
    assert 0 < result.min_us <= result.p50_us <= result.p99_us <= result.p99_9_us <= result.max_us
    assert result.client_cpu_us > 0


def test_answers_that_are_not_200_are_told_with_the_first_text() -> None:
    with running_server(lambda number: (503, b'{"error":"full"}')) as port:
        result = run_load(port, REQUEST, connections=1, duration_s=0.2, warmup_s=0)
    assert result.completed_count == 0
    assert result.non_200_count > 0
    # Quotes are replaced, so that the excerpt fits into JSON as it is.
    assert result.first_error == "503: {'error':'full'}"


def test_answers_of_another_length_than_the_first_are_counted() -> None:
    with running_server(lambda number: (200, b"fine" if number < 5 else b"finer")) as port:
        result = run_load(port, REQUEST, connections=1, duration_s=0.2, warmup_s=0)
    assert result.completed_count == 4
    assert result.length_mismatch_count > 0


def test_open_loop_counts_a_stall_for_every_request_that_it_kept_from_being_sent() -> None:
    def answer(number: int) -> tuple[int, bytes]:
        if number == 20:
            time.sleep(0.3)
        return 200, b"fine"

    with running_server(answer) as port:
        result = run_load(port, REQUEST, connections=1, duration_s=0.6, warmup_s=0, rate_per_s=100, arrivals="constant")
    # 30 of 60 requests fell due during the stall; a closed loop would have seen one slow request among hundreds.
    assert result.p90_us > 100_000


def test_requests_that_never_found_a_connection_count_with_the_time_they_waited() -> None:
    def answer(number: int) -> tuple[int, bytes]:
        time.sleep(0.05)
        return 200, b"fine"

    with running_server(answer) as port:
        result = run_load(port, REQUEST, connections=1, duration_s=0.5, warmup_s=0, rate_per_s=200)
    assert result.unsent_count > 0
    assert result.p50_us > 50_000


@pytest.mark.parametrize("arrivals", ["poisson", "bursty"])
def test_an_open_loop_asks_for_the_rate_that_was_given_and_counts_what_was_within_limits(arrivals: Arrivals) -> None:
    with running_server(lambda number: (200, b"fine")) as port:
        result = run_load(
            port, REQUEST, connections=8, duration_s=1.0, warmup_s=0, rate_per_s=300, arrivals=arrivals,
            limits_us=(0.001, 30_000_000),
        )  # fmt: skip
    assert 100 < result.due_count < 700
    assert result.within_counts == (0, result.due_count)


def test_refused_requests_are_within_no_limit() -> None:
    with running_server(lambda number: (503, b"full")) as port:
        result = run_load(
            port, REQUEST, connections=2, duration_s=0.3, warmup_s=0, rate_per_s=100, limits_us=(30_000_000,)
        )
    assert result.due_count > 0
    assert result.within_counts == (0,)


def test_no_server_is_an_error_and_not_a_result() -> None:
    with running_server(lambda number: (200, b"fine")) as port:
        pass
    with pytest.raises(LoadFailed, match="connect"):
        run_load(port, REQUEST, connections=1, duration_s=0.1, warmup_s=0)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_real_time_client_measures_and_leaves_us_as_we_were() -> None:
    with running_server(lambda number: (200, b"fine")) as port:
        seen: list[int] = []

        def children() -> set[int]:
            return set(map(int, Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()))

        before = children()

        def note() -> None:
            seen.extend(os.sched_getscheduler(child) for child in children() - before)

        result = run_load(port, REQUEST, connections=1, duration_s=0.1, warmup_s=0, realtime=True, on_start=note)
    assert result.completed_count > 0
    assert seen == [os.SCHED_FIFO]
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_a_client_that_may_not_be_real_time_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    with pytest.raises(LoadFailed, match="CAP_SYS_NICE"):
        run_load(1, REQUEST, connections=1, duration_s=0.1, warmup_s=0, realtime=True)
