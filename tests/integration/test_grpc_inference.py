"""gRPC over real sockets with the clients that people use."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.grpc.aio as aioclient
from forebay_server import CONF_MODELS, PATIENCE_S, ForebayServer, wait_until
from grpc_wire import INFER, connect, frame
from http_models import copied_bytes, wait_nothing_in_use, write_identity, write_models
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException, shared_memory

TRANSCRIPT_MODELS = Path(__file__).resolve().parents[1] / "data" / "transcript_models"

FloatArray = npt.NDArray[np.float32]

SERVICE = "/inference.GRPCInferenceService"


def url_of(server: ForebayServer) -> str:
    return f"127.0.0.1:{server.ports()['GRPCInferenceService']}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForebayServer]:
    models = write_models(tmp_path_factory.mktemp("grpc") / "models")
    shutil.copytree(TRANSCRIPT_MODELS / "dec", models / "dec")
    write_identity(models, "mixed", [("TYPE_FP32", "-1"), ("TYPE_INT64", "-1")])
    with ForebayServer(models, protocols=("grpc", "http", "metrics")) as running:
        yield running
        wait_nothing_in_use(running)


@pytest.fixture
def client(server: ForebayServer) -> Iterator[grpcclient.InferenceServerClient]:
    with grpcclient.InferenceServerClient(url_of(server)) as opened:
        yield opened


@pytest.fixture
def channel(server: ForebayServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(url_of(server)) as opened:
        yield opened


def tensor(name: str, value: npt.NDArray[Any], datatype: str = "FP32") -> grpcclient.InferInput:
    made = grpcclient.InferInput(name, list(value.shape), datatype)
    made.set_data_from_numpy(value)
    return made


def features(rows: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).standard_normal((rows, 50)).astype(np.float32)


@pytest.fixture(scope="module")
def expected() -> Any:
    """Runs version 2 of the model in this process."""
    session = onnxruntime.InferenceSession(str(CONF_MODELS / "alpha_model/2/model.onnx"))
    return lambda rows: session.run(["prediction"], {"features": rows})[0]


def test_results_are_the_models(client: grpcclient.InferenceServerClient, expected: Any) -> None:
    """With and without a plan, with and without an id, of several batch sizes."""
    for rows in (1, 64, 3, 1, 3, 64):
        for request_id in ("", "first", "a much longer request id than the first one"):
            given = features(rows, seed=rows)
            result = client.infer("alpha_model", [tensor("features", given)], request_id=request_id)
            np.testing.assert_allclose(result.as_numpy("prediction"), expected(given), rtol=1e-5)
            assert result.get_response().id == request_id


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests(client: grpcclient.InferenceServerClient, expected: Any, algorithm: str) -> None:
    """Spec G-084."""
    given = features(4)
    result = client.infer("alpha_model", [tensor("features", given)], compression_algorithm=algorithm)
    np.testing.assert_allclose(result.as_numpy("prediction"), expected(given), rtol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 4_000, 100_000, 5_000_000])
def test_tensors_of_any_size(client: grpcclient.InferenceServerClient, count: int) -> None:
    """Spec D-012, G-055; beyond every window and buffer."""
    given = np.arange(count, dtype=np.float32)
    np.testing.assert_array_equal(client.infer("echo", [tensor("INPUT0", given)]).as_numpy("OUTPUT0"), given)


def test_a_tensor_is_copied_once_each_way(server: ForebayServer, client: grpcclient.InferenceServerClient) -> None:
    before = [copied_bytes(server, "alpha_model", stage) for stage in ("ingress", "egress")]
    for _ in range(5):
        client.infer("alpha_model", [tensor("features", features(2))])

    def counted() -> bool:
        after = [copied_bytes(server, "alpha_model", stage) for stage in ("ingress", "egress")]
        return [now - then for now, then in zip(after, before, strict=True)] == [5 * 2 * 50 * 4, 5 * 2 * 4]

    wait_until(counted, "the copied bytes to be counted", timeout_s=10)


def raw_call(server: ForebayServer, request: Any) -> Any:
    """Return the reply to a request that no client would make, or (code, details)."""
    unlimited = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(url_of(server), options=unlimited) as channel:
        stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            return stub.ModelInfer(request, timeout=PATIENCE_S)
        except grpc.RpcError as error:
            failed: Any = error
            return failed.code().name, failed.details()


def large_request(model: str, *inputs: tuple[str, int], raw: list[bytes]) -> Any:
    made = service_pb2.ModelInferRequest(model_name=model, raw_input_contents=raw)
    for index, (datatype, count) in enumerate(inputs):
        made.inputs.add(name=f"INPUT{index}", datatype=datatype, shape=[count])
    return made


def test_large_messages_are_received_into_shared_memory(server: ForebayServer) -> None:
    """Two tensors of odd sizes, and what is left to copy is less than a tenth of them where frames are large."""
    first = np.random.default_rng(1).standard_normal(1_000_003).astype(np.float32)
    second = np.arange(100_001, dtype=np.int64)
    before = copied_bytes(server, "mixed", "ingress")
    message = large_request(
        "mixed", ("FP32", first.size), ("INT64", second.size), raw=[first.tobytes(), second.tobytes()]
    )
    reply = raw_call(server, message)
    assert list(reply.raw_output_contents) == [first.tobytes(), second.tobytes()]
    assert copied_bytes(server, "mixed", "ingress") - before <= first.nbytes + second.nbytes


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        pytest.param(
            large_request("mixed", ("FP32", 50_000), ("INT64", 10), raw=[bytes(200_000), bytes(79)]),
            "[request id: <id_unknown>] input byte size mismatch for input 'INPUT1' for model 'mixed'. "
            "Expected 80, got 79",
            id="second tensor too short",
        ),
        pytest.param(
            large_request("mixed", ("FP32", 50_000), ("INT64", 10), raw=[bytes(200_000)]),
            "unable to find data for input tensor 'INPUT1' for model 'mixed' in request.",
            id="second tensor missing",
        ),
        pytest.param(
            large_request("echo", ("FP32", 49_999), raw=[bytes(200_000)]),
            "[request id: <id_unknown>] input byte size mismatch for input 'INPUT0' for model 'echo'. "
            "Expected 199996, got 200000",
            id="too long",
        ),
        pytest.param(
            large_request("strings", ("BYTES", 2), raw=[bytes(200_000)]),
            "[request id: <id_unknown>] unexpected number of string elements 3 for inference input 'INPUT0' for model "
            "'strings', expecting 2",
            id="broken strings",
        ),
    ],
)
def test_large_messages_that_are_wrong(server: ForebayServer, request_: Any, expected: str) -> None:
    """The same texts as for small ones."""
    assert raw_call(server, request_) == ("INVALID_ARGUMENT", expected)


def test_a_message_beyond_shared_memory_is_refused(server: ForebayServer) -> None:
    """The arena has 256 MiB."""
    code, details = raw_call(server, large_request("echo", ("FP32", 100_000_000), raw=[bytes(400_000_000)]))
    assert code == "UNAVAILABLE"
    assert "memory" in details


def test_more_tensors_than_inputs_in_a_large_message(server: ForebayServer) -> None:
    """Spec G-038."""
    reply = raw_call(server, large_request("echo", ("FP32", 50_000), raw=[bytes(200_000), b"extra"]))
    assert list(reply.raw_output_contents) == [bytes(200_000)]


def test_large_messages_of_a_stream_keep_their_order(stream: Stream) -> None:
    for number in range(5):
        stream.ask("echo", [tensor("INPUT0", np.full(200_000, number, np.float32))], request_id=str(number))
    stream.ask("echo", [tensor("INPUT0", np.ones(1, np.float32))], request_id="small")
    assert [stream.take().id for _ in range(6)] == ["0", "1", "2", "3", "4", "small"]


def test_a_length_that_the_body_does_not_have(server: ForebayServer) -> None:
    """RFC 9113, 8.1.1."""
    length = b"\0\x0econtent-length\x0299"
    with connect(server.ports()["GRPCInferenceService"]) as wire:
        wire.sendall(frame(1, 4, 1, INFER + length) + frame(0, 1, 1, b"\0\0\0\0\0"))
        received = b""
        while frame(3, 0, 1, b"\0\0\0\1") not in received:
            received += wire.recv(4096)


def test_strings_and_numbers_in_one_request(client: grpcclient.InferenceServerClient) -> None:
    words = np.array([[b"one", b"", b"\x00\xff"], [b"four", b"5" * 300, b"sechs"]], dtype=np.object_)
    numbers = features(2)
    for _ in range(2):
        result = client.infer("pair", [tensor("INPUT0", numbers), tensor("INPUT1", words, "BYTES")])
        np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), numbers)
        assert result.as_numpy("OUTPUT1").tolist() == words.tolist()


def test_requested_outputs_come_in_the_models_order(client: grpcclient.InferenceServerClient) -> None:
    words = np.array([[b"a"]], dtype=np.object_)
    inputs = [tensor("INPUT1", words, "BYTES"), tensor("INPUT0", np.ones((1, 1), np.float32))]
    outputs = [grpcclient.InferRequestedOutput("OUTPUT1")]
    response = client.infer("pair", inputs, outputs=outputs).get_response()
    assert [output.name for output in response.outputs] == ["OUTPUT1"]
    assert len(response.raw_output_contents) == 1
    both = [grpcclient.InferRequestedOutput("OUTPUT1"), grpcclient.InferRequestedOutput("OUTPUT0")]
    response = client.infer("pair", inputs, outputs=both).get_response()
    assert [output.name for output in response.outputs] == ["OUTPUT0", "OUTPUT1"]


def test_many_calls_at_once(client: grpcclient.InferenceServerClient, expected: Any) -> None:
    results: queue.Queue[Any] = queue.Queue()
    given = [features(1, seed) for seed in range(200)]
    for number, rows in enumerate(given):
        client.async_infer(
            "alpha_model",
            [tensor("features", rows)],
            request_id=str(number),
            callback=lambda result, error: results.put((result, error)),
        )
    for _ in given:
        result, error = results.get(timeout=PATIENCE_S)
        assert error is None
        rows = given[int(result.get_response().id)]
        np.testing.assert_allclose(result.as_numpy("prediction"), expected(rows), rtol=1e-5)


def test_calls_of_one_channel_overtake_each_other(client: grpcclient.InferenceServerClient) -> None:
    """Spec G-088."""
    done: queue.Queue[str] = queue.Queue()
    one = [tensor("INPUT0", np.ones(1, np.float32))]
    client.async_infer("slow", one, callback=lambda result, error: done.put("slow"))
    client.infer("echo", one)
    done.put("fast")
    assert [done.get(timeout=PATIENCE_S), done.get(timeout=PATIENCE_S)] == ["fast", "slow"]


def test_a_deadline_ends_the_call(client: grpcclient.InferenceServerClient) -> None:
    """Spec G-089."""
    with pytest.raises(InferenceServerException, match="Deadline Exceeded"):
        client.infer("slow", [tensor("INPUT0", np.ones(1, np.float32))], client_timeout=0.1)
    client.infer("echo", [tensor("INPUT0", np.ones(1, np.float32))])


def test_a_cancelled_call_ends(client: grpcclient.InferenceServerClient) -> None:
    done: queue.Queue[Any] = queue.Queue()
    one = [tensor("INPUT0", np.ones(1, np.float32))]
    call = client.async_infer("slow", one, callback=lambda result, error: done.put(error))
    call.cancel()
    assert "Locally cancelled" in str(done.get(timeout=PATIENCE_S))


def test_asyncio_client(server: ForebayServer, expected: Any) -> None:
    async def use() -> None:
        async with aioclient.InferenceServerClient(url_of(server)) as client:
            assert await client.is_server_live()
            given = [features(1, seed) for seed in range(20)]
            results = await asyncio.gather(*[client.infer("alpha_model", [tensor("features", x)]) for x in given])
            for rows, result in zip(given, results, strict=True):
                np.testing.assert_allclose(result.as_numpy("prediction"), expected(rows), rtol=1e-5)

            async def requests() -> Any:
                for rows in given:
                    yield {"model_name": "alpha_model", "inputs": [tensor("features", rows)]}

            found = [result async for result, error in client.stream_infer(requests()) if error is None]
            assert len(found) == len(given)

    asyncio.run(use())


# --- streams ---


class Stream:
    """tritonclient's stream, with its answers in a queue."""

    def __init__(self, client: grpcclient.InferenceServerClient, **options: Any) -> None:
        self.client = client
        self.answers: queue.Queue[Any] = queue.Queue()
        client.start_stream(callback=lambda result, error: self.answers.put((result, error)), **options)

    def ask(self, model: str, inputs: list[Any], **options: Any) -> None:
        self.client.async_stream_infer(model, inputs, **options)

    def take(self) -> Any:
        result, error = self.answers.get(timeout=PATIENCE_S)
        assert error is None, error
        return result.get_response()


