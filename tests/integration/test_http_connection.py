"""Order, framing and ends of connections, over real sockets."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import numpy as np
import pytest
from forebay_server import ForebayServer
from http_models import copied_bytes, wait_nothing_in_use, write_models
from http_wire import WireClient, chunked, get, infer, post


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForebayServer]:
    models = write_models(tmp_path_factory.mktemp("http") / "models")
    with ForebayServer(models) as running:
        yield running
        wait_nothing_in_use(running)


def alpha(value: float, *headers: str, version: str = "1.1", request_id: str = "") -> bytes:
    data = np.full(50, value, np.float32).tobytes()
    return infer("alpha_model", [("features", "FP32", [1, 50], data)], *headers, version=version, request_id=request_id)


def echo(count: int, *headers: str, model: str = "echo", version: str = "1.1", request_id: str = "") -> bytes:
    data = np.arange(count, dtype=np.float32).tobytes()
    return infer(model, [("INPUT0", "FP32", [count], data)], *headers, version=version, request_id=request_id)


def document(count: int) -> bytes:
    data = list(range(count))
    return json.dumps({"inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": [count], "data": data}]}).encode()


def ids(wire: WireClient, count: int) -> list[str]:
    """Return what tells each of so many replies apart: the request's id, or the beginning of the body."""
    found: list[str] = []
    for _ in range(count):
        answer = wire.answer()
        content = answer.json() if answer.body else None
        found.append(str(content.get("id") or content.get("error") or content.get("name")) if content else "empty")
    return found


# --- order --------------------------------------------------------------------------------------------------------


def test_pipelined_requests_are_answered_in_order(server: ForebayServer) -> None:
    """H-017: rows, parcels, errors and other endpoints mixed, in one segment."""
    with WireClient(server.http_port) as wire:
        wire.send(
            echo(2, model="slow", request_id="1"),
            alpha(1.0, request_id="2"),
            post("/v2/models/nope/infer", b"{}"),
            get("/v2"),
            alpha(2.0, request_id="5"),
            get("/v2/health/live"),
            echo(3, request_id="7"),
        )
        unknown = "Request for unknown model: 'nope' is not found"
        assert ids(wire, 7) == ["1", "2", unknown, "triton", "5", "empty", "7"]


def test_a_last_request_for_another_endpoint_is_not_forgotten(server: ForebayServer) -> None:
    """It has no body whose arrival would bring it back to mind."""
    with WireClient(server.http_port) as wire:
        wire.send(echo(1, model="slow", request_id="1"), get("/v2"))
        assert ids(wire, 2) == ["1", "triton"]


def test_a_chunked_request_for_another_endpoint_waits_for_its_turn(server: ForebayServer) -> None:
    index = b"POST /v2/repository/index HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(b"{}")
    with WireClient(server.http_port) as wire:
        wire.send(echo(1, model="slow", request_id="1"), index)
        assert wire.answer().json()["id"] == "1"
        assert {entry["name"] for entry in wire.answer().json()} >= {"echo"}


def test_many_more_pipelined_requests_than_are_taken_at_a_time(server: ForebayServer) -> None:
    count = 700
    with WireClient(server.http_port) as wire:
        wire.send(*(alpha(float(number), request_id=str(number)) for number in range(count)))
        assert ids(wire, count) == [str(number) for number in range(count)]


def test_pipelined_requests_before_a_half_close_are_all_answered(server: ForebayServer) -> None:
    count = 300
    with WireClient(server.http_port) as wire:
        wire.send(*(alpha(float(number), request_id=str(number)) for number in range(count)), get("/v2"))
        wire.finish_sending()
        assert ids(wire, count + 1) == [*map(str, range(count)), "triton"]
        assert wire.is_ended


# --- framing ------------------------------------------------------------------------------------------------------


def test_one_byte_at_a_time(server: ForebayServer) -> None:
    request = alpha(1.0, request_id="a")
    with WireClient(server.http_port) as wire:
        for _ in range(2):
            for index in range(len(request)):
                wire.send(request[index : index + 1])
            assert wire.answer().json()["id"] == "a"


@pytest.mark.parametrize("step", [3, 17, 100, 1_000, 4_096])
def test_requests_cut_anywhere(server: ForebayServer, step: int) -> None:
    requests = alpha(1.0, request_id="a") + get("/v2") + echo(20, request_id="b") + get("/v2/health/live")
    with WireClient(server.http_port) as wire:
        for start in range(0, len(requests), step):
            wire.send(requests[start : start + step])
        assert ids(wire, 4) == ["a", "triton", "b", "empty"]


def test_empty_lines_before_a_request_are_ignored(server: ForebayServer) -> None:
    with WireClient(server.http_port) as wire:
        assert wire.send(b"\r\n\r\n", alpha(1.0)).answer().status == 200
        assert wire.send(b"\r\n").send(b"\r\n", get("/v2/health/live")).answer().status == 200


