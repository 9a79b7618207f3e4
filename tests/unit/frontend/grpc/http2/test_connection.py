"""The HTTP/2 connection against an independent client (h2), frame by frame, and against clients that misbehave."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import h2.config
import h2.connection
import h2.events
import pytest

from forebay.frontend.grpc.http2.connection import Connection
from forebay.frontend.grpc.http2.frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Http2Code,
    frame,
)
from forebay.frontend.grpc.http2.hpack_decoder import HpackDecoder
from forebay.frontend.grpc.http2.hpack_encoder import ReplyEncoder, encode_plain
from forebay.frontend.grpc.http2.sending import QUEUED_BYTES_LIMIT, QUEUED_BYTES_MAX, STREAMS_MAX
from forebay.frontend.grpc.http2.stream import STREAM_WINDOW, Stream

REQUEST = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/m"), (b":authority", b"a")]
BLOCK = encode_plain(REQUEST)
HEAD = [(b":status", b"200"), (b"content-type", b"application/grpc"), (b"accept", b"x")]
TAIL = [(b"grpc-status", b"0")]

Fields = list[tuple[bytes, bytes]]


class EchoStream(Stream):
    """Answers with what it was sent."""

    __slots__ = ("body", "head", "is_held", "was_reset")

    def __init__(self, connection: Connection[Fields], number: int, head: Fields) -> None:
        super().__init__(connection, number)
        self.head = head
        self.body = bytearray()
        self.was_reset = False
        self.is_held = False

    @property
    def holds_back(self) -> bool:
        return self.is_held

    def on_data(self, chunk: memoryview, *, is_end: bool) -> None:
        self.body += chunk
        if is_end:
            self.answer()

    def answer(self) -> None:
        self.connection.reply(self, len(self.body), (bytes(self.body),))

    def on_reset(self) -> None:
        self.was_reset = True


class Server:
    """A connection whose application echoes."""

    def __init__(self, make: Callable[[Connection[Fields], int, Fields], EchoStream] = EchoStream) -> None:
        self.out = bytearray()
        self.now_s = 0.0
        self.pings = self.idle = 0
        self.is_closed = False
        self.opened: list[EchoStream] = []
        self._make = make
        self.http2: Connection[Fields] = Connection(
            self,
            self.out.extend,
            HpackDecoder(lambda fields: fields),
            ReplyEncoder(HEAD[1], HEAD[2], TAIL[0]),
            lambda: self.now_s,
        )

    def open_stream(self, number: int, head: Fields, *, is_end: bool) -> Stream:
        stream = self._make(self.http2, number, head)
        self.opened.append(stream)
        self.http2.add(stream)
        if is_end:
            stream.is_remote_closed = True
            stream.on_data(memoryview(b""), is_end=True)
        return stream

    def are_trailers(self, head: Fields) -> bool:
        return not any(name.startswith(b":") for name, _value in head)

    def on_ping(self) -> None:
        self.pings += 1

    def on_pong(self) -> None:
        pass

    def on_idle(self) -> None:
        self.idle += 1

    def on_closed(self) -> None:
        self.is_closed = True

    def receive(self, data: bytes) -> None:
        self.http2.receive(memoryview(data))

    def take(self) -> bytes:
        taken = bytes(self.out)
        self.out.clear()
        return taken

    def frames(self) -> list[tuple[int, int, int, bytes]]:
        """Take what was written: type, flags, stream and payload of each frame."""
        data, found = self.take(), []
        while data:
            size = int.from_bytes(data[:3], "big")
            kind, flags, number = struct.unpack_from(">BBI", data, 3)
            found.append((kind, flags, number, data[9 : 9 + size]))
            data = data[9 + size :]
        return found

    def greet(self, settings: bytes = b"") -> None:
        self.receive(PREFACE + frame(SETTINGS, 0, 0, settings))
        self.take()

    def goaway_code(self) -> Http2Code | None:
        """Return the error of the GOAWAY that was written, None without."""
        for kind, _flags, _number, payload in self.frames():
            if kind == GOAWAY:
                assert self.http2.is_closed
                assert self.is_closed
                return Http2Code(int.from_bytes(payload[4:8], "big"))
        return None


def request(number: int, body: bytes = b"", *, end: bool = True) -> bytes:
    head = frame(HEADERS, END_HEADERS, number, BLOCK)
    return head + frame(DATA, END_STREAM if end else 0, number, body)


class Client:
    """An h2 client, in memory, on a server."""

    def __init__(self, server: Server, chunk_bytes: int = 0) -> None:
        self.server = server
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding=False))
        self.chunk_bytes = chunk_bytes
        self.bodies: dict[int, bytearray] = {}
        self.ended: set[int] = set()
        self.trailers: dict[int, list[tuple[bytes, bytes]]] = {}
        self.events: list[h2.events.Event] = []
        self.h2.initiate_connection()
        self.exchange()

    def exchange(self) -> None:
        """Carry bytes both ways until nobody has any."""
        while True:
            sent = self.h2.data_to_send()
            step = self.chunk_bytes or max(len(sent), 1)
            for start in range(0, len(sent), step):
                self.server.receive(sent[start : start + step])
            received = self.server.take()
            if not sent and not received:
                return
            for event in self.h2.receive_data(received):
                self.note(event)

    def note(self, event: h2.events.Event) -> None:
        self.events.append(event)
        if isinstance(event, h2.events.DataReceived):
            self.bodies.setdefault(event.stream_id, bytearray()).extend(event.data)
            self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.TrailersReceived):
            self.trailers[event.stream_id] = list(event.headers)
        elif isinstance(event, h2.events.StreamEnded):
            self.ended.add(event.stream_id)

    def call(self, body: bytes, frame_bytes: int = 0) -> int:
        number = self.h2.get_next_available_stream_id()
        self.h2.send_headers(number, REQUEST)
        position = 0
        while position < len(body):
            self.exchange()
            room = min(self.h2.local_flow_control_window(number), self.h2.max_outbound_frame_size)
            size = min(room, frame_bytes or room)
            assert size > 0, "the server gives no more window"
            self.h2.send_data(number, body[position : position + size])
            position += size
        self.h2.end_stream(number)
        return number


@pytest.mark.parametrize("chunk_bytes", [0, 1, 7, 4096])
def test_calls_are_answered_however_the_bytes_arrive(chunk_bytes: int) -> None:
    server = Server()
    client = Client(server, chunk_bytes)
    size = 300 if chunk_bytes == 1 else 60_000
    bodies = {client.call(bytes([number]) * (number * size // 4)): number for number in range(4)}
    client.exchange()
    for number, index in bodies.items():
        assert bytes(client.bodies.get(number, b"")) == bytes([index]) * (index * size // 4)
        assert client.trailers[number] == TAIL
    assert client.ended == set(bodies)
    assert not server.http2.streams
    assert server.http2.queued_bytes == 0


def test_a_body_beyond_all_windows_gets_through_both_ways() -> None:
    server = Server()
    client = Client(server)
    body = random.Random(2).randbytes(3 * STREAM_WINDOW)
    number = client.call(body)
    client.exchange()
    assert bytes(client.bodies[number]) == body
    assert server.http2.queued_bytes == 0


def test_padding_is_not_data_and_counts_for_the_windows() -> None:
    server = Server()
    client = Client(server)
    number = client.h2.get_next_available_stream_id()
    client.h2.send_headers(number, REQUEST)
    for _ in range(40):
        client.h2.send_data(number, b"ab" * 4000, pad_length=255)
        client.exchange()
    client.h2.end_stream(number)
    client.exchange()
    assert bytes(client.bodies[number]) == b"ab" * 160_000


def test_several_streams_that_wait_for_one_window_take_turns() -> None:
    server = Server()
    server.greet(struct.pack(">HI", 4, 2**20))
    for number in (1, 3):
        server.receive(request(number, b"x" * 150_000))
    assert [number for kind, _f, number, _p in server.frames() if kind == DATA] == [1, 1, 1, 1]
    server.receive(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 65_536)))
    order = [number for kind, _f, number, _p in server.frames() if kind == DATA]
    assert order[:4] in ([1, 3, 1, 3], [3, 1, 3, 1])


def test_every_frame_of_a_reply_counts_for_the_ping_policy() -> None:
    """grpc-go pings while it receives, to measure the line; that must not look like abuse."""
    server = Server()
    server.greet(struct.pack(">HI", 4, 10))
    server.receive(request(1, b"x" * 100))
    before = server.http2.frames_written
    server.receive(frame(WINDOW_UPDATE, 0, 1, struct.pack(">I", 10)))
    assert server.http2.frames_written == before + 1
    server.receive(frame(PING, 0, 0, bytes(8)))
    assert server.http2.frames_written == before + 1


def test_the_initial_window_applies_to_open_streams() -> None:
    server = Server()
    server.greet(struct.pack(">HI", 4, 0))
    server.receive(request(1, b"hello"))
    assert [kind for kind, *_ in server.frames()] == [HEADERS]
    server.receive(frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 3)))
    assert [(kind, payload) for kind, _f, _n, payload in server.frames()] == [(SETTINGS, b""), (DATA, b"hel")]
    server.receive(frame(WINDOW_UPDATE, 0, 1, struct.pack(">I", 100)))
    assert [kind for kind, *_ in server.frames()] == [DATA, HEADERS]


def test_a_client_that_does_not_read_makes_replies_wait() -> None:
    server = Server()
    server.greet()
    server.http2.pause_writing()
    server.receive(request(1, b"hello"))
    assert server.take() == b""
    server.http2.resume_writing()
    assert [kind for kind, *_ in server.frames()] == [HEADERS, DATA, HEADERS]
    assert not server.http2.streams


def test_calls_are_refused_while_too_many_reply_bytes_wait() -> None:
    server = Server()
    server.greet()
    server.http2.queued_bytes = QUEUED_BYTES_MAX + 1
    server.receive(request(1, b"hello"))
    assert server.frames() == [(RST_STREAM, 0, 1, struct.pack(">I", Http2Code.ENHANCE_YOUR_CALM))]


def test_replies_beyond_all_bounds_are_given_up() -> None:
    """A client that opens many calls at once and takes no reply: what waits stays bounded."""
    server = Server()
    server.greet(struct.pack(">HI", 4, 0))
    server.receive(request(1, b"hello") + request(3, b"hello", end=False))
    server.http2.queued_bytes += QUEUED_BYTES_LIMIT
    server.take()
    server.receive(frame(DATA, END_STREAM, 3, b"more"))
    assert server.frames()[-1] == (RST_STREAM, 0, 3, struct.pack(">I", Http2Code.ENHANCE_YOUR_CALM))
    assert server.opened[1].was_reset
    assert list(server.http2.streams) == [1]


def test_an_early_answer_tells_the_client_to_send_no_more() -> None:
    server = Server()
    client = Client(server)
    number = client.h2.get_next_available_stream_id()
    client.h2.send_headers(number, REQUEST)
    client.h2.send_data(number, b"first")
    client.exchange()
    server.opened[0].answer()
    assert server.frames()[-1] == (RST_STREAM, 0, number, struct.pack(">I", Http2Code.NO_ERROR))
    client.h2.send_data(number, b"second")
    client.h2.end_stream(number)
    client.exchange()
    assert not server.is_closed
    assert not server.opened[0].was_reset


def test_a_reset_ends_the_call() -> None:
    server = Server()
    server.greet()
    server.receive(request(1, b"a", end=False) + frame(RST_STREAM, 0, 1, struct.pack(">I", 8)))
    assert server.opened[0].was_reset
    assert not server.http2.streams
    assert server.goaway_code() is None


def test_a_stream_that_is_held_back_gets_no_window() -> None:
    server = Server()
    server.greet()
    server.receive(request(1, b"", end=False))
    stream = server.opened[0]
    stream.is_held = True
    piece = frame(DATA, 0, 1, bytes(2**20))
    server.receive(piece * 3)
    assert [number for kind, _f, number, _p in server.frames() if kind == WINDOW_UPDATE] == []
    stream.is_held = False
    server.http2.replenish(stream)
    assert [number for kind, _f, number, _p in server.frames() if kind == WINDOW_UPDATE] == [1]


def test_draining_takes_calls_until_the_client_can_know() -> None:
    server = Server()
    server.greet()
    server.http2.drain(refuse=False)
    server.receive(request(1, b"late"))
    assert server.http2.last_stream == 1
    server.http2.drain(refuse=True)
    server.take()
    server.receive(request(3))
    assert (RST_STREAM, 0, 3, struct.pack(">I", Http2Code.REFUSED_STREAM)) in server.frames()
    assert len(server.opened) == 1


def test_more_streams_than_allowed_are_refused() -> None:
    server = Server()
    server.greet()
    opening = b"".join(request(number, end=False) for number in range(1, 2 * STREAMS_MAX + 3, 2))
    server.receive(opening)
    assert len(server.opened) == STREAMS_MAX
    refused = [payload for kind, _f, _n, payload in server.frames() if kind == RST_STREAM]
    assert refused == [struct.pack(">I", Http2Code.REFUSED_STREAM)]


def settings(name: int, value: int) -> bytes:
    return frame(SETTINGS, 0, 0, struct.pack(">HI", name, value))


#: What a client may not send, after the greeting, and how the connection ends.
BROKEN = {
    "DATA on stream 0": (frame(DATA, 0, 0, b"x"), Http2Code.PROTOCOL_ERROR),
    "DATA on an idle stream": (frame(DATA, 0, 5, b"x"), Http2Code.PROTOCOL_ERROR),
    "DATA after the end": (request(1) + frame(DATA, 0, 1, b"x"), Http2Code.STREAM_CLOSED),
    "HEADERS after the end": (request(1) + frame(HEADERS, END_HEADERS | 1, 1, BLOCK), Http2Code.STREAM_CLOSED),
    "HEADERS on stream 0": (frame(HEADERS, END_HEADERS, 0, BLOCK), Http2Code.PROTOCOL_ERROR),
    "HEADERS on an even stream": (frame(HEADERS, END_HEADERS, 2, BLOCK), Http2Code.PROTOCOL_ERROR),
    "a lower stream": (request(5) + request(3), Http2Code.STREAM_CLOSED),
    "padding longer than HEADERS": (frame(HEADERS, END_HEADERS | PADDED, 1, b"\x30a"), Http2Code.PROTOCOL_ERROR),
    "padding longer than DATA": (
        request(1, end=False) + frame(DATA, PADDED, 1, b"\x05abcd"),
        Http2Code.PROTOCOL_ERROR,
    ),
    "padded and empty": (request(1, end=False) + frame(DATA, PADDED, 1), Http2Code.FRAME_SIZE_ERROR),
    "a header interrupted": (frame(HEADERS, 0, 1, BLOCK) + frame(PING, 0, 0, bytes(8)), Http2Code.PROTOCOL_ERROR),
    "a header interrupted by DATA": (frame(HEADERS, 0, 1, BLOCK) + frame(DATA, 0, 1, b"x"), Http2Code.PROTOCOL_ERROR),
    "a header continued elsewhere": (
        frame(HEADERS, 0, 1, BLOCK) + frame(CONTINUATION, END_HEADERS, 3, BLOCK),
        Http2Code.PROTOCOL_ERROR,
    ),
    "CONTINUATION alone": (frame(CONTINUATION, END_HEADERS, 1, BLOCK), Http2Code.PROTOCOL_ERROR),
    "a header that is no HPACK": (frame(HEADERS, END_HEADERS, 1, b"\x80"), Http2Code.COMPRESSION_ERROR),
    "PUSH_PROMISE": (frame(PUSH_PROMISE, END_HEADERS, 1, bytes(4)), Http2Code.PROTOCOL_ERROR),
    "PING of 7 bytes": (frame(PING, 0, 0, bytes(7)), Http2Code.FRAME_SIZE_ERROR),
    "PING on a stream": (frame(PING, 0, 1, bytes(8)), Http2Code.PROTOCOL_ERROR),
    "SETTINGS on a stream": (frame(SETTINGS, 0, 1), Http2Code.PROTOCOL_ERROR),
    "SETTINGS of 5 bytes": (frame(SETTINGS, 0, 0, bytes(5)), Http2Code.FRAME_SIZE_ERROR),
    "an acknowledgement with settings": (frame(SETTINGS, ACK, 0, bytes(6)), Http2Code.FRAME_SIZE_ERROR),
    "ENABLE_PUSH 2": (settings(2, 2), Http2Code.PROTOCOL_ERROR),
    "INITIAL_WINDOW_SIZE of 2^31": (settings(4, 2**31), Http2Code.FLOW_CONTROL_ERROR),
    "MAX_FRAME_SIZE too small": (settings(5, 16_383), Http2Code.PROTOCOL_ERROR),
    "MAX_FRAME_SIZE too large": (settings(5, 2**24), Http2Code.PROTOCOL_ERROR),
    "WINDOW_UPDATE by 0": (frame(WINDOW_UPDATE, 0, 0, bytes(4)), Http2Code.PROTOCOL_ERROR),
    "WINDOW_UPDATE of 3 bytes": (frame(WINDOW_UPDATE, 0, 0, bytes(3)), Http2Code.FRAME_SIZE_ERROR),
    "WINDOW_UPDATE too far": (frame(WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff"), Http2Code.FLOW_CONTROL_ERROR),
    "WINDOW_UPDATE on an idle stream": (frame(WINDOW_UPDATE, 0, 1, b"\0\0\0\1"), Http2Code.PROTOCOL_ERROR),
    "RST_STREAM on an idle stream": (frame(RST_STREAM, 0, 1, bytes(4)), Http2Code.PROTOCOL_ERROR),
    "RST_STREAM on stream 0": (frame(RST_STREAM, 0, 0, bytes(4)), Http2Code.PROTOCOL_ERROR),
    "RST_STREAM of 3 bytes": (request(1, end=False) + frame(RST_STREAM, 0, 1, bytes(3)), Http2Code.FRAME_SIZE_ERROR),
    "PRIORITY on stream 0": (frame(PRIORITY, 0, 0, bytes(5)), Http2Code.PROTOCOL_ERROR),
    "PRIORITY of 4 bytes": (frame(PRIORITY, 0, 1, bytes(4)), Http2Code.FRAME_SIZE_ERROR),
    "GOAWAY on a stream": (frame(GOAWAY, 0, 1, bytes(8)), Http2Code.PROTOCOL_ERROR),
    "DATA frame too large": (b"\x10\x00\x01\x00\x00\x00\x00\x00\x01", Http2Code.FRAME_SIZE_ERROR),
    "HEADERS frame too large": (b"\x10\x00\x01\x01\x00\x00\x00\x00\x01", Http2Code.FRAME_SIZE_ERROR),
    "unknown frame far too large": (b"\x0f\xff\xff\x63\x00\x00\x00\x00\x00", Http2Code.ENHANCE_YOUR_CALM),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_ends_the_connection(name: str) -> None:
    """RFC 9113; the cases of h2spec that end in a connection error."""
    data, code = BROKEN[name]
    server = Server()
    server.greet()
    server.receive(data)
    assert server.goaway_code() is code
    server.receive(request(99))
    assert server.take() == b""


#: What ends one stream only.
STREAM_ERRORS = {
    "WINDOW_UPDATE by 0": (frame(WINDOW_UPDATE, 0, 1, bytes(4)), Http2Code.PROTOCOL_ERROR),
    "WINDOW_UPDATE too far": (frame(WINDOW_UPDATE, 0, 1, b"\x7f\xff\xff\xff"), Http2Code.FLOW_CONTROL_ERROR),
    "headers in the middle": (frame(HEADERS, END_HEADERS, 1, BLOCK), Http2Code.PROTOCOL_ERROR),
    "pseudo-fields in trailers": (frame(HEADERS, END_HEADERS | END_STREAM, 1, BLOCK), Http2Code.PROTOCOL_ERROR),
    "PRIORITY of 4 bytes": (frame(PRIORITY, 0, 1, bytes(4)), Http2Code.FRAME_SIZE_ERROR),
    "depends on itself": (frame(PRIORITY, 0, 1, b"\0\0\0\1\0"), Http2Code.PROTOCOL_ERROR),
}


@pytest.mark.parametrize("name", STREAM_ERRORS)
def test_a_fault_of_one_stream_ends_that_stream(name: str) -> None:
    data, code = STREAM_ERRORS[name]
    server = Server()
    server.greet()
    server.receive(request(1, b"a", end=False) + request(3, b"b", end=False))
    server.receive(data)
    assert (RST_STREAM, 0, 1, struct.pack(">I", code)) in server.frames()
    assert server.opened[0].was_reset
    server.receive(frame(DATA, END_STREAM, 3, b"c"))
    assert [payload for kind, _f, _n, payload in server.frames() if kind == DATA] == [b"bc"]


def test_trailers_end_a_request() -> None:
    server = Server()
    server.greet()
    server.receive(request(1, b"a", end=False))
    server.receive(frame(HEADERS, END_HEADERS | END_STREAM, 1, encode_plain([(b"x-checksum", b"1")])))
    assert [payload for kind, _f, _n, payload in server.frames() if kind == DATA] == [b"a"]


def test_more_data_than_the_window_ends_the_stream_then_the_connection() -> None:
    server = Server()
    server.greet()
    server.receive(request(1, end=False))
    stream = server.opened[0]
    stream.is_held = True
    piece = frame(DATA, 0, 1, bytes(2**20))
    server.receive(piece * 5)
    assert (RST_STREAM, 0, 1, struct.pack(">I", Http2Code.FLOW_CONTROL_ERROR)) in server.frames()
    assert stream.was_reset


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nXX", b"\0" * 24])
def test_another_protocol_is_turned_away(data: bytes) -> None:
    server = Server()
    server.receive(data)
    assert server.goaway_code() is Http2Code.PROTOCOL_ERROR


def test_the_first_frame_must_be_settings() -> None:
    server = Server()
    server.receive(PREFACE + frame(PING, 0, 0, bytes(8)))
    assert server.goaway_code() is Http2Code.PROTOCOL_ERROR


def test_unknown_frames_and_settings_are_ignored() -> None:
    server = Server()
    server.greet()
    server.receive(frame(0x77, 0xFF, 3, b"whatever") + settings(0x99, 7) + request(1, b"x"))
    assert DATA in [kind for kind, *_ in server.frames()]


def flood(unit: Callable[[int], bytes], rounds: int = 40_000) -> tuple[Server, int]:
    """Send a unit again and again; return the server and how many it took before it hung up."""
    server = Server()
    server.greet()
    for index in range(rounds):
        server.receive(unit(index))
        if server.is_closed:
            return server, index
        if len(server.out) > 2**20:
            server.take()
    raise AssertionError("the flood was never stopped")


FLOODS: dict[str, Callable[[int], bytes]] = {
    "rapid reset": lambda index: (
        request(2 * index + 1, end=False) + frame(RST_STREAM, 0, 2 * index + 1, struct.pack(">I", 8))
    ),
    "resets that we are made to send": lambda index: (
        request(2 * index + 1, end=False) + frame(WINDOW_UPDATE, 0, 2 * index + 1, bytes(4))
    ),
    "settings": lambda _index: frame(SETTINGS, 0, 0),
    "ping": lambda _index: frame(PING, 0, 0, bytes(8)),
    "priority": lambda index: frame(PRIORITY, 0, 2 * index + 1, b"\0\0\0\0\1"),
    "empty data": lambda index: (request(1, end=False) if index == 0 else b"") + frame(DATA, 0, 1),
    "unknown frames": lambda _index: frame(0x42, 0, 0),
    "window updates without use": lambda _index: frame(WINDOW_UPDATE, 0, 0, b"\0\0\0\1") * 5,
}


@pytest.mark.parametrize("name", FLOODS)
def test_floods_end_the_connection(name: str) -> None:
    server, _taken = flood(FLOODS[name])
    assert server.goaway_code() is Http2Code.ENHANCE_YOUR_CALM


def test_a_header_without_end_is_cut_off() -> None:
    """CVE-2024-27316 and its kin: CONTINUATION frames for ever."""
    server = Server()
    server.greet()
    server.receive(frame(HEADERS, 0, 1, b""))
    for _ in range(100):
        server.receive(frame(CONTINUATION, 0, 1, b""))
    assert server.goaway_code() is Http2Code.ENHANCE_YOUR_CALM


def test_answers_to_a_client_that_never_reads_are_bounded() -> None:
    server = Server()
    server.greet()
    server.http2.pause_writing()
    for _ in range(40_000):
        server.receive(frame(PING, 0, 0, bytes(8)))
        server.now_s += 1.0
    assert server.is_closed
    assert len(server.out) < 2**19


def test_the_rate_of_resets_refills() -> None:
    server = Server()
    server.greet()
    for index in range(5000):
        server.receive(FLOODS["rapid reset"](index))
        server.now_s += 0.1
    assert not server.is_closed


def test_random_frames_are_taken_or_refused() -> None:
    """Our frame fuzzer: valid conversations with bytes changed, cut and repeated. No exception, no growth."""
    chance = random.Random(20261122)
    for _ in range(1500):
        server = Server()
        server.greet()
        number = 1
        parts: list[bytes] = []
        for _ in range(chance.randrange(1, 12)):
            kind = chance.randrange(12)
            flags = chance.choice([0, 1, 4, 5, 8, 0xD, 0x20, 0x25, 0xFF])
            stream = chance.choice([0, 1, number, number, number + 2, 2])
            payload = chance.choice([b"", BLOCK, bytes(4), bytes(5), bytes(8), b"\0\0\0\1", chance.randbytes(20)])
            parts.append(frame(kind, flags, stream, payload))
            if chance.random() < 0.6:
                parts.append(request(number, chance.randbytes(5), end=chance.random() < 0.7))
                number += 2
        data = bytearray(b"".join(parts))
        for _ in range(chance.randrange(3)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        position = 0
        while position < len(data):
            step = chance.randrange(1, 64)
            server.receive(bytes(data[position : position + step]))
            position += step
        server.http2.lost()
        assert not server.http2.streams
        assert all(stream.is_local_closed for stream in server.opened)
        assert len(server.out) < 100_000