@pytest.fixture
def stream(client: grpcclient.InferenceServerClient) -> Iterator[Stream]:
    yield Stream(client)
    client.stop_stream()


def is_final(response: Any) -> bool:
    return bool(response.parameters["triton_final_response"].bool_param)


def test_replies_of_a_stream_keep_the_order_of_the_requests(stream: Stream) -> None:
    """Spec G-061: a slow one holds back what was asked after it."""
    one = [tensor("INPUT0", np.ones(1, np.float32))]
    for number, model in enumerate(["slow", "echo", "echo", "zz", "slow", "echo"]):
        stream.ask(model, one, request_id=str(number))
    answers = [stream.answers.get(timeout=PATIENCE_S) for _ in range(6)]
    assert [result.get_response().id if result else str(error) for result, error in answers] == [
        "0", "1", "2", "Request for unknown model: 'zz' is not found", "4", "5",
    ]  # fmt: skip
    assert all(is_final(result.get_response()) for result, _error in answers if result)


def test_a_decoupled_model_answers_as_often_as_it_likes(stream: Stream) -> None:
    """Spec G-063, G-064; and others on the same stream are not in its way (spec G-060)."""
    stream.ask("dec", [tensor("IN", np.array([3], np.float32))], request_id="d", enable_empty_final_response=True)
    replies = [stream.take() for _ in range(4)]
    values = [np.frombuffer(reply.raw_output_contents[0], np.float32)[0] for reply in replies[:3]]
    assert values == [0, 1, 2]
    assert [is_final(reply) for reply in replies] == [False, False, False, True]
    assert not replies[3].outputs
    stream.ask("dec", [tensor("IN", np.array([1], np.float32))], request_id="d")
    stream.ask("echo", [tensor("INPUT0", np.ones(1, np.float32))], request_id="e")
    assert sorted(stream.take().id for _ in range(2)) == ["d", "e"]


