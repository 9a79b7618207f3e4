"""The generate extension over real sockets (spec 1.13): one reply, streams of events, and clients that leave."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from forebay_server import ForebayServer
from http_models import wait_nothing_in_use, write_identity, write_models
from http_wire import WireClient, get, post

#: Sends as many responses as the input says, each after ``delay`` s; notes in a file that it was cancelled.
STREAMER = """
import json, time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.notes = json.loads(args["model_config"])["parameters"]["notes"]["string_value"]

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            count = int(pb_utils.get_input_tensor_by_name(request, "N").as_numpy().ravel()[0])
            parameters = json.loads(request.parameters())
            if parameters.get("raise"):
                raise ValueError("raised")
            if parameters.get("empty"):
                sender.send(pb_utils.InferenceResponse([]))
            for index in range(abs(count)):
                if request.is_cancelled():
                    with open(self.notes, "a") as file:
                        file.write("cancelled\\n")
                    break
                if count < 0 and index == -count - 1:
                    sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(f"failed at {index}")))
                else:
                    text = np.array([f"token {index} " + "x" * int(parameters.get("pad", 0))], dtype=object)
                    sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("TEXT", text)]))
                time.sleep(float(parameters.get("delay", 0)))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        return None
"""

CONFIG = """
backend: "python"
max_batch_size: 0
input [ { name: "N" data_type: TYPE_INT32 dims: [ 1 ] } ]
output [ { name: "TEXT" data_type: TYPE_STRING dims: [ 1 ] } ]
model_transaction_policy { decoupled: true }
"""


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notes") / "notes.txt"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, notes: Path) -> Iterator[ForebayServer]:
    models = write_models(tmp_path_factory.mktemp("generate") / "models")
    write_identity(models, "half", [("TYPE_FP16", "-1")])
    directory = models / "streamer"
    (directory / "1").mkdir(parents=True)
    (directory / "1" / "model.py").write_text(STREAMER)
    parameter = f'parameters {{ key: "notes" value: {{ string_value: "{notes}" }} }}\n'
    (directory / "config.pbtxt").write_text(CONFIG + parameter)
    with ForebayServer(models) as running:
        yield running
        wait_nothing_in_use(running)


def generate(model: str, document: object, *headers: str, version: str = "1.1", stream: bool = False) -> bytes:
    path = f"/v2/models/{model}/{'generate_stream' if stream else 'generate'}"
    return post(path, json.dumps(document).encode(), *headers, version=version)


def events(body: bytes) -> list[dict[str, object]]:
    """Return the events of a stream."""
    blocks = body.decode().split("\n\n")
    assert blocks.pop() == ""
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def test_one_reply(server: ForebayServer) -> None:
    """H-270, H-271, H-275: inputs, parameters and id in one flat object; one-element tensors as scalars."""
    with WireClient(server.http_port) as wire:
        answer = wire.send(generate("echo", {"INPUT0": [1, 2], "id": "a", "foo": "bar"})).answer()
        assert answer.headers["content-type"] == "application/json"
        document = answer.json()
        assert (document["OUTPUT0"], document["id"], document["model_name"]) == ([1.0, 2.0], "a", "echo")
        assert wire.send(generate("strings", {"INPUT0": "hi"})).answer().json()["OUTPUT0"] == "hi"
        assert wire.send(generate("alpha_model", {"features": [0.5] * 50})).answer().json()["model_version"] == "2"


def test_stream_of_events(server: ForebayServer) -> None:
    """H-277, H-280."""
    with WireClient(server.http_port) as wire:
        for count in (1, 5, 40):
            answer = wire.send(generate("streamer", {"N": count, "id": "s"}, stream=True)).answer()
            assert answer.status == 200
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert answer.headers["transfer-encoding"] == "chunked"
            assert [str(event["TEXT"]).split()[1] for event in events(answer.body)] == [str(i) for i in range(count)]
            assert {event["id"] for event in events(answer.body)} == {"s"}
        answer = wire.send(generate("streamer", {"N": 0}, stream=True)).answer()
        assert (answer.status, answer.body) == (200, b"")
        answer = wire.send(generate("echo", {"INPUT0": 1}, stream=True)).answer()
        assert [event["OUTPUT0"] for event in events(answer.body)] == [1.0]


def test_response_without_outputs_is_one(server: ForebayServer) -> None:
    """As in Triton 2.51: only the end by itself is no event."""
    about = {"model_name": "streamer", "model_version": "1"}
    with WireClient(server.http_port) as wire:
        answer = wire.send(generate("streamer", {"N": 0, "empty": True}, stream=True)).answer()
        assert events(answer.body) == [about]
        assert wire.send(generate("streamer", {"N": 0, "empty": True})).answer().json() == about


def test_decoupled_model_that_raises(server: ForebayServer) -> None:
    """P-008; the code is that of Triton 2.51 for decoupled models."""
    for stream in (False, True):
        with WireClient(server.http_port) as wire:
            answer = wire.send(generate("streamer", {"N": 1, "raise": True}, stream=stream)).answer()
            assert answer.status == 400
            assert b"message: ValueError: raised" in answer.body


def test_events_arrive_one_by_one(server: ForebayServer) -> None:
    with WireClient(server.http_port) as wire:
        wire.send(generate("streamer", {"N": 3, "delay": 0.3}, stream=True))
        began_s = time.monotonic()
        head = wire.sock.recv(4096)
        while b"token 0" not in head:
            head += wire.sock.recv(4096)
        assert b"token 1" not in head
        while b"token 2" not in head:
            head += wire.sock.recv(4096)
        assert time.monotonic() - began_s > 0.4


def test_errors_before_anything_was_sent(server: ForebayServer) -> None:
    """H-279, H-145, H-281."""
    for stream in (False, True):
        with WireClient(server.http_port) as wire:
            cases: list[tuple[bytes, int, str]] = [
                (generate("nope", {}, stream=stream), 404, "Request for unknown model: 'nope' is not found"),
                (generate("echo", {}, stream=stream), 400, "expected 1 inputs but got 0 inputs for model 'echo'"),
                (generate("echo", {"INPUT0": "x"}, stream=stream), 500, "Unable to parse 'data'"),
                (generate("echo", [1], stream=stream), 500, "attempt to get members for non-object"),
                (generate("echo", {"INPUT0": [[1, 2]]}, stream=stream), 500, "Shape does not match true shape"),
                (generate("alpha_model", {"features": [1, 2]}, stream=stream), 400, "to tensor with proper shape"),
                (generate("half", {"INPUT0": 1}, stream=stream), 400, "receiving FP16 data via JSON is not supported"),
                (
                    generate("echo", {"INPUT0": 1}, "Content-Encoding: gzip", stream=stream),
                    400,
                    "Unsupported content-encoding, only 'identity' is supported.",
                ),
            ]
            for request, status, text in cases:
                answer = wire.send(request).answer()
                assert (answer.status, text in answer.text) == (status, True), answer.body
                assert answer.headers["content-type"] == "application/json"
            assert wire.send(get("/v2/models/echo/generate")).answer().status == 405


def test_errors_of_the_model(server: ForebayServer) -> None:
    """H-278: the first response decides the status; a later error is an event."""
    with WireClient(server.http_port) as wire:
        answer = wire.send(generate("streamer", {"N": -1}, stream=True)).answer()
        assert (answer.status, events(answer.body)) == (500, [{"error": "failed at 0"}])
        answer = wire.send(generate("streamer", {"N": -3}, stream=True)).answer()
        assert (answer.status, events(answer.body)[-1]) == (200, {"error": "failed at 2"})
        assert len(events(answer.body)) == 3
        answer = wire.send(generate("streamer", {"N": -1})).answer()
        assert (answer.status, answer.text) == (500, "failed at 0")


@pytest.mark.parametrize("count", [0, 2, 7])
def test_generate_wants_exactly_one_response(server: ForebayServer, count: int) -> None:
    """H-276: with status 200."""
    with WireClient(server.http_port) as wire:
        answer = wire.send(generate("streamer", {"N": count}), get("/v2")).answer()
        assert answer.status == 200
        assert answer.text.startswith("generate expects model to produce exactly 1 response, use generate stream")
        assert wire.answer().json()["name"] == "triton"


def test_streams_keep_their_place_among_pipelined_requests(server: ForebayServer) -> None:
    with WireClient(server.http_port) as wire:
        wire.send(
            generate("slow", {"INPUT0": 1, "id": "1"}),
            generate("streamer", {"N": 3, "delay": 0.05}, stream=True),
            generate("echo", {"INPUT0": 1, "id": "3"}),
            generate("streamer", {"N": 2}, stream=True),
            get("/v2"),
        )
        assert wire.answer().json()["id"] == "1"
        assert len(events(wire.answer().body)) == 3
        assert wire.answer().json()["id"] == "3"
        assert len(events(wire.answer().body)) == 2
        assert wire.answer().json()["name"] == "triton"


def test_stream_to_a_client_of_http_1_0_ends_with_the_connection(server: ForebayServer) -> None:
    for headers in ((), ("Connection: keep-alive",)):
        with WireClient(server.http_port) as wire:
            answer = wire.send(generate("streamer", {"N": 3}, *headers, version="1.0", stream=True)).answer()
            assert answer.headers["connection"] == "close"
            assert "transfer-encoding" not in answer.headers
            assert len(events(answer.body)) == 3


def test_client_that_leaves_cancels_its_stream(server: ForebayServer, notes: Path) -> None:
    """H-282, H-016."""
    for abrupt in (True, False):
        before = notes.read_text().count("cancelled") if notes.exists() else 0
        wire = WireClient(server.http_port)
        wire.send(generate("streamer", {"N": 600, "delay": 0.05}, stream=True))
        assert b"200 OK" in wire.sock.recv(4096)
        if abrupt:
            wire.reset()
        else:
            wire.sock.close()
        server.wait_for(
            lambda before=before: notes.exists() and notes.read_text().count("cancelled") > before,  # type: ignore[misc]
            "the model to see that the request is cancelled",
        )
    with WireClient(server.http_port) as other:
        assert other.send(generate("streamer", {"N": 1})).answer().status == 200


def test_stream_whose_client_does_not_read_is_cut_off(server: ForebayServer) -> None:
    """What waits for it is bounded, and the model hears of it."""
    with WireClient(server.http_port, receive_buffer_bytes=4096) as wire:
        wire.send(generate("streamer", {"N": 400, "pad": 200_000}, stream=True))
        with WireClient(server.http_port) as other:
            # The streamer has one instance: it answers others only when the first stream has ended.
            assert other.send(generate("streamer", {"N": 1})).answer().status == 200
        with pytest.raises(Exception):  # noqa: B017, PT011 - a reset or an end, as the kernel likes
            assert len(events(wire.answer().body)) == 400