@pytest.mark.parametrize("sizes", [[10_000], [1, 2, 3, 4], [5_000, 5_000], [1] * 900])
def test_chunked_bodies(server: ForebayServer, sizes: list[int]) -> None:
    """H-012."""
    body = document(300)
    parts: list[bytes] = []
    for size in sizes:
        parts.append(body[:size])
        body = body[size:]
    parts += [body] if body else []
    request = b"POST /v2/models/echo/infer HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(
        *filter(None, parts)
    )
    with WireClient(server.http_port) as wire:
        wire.send(request, alpha(1.0, request_id="next"))
        assert wire.answer().json()["outputs"][0]["data"] == [float(number) for number in range(300)]
        assert wire.answer().json()["id"] == "next"
        for start in range(0, len(request), 7):
            wire.send(request[start : start + 7])
        assert wire.answer().status == 200


def test_chunked_body_with_binary_tensors_extensions_and_trailers(server: ForebayServer) -> None:
    whole = echo(1_000)
    head, _, body = whole.partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.startswith(b"Content-Length")]
    coded = b"%x;a=b\r\n%s\r\n5\r\n%s\r\n0\r\nX-Trailer: 1\r\n\r\n" % (len(body) - 5, body[:-5], body[-5:])
    with WireClient(server.http_port) as wire:
        wire.send(b"\r\n".join([*lines, b"Transfer-Encoding: chunked"]), b"\r\n\r\n", coded, get("/v2"))
        assert wire.answer().tensors == np.arange(1_000, dtype=np.float32).tobytes()
        assert wire.answer().json()["name"] == "triton"


@pytest.mark.parametrize("path", ["/v2/models/echo/infer", "/v2/repository/index"])
@pytest.mark.parametrize("count", [10, 20_000])
def test_expect_continue(server: ForebayServer, path: str, count: int) -> None:
    body = document(count) if path.endswith("infer") else b"{}"
    request = post(path, body, "Expect: 100-continue")
    head = request[: len(request) - len(body)]
    with WireClient(server.http_port) as wire:
        for _ in range(2):
            assert wire.send(head).answer().status == 100
            assert wire.send(body).answer().status == 200
        coded = (
            b"POST %s HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"
            % path.encode()
        )
        assert wire.send(coded).answer().status == 100
        assert wire.send(chunked(body)).answer().status == 200


def test_interim_reply_does_not_overtake_a_reply(server: ForebayServer) -> None:
    body = document(3)
    request = post("/v2/models/echo/infer", body, "Expect: 100-continue")
    with WireClient(server.http_port) as wire:
        wire.send(echo(1, model="slow", request_id="1"), request[: len(request) - len(body)])
        assert wire.answer().json()["id"] == "1"
        assert wire.answer().status == 100
        assert wire.send(body).answer().status == 200


def test_absolute_form_of_the_path(server: ForebayServer) -> None:
    request = alpha(1.0).replace(b"POST /", b"POST http://example.org:8000/", 1)
    with WireClient(server.http_port) as wire:
        assert wire.send(request).answer().status == 200
        assert wire.send(get("http://example.org/v2")).answer().json()["name"] == "triton"


def test_offer_of_http_2_is_declined_by_serving_http_1(server: ForebayServer) -> None:
    """Java's HttpClient makes it with every first request."""
    offer = (
        "Connection: Upgrade, HTTP2-Settings",
        "Upgrade: h2c",
        "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
    )
    with WireClient(server.http_port) as wire:
        assert wire.send(get("/v2", *offer)).answer().json()["name"] == "triton"
        assert wire.send(alpha(1.0, *offer)).answer().status == 200
        assert wire.send(get("/v2")).answer().status == 200


# --- ends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_connection_close(server: ForebayServer, version: str) -> None:
    for request in (alpha(1.0, "Connection: close", version=version), get("/v2", "Connection: close", version=version)):
        with WireClient(server.http_port) as wire:
            answer = wire.send(request).answer()
            assert answer.status == 200
            assert answer.headers.get("connection", "close" if version == "1.0" else "") == "close"
            assert wire.is_ended


def test_http_1_0_closes_unless_asked_to_stay(server: ForebayServer) -> None:
    with WireClient(server.http_port) as wire:
        assert wire.send(alpha(1.0, version="1.0")).answer().headers["connection"] == "close"
        assert wire.is_ended
    with WireClient(server.http_port) as wire:
        for request in (
            alpha(1.0, "Connection: keep-alive", version="1.0"),
            get("/v2", "Connection: keep-alive", version="1.0"),
        ):
            for _ in range(2):
                answer = wire.send(request).answer()
                assert (answer.status, answer.headers["connection"]) == (200, "keep-alive")