def test_many_replies_to_a_client_that_reads_slowly(client: grpcclient.InferenceServerClient) -> None:
    """Spec G-086: thousands of replies wait their turn; none is lost or out of order."""
    found: list[float] = []
    last = threading.Event()

    def take(result: Any, error: Any) -> None:
        response = result.get_response()
        if not response.outputs:
            last.set()
            return
        found.append(float(np.frombuffer(response.raw_output_contents[0], np.float32)[0]))
        if len(found) % 500 == 0:
            time.sleep(0.05)

    client.start_stream(callback=take)
    count = 3000
    client.async_stream_infer("dec", [tensor("IN", np.array([count], np.float32))], enable_empty_final_response=True)
    assert last.wait(PATIENCE_S)
    client.stop_stream()
    assert found == list(range(count))


def test_a_stream_ends_after_what_was_asked(channel: grpc.Channel) -> None:
    """Spec G-068: half close, then every answer, then OK."""
    stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    request = service_pb2.ModelInferRequest(model_name="slow", raw_input_contents=[bytes(4)])
    request.inputs.add(name="INPUT0", datatype="FP32", shape=[1])
    call = stub.ModelStreamInfer(iter([request]))
    assert len(list(call)) == 1
    assert call.code() is grpc.StatusCode.OK


def test_a_cancelled_stream_lets_go_of_its_requests(channel: grpc.Channel, server: ForebayServer) -> None:
    """Spec G-069."""
    stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    request = service_pb2.ModelInferRequest(model_name="slow", raw_input_contents=[bytes(4)])
    request.inputs.add(name="INPUT0", datatype="FP32", shape=[1])
    call = stub.ModelStreamInfer(iter([request] * 10))
    time.sleep(0.05)
    call.cancel()
    wait_nothing_in_use(server)


