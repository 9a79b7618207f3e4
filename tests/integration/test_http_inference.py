"""Inference over real sockets with clients as people use them, in every form of input and output."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import tritonclient.http as httpclient
import tritonclient.http.aio as aioclient
from forebay_server import CONF_MODELS, ForebayServer
from http_models import copied_bytes, wait_nothing_in_use, write_models
from http_wire import WireClient, infer, post

from forebay.frontend.http.connection import UPLOAD_HEAD_BYTES

#: The client of the README.
CLIENT = """
import tritonclient.http as httpclient
import numpy as np
client = httpclient.InferenceServerClient(url="localhost:8000")
features = np.random.randn(1, 50).astype(np.float32)
inputs = [httpclient.InferInput("features", features.shape, "FP32")]
inputs[0].set_data_from_numpy(features)
outputs = [httpclient.InferRequestedOutput("prediction")]
result = client.infer("alpha_model", inputs, outputs=outputs)
prediction = result.as_numpy("prediction")
"""

FloatArray = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForebayServer]:
    models = write_models(tmp_path_factory.mktemp("http") / "models")
    with ForebayServer(models) as running:
        yield running
        wait_nothing_in_use(running)


@pytest.fixture
def client(server: ForebayServer) -> Iterator[httpclient.InferenceServerClient]:
    with httpclient.InferenceServerClient(server.http_url) as opened:
        yield opened


def features(rows: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).standard_normal((rows, 50)).astype(np.float32)


@pytest.fixture(scope="module")
def expected() -> Any:
    """Runs version 2 of the model in this process."""
    session = onnxruntime.InferenceSession(str(CONF_MODELS / "alpha_model/2/model.onnx"))
    return lambda rows: session.run(["prediction"], {"features": rows})[0]


def test_the_client_of_the_readme_runs_word_for_word(server: ForebayServer, expected: Any) -> None:
    names: dict[str, Any] = {}
    code = compile(CLIENT.replace("localhost:8000", server.http_url), "<readme>", "exec")
    exec(code, names)  # noqa: S102 - the point is to run the text
    np.testing.assert_allclose(names["prediction"], expected(names["features"]), rtol=1e-5)
    assert textwrap.dedent(CLIENT).count("\n") == 10


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
@pytest.mark.parametrize(("binary_in", "binary_out"), list(itertools.product([True, False], repeat=2)))
def test_every_combination_of_binary_and_json(
    client: httpclient.InferenceServerClient, expected: Any, rows: int, binary_in: bool, binary_out: bool
) -> None:
    """H-071, H-097, H-110, H-118."""
    values = features(rows, rows)
    given = httpclient.InferInput("features", values.shape, "FP32")
    given.set_data_from_numpy(values, binary_data=binary_in)
    outputs = [httpclient.InferRequestedOutput("prediction", binary_data=binary_out)]
    for _ in range(2):  # the second time from the plan
        result = client.infer("alpha_model", [given], outputs=outputs, request_id="r7")
        np.testing.assert_allclose(result.as_numpy("prediction"), expected(values), rtol=1e-5)
        assert result.get_response()["id"] == "r7"
        assert result.get_response()["model_version"] == "2"


def test_one_input_binary_and_the_other_json(client: httpclient.InferenceServerClient) -> None:
    """H-117; BYTES both ways (H-078, H-122)."""
    numbers = np.array([[1.5, -2.0]], dtype=np.float32)
    words = np.array([[b"a\x00b", "müsli".encode()]], dtype=np.object_)
    for binary_numbers, binary_words in ((True, False), (False, True), (True, True)):
        first = httpclient.InferInput("INPUT0", numbers.shape, "FP32")
        first.set_data_from_numpy(numbers, binary_data=binary_numbers)
        second = httpclient.InferInput("INPUT1", words.shape, "BYTES")
        second.set_data_from_numpy(words, binary_data=binary_words)
        result = client.infer("pair", [first, second])
        np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), numbers)
        assert result.as_numpy("OUTPUT1").tolist() == words.tolist()


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_both_ways(client: httpclient.InferenceServerClient, expected: Any, algorithm: str) -> None:
    """H-140..H-142, H-315."""
    values = features(3)
    given = httpclient.InferInput("features", values.shape, "FP32")
    given.set_data_from_numpy(values)
    result = client.infer(
        "alpha_model", [given], request_compression_algorithm=algorithm, response_compression_algorithm=algorithm
    )
    np.testing.assert_allclose(result.as_numpy("prediction"), expected(values), rtol=1e-5)


def test_many_at_a_time_with_the_asyncio_client(server: ForebayServer, expected: Any) -> None:
    async def one(client: aioclient.InferenceServerClient, seed: int) -> None:
        values = features(1 + seed % 5, seed)
        given = aioclient.InferInput("features", values.shape, "FP32")
        given.set_data_from_numpy(values)
        result = await client.infer("alpha_model", [given])
        np.testing.assert_allclose(result.as_numpy("prediction"), expected(values), rtol=1e-5)

    async def everything() -> None:
        async with aioclient.InferenceServerClient(server.http_url, conn_limit=16) as client:
            assert await client.is_server_ready()
            assert (await client.get_model_metadata("alpha_model"))["versions"] == ["1", "2"]
            await asyncio.gather(*(one(client, seed) for seed in range(60)))

    asyncio.run(everything())


def test_async_infer_of_the_blocking_client(server: ForebayServer, expected: Any) -> None:
    with httpclient.InferenceServerClient(server.http_url, concurrency=8) as client:
        pending = []
        for seed in range(24):
            values = features(2, seed)
            given = httpclient.InferInput("features", values.shape, "FP32")
            given.set_data_from_numpy(values)
            pending.append((values, client.async_infer("alpha_model", [given])))
        for values, result in pending:
            np.testing.assert_allclose(result.get_result().as_numpy("prediction"), expected(values), rtol=1e-5)


def test_versions_are_told_apart(client: httpclient.InferenceServerClient) -> None:
    """H-062."""
    values = features(1)
    given = httpclient.InferInput("features", values.shape, "FP32")
    given.set_data_from_numpy(values)
    answers = {
        version: client.infer("alpha_model", [given], model_version=version).get_response()["model_version"]
        for version in ("", "1", "2")
    }
    assert answers == {"": "2", "1": "1", "2": "2"}


@pytest.mark.parametrize("count", [0, 1, 5, 8_100, 8_192, 8_193, 65_000, 65_536, 65_537, 70_000, 500_000])
def test_bodies_of_every_size_around_the_limits(server: ForebayServer, count: int) -> None:
    """From the scratch (256 KiB), from the connection's buffer, straight into shared memory (above 32 KiB)."""
    values = np.arange(count, dtype=np.float32)
    request = infer("echo", [("INPUT0", "FP32", [count], values.tobytes())])
    with WireClient(server.http_port) as wire:
        for cut in (len(request), 1, 300, 40_000):
            wire.send(request[:cut])
            if cut < len(request):
                wire.send(request[cut:])
            answer = wire.answer()
            assert answer.status == 200, answer.body
            tensors = answer.tensors if count else b""
            assert tensors == values.tobytes()