def test_nothing_is_answered_after_aiohttp_has_refused_a_request(server: ForebayServer) -> None:
    """It says that it closes the connection (here for want of a Host header), so what follows is not looked at."""
    with WireClient(server.http_port) as wire:
        answer = wire.send(b"GET /v2 HTTP/1.1\r\n\r\n", alpha(1.0), get("/v2")).answer()
        assert (answer.status, answer.headers.get("connection")) == (400, "close")
        assert wire.is_ended


def test_half_closed_client_gets_its_answer(server: ForebayServer) -> None:
    """As of ``printf ... | nc``."""
    for request in (alpha(1.0), get("/v2"), echo(5, model="slow"), echo(30_000)):
        with WireClient(server.http_port) as wire:
            wire.send(request).finish_sending()
            assert wire.answer().status == 200
            assert wire.is_ended


def test_half_closed_in_the_middle_of_a_request(server: ForebayServer) -> None:
    for request in (alpha(1.0), get("/v2"), echo(30_000)):
        with WireClient(server.http_port) as wire:
            wire.send(request[:-3]).finish_sending()
            assert wire.is_ended


def test_connections_that_ask_nothing(server: ForebayServer) -> None:
    for _ in range(50):
        WireClient(server.http_port).sock.close()
    with WireClient(server.http_port) as wire:
        time.sleep(0.2)
        assert wire.send(alpha(1.0)).answer().status == 200


# --- flow ---------------------------------------------------------------------------------------------------------


def test_slow_reader_of_a_large_answer_gets_all_of_it(server: ForebayServer) -> None:
    count = 2_000_000
    before = copied_bytes(server, "echo", "egress")
    with WireClient(server.http_port, receive_buffer_bytes=4096) as wire:
        wire.send(echo(count))
        time.sleep(0.5)
        answer = wire.answer()
        assert answer.tensors == np.arange(count, dtype=np.float32).tobytes()
    wait_nothing_in_use(server)
    # What the client did not take at once had to be kept (I-1).
    assert 0 < copied_bytes(server, "echo", "egress") - before <= count * 4 + 1_000


def test_reader_that_never_reads_does_not_hold_up_others(server: ForebayServer) -> None:
    with WireClient(server.http_port, receive_buffer_bytes=4096) as lazy, WireClient(server.http_port) as wire:
        lazy.send(*(echo(100_000) for _ in range(8)))
        for _ in range(20):
            assert wire.send(alpha(1.0)).answer().status == 200
        assert all(lazy.answer().status == 200 for _ in range(8))


def test_as_many_connections_as_allowed(server: ForebayServer) -> None:
    """``--max-connections``: further clients wait to be accepted, and are served when others leave."""
    with ForebayServer(server_models(server), "--max-connections=6") as small:
        wires = [WireClient(small.http_port) for _ in range(6)]
        for wire in wires:
            assert wire.send(alpha(1.0)).answer().status == 200
        with WireClient(small.http_port, timeout_s=0.5) as late:
            late.send(alpha(1.0))
            with pytest.raises(TimeoutError):
                late.answer()
            for wire in wires[:3]:
                wire.sock.close()
            late.sock.settimeout(30)
            assert late.answer().status == 200
        for wire in wires[3:]:
            assert wire.send(alpha(1.0)).answer().status == 200
            wire.sock.close()
        with WireClient(small.http_port) as wire:
            assert wire.send(alpha(1.0)).answer().status == 200
        assert "raise --max-connections" in small.stderr


def server_models(server: ForebayServer) -> str:
    """Return the repository that a server serves."""
    command = server.process.args
    assert isinstance(command, list)
    return str(command[command.index("--model-repository") + 1])


def test_two_servers_share_a_port(server: ForebayServer) -> None:
    """H-020: the kernel shares out the connections; when one server ends, the other has them all."""
    models = server_models(server)
    with (
        ForebayServer(models, "--reuse-http-port=true", "--id=one") as one,
        ForebayServer(models, "--reuse-http-port=true", "--id=two", http_port=one.http_port) as two,
    ):
        assert two.http_port == one.http_port

        def names(count: int) -> set[str]:
            return {json.loads(two.get("/v2")[1])["name"] for _ in range(count)}

        two.wait_for(lambda: names(20) == {"one", "two"}, "both to be asked")
        assert one.stop() == 0
        assert names(20) == {"two"}


def test_stop_answers_what_was_asked(server: ForebayServer) -> None:
    """H-009."""
    with (
        ForebayServer(server_models(server)) as ending,
        WireClient(ending.http_port) as wire,
        WireClient(ending.http_port) as idle,
    ):
        assert idle.send(alpha(1.0)).answer().status == 200
        wire.send(echo(4, model="slow"))
        ending.wait_for(lambda: b'"slow"' in ending.get("/v2/models/slow")[1], "the server to have read it")
        assert ending.stop() == 0
        assert wire.answer().status == 200
        assert wire.is_ended
        assert idle.is_ended
