"""The states of one connection, with a transport that records what is asked of it and calls answered by hand."""

from __future__ import annotations

import asyncio
import functools
import socket
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from forebay.frontend.http.call import Call
from forebay.frontend.http.connection import PIPELINE_MAX, Connection
from forebay.frontend.http.head import HeadParser
from forebay.frontend.http.server import HttpFrontend
from forebay.frontend.http.settings import HttpView
from forebay.frontend.regions import RegionTable

INFER = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n"
REPLY = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1"
LAST_REPLY = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: close\r\n\r\n1"
STREAM = INFER.replace(b"infer", b"generate_stream")


class HandCall(Call):
    """Remembers its body; the test answers it."""

    __slots__ = ("body", "is_cancelled", "on_cancel")

    def __init__(self, connection: Connection, *, keep_alive: bool) -> None:
        super().__init__(connection, keep_alive=keep_alive)
        self.body = b""
        self.is_cancelled = False
        self.on_cancel: Callable[[], None] = lambda: None

    def start(self, body: memoryview) -> None:
        self.body = bytes(body)

    def cancel(self) -> None:
        self.is_cancelled = True
        self.on_cancel()


class Bench:
    """A frontend with one connection whose other end the test holds."""

    def __init__(self, **settings: Any) -> None:
        self._bell, self._completions = socket.socketpair()
        engine: Any = SimpleNamespace(
            arena=SimpleNamespace(byte_size=1 << 20),
            crowded_routes=set(),
            completions_fd=self._completions.fileno(),
        )
        control: Any = mock.Mock()
        catalog: Any = mock.Mock()
        self.frontend = HttpFrontend(engine, HttpView(**settings), control, catalog, HeadParser(), RegionTable())
        self.calls: list[HandCall] = []
        self.frontend.new_call = self._new_call  # type: ignore[assignment, method-assign]
        self.client, server = socket.socketpair()
        self.client.setblocking(False)
        server.setblocking(False)
        self._server = server
        self.transport = mock.create_autospec(asyncio.Transport, instance=True)
        self.transport.get_extra_info.return_value = server
        self.transport.get_write_buffer_size.return_value = 0
        self.transport.is_closing.return_value = False
        self.connection = self.frontend.connection()
        self.connection.connection_made(self.transport)

    def _new_call(self, connection: Connection, head: Any) -> HandCall:
        self.calls.append(HandCall(connection, keep_alive=head.keep_alive))
        return self.calls[-1]

    def receive(self, *parts: bytes) -> None:
        """Let bytes arrive, in one read."""
        data = b"".join(parts)
        buffer = memoryview(self.connection.get_buffer(-1))
        buffer[: len(data)] = data
        self.connection.buffer_updated(len(data))

    def answer(self, index: int, data: bytes) -> None:
        self.connection.answer(self.calls[index], [data])

    @property
    def sent(self) -> bytes:
        """What the client has got since it was last asked."""
        try:
            return self.client.recv(1 << 20)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        self.connection.connection_lost(None)
        for end in (self.client, self._server, self._bell, self._completions):
            end.close()


def run(scenario: Callable[[Bench], Coroutine[Any, Any, None]], **settings: Any) -> None:
    async def main() -> None:
        bench = Bench(**settings)
        try:
            await scenario(bench)
        finally:
            bench.close()

    asyncio.run(main())


def test_answers_wait_for_their_turn() -> None:
    async def scenario(bench: Bench) -> None:
        bench.receive(INFER, b"a", INFER, b"b", INFER, b"c")
        assert [call.body for call in bench.calls] == [b"a", b"b", b"c"]
        bench.answer(2, b"3")
        bench.answer(1, b"2")
        assert bench.sent == b""
        bench.answer(0, b"1")
        assert bench.sent == b"123"

    run(scenario)