def test_large_bodies_are_received_in_place(server: ForebayServer) -> None:
    """I-1: only what came together with the header is copied, and nothing on the way out."""
    values = np.random.default_rng(1).standard_normal(500_000).astype(np.float32)
    request = infer("echo", [("INPUT0", "FP32", [values.size], values.tobytes())])
    before = copied_bytes(server, "echo", "ingress"), copied_bytes(server, "echo", "gather")
    with WireClient(server.http_port) as wire:
        head = request[:400]
        arrived = 400 - (len(request) - values.nbytes)
        for _ in range(3):
            wire.send(head)
            # The rest must not be in the socket yet when the server reads the header.
            server.get("/v2/health/live")
            wire.send(request[400:])
            assert wire.answer().tensors == values.tobytes()
    wait_nothing_in_use(server)
    assert copied_bytes(server, "echo", "ingress") - before[0] == 3 * arrived
    assert copied_bytes(server, "echo", "gather") == before[1]


def test_behind_a_large_body_little_is_read_that_must_be_copied(server: ForebayServer) -> None:
    """I-1: a client that sends images sends the next one too; a small request is read as ever."""
    values = np.random.default_rng(1).standard_normal(500_000).astype(np.float32)
    large = infer("echo", [("INPUT0", "FP32", [values.size], values.tobytes())])
    small = infer("echo", [("INPUT0", "FP32", [8_000], values[:8_000].tobytes())])
    with WireClient(server.http_port) as wire:
        assert wire.send(large).answer().tensors == values.tobytes()
        before = copied_bytes(server, "echo", "ingress")
        for _ in range(2):
            assert wire.send(large).answer().tensors == values.tobytes()
        wait_nothing_in_use(server)
        assert copied_bytes(server, "echo", "ingress") - before <= 2 * UPLOAD_HEAD_BYTES
        for _ in range(3):
            assert wire.send(small).answer().tensors == values[:8_000].tobytes()
        assert wire.send(large).answer().tensors == values.tobytes()


def test_small_requests_are_copied_once(server: ForebayServer) -> None:
    """I-1: their bytes come with the header."""
    request = infer("alpha_model", [("features", "FP32", [2, 50], features(2).tobytes())])
    before = [copied_bytes(server, "alpha_model", stage) for stage in ("ingress", "egress", "gather", "scatter")]
    with WireClient(server.http_port) as wire:
        for _ in range(5):
            assert wire.send(request).answer().status == 200
    wait_nothing_in_use(server)
    after = [copied_bytes(server, "alpha_model", stage) for stage in ("ingress", "egress", "gather", "scatter")]
    assert [new - old for new, old in zip(after, before, strict=True)] == [5 * 400, 0, 0, 0]