def test_streams_progress_independently(channel: grpc.Channel) -> None:
    """Spec L-041."""
    stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    request = service_pb2.ModelInferRequest(model_name="echo", raw_input_contents=[bytes(4)])
    request.inputs.add(name="INPUT0", datatype="FP32", shape=[1])
    stop = threading.Event()

    def requests() -> Iterator[Any]:
        yield request
        stop.wait(PATIENCE_S)

    calls = [stub.ModelStreamInfer(requests()) for _ in range(30)]
    try:
        for call in reversed(calls):
            assert next(call).infer_response.model_name == "echo"
    finally:
        stop.set()
    assert all(list(call) == [] for call in calls)


# --- the other services ---


def test_what_http_and_grpc_say_of_a_model_is_the_same(client: grpcclient.InferenceServerClient, server: Any) -> None:
    """Spec G-004, G-005, G-008."""
    import tritonclient.http as httpclient

    with httpclient.InferenceServerClient(server.http_url) as other:
        assert client.get_server_metadata(as_json=True) == other.get_server_metadata()
        assert client.get_model_metadata("alpha_model", as_json=True)["inputs"] == [
            {**entry, "shape": [str(size) for size in entry["shape"]]}
            for entry in other.get_model_metadata("alpha_model")["inputs"]
        ]
        ours = client.get_model_config("alpha_model", as_json=True)["config"]
        theirs = other.get_model_config("alpha_model")
        for key in ("name", "backend", "max_batch_size"):
            assert ours[key] == theirs[key]
        assert ours["dynamic_batching"]["preferred_batch_size"] == theirs["dynamic_batching"]["preferred_batch_size"]