@pytest.mark.parametrize("count", [1, 3])
def test_requests_that_end_while_they_are_cancelled_do_not_keep_the_connection(count: int) -> None:
    """Rows that have not been sent yet are answered at once, with an error that nobody reads."""

    async def scenario(bench: Bench) -> None:
        bench.receive(*(INFER + b"a" for _ in range(count)))
        for index, call in enumerate(bench.calls):
            call.on_cancel = functools.partial(bench.answer, index, b"cancelled")
        bench.connection.connection_lost(None)
        assert all(call.is_cancelled for call in bench.calls)
        assert bench.frontend.connection_count == 0

    run(scenario)


def test_requests_behind_the_last_one_may_end_while_they_are_cancelled() -> None:
    async def scenario(bench: Bench) -> None:
        bench.receive(INFER.replace(b"Host", b"Connection: close\r\nHost"), b"a", INFER, b"b", INFER, b"c")
        for index, call in enumerate(bench.calls):
            call.on_cancel = functools.partial(bench.answer, index, b"cancelled")
        bench.answer(0, b"1")
        assert bench.sent == b"1"
        assert [call.is_cancelled for call in bench.calls] == [False, True, True]

    run(scenario)


def test_a_request_that_must_be_alone_waits_and_holds_up_what_follows() -> None:
    async def scenario(bench: Bench) -> None:
        bench.receive(INFER, b"a", STREAM, b"s", INFER, b"b")
        assert len(bench.calls) == 1
        bench.transport.pause_reading.assert_called_once()
        bench.answer(0, b"1")
        bench.transport.resume_reading.assert_called_once()
        assert [call.body for call in bench.calls] == [b"a", b"s", b"b"]
        bench.connection.stream(bench.calls[1], [b"x"])
        bench.answer(2, b"3")
        bench.connection.stream(bench.calls[1], [b"y"])
        assert bench.sent == b"1xy"
        bench.answer(1, b"z")
        assert bench.sent == b"z3"

    run(scenario)


def test_no_more_is_read_than_may_be_in_flight() -> None:
    async def scenario(bench: Bench) -> None:
        bench.receive(*[INFER + b"a"] * (PIPELINE_MAX + 5))
        assert len(bench.calls) == PIPELINE_MAX
        bench.transport.pause_reading.assert_called_once()
        bench.answer(0, b"1")
        assert len(bench.calls) == PIPELINE_MAX + 1

    run(scenario)


def test_nothing_is_taken_from_a_client_that_does_not_take_its_answers() -> None:
    async def scenario(bench: Bench) -> None:
        bench.connection.pause_writing()
        bench.transport.pause_reading.assert_called_once()
        bench.receive(INFER, b"a")
        assert bench.calls == []
        bench.connection.resume_writing()
        assert [call.body for call in bench.calls] == [b"a"]

    run(scenario)


def test_half_closed_client_is_answered_then_closed() -> None:
    async def scenario(bench: Bench) -> None:
        bench.receive(INFER, b"a", INFER, b"b")
        assert bench.connection.eof_received() is True
        bench.answer(0, b"1")
        bench.transport.close.assert_not_called()
        bench.answer(1, b"2")
        assert bench.sent == b"12"
        bench.transport.close.assert_called_once()

    run(scenario)


def test_half_closed_client_is_not_waited_for_long() -> None:
    """H-016."""

    async def scenario(bench: Bench) -> None:
        bench.receive(INFER, b"a")
        assert bench.connection.eof_received() is True
        assert bench.connection.deadline_s > 0
        bench.connection.time_out()
        assert bench.calls[0].is_cancelled
        bench.transport.close.assert_called_once()
        bench.answer(0, b"1")
        assert bench.sent == b""

    run(scenario)


def test_end_without_a_question_closes() -> None:
    async def scenario(bench: Bench) -> None:
        assert bench.connection.eof_received() is False
        bench.receive(INFER[:20])
        assert bench.connection.eof_received() is False

    run(scenario)


