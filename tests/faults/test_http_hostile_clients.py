"""Clients that break the rules, leave, or dawdle: a clear answer, bounded memory, and everyone else is served.

The server has a short time limit for requests and small limits for sizes, so that each can be reached.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from forebay_server import ForebayServer
from http_models import wait_nothing_in_use, write_models
from http_wire import Answer, WireClient, get, infer, post

LIMIT_BYTES = 300_000
ARENA_BYTES = 8 << 20


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForebayServer]:
    models = write_models(tmp_path_factory.mktemp("http") / "models")
    flags = (
        "--http-request-timeout-secs=2",
        f"--http-max-input-size={LIMIT_BYTES}",
        f"--arena-byte-size={ARENA_BYTES}",
    )
    with ForebayServer(models, *flags) as server:
        yield server


@pytest.fixture
def server(running: ForebayServer) -> Iterator[ForebayServer]:
    """The server, which must be as good as new after every test."""
    frontend = running.pid_of("http")
    yield running
    serves(running)
    wait_nothing_in_use(running)
    assert running.pid_of("http") == frontend, "the frontend was restarted"


def alpha(rows: int = 1, *headers: str) -> bytes:
    return infer("alpha_model", [("features", "FP32", [rows, 50], bytes(rows * 200))], *headers)


def echo(count: int, *headers: str, model: str = "echo") -> bytes:
    return infer(model, [("INPUT0", "FP32", [count], bytes(4 * count))], *headers)


def serves(server: ForebayServer) -> None:
    with WireClient(server.http_port) as wire:
        assert wire.send(alpha()).answer().status == 200
        assert wire.send(get("/v2/health/ready")).answer().status == 200


def refused(server: ForebayServer, *parts: bytes) -> Answer:
    """Send something for which the server answers once and closes."""
    with WireClient(server.http_port) as wire:
        answer = wire.send(*parts).answer()
        assert answer.headers["connection"] == "close"
        assert wire.is_ended
        assert json.loads(answer.body).keys() == {"error"}
        return answer


# --- no HTTP ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x00" * 100,
        b"hello\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\nHost: a\n\n\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: \x00\r\n\r\n",
        b"GET / HTTP/1.1\r\n: a\r\n\r\n",
        b"CONNECT example.org:443 HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"POST / HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabcd",
        b"POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 0x10\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
    ],
)
def test_what_is_no_http_request_is_refused(server: ForebayServer, garbage: bytes) -> None:
    answer = refused(server, garbage)
    assert answer.status in (400, 505)
    assert answer.status == (505 if b"HTTP/2.0" in garbage else 400)


def test_random_bytes(server: ForebayServer) -> None:
    """Whatever comes, the server answers 4xx/5xx, waits for more, or closes."""
    generator = random.Random(7)
    request = alpha()
    for _ in range(150):
        damaged = bytearray(request)
        for _ in range(generator.randrange(1, 6)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        cut = generator.randrange(1, len(damaged))
        with WireClient(server.http_port) as wire:
            wire.send(bytes(damaged[:cut]))
            if generator.random() < 0.5:
                wire.send(bytes(damaged[cut:]))
            if generator.random() < 0.3:
                wire.reset()


@pytest.mark.parametrize("value", ["gzip", "gzip, chunked", "identity"])
def test_unknown_transfer_encoding(server: ForebayServer, value: str) -> None:
    answer = refused(server, f"POST /v2 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: {value}\r\n\r\n".encode())
    assert answer.status in (400, 501)


def test_unknown_expectation(server: ForebayServer) -> None:
    assert refused(server, post("/v2/models/echo/infer", b"", "Expect: a miracle")).status == 417


def test_protocol_version_that_we_do_not_speak(server: ForebayServer) -> None:
    assert refused(server, get("/v2", version="2.0")).status == 505
    assert refused(server, get("/v2", version="0.9")).status == 505


# --- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [33_000, 300_000])
@pytest.mark.parametrize("is_complete", [True, False])
def test_header_that_is_too_large(server: ForebayServer, size: int, is_complete: bool) -> None:
    request = get("/v2", "X: " + "a" * size)
    assert refused(server, request if is_complete else request[:-4]).status == 431


def test_header_of_almost_the_largest_size(server: ForebayServer) -> None:
    with WireClient(server.http_port) as wire:
        for _ in range(2):
            assert wire.send(alpha(1, *(f"X-{number}: {'a' * 1000}" for number in range(30)))).answer().status == 200


def test_json_that_is_too_large_is_refused_before_it_is_read(server: ForebayServer) -> None:
    """H-013."""
    for path in ("/v2/models/echo/infer", "/v2/repository/index", "/v2/models/echo/generate"):
        answer = refused(server, post(path, length=LIMIT_BYTES + 1))
        assert answer.status == 400
        assert answer.text == (
            f"request JSON size of {LIMIT_BYTES + 1} bytes exceeds the maximum allowed input size of {LIMIT_BYTES} "
            "bytes. Use --http-max-input-size to increase the limit."
        )


def test_why_a_large_body_is_refused_can_be_read_while_it_is_being_sent(server: ForebayServer) -> None:
    """A close with unread bytes would reset the connection and lose the answer."""
    for _ in range(20):
        with WireClient(server.http_port) as wire:
            wire.send(post("/v2/models/echo/infer", bytes(1_000_000)))
            time.sleep(0.005)
            assert wire.answer().status == 400


def test_json_header_that_is_too_large(server: ForebayServer) -> None:
    request = post(
        "/v2/models/echo/infer", b"", f"Inference-Header-Content-Length: {LIMIT_BYTES + 1}", length=LIMIT_BYTES + 9
    )
    assert "request JSON size" in refused(server, request).text


def test_body_that_can_never_fit(server: ForebayServer) -> None:
    for length in (ARENA_BYTES + 1, 2**63, 2**64 - 1):
        request = post("/v2/models/echo/infer", b"", "Inference-Header-Content-Length: 10", length=length)
        assert refused(server, request).status == 413


def test_chunks_that_are_too_many_or_too_large(server: ForebayServer) -> None:
    """H-012: more than 65,536 chunks are refused."""
    head = b"POST /v2/models/echo/infer HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert refused(server, head, b"%x\r\n" % (LIMIT_BYTES + 1)).status == 413
    assert refused(server, head, b"ffffffffffffffffff\r\n").status == 400
    assert refused(server, head, b"1\r\nab\r\n").status == 400
    assert refused(server, head, b"x\r\n").status == 400
    assert refused(server, head, b"1;" + b"x" * 5_000).status == 400
    assert refused(server, head, b"0\r\n" + b"x: y\r\n" * 2_000).status == 400
    answer = refused(server, head, b"1\r\n \r\n" * 70_000)
    assert (answer.status, "65536 chunks" in answer.text) == (400, True)


def test_incomplete_requests_of_all_clients_together_are_bounded(server: ForebayServer) -> None:
    """Private memory does not grow with the number of clients that send half of a body."""
    wires = [WireClient(server.http_port) for _ in range(12)]
    part = post("/v2/models/echo/infer", length=LIMIT_BYTES) + bytes(LIMIT_BYTES - 10)
    statuses: list[int] = []
    for wire in wires:
        wire.send(part)
    for wire in wires:
        statuses.append(wire.answer().status)
        wire.sock.close()
    # The first ones run into the time limit, the others found no room.
    assert set(statuses) == {408, 503}
    assert statuses.count(408) <= 4


def test_more_tensors_than_shared_memory_has_room_for(server: ForebayServer) -> None:
    """I-6: a prompt 503, and everything is as before when the uploads are gone."""
    half = echo(1_000_000)
    with WireClient(server.http_port) as first, WireClient(server.http_port) as second:
        first.send(half[: len(half) // 2])
        server.get("/v2/health/live")
        answer = second.send(half).answer()
        assert (answer.status, "shared memory" in answer.text) == (503, True)
        serves(server)


def test_decompression_bomb(server: ForebayServer) -> None:
    """H-143."""
    import gzip

    bomb = gzip.compress(b" " * 50_000_000)
    with WireClient(server.http_port) as wire:
        answer = wire.send(post("/v2/models/echo/infer", bomb, "Content-Encoding: gzip")).answer()
        assert (answer.status, "decompressed request size exceeds" in answer.text) == (400, True)


def test_deeply_nested_json(server: ForebayServer) -> None:
    """H-014."""
    with WireClient(server.http_port) as wire:
        answer = wire.send(post("/v2/models/echo/infer", b"[" * 100_000)).answer()
        assert (answer.status, "nesting depth" in answer.text) == (400, True)


# --- dawdling -----------------------------------------------------------------------------------------------------


def test_slow_loris(server: ForebayServer) -> None:
    """Each of these sends a byte now and then, and never a whole request: 408 after the time limit."""
    beginnings = (
        b"POST /v2/mod",
        post("/v2/models/echo/infer", b"{", length=1_000),
        get("/v2")[:-2],
        b"POST /v2/models/echo/infer HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        echo(50_000)[:150_000],
    )
    wires = [WireClient(server.http_port) for _ in beginnings]
    for wire, beginning in zip(wires, beginnings, strict=True):
        wire.send(beginning)
    began_s = time.monotonic()
    serves(server)
    statuses: list[int] = []
    for wire in wires:
        wire.sock.settimeout(0.2)
        while True:
            try:
                statuses.append(wire.answer().status)
                break
            except TimeoutError:
                assert time.monotonic() < began_s + 30
                wire.send(b"a")
        assert time.monotonic() > began_s + 1.9
        wire.sock.close()
    assert statuses == [408] * len(beginnings)


def test_time_limit_spares_who_waits_for_us(server: ForebayServer) -> None:
    """Requests behind a slow model are complete; the clock runs for what the client still has to send."""
    with WireClient(server.http_port) as wire:
        wire.send(*(echo(1, model="slow") for _ in range(6)), get("/v2"), alpha())
        assert [wire.answer().status for _ in range(8)] == [200] * 8
        time.sleep(2.5)  # idle connections stay open
        assert wire.send(alpha()).answer().status == 200


def test_steady_pipelining_across_the_time_limit(server: ForebayServer) -> None:
    """Every read ends in the middle of a request, for longer than a single request may take."""
    request = alpha()
    with WireClient(server.http_port) as wire:
        wire.send(request[:50])
        end_s = time.monotonic() + 4
        while time.monotonic() < end_s:
            wire.send(request[50:], request[:50])
            assert wire.answer().status == 200
            time.sleep(0.05)


def test_client_that_never_reads_its_answer_is_cut_off(server: ForebayServer) -> None:
    with WireClient(server.http_port, receive_buffer_bytes=4096) as wire:
        wire.send(echo(900_000))
        time.sleep(4.5)
        with pytest.raises(Exception):  # noqa: B017, PT011 - the end may show as a reset or as half an answer
            assert len(wire.answer().body) > 3_600_000


@pytest.fixture
def patient_server(tmp_path: Path) -> Iterator[ForebayServer]:
    """One that gives its clients all the time that they want."""
    with ForebayServer(write_models(tmp_path / "models"), f"--arena-byte-size={ARENA_BYTES}") as running:
        yield running


def test_replies_that_nobody_takes_are_bounded(patient_server: ForebayServer) -> None:
    """The clients that owe us most reading are cut off, so that the others can be served."""
    server = patient_server

    def anonymous_kb() -> int:
        status = Path(f"/proc/{server.pid_of('http')}/status").read_text()
        return int(re.findall(r"RssAnon:\s+(\d+)", status)[0])

    before_kb = anonymous_kb()
    with contextlib.ExitStack() as stack:
        for _ in range(6):
            wire = stack.enter_context(WireClient(server.http_port, receive_buffer_bytes=4096))
            # Few answers at a time fit into the arena, but they pile up behind the slow model's.
            with contextlib.suppress(ConnectionError):
                wire.send(echo(1, model="slow"), *(echo(200_000) for _ in range(12)))
            serves(server)
        server.wait_logged("cut off a client that has not taken")
        serves(server)
        assert anonymous_kb() - before_kb < 4 * ARENA_BYTES // 1024


# --- leaving ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [50, 5_000, 20_000, 400_000])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_client_gone_in_the_middle_of_a_request(server: ForebayServer, count: int, part: float) -> None:
    request = echo(count)
    for abrupt in (True, False):
        wire = WireClient(server.http_port)
        wire.send(request[: int(len(request) * part)])
        if abrupt:
            wire.reset()
        else:
            wire.sock.close()


@pytest.mark.parametrize("model", ["echo", "slow"])
def test_client_gone_before_the_answer(server: ForebayServer, model: str) -> None:
    for abrupt in (True, False):
        for _ in range(4):
            wire = WireClient(server.http_port)
            wire.send(echo(100_000, model=model), alpha(64), get("/v2"))
            if abrupt:
                wire.reset()
            else:
                wire.sock.close()


def test_requests_of_clients_that_left_do_not_run(server: ForebayServer) -> None:
    """H-016: what is still queued when its client leaves is taken out of the queue."""
    executed = executions(server)
    for _ in range(20):
        wire = WireClient(server.http_port)
        wire.send(echo(1, model="slow"))
        wire.reset()
    serves(server)
    wait_nothing_in_use(server)
    assert executions(server) - executed < 10


def executions(server: ForebayServer) -> int:
    return int(json.loads(server.get("/v2/models/slow/stats")[1])["model_stats"][0]["execution_count"])


def test_client_gone_in_the_middle_of_the_answer(server: ForebayServer) -> None:
    for abrupt in (True, False):
        wire = WireClient(server.http_port, receive_buffer_bytes=4096)
        wire.send(echo(900_000), echo(900_000))
        assert wire.sock.recv(1000)
        if abrupt:
            wire.reset()
        else:
            wire.sock.close()


def test_many_connections_come_and_go(server: ForebayServer) -> None:
    """No descriptor is left behind."""

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{server.pid_of('http')}/fd"))

    before = descriptors()
    for _ in range(300):
        with WireClient(server.http_port) as wire:
            wire.send(alpha()[:60])
    server.wait_for(lambda: descriptors() <= before + 2, "connections to be closed")


def test_memory_of_the_frontend_does_not_grow(server: ForebayServer) -> None:
    def private_kb() -> int:
        status = Path(f"/proc/{server.pid_of('http')}/status").read_text()
        return int(re.findall(r"RssAnon:\s+(\d+)", status)[0])

    def attack() -> None:
        for number in range(40):
            with WireClient(server.http_port) as wire:
                wire.send(post("/v2/models/echo/infer", bytes(250_000), f"X-Unique: {time.monotonic_ns()}"), b"\x00")
                assert wire.answer().status >= 400
                if number % 2:
                    wire.send(get("/v2/" + "x" * 5_000))

    attack()
    before = private_kb()
    for _ in range(4):
        attack()
    assert private_kb() - before < 20_000


def test_numbers_are_right_after_all_this(server: ForebayServer) -> None:
    values = np.random.default_rng(3).standard_normal(60_000).astype(np.float32)
    with WireClient(server.http_port) as wire:
        answer = wire.send(infer("echo", [("INPUT0", "FP32", [values.size], values.tobytes())])).answer()
        assert answer.tensors == values.tobytes()