def test_log_settings(client: grpcclient.InferenceServerClient) -> None:
    """Spec G-017."""
    try:
        assert client.update_log_settings({"log_verbose_level": 1}).settings["log_verbose_level"].uint32_param == 1
        assert client.get_log_settings().settings["log_verbose_level"].uint32_param == 1
    finally:
        client.update_log_settings({"log_verbose_level": 0})
    with pytest.raises(InferenceServerException, match="log file location can not be updated through network"):
        client.update_log_settings({"log_file": "x"})


def test_regions_are_off_by_default(client: grpcclient.InferenceServerClient) -> None:
    """Spec G-014, H-190."""
    with pytest.raises(InferenceServerException, match="Client shared memory is disabled"):
        client.register_system_shared_memory("r", "/r", 8)


def test_health_service(channel: grpc.Channel) -> None:
    """Spec G-018, G-019: Check, and Watch, which Triton lacks."""
    assert channel.unary_unary("/grpc.health.v1.Health/Check")(b"") == b"\x08\x01"
    watch = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"\x0a\x01x")
    assert next(watch) == b"\x08\x01"
    watch.cancel()


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection(channel: grpc.Channel, version: str) -> None:
    """Spec L-033: what ``grpcurl list`` and ``describe`` ask."""
    name = b"inference.GRPCInferenceService"
    method = channel.stream_stream(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo")
    unknown = b"no.such.Symbol"
    answers = list(method(iter([b"\x3a\x01*", bytes((0x22, len(name))) + name, bytes((0x22, len(unknown))) + unknown])))
    assert all(service in answers[0] for service in (name, b"grpc.health.v1.Health"))
    assert all(file in answers[1] for file in (b"grpc_service.proto", b"model_config.proto", b"ModelStreamInfer"))
    assert b"Symbol not found." in answers[2]


@pytest.mark.parametrize(
    ("path", "body", "code", "details"),
    [
        (f"{SERVICE}/Nope", b"", grpc.StatusCode.UNIMPLEMENTED, ""),
        ("/Other/ModelInfer", b"", grpc.StatusCode.UNIMPLEMENTED, ""),
        (f"{SERVICE}/ModelInfer", b"\x0a\xff", grpc.StatusCode.INTERNAL, "Unable to parse request"),
        (f"{SERVICE}/ModelConfig", b"\x0a\xff", grpc.StatusCode.INTERNAL, "Unable to parse request"),
        (f"{SERVICE}/ModelInfer", b"\x0a\x02\xff\xfe", grpc.StatusCode.INTERNAL, "Unable to parse request"),
    ],
)
def test_what_is_no_request(channel: grpc.Channel, path: str, body: bytes, code: Any, details: str) -> None:
    """Spec G-021."""
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(path)(body, timeout=PATIENCE_S)
    failed: Any = caught.value
    assert (failed.code(), failed.details()) == (code, details)


def test_other_http_clients_get_an_answer(server: ForebayServer) -> None:
    """nghttp and curl speak HTTP/2 without gRPC; a plain HTTP/1 request is turned away."""
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    for arguments, status in ((["-X", "GET"], "405"), (["-d", "x"], "415")):
        found = subprocess.run(
            [curl, "-s", "--http2-prior-knowledge", *arguments, "-o", "/dev/null", "-w", "%{http_code}",
             f"http://{url_of(server)}/inference.GRPCInferenceService/ServerLive"],
            capture_output=True, text=True, check=True, timeout=PATIENCE_S,
        )  # fmt: skip
        assert found.stdout == status
    host, port = url_of(server).split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"does not speak HTTP/2" in b"".join(iter(lambda: plain.recv(4096), b""))


# --- servers with other settings ---


@pytest.fixture
def alpha(tmp_path: Path) -> Path:
    shutil.copytree(CONF_MODELS / "alpha_model", tmp_path / "models" / "alpha_model")
    return tmp_path / "models"


def test_restricted_protocols(alpha: Path) -> None:
    """Spec G-080."""
    with (
        ForebayServer(alpha, "--grpc-restricted-protocol=inference,health:admin=secret", protocols=("grpc",)) as server,
        grpcclient.InferenceServerClient(url_of(server)) as client,
    ):
        text = "This protocol is restricted, expecting header 'triton-grpc-protocol-admin'"
        key = {"triton-grpc-protocol-admin": "secret"}
        inputs = [tensor("features", features(1))]
        for _ in range(2):
            for headers in ({}, {"triton-grpc-protocol-admin": "wrong"}):
                with pytest.raises(InferenceServerException, match=text) as caught:
                    client.infer("alpha_model", inputs, headers=headers)
                assert caught.value.status() == "StatusCode.UNAVAILABLE"
            client.infer("alpha_model", inputs, headers=key)
        with pytest.raises(InferenceServerException, match=text):
            client.is_server_live()
        assert client.is_server_live(headers=key)
        assert client.get_server_metadata().name == "triton"


def test_compressed_replies(alpha: Path, expected: Any) -> None:
    """Spec G-084."""
    with (
        ForebayServer(alpha, "--grpc-infer-response-compression-level=high", protocols=("grpc",)) as server,
        grpcclient.InferenceServerClient(url_of(server)) as client,
    ):
        given = features(64)
        for _ in range(2):
            result = client.infer("alpha_model", [tensor("features", given)])
            np.testing.assert_allclose(result.as_numpy("prediction"), expected(given), rtol=1e-5)
        stream = Stream(client)
        stream.ask("alpha_model", [tensor("features", given)])
        assert is_final(stream.take())
        client.stop_stream()


def test_a_stopping_server_finishes_what_it_was_asked(tmp_path: Path) -> None:
    """Spec G-087: SIGTERM while a call runs."""
    models = write_models(tmp_path / "models")
    with ForebayServer(models, protocols=("grpc",)) as server:
        with grpcclient.InferenceServerClient(url_of(server)) as client:
            done: queue.Queue[Any] = queue.Queue()
            one = [tensor("INPUT0", np.ones(1, np.float32))]
            client.infer("slow", one)
            client.async_infer("slow", one, callback=lambda result, error: done.put(error))
            time.sleep(0.2)
            server.process.send_signal(signal.SIGTERM)
            assert done.get(timeout=PATIENCE_S) is None
        assert server.process.wait(PATIENCE_S) == 0


def test_streams_end_with_the_server(alpha: Path) -> None:
    """Spec G-087: an idle stream ends well; who watches the health is told."""
    with ForebayServer(alpha, protocols=("grpc",)) as server, grpc.insecure_channel(url_of(server)) as channel:
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"")
        assert next(watch) == b"\x08\x01"
        stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        stop = threading.Event()
        stream = stub.ModelStreamInfer(iter(lambda: stop.wait(PATIENCE_S), True))
        # The header is out as soon as the stream is taken.
        stream.initial_metadata()
        server.process.send_signal(signal.SIGTERM)
        assert list(stream) == []
        assert stream.code() is grpc.StatusCode.OK
        stop.set()
        assert next(watch) == b"\x08\x02"
        with pytest.raises(grpc.RpcError) as caught:
            next(watch)
        failed: Any = caught.value
        assert failed.code() is grpc.StatusCode.UNAVAILABLE
        assert server.process.wait(PATIENCE_S) == 0