def test_client_that_leaves_cancels_everything() -> None:
    async def scenario(bench: Bench) -> None:
        bench.receive(INFER, b"a", INFER, b"b")
        bench.connection.connection_lost(ConnectionResetError())
        assert [call.is_cancelled for call in bench.calls] == [True, True]
        bench.answer(0, b"1")
        assert bench.frontend.connection_count == 0

    run(scenario)


def test_refusal_comes_after_what_was_asked_before_and_nothing_after_it_is_read() -> None:
    async def scenario(bench: Bench) -> None:
        bench.receive(INFER, b"a", b"\x16garbage")
        bench.receive(INFER, b"b")
        assert len(bench.calls) == 1
        bench.answer(0, b"1")
        sent = bench.sent
        assert sent.startswith(b"1HTTP/1.1 400 ")
        assert b"Connection: close" in sent
        # Our last word can be read although there are unread bytes; then the connection goes.
        bench.transport.write_eof.assert_called_once()
        bench.transport.close.assert_not_called()
        bench.receive(b"more")
        assert bench.connection.eof_received() is False
        bench.connection.time_out()
        bench.transport.abort.assert_called_once()

    run(scenario)


@pytest.mark.parametrize("beginning", [b"POST /v2/mod", INFER, INFER.replace(b"Length: 1", b"Length: 100") + b"a"])
def test_clock_runs_while_the_client_has_something_to_send(beginning: bytes) -> None:
    async def scenario(bench: Bench) -> None:
        assert bench.connection.deadline_s == 0
        bench.receive(beginning)
        assert bench.connection.deadline_s > 0
        bench.connection.time_out()
        assert bench.sent.startswith(b"HTTP/1.1 408 ")

    run(scenario)


def test_clock_stands_while_the_client_waits_for_us() -> None:
    async def scenario(bench: Bench) -> None:
        bench.receive(INFER)
        bench.receive(b"a")
        assert bench.connection.deadline_s == 0
        bench.receive(STREAM, b"s", INFER[:9])
        assert bench.connection.deadline_s == 0
        bench.answer(0, b"1")
        bench.answer(1, b"2")
        assert bench.connection.deadline_s > 0

    run(scenario)


def test_close_when_asked_to() -> None:
    async def scenario(bench: Bench) -> None:
        bench.receive(INFER.replace(b"Host: a", b"Connection: close"), b"a", INFER, b"b")
        bench.answer(0, b"1")
        bench.transport.close.assert_called_once()
        assert bench.calls[1].is_cancelled
        bench.answer(1, b"2")
        assert bench.sent == b"1"

    run(scenario)


def test_drain_answers_first() -> None:
    """H-009."""

    async def scenario(bench: Bench) -> None:
        bench.receive(INFER, b"a")
        bench.frontend.drain()
        bench.receive(INFER, b"b")
        assert len(bench.calls) == 1
        bench.answer(0, REPLY)
        assert bench.sent == LAST_REPLY
        bench.transport.write_eof.assert_called_once()

    run(scenario)


def test_drain_announces_the_end_with_the_last_of_several_replies() -> None:
    async def scenario(bench: Bench) -> None:
        bench.receive(INFER, b"a", INFER, b"b", INFER, b"c")
        bench.frontend.drain()
        bench.answer(0, REPLY)
        assert bench.sent == REPLY
        bench.answer(2, REPLY)
        bench.answer(1, REPLY)
        assert bench.sent == REPLY + LAST_REPLY
        bench.transport.write_eof.assert_called_once()

    run(scenario)


def test_drain_does_not_write_a_header_into_a_stream() -> None:
    async def scenario(bench: Bench) -> None:
        bench.receive(STREAM, b"a")
        bench.connection.stream(bench.calls[0], [b"HTTP/1.1 200 OK\r\n\r\nfirst"])
        bench.frontend.drain()
        bench.answer(0, b"last")
        assert bench.sent == b"HTTP/1.1 200 OK\r\n\r\nfirstlast"
        bench.transport.write_eof.assert_called_once()

    run(scenario)