def test_equal_json_with_other_bytes_is_another_request(server: ForebayServer) -> None:
    """What is remembered of a request's JSON: shapes, id and parameters, never its tensors."""
    with WireClient(server.http_port) as wire:
        for size in (3, 3, 20_000, 20_000):
            values = np.random.default_rng().standard_normal(size).astype(np.float32).tobytes()
            answer = wire.send(infer("echo", [("INPUT0", "FP32", [size], values)], request_id="a")).answer()
            assert answer.tensors == values
            assert answer.json()["id"] == "a"
        for length, status in ((3, 200), (3, 200), (4, 400), (3, 200)):
            text = length.to_bytes(4, "little") + b"abc"
            answer = wire.send(infer("strings", [("INPUT0", "BYTES", [1], text)])).answer()
            assert answer.status == status


def test_raw_request_of_nothing_but_tensor_bytes(server: ForebayServer) -> None:
    """H-130..H-134."""
    values = np.array([1, 2, 3], dtype=np.float32).tobytes()
    with WireClient(server.http_port) as wire:
        path = "/v2/models/echo/infer"
        answer = wire.send(post(path, values, "Inference-Header-Content-Length: 0")).answer()
        assert answer.tensors == values
        assert answer.json()["outputs"][0]["shape"] == [3]
        assert "id" not in answer.json()
        answer = wire.send(post(path, b"abc", "Inference-Header-Content-Length: 0")).answer()
        assert answer.status == 400
        assert "input byte size mismatch for input 'raw_input' for model 'echo'. Expected 0, got 3" in answer.text
        path = "/v2/models/pair/infer"
        answer = wire.send(post(path, b"abc", "Inference-Header-Content-Length: 0")).answer()
        assert "Raw request must only have 1 input (found 1) to be deduced but got 2 inputs in 'pair'" in answer.text