def make_certificates(folder: Path) -> dict[str, Path]:
    """Make an authority and certificates for server and client with the openssl program."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("the openssl program is not installed")

    def run(*arguments: str) -> None:
        subprocess.run([openssl, *arguments], check=True, capture_output=True, cwd=folder, timeout=PATIENCE_S)

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    run("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=test authority", "-days", "2")
    for name in ("server", "client"):
        run("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
        run("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
            "-out", f"{name}.crt", "-days", "2", "-extfile", "names")  # fmt: skip
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("mutual", [False, True])
def test_tls(alpha: Path, tmp_path: Path, mutual: bool, expected: Any) -> None:
    """Spec G-081."""
    folder = tmp_path / "certificates"
    folder.mkdir()
    files = make_certificates(folder)
    flags = [f"--grpc-server-cert={files['server.crt']}", f"--grpc-server-key={files['server.key']}"]
    if mutual:
        flags += ["--grpc-use-ssl-mutual=true", f"--grpc-root-cert={files['ca.crt']}"]
    else:
        flags += ["--grpc-use-ssl=true"]
    with ForebayServer(alpha, *flags, protocols=("grpc",)) as server:
        own = {"private_key": str(files["client.key"]), "certificate_chain": str(files["client.crt"])}

        def open_client(**more: str) -> grpcclient.InferenceServerClient:
            return grpcclient.InferenceServerClient(
                url_of(server), ssl=True, root_certificates=str(files["ca.crt"]), **more
            )

        with open_client(**(own if mutual else {})) as client:
            given = features(3)
            result = client.infer("alpha_model", [tensor("features", given)])
            np.testing.assert_allclose(result.as_numpy("prediction"), expected(given), rtol=1e-5)
        if mutual:
            with open_client() as stranger, pytest.raises(InferenceServerException):
                stranger.is_server_live(client_timeout=5)


def test_tensors_in_shared_memory(tmp_path: Path) -> None:
    """Spec G-013, G-014, G-038, G-043, G-046: inputs and outputs in a region, nothing in the messages."""
    models = write_models(tmp_path / "models")
    given = np.arange(1000, dtype=np.float32)
    size = given.nbytes
    region = shared_memory.create_shared_memory_region("both", f"/forebay_test_{tmp_path.name}", 2 * size)
    try:
        shared_memory.set_shared_memory_region(region, [given])
        with (
            ForebayServer(models, "--allow-client-shm=true", protocols=("grpc",)) as server,
            grpcclient.InferenceServerClient(url_of(server)) as client,
        ):
            source = grpcclient.InferInput("INPUT0", [1000], "FP32")
            source.set_shared_memory("both", size)
            target = grpcclient.InferRequestedOutput("OUTPUT0")
            target.set_shared_memory("both", size, offset=size)
            with pytest.raises(InferenceServerException, match="Unable to find shared memory region: 'both'"):
                client.infer("echo", [source], outputs=[target])
            client.register_system_shared_memory("both", f"/forebay_test_{tmp_path.name}", 2 * size)
            assert client.get_system_shared_memory_status().regions["both"].byte_size == 2 * size
            for _ in range(2):
                response = client.infer("echo", [source], outputs=[target]).get_response()
                assert list(response.raw_output_contents) == [b""]
                found = shared_memory.get_contents_as_numpy(region, np.float32, [1000], offset=size)
                np.testing.assert_array_equal(found, given)
            stream = Stream(client)
            stream.ask("echo", [source], outputs=[target])
            assert list(stream.take().raw_output_contents) == [b""]
            client.stop_stream()
            source.set_shared_memory("both", size, offset=2 * size)
            with pytest.raises(InferenceServerException, match=r"[Ii]nvalid offset"):
                client.infer("echo", [source])
            client.unregister_system_shared_memory("both")
            assert not client.get_system_shared_memory_status().regions
    finally:
        shared_memory.destroy_shared_memory_region(region)


def test_too_many_pings(alpha: Path) -> None:
    """Spec G-082: a client that pings too often is told so."""
    limits = ["--grpc-http2-min-recv-ping-interval-without-data=300000", "--grpc-http2-max-ping-strikes=2"]
    with ForebayServer(alpha, *limits, protocols=("grpc",)) as server:
        host, port = url_of(server).split(":")
        with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as wire:
            ping = b"\0\0\x08\x06\0\0\0\0\0" + bytes(8)
            wire.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
            for _ in range(4):
                wire.sendall(ping)
                time.sleep(0.05)
            assert b"too_many_pings" in b"".join(iter(lambda: wire.recv(4096), b""))


def test_connections_grow_old(alpha: Path) -> None:
    """Spec G-083: connections end, calls do not fail."""
    with (
        ForebayServer(alpha, "--grpc-max-connection-age=300", protocols=("grpc",)) as server,
        grpcclient.InferenceServerClient(url_of(server)) as client,
    ):
        end_s = time.monotonic() + 1.5
        while time.monotonic() < end_s:
            client.infer("alpha_model", [tensor("features", features(1))])


# --- clients that misbehave ---


def memory_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    raise AssertionError("no memory")


def rapid_reset(wire: socket.socket) -> None:
    for number in range(1, 200_000, 2):
        wire.sendall(frame(1, 4, number, INFER) + frame(3, 0, number, bytes(4)))


def endless_header(wire: socket.socket) -> None:
    wire.sendall(frame(1, 0, 1, INFER))
    for _ in range(100_000):
        wire.sendall(frame(9, 0, 1, b"\0\x01a\x7f\x81\x1e" + b"v" * 4000))


def settings_flood(wire: socket.socket) -> None:
    for _ in range(100_000):
        wire.sendall(frame(4, 0, 0, b"\0\4\0\0\0\0" * 8))


def ping_flood(wire: socket.socket) -> None:
    for _ in range(100_000):
        wire.sendall(frame(6, 0, 0, bytes(8)) * 10)


@pytest.mark.parametrize("attack", [rapid_reset, endless_header, settings_flood, ping_flood])
def test_a_flood_ends_its_connection_and_nothing_else(
    server: ForebayServer, client: grpcclient.InferenceServerClient, attack: Callable[[socket.socket], None]
) -> None:
    client.is_server_live()
    pid = server.pid_of("grpc")
    before = memory_kib(pid)
    with (
        connect(server.ports()["GRPCInferenceService"]) as wire,
        pytest.raises((BrokenPipeError, ConnectionResetError)),
    ):
        attack(wire)
    client.infer("alpha_model", [tensor("features", features(1))])
    assert server.pid_of("grpc") == pid
    assert memory_kib(pid) - before < 50_000


def test_a_client_that_takes_no_reply_costs_bounded_memory(
    server: ForebayServer, client: grpcclient.InferenceServerClient
) -> None:
    """A window of zero: replies wait, until calls are refused."""
    client.is_server_live()
    message = service_pb2.ModelInferRequest(model_name="echo", raw_input_contents=[bytes(1_000_000)])
    message.inputs.add(name="INPUT0", datatype="FP32", shape=[250_000])
    body = message.SerializeToString()
    data = b"\0" + len(body).to_bytes(4, "big") + body
    pid = server.pid_of("grpc")
    before = memory_kib(pid)
    refused = threading.Event()

    def read(wire: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while received := wire.recv(65536):
                if b"\0\0\4\3\0" in received:
                    refused.set()

    with connect(server.ports()["GRPCInferenceService"]) as wire:
        wire.sendall(frame(4, 0, 0, b"\0\4\0\0\0\0"))
        reader = threading.Thread(target=read, args=(wire,))
        reader.start()
        number = 1
        while not refused.is_set() and number < 10_000:
            wire.sendall(frame(1, 4, number, INFER))
            pieces = [data[start : start + 16_384] for start in range(0, len(data), 16_384)]
            wire.sendall(b"".join(frame(0, 0, number, piece) for piece in pieces[:-1]))
            wire.sendall(frame(0, 1, number, pieces[-1]))
            number += 2
        assert refused.wait(PATIENCE_S)
        grown = memory_kib(pid) - before
        wire.shutdown(socket.SHUT_RDWR)
        reader.join(PATIENCE_S)
    assert grown < 200_000
    client.infer("alpha_model", [tensor("features", features(1))])


def test_a_thousand_idle_connections_are_in_nobodys_way(
    server: ForebayServer, client: grpcclient.InferenceServerClient
) -> None:
    client.is_server_live()
    pid = server.pid_of("grpc")
    before = memory_kib(pid)
    wires = [connect(server.ports()["GRPCInferenceService"]) for _ in range(500)]
    try:
        client.infer("alpha_model", [tensor("features", features(1))])
        assert (memory_kib(pid) - before) / len(wires) < 64
    finally:
        for wire in wires:
            wire.close()


def test_half_a_message_holds_nothing(server: ForebayServer, client: grpcclient.InferenceServerClient) -> None:
    """Lengths that lie: a message of 2 GB is announced, and a few bytes of it sent."""
    with connect(server.ports()["GRPCInferenceService"]) as wire:
        wire.sendall(frame(1, 4, 1, INFER) + frame(0, 1, 1, b"\0\x7f\xff\xff\xff" + b"few bytes"))
        received = b""
        while b"grpc-status" not in received:
            received += wire.recv(4096)
        assert b"the request ends within a message" in received
    client.infer("alpha_model", [tensor("features", features(1))])