def test_drain_takes_a_request_that_was_on_its_way() -> None:
    async def scenario(bench: Bench) -> None:
        bench.frontend.drain()
        bench.transport.close.assert_not_called()
        bench.receive(INFER, b"a")
        bench.receive(INFER, b"b")
        bench.frontend.close_idle()
        assert len(bench.calls) == 1
        bench.answer(0, REPLY)
        assert bench.sent == LAST_REPLY
        bench.transport.write_eof.assert_called_once()

    run(scenario)


def test_drain_closes_what_stays_idle() -> None:
    async def scenario(bench: Bench) -> None:
        bench.frontend.drain()
        bench.frontend.close_idle()
        bench.transport.close.assert_called_once()

    run(scenario)


def test_what_the_socket_does_not_take_is_kept() -> None:
    async def scenario(bench: Bench) -> None:
        bench.receive(INFER, b"a")
        large = bytes(range(256)) * 40_000
        copied: list[int] = []
        with mock.patch.object(HandCall, "count_copy", lambda _self, count: copied.append(count)):
            bench.connection.answer(bench.calls[0], [b"head", memoryview(large)])
        rest = bytes(bench.transport.write.call_args.args[0])
        received = b""
        while part := bench.sent:
            received += part
        assert received + rest == b"head" + large
        assert copied == [len(rest)]

    run(scenario)


def test_stream_that_is_not_read_is_cut_off() -> None:
    async def scenario(bench: Bench) -> None:
        bench.receive(STREAM, b"s")
        bench.transport.get_write_buffer_size.return_value = 17 << 20
        bench.connection.stream(bench.calls[0], [b"x"])
        bench.transport.abort.assert_called_once()

    run(scenario)


def test_private_memory_is_counted_and_given_back() -> None:
    async def scenario(bench: Bench) -> None:
        long = INFER.replace(b"Length: 1", b"Length: 900")
        bench.receive(long, bytes(800))
        assert bench.frontend._held_bytes == 800
        bench.receive(bytes(100))
        assert bench.frontend._held_bytes == 0
        bench.receive(long, bytes(10))
        assert bench.frontend._held_bytes == 10
        bench.connection.connection_lost(None)
        assert bench.frontend._held_bytes == 0

    run(scenario)


def test_no_more_private_memory_than_allowed() -> None:
    async def scenario(bench: Bench) -> None:
        bench.receive(INFER.replace(b"Length: 1", b"Length: 1000"), bytes(900))
        bench.frontend.hold(3_101)
        bench.receive(b"a")
        assert bench.sent.startswith(b"HTTP/1.1 503 ")
        assert bench.frontend._held_bytes == 3_101

    run(scenario, max_input_size=1_000)


def test_full_frontend_says_so_once_and_again_when_there_is_room() -> None:
    """``--max-connections``."""

    async def scenario(bench: Bench) -> None:
        told: list[bool] = []
        bench.frontend.on_full = told.append
        more = [Connection(bench.frontend) for _ in range(3)]
        for connection in more:
            bench.frontend.opened(connection)
        assert told == [True]
        for connection in more:
            bench.frontend.closed(connection)
        assert told == [True, False]

    run(scenario, max_connections=2)


def test_what_has_arrived_can_be_read_before_the_event_loop_does() -> None:
    async def scenario(bench: Bench) -> None:
        bench.client.send(INFER + b"a" + INFER)
        bench.connection.read_now()
        bench.connection.read_now()
        assert [call.body for call in bench.calls] == [b"a"]
        bench.receive(b"b")
        assert [call.body for call in bench.calls] == [b"a", b"b"]

    run(scenario)


def test_end_of_what_the_client_sends_is_left_to_the_event_loop() -> None:
    async def scenario(bench: Bench) -> None:
        bench.client.send(INFER + b"a")
        bench.client.shutdown(socket.SHUT_WR)
        for _ in range(3):
            bench.connection.read_now()
        assert len(bench.calls) == 1
        bench.answer(0, b"1")
        assert bench.sent == b"1"

    run(scenario)


