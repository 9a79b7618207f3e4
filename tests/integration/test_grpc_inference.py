"""gRPC over real sockets with the clients that people use."""

from __future__ import annotations

import asyncio
import queue
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.grpc.aio as aioclient
from forebay_server import PATIENCE_S, ForebayServer, wait_until
from grpc_clients import Stream, alpha_model_of, features, is_final, tensor, url_of
from grpc_wire import INFER, connect, frame, header_block
from http_models import copied_bytes, wait_nothing_in_use, write_identity, write_models
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

TRANSCRIPT_MODELS = Path(__file__).resolve().parents[1] / "data" / "transcript_models"

SERVICE = "/inference.GRPCInferenceService"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForebayServer]:
    models = write_models(tmp_path_factory.mktemp("grpc") / "models")
    shutil.copytree(TRANSCRIPT_MODELS / "dec", models / "dec")
    write_identity(models, "mixed", [("TYPE_FP32", "-1"), ("TYPE_INT64", "-1")])
    patient = shutil.copytree(models / "alpha_model", models / "patient") / "config.pbtxt"
    config = patient.read_text().replace('name: "alpha_model"', 'name: "patient"')
    patient.write_text(re.sub(r"max_queue_delay_microseconds: \d+", "max_queue_delay_microseconds: 200000000", config))
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


@pytest.fixture(scope="module")
def expected() -> Any:
    return alpha_model_of(2)


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


@pytest.mark.parametrize("is_stream", [False, True])
def test_cancelled_requests_in_rows_leave_the_queue_at_once(
    channel: grpc.Channel, server: ForebayServer, is_stream: bool
) -> None:
    """Spec S-183: the model would wait for a full batch for minutes. The second request has a plan."""
    stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    request = service_pb2.ModelInferRequest(model_name="patient", raw_input_contents=[bytes(200)])
    request.inputs.add(name="features", datatype="FP32", shape=[1, 50])
    if is_stream:
        calls = [stub.ModelStreamInfer(iter([request] * 2))]
    else:
        calls = [stub.ModelInfer.future(request) for _ in range(2)]
    wait_until(lambda: _rows_in_use(server, "patient") == 2, "the requests to be queued")
    for call in calls:
        call.cancel()
    wait_until(lambda: _rows_in_use(server, "patient") == 0, "the rows to be free")


def _rows_in_use(server: ForebayServer, model: str) -> int:
    found = re.findall(rf'^forebay_slab_rows_in_use\{{[^}}]*model="{model}"[^}}]*\}} (\d+)$', server.metrics(), re.M)
    return sum(map(int, found))


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


@pytest.fixture
def stream(client: grpcclient.InferenceServerClient) -> Iterator[Stream]:
    yield Stream(client)
    client.stop_stream()


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


def test_small_requests_of_a_stream_cost_no_window_updates(server: ForebayServer) -> None:
    """What has been taken is told in few frames, not with every reply."""
    message = large_request("echo", ("FP32", 1), raw=[bytes(4)]).SerializeToString()
    data = b"\0" + len(message).to_bytes(4, "big") + message
    with connect(server.ports()["GRPCInferenceService"]) as wire:
        wire.sendall(frame(1, 4, 1, header_block(f"{SERVICE}/ModelStreamInfer".encode())))
        wire.sendall(frame(0, 0, 1, data) * 20 + frame(0, 1, 1))
        received = b""
        while b"grpc-status" not in received:
            received += wire.recv(65_536)
    kinds: list[int] = []
    while received:
        kinds.append(received[3])
        received = received[9 + int.from_bytes(received[:3], "big") :]
    assert kinds.count(0) == 20
    # The one of the greeting.
    assert kinds.count(8) == 1


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