def test_metadata_beside_inference_on_one_connection(client: httpclient.InferenceServerClient) -> None:
    """H-310, H-311: the client's whole list of questions."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("alpha_model", "1")
    assert not client.is_model_ready("nope")
    assert client.get_server_metadata()["name"] == "triton"
    assert client.get_model_metadata("alpha_model")["inputs"][0]["shape"] == [-1, 50]
    assert client.get_model_config("alpha_model")["max_batch_size"] == 64
    statistics = client.get_inference_statistics("alpha_model", "2")["model_stats"][0]
    assert statistics["version"] == "2"
    assert {entry["name"] for entry in client.get_model_repository_index()} >= {"alpha_model", "echo"}
    assert client.get_log_settings()["log_info"] is True


def core_failures() -> list[tuple[str, dict[str, Any] | bytes, int, str]]:
    def one(**changes: Any) -> dict[str, Any]:
        entry = {"name": "features", "datatype": "FP32", "shape": [1, 50], "data": [0.5] * 50}
        return {"inputs": [{key: value for key, value in (entry | changes).items() if value is not None}]}

    unknown = "[request id: <id_unknown>] "
    return [
        ("nope", one(), 404, "Request for unknown model: 'nope' is not found"),
        ("alpha_model/versions/9", one(), 404, "Request for unknown model: 'alpha_model' version 9 is not found"),
        ("alpha_model", b"xx", 500, "failed to parse the request JSON buffer: Invalid value. at 0"),
        ("alpha_model", {}, 500, "Unable to parse 'inputs': attempt to access non-existing object member 'inputs'"),
        ("alpha_model", one(data=[1]), 500, "Unable to parse 'data': Shape does not match true shape of 'data' field"),
        (
            "alpha_model",
            one(shape=[1, -1]),
            500,
            "Unable to parse 'shape': attempt to access JSON non-unsigned-integer",
        ),
        ("alpha_model", one(datatype="FOO"), 400, "invalid datatype for input features"),
        ("alpha_model", one(name="x"), 400, "unexpected inference input 'x' for model 'alpha_model'"),
        ("alpha_model", {"inputs": []}, 400, f"{unknown}expected 1 inputs but got 0 inputs for model 'alpha_model'."),
        ("alpha_model", one(datatype="INT32", data=[1] * 50), 400, "data-type is 'INT32', but model"),
        ("alpha_model", one(shape=[1, 2, 25]), 400, "Expected [-1,50], got [1,2,25]"),
        ("alpha_model", one(shape=[65, 50], data=[0] * 3250), 400, "batch-size must be <= 64 for 'alpha_model'"),
        ("alpha_model", one(shape=[0, 50], data=[]), 400, "Expected 200, got 0"),
        ("alpha_model", one(shape=[2**40, 2**40]), 400, "exceed"),
        ("alpha_model", one(shape=[2**63]), 400, "invalid dimensions"),
        ("alpha_model", one(data=None), 400, "But no field is set"),
        ("alpha_model", one() | {"outputs": [{"name": "q"}]}, 400, "unexpected inference output 'q'"),
        (
            "alpha_model",
            one(data=["a"] * 50),
            500,
            "Unable to parse 'data': attempt to access JSON non-number as double",
        ),
        ("alpha_model", one(data=None, parameters={"binary_data_size": 8}), 400, "expecting 8 additional bytes"),
        ("alpha_model", one(data=None, parameters={"binary_data_size": 2**62}), 400, "additional bytes for model"),
        ("alpha_model", one(data=None, parameters={"shared_memory_region": "r"}), 400, ""),
    ]


@pytest.mark.parametrize(("model", "document", "status", "text"), core_failures())
def test_wrong_requests_get_status_and_text_of_the_specification(
    server: ForebayServer, model: str, document: dict[str, Any] | bytes, status: int, text: str
) -> None:
    """H-002, H-039, H-040, H-064..H-092; the connection stays open (H-017)."""
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    with WireClient(server.http_port) as wire:
        for _ in range(2):
            answer = wire.send(post(f"/v2/models/{model}/infer", body)).answer()
            assert answer.status in ((status, 404) if "shared_memory" in str(document) else (status,)), answer.text
            assert text in answer.text
        good = infer("alpha_model", [("features", "FP32", [1, 50], features(1).tobytes())])
        assert wire.send(good).answer().status == 200


@pytest.mark.parametrize(
    ("header", "status", "text"),
    [
        ("abc", 400, "Unable to parse Inference-Header-Content-Length, got: abc"),
        ("100000", 400, "inference header size should be in range"),
        ("-5", 400, "inference header size should be in range"),
        ("99999999999999999999999", 400, "inference header size should be in range"),
        ("10", 500, "failed to parse the request JSON buffer"),
    ],
)
def test_lying_header_length(server: ForebayServer, header: str, status: int, text: str) -> None:
    """H-111, H-112."""
    request = infer("alpha_model", [("features", "FP32", [1, 50], features(1).tobytes())])
    lie = re.sub(
        rb"Inference-Header-Content-Length: \d+", b"Inference-Header-Content-Length: " + header.encode(), request
    )
    with WireClient(server.http_port) as wire:
        answer = wire.send(lie).answer()
        assert (answer.status, text in answer.text) == (status, True), answer.text
        assert wire.send(request).answer().status == 200


@pytest.mark.parametrize(
    ("change", "text"), [(-4, "expecting 4 additional bytes"), (4, "unexpected additional input data")]
)
@pytest.mark.parametrize("count", [50, 20_000])
def test_too_few_and_too_many_tensor_bytes(server: ForebayServer, count: int, change: int, text: str) -> None:
    """H-114, H-115; small bodies and those that are received in place."""
    document = {
        "inputs": [
            {"name": "INPUT0", "datatype": "FP32", "shape": [count], "parameters": {"binary_data_size": count * 4}}
        ]
    }
    head = json.dumps(document).encode()
    body = head + bytes(count * 4 + change)
    with WireClient(server.http_port) as wire:
        request = post("/v2/models/echo/infer", body, f"Inference-Header-Content-Length: {len(head)}")
        answer = wire.send(request[:300]).send(request[300:]).answer()
        assert (answer.status, text in answer.text) == (400, True), answer.text
        assert wire.send(infer("echo", [("INPUT0", "FP32", [1], bytes(4))])).answer().status == 200


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\x05\x00\x00\x00abc", "incomplete string"),
        (b"\x01\x00\x00", "incomplete string length indicator"),
        (b"\x01\x00\x00\x00a\x01\x00\x00\x00b", "unexpected number of string elements 2"),
        (b"\xff\xff\xff\xffa", "incomplete string data"),
        (b"", "expected 1 string elements"),
    ],
)
@pytest.mark.parametrize("padding", [0, 40_000])
def test_broken_strings(server: ForebayServer, content: bytes, text: str, padding: int) -> None:
    """H-091, also where the bytes were received in place."""
    first = [b"%b%b" % (padding.to_bytes(4, "little"), b"x" * padding)] if padding else []
    shape = [2] if padding else [1]
    with WireClient(server.http_port) as wire:
        request = infer("strings", [("INPUT0", "BYTES", shape, b"".join(first) + content)])
        answer = wire.send(request[:280]).send(request[280:]).answer()
        assert answer.status == 400
        expected_text = (
            text.replace("elements 2", "elements 3").replace("expected 1", "expected 2") if padding else text
        )
        assert expected_text in answer.text