# --- to another frontend


def leaving(bench: Bench, *, is_taken: bool = True) -> list[int]:
    """Return where the descriptors of connections that are handed over will be found."""
    handed_over: list[int] = []

    def hand_over(fd: int) -> bool:
        handed_over.append(fd)
        return is_taken

    bench.frontend.hand_over = hand_over
    return handed_over


def test_connection_on_which_nothing_is_asked_leaves_at_once() -> None:
    async def scenario(bench: Bench) -> None:
        handed_over = leaving(bench)
        bench.receive(INFER, b"a")
        bench.answer(0, REPLY)
        fd = bench.transport.get_extra_info("socket").fileno()
        bench.connection.leave()
        assert handed_over == [fd]
        bench.transport.abort.assert_called_once()
        # Not shut down, and no last word: the client's connection goes on.
        bench.transport.write_eof.assert_not_called()
        assert bench.sent == REPLY

    run(scenario)


def test_what_is_asked_is_answered_before_the_connection_leaves() -> None:
    async def scenario(bench: Bench) -> None:
        handed_over = leaving(bench)
        bench.receive(INFER, b"a", INFER, b"b")
        assert bench.connection.leave()
        assert not bench.connection.leave()
        # A client that leaves meanwhile must be noticed.
        bench.transport.pause_reading.assert_not_called()
        bench.answer(1, b"2")
        assert handed_over == []
        bench.answer(0, b"1")
        assert len(handed_over) == 1
        assert bench.sent == b"12"
        bench.transport.abort.assert_called_once()

    run(scenario)


@pytest.mark.parametrize("arrived", [30, len(INFER)])
def test_connection_with_part_of_a_request_stays(arrived: int) -> None:
    """What has been read cannot be given to anybody else."""

    async def scenario(bench: Bench) -> None:
        handed_over = leaving(bench)
        bench.receive(INFER, b"a")
        assert bench.connection.leave()
        bench.receive(INFER[:arrived])
        bench.answer(0, b"1")
        assert handed_over == []
        assert not bench.connection.leave()
        bench.receive(INFER[arrived:], b"b")
        bench.answer(1, b"2")
        assert bench.sent == b"12"
        bench.transport.abort.assert_not_called()
        bench.transport.pause_reading.assert_not_called()

    run(scenario)


def test_connection_that_cannot_be_handed_over_is_served_on() -> None:
    async def scenario(bench: Bench) -> None:
        handed_over = leaving(bench, is_taken=False)
        bench.connection.leave()
        assert len(handed_over) == 1
        bench.transport.abort.assert_not_called()
        bench.receive(INFER, b"a")
        bench.answer(0, b"1")
        assert bench.sent == b"1"

    run(scenario)


def test_reply_that_is_not_written_yet_keeps_the_connection() -> None:
    async def scenario(bench: Bench) -> None:
        handed_over = leaving(bench)
        bench.transport.get_write_buffer_size.return_value = 1
        assert not bench.connection.leave()
        bench.receive(INFER, b"a")
        bench.transport.get_write_buffer_size.return_value = 0
        assert bench.connection.leave()
        bench.transport.get_write_buffer_size.return_value = 1
        bench.answer(0, b"1")
        assert handed_over == []
        bench.transport.get_write_buffer_size.return_value = 0
        assert bench.connection.leave()
        assert len(handed_over) == 1

    run(scenario)


@pytest.mark.parametrize("end", ["eof_received", "abort", "drain"])
def test_connection_that_ends_does_not_leave(end: str) -> None:
    async def scenario(bench: Bench) -> None:
        handed_over = leaving(bench)
        bench.receive(INFER, b"a")
        getattr(bench.connection, end)()
        assert not bench.connection.leave()
        bench.answer(0, b"1")
        assert handed_over == []

    run(scenario)
