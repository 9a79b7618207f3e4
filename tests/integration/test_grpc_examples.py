"""The flows of Triton's public Python client examples over gRPC, each as a test named after its program.

The models are stand-ins for those that the examples use (``simple``, ``simple_string``, ``simple_sequence``,
``simple_identity``, ``simple_int8``, ``repeat_int32``), with the same names, tensors and answers.
"""

from __future__ import annotations

import asyncio
import gc
import json
import queue
import shutil
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.grpc.aio as aioclient
from forebay_server import PATIENCE_S, ForebayServer
from grpc_clients import Stream, tensor, url_of
from tritonclient import utils
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException, shared_memory

MODELS = Path(__file__).resolve().parents[1] / "data" / "client_examples"

ONES = np.ones((1, 16), np.int32)
COUNTED = np.arange(16, dtype=np.int32)[np.newaxis]

IntArray = npt.NDArray[np.int32]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForebayServer]:
    models = tmp_path_factory.mktemp("examples") / "models"
    shutil.copytree(MODELS, models, ignore=shutil.ignore_patterns(".*"))
    with ForebayServer(
        models,
        "--model-control-mode=explicit",
        "--load-model=*",
        "--allow-client-shm=true",
        protocols=("grpc",),
    ) as running:
        yield running


@pytest.fixture
def client(server: ForebayServer) -> Iterator[grpcclient.InferenceServerClient]:
    with grpcclient.InferenceServerClient(url_of(server)) as opened:
        yield opened


@pytest.fixture
def stub(server: ForebayServer) -> Iterator[Any]:
    with grpc.insecure_channel(url_of(server)) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def simple_inputs() -> list[grpcclient.InferInput]:
    return [tensor("INPUT0", COUNTED, "INT32"), tensor("INPUT1", ONES, "INT32")]


def simple_outputs() -> list[grpcclient.InferRequestedOutput]:
    return [grpcclient.InferRequestedOutput(name) for name in ("OUTPUT0", "OUTPUT1")]


def check_simple(result: Any) -> None:
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), COUNTED + ONES)
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), COUNTED - ONES)


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_simple_grpc_infer_client(client: grpcclient.InferenceServerClient, compression: str | None) -> None:
    """With outputs named and not, with headers, and the statistics afterwards."""
    before = client.get_inference_statistics(model_name="simple").model_stats[0].inference_count
    for outputs in (simple_outputs(), None):
        result = client.infer(
            model_name="simple",
            inputs=simple_inputs(),
            outputs=outputs,
            client_timeout=PATIENCE_S,
            headers={"test": "1"},
            compression_algorithm=compression,
        )
        check_simple(result)
    statistics = client.get_inference_statistics(model_name="simple")
    assert len(statistics.model_stats) == 1
    assert statistics.model_stats[0].inference_count == before + 2


def test_simple_grpc_async_infer_client(client: grpcclient.InferenceServerClient) -> None:
    results: list[Any] = []
    arrived: queue.Queue[None] = queue.Queue()

    def take(into: list[Any], result: Any, error: Any) -> None:
        into.append(error or result)
        arrived.put(None)

    for _ in range(2):
        client.async_infer("simple", simple_inputs(), callback=partial(take, results), outputs=simple_outputs())
    for _ in range(2):
        arrived.get(timeout=PATIENCE_S)
    for result in results:
        check_simple(result)


def test_simple_grpc_aio_infer_client(server: ForebayServer) -> None:
    async def use() -> None:
        async with aioclient.InferenceServerClient(url_of(server)) as client:
            assert await client.is_server_ready()
            assert await client.is_model_ready("simple")
            check_simple(await client.infer("simple", simple_inputs(), outputs=simple_outputs(), headers={"test": "1"}))
            assert (await client.get_inference_statistics("simple")).model_stats[0].name == "simple"

    asyncio.run(use())


def test_simple_grpc_string_infer_client(client: grpcclient.InferenceServerClient) -> None:
    def texts(values: IntArray) -> npt.NDArray[np.object_]:
        return np.array([str(value).encode() for value in values.ravel()], dtype=np.object_).reshape(values.shape)

    inputs = [tensor("INPUT0", texts(COUNTED), "BYTES"), tensor("INPUT1", texts(ONES), "BYTES")]
    result = client.infer("simple_string", inputs, outputs=simple_outputs())
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0").astype(np.int32), COUNTED + ONES)
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1").astype(np.int32), COUNTED - ONES)

    # Null-containing byte data, which must come back as it is.
    zeros = np.array([[b"he\x00llo\x00", b"\x00", b""]], dtype=np.object_)
    result = client.infer("simple_identity", [tensor("INPUT0", zeros, "BYTES")])
    assert result.as_numpy("OUTPUT0").tolist() == zeros.tolist()


VALUES = [11, 7, 5, 3, 2, 0, 1]


def expected_sums(values: list[int]) -> list[int]:
    return [1 + sum(values[: index + 1]) for index in range(len(values))]


def sequence_input(value: int) -> list[grpcclient.InferInput]:
    return [tensor("INPUT", np.full((1, 1), value, np.int32), "INT32")]


def flags_of(index: int) -> dict[str, bool]:
    return {"sequence_start": index == 0, "sequence_end": index == len(VALUES) - 1}


@pytest.mark.parametrize(("first", "second"), [(1000, 1001), ("a text", "another")])
def test_simple_grpc_sequence_sync_infer_client(
    client: grpcclient.InferenceServerClient, first: int | str, second: int | str
) -> None:
    """Two sequences in turns, with numbers and with texts as ids."""
    found: dict[int | str, list[int]] = {first: [], second: []}
    for index, value in enumerate(VALUES):
        for sequence, sign in ((first, 1), (second, -1)):
            result = client.infer(
                "simple_sequence", sequence_input(sign * value), sequence_id=sequence, **flags_of(index)
            )
            found[sequence].append(int(result.as_numpy("OUTPUT")[0][0]))
    assert found[first] == expected_sums(VALUES)
    assert found[second] == expected_sums([-value for value in VALUES])


@pytest.mark.parametrize(("first", "second"), [(1007, 1008), ("one", "two")])
def test_simple_grpc_sequence_stream_infer_client(
    client: grpcclient.InferenceServerClient, first: int | str, second: int | str
) -> None:
    stream = Stream(client)
    for sequence, sign in ((first, 1), (second, -1)):
        for index, value in enumerate(VALUES):
            stream.ask(
                "simple_sequence",
                sequence_input(sign * value),
                request_id=f"{sequence}_{index}",
                sequence_id=sequence,
                **flags_of(index),
            )
    answers = [stream.take() for _ in range(2 * len(VALUES))]
    client.stop_stream()
    found = {answer.id: int(np.frombuffer(answer.raw_output_contents[0], np.int32)[0]) for answer in answers}
    for sequence, sums in ((first, expected_sums(VALUES)), (second, expected_sums([-value for value in VALUES]))):
        assert [found[f"{sequence}_{index}"] for index in range(len(VALUES))] == sums


def test_simple_grpc_aio_sequence_stream_infer_client(server: ForebayServer) -> None:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        for index, value in enumerate(VALUES):
            yield {
                "model_name": "simple_sequence",
                "inputs": sequence_input(value),
                "request_id": str(index),
                "sequence_id": 1017,
                **flags_of(index),
            }

    async def use() -> list[int]:
        async with aioclient.InferenceServerClient(url_of(server)) as client:
            found: list[int] = []
            async for result, error in client.stream_infer(inputs_iterator=requests()):
                assert error is None
                found.append(int(result.as_numpy("OUTPUT")[0][0]))
            return found

    assert asyncio.run(use()) == expected_sums(VALUES)


# --- shared memory ---


class Region:
    """A registered region of shared memory, gone at the end."""

    def __init__(self, client: grpcclient.InferenceServerClient, name: str, byte_size: int) -> None:
        self.name, self.byte_size = name, byte_size
        self._client = client
        self.handle = shared_memory.create_shared_memory_region(name, f"/forebay_{name}", byte_size)
        client.register_system_shared_memory(name, f"/forebay_{name}", byte_size)

    def __enter__(self) -> Region:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.unregister_system_shared_memory(self.name)
        shared_memory.destroy_shared_memory_region(self.handle)


def test_simple_grpc_shm_client(client: grpcclient.InferenceServerClient, tmp_path: Path) -> None:
    """Both inputs in one region, both outputs in another."""
    client.unregister_system_shared_memory()
    client.unregister_cuda_shared_memory()
    size = COUNTED.nbytes
    with (
        Region(client, f"input_{tmp_path.name}", 2 * size) as source,
        Region(client, f"output_{tmp_path.name}", 2 * size) as target,
    ):
        shared_memory.set_shared_memory_region(source.handle, [COUNTED])
        shared_memory.set_shared_memory_region(source.handle, [ONES], offset=size)
        assert set(client.get_system_shared_memory_status().regions) == {source.name, target.name}
        inputs = [grpcclient.InferInput(name, [1, 16], "INT32") for name in ("INPUT0", "INPUT1")]
        outputs = simple_outputs()
        for index in range(2):
            inputs[index].set_shared_memory(source.name, size, offset=index * size)
            outputs[index].set_shared_memory(target.name, size, offset=index * size)
        for _ in range(2):
            result = client.infer("simple", inputs, outputs=outputs)
            for index, expected in enumerate((COUNTED + ONES, COUNTED - ONES)):
                output = result.get_output(f"OUTPUT{index}")
                found = shared_memory.get_contents_as_numpy(
                    target.handle, utils.triton_to_np_dtype(output.datatype), output.shape, offset=index * size
                )
                np.testing.assert_array_equal(found, expected)
    assert not client.get_system_shared_memory_status().regions


def test_simple_grpc_shm_string_client(client: grpcclient.InferenceServerClient, tmp_path: Path) -> None:
    texts = np.array([str(value).encode() for value in range(16)], dtype=np.object_).reshape(1, 16)
    ones = np.array([b"1"] * 16, dtype=np.object_).reshape(1, 16)
    with (
        Region(client, f"strings_{tmp_path.name}", 1024) as source,
        Region(client, f"results_{tmp_path.name}", 1024) as target,
    ):
        sizes = [utils.serialized_byte_size(utils.serialize_byte_tensor(values)) for values in (texts, ones)]
        shared_memory.set_shared_memory_region(source.handle, [utils.serialize_byte_tensor(texts)])
        shared_memory.set_shared_memory_region(source.handle, [utils.serialize_byte_tensor(ones)], offset=512)
        inputs = [grpcclient.InferInput(name, [1, 16], "BYTES") for name in ("INPUT0", "INPUT1")]
        outputs = simple_outputs()
        for index in range(2):
            inputs[index].set_shared_memory(source.name, sizes[index], offset=512 * index)
            outputs[index].set_shared_memory(target.name, 512, offset=512 * index)
        result = client.infer("simple_string", inputs, outputs=outputs)
        for index, expected in enumerate((COUNTED + ONES, COUNTED - ONES)):
            assert result.get_output(f"OUTPUT{index}").datatype == "BYTES"
            found = shared_memory.get_contents_as_numpy(target.handle, np.object_, [1, 16], offset=512 * index)
            np.testing.assert_array_equal(found.astype(np.int32), expected)


def test_simple_grpc_cudashm_client_without_a_gpu(client: grpcclient.InferenceServerClient) -> None:
    """The calls are there; without a GPU nothing can be registered, and nothing is."""
    assert not client.get_cuda_shared_memory_status().regions
    with pytest.raises(InferenceServerException) as caught:
        client.register_cuda_shared_memory("input_data", b"A" * 88, 0, 64)
    assert caught.value.status() in ("StatusCode.INVALID_ARGUMENT", "StatusCode.INTERNAL")
    client.unregister_cuda_shared_memory()
    client.unregister_cuda_shared_memory("input_data")


# --- decoupled ---


@pytest.mark.parametrize("final", [False, True])
def test_simple_grpc_custom_repeat(client: grpcclient.InferenceServerClient, final: bool) -> None:
    count, offset = 5, 100
    stream = Stream(client)
    inputs = [
        tensor("IN", np.arange(offset, offset + count, dtype=np.int32), "INT32"),
        tensor("DELAY", np.full(count, 5, np.uint32), "UINT32"),
        tensor("WAIT", np.array([10], np.uint32), "UINT32"),
    ]
    for number in range(2):
        stream.ask("repeat_int32", inputs, request_id=str(number), enable_empty_final_response=final)
    answers = [stream.take() for _ in range(2 * (count + final))]
    client.stop_stream()
    for number in range(2):
        own = [answer for answer in answers if answer.id == str(number)]
        flags = [bool(answer.parameters["triton_final_response"].bool_param) for answer in own]
        assert flags == [False] * count + [True] * final
        data = [np.frombuffer(answer.raw_output_contents[0], np.int32)[0] for answer in own[:count]]
        assert data == list(range(offset, offset + count))


# --- channels and control ---


def test_simple_grpc_custom_args_client(server: ForebayServer) -> None:
    arguments = [
        ("grpc.max_send_message_length", grpcclient.MAX_GRPC_MESSAGE_SIZE),
        ("grpc.max_receive_message_length", grpcclient.MAX_GRPC_MESSAGE_SIZE),
        ("grpc.primary_user_agent", "example"),
        ("grpc.lb_policy_name", "round_robin"),
    ]
    with grpcclient.InferenceServerClient(url_of(server), channel_args=arguments) as client:
        check_simple(client.infer("simple", simple_inputs(), outputs=simple_outputs()))


def test_simple_grpc_model_control(client: grpcclient.InferenceServerClient) -> None:
    """Load, unload, load with another configuration, and what cannot be loaded."""
    client.load_model("simple")
    assert client.is_model_ready("simple")
    client.unload_model("simple")
    assert not client.is_model_ready("simple")
    with pytest.raises(InferenceServerException, match=r"has no available versions|is not found") as caught:
        client.infer("simple", simple_inputs())
    assert caught.value.status() in ("StatusCode.NOT_FOUND", "StatusCode.UNAVAILABLE")

    config = client.get_model_config("simple_int8", as_json=True)["config"]
    config["max_batch_size"] = 3
    client.load_model("simple_int8", config=json.dumps(config))
    assert client.get_model_config("simple_int8").config.max_batch_size == 3
    client.load_model("simple")
    check_simple(client.infer("simple", simple_inputs()))
    with pytest.raises(InferenceServerException, match="failed to load 'wrong_model_name', failed to poll from model"):
        client.load_model("wrong_model_name")
    index = {model.name: model.state for model in client.get_model_repository_index().models}
    assert index["simple"] == "READY"


def test_simple_grpc_health_metadata(client: grpcclient.InferenceServerClient) -> None:
    assert client.is_server_live(headers={"test": "1", "dummy": "2"})
    assert client.is_server_ready()
    assert client.is_model_ready("simple")
    metadata = client.get_server_metadata()
    assert metadata.name == "triton"
    assert "model_repository" in metadata.extensions
    assert client.get_model_metadata("simple", headers={"test": "1"}).name == "simple"
    with pytest.raises(InferenceServerException, match="Request for unknown model: 'wrong_model_name' is not found"):
        client.get_model_metadata("wrong_model_name")
    assert client.get_model_config("simple").config.name == "simple"


# --- messages by hand ---


def explicit(name: str, datatype: str, **contents: Any) -> Any:
    made = service_pb2.ModelInferRequest(model_name=name, id="my request id")
    for number in range(2):
        made.inputs.add(name=f"INPUT{number}", datatype=datatype, shape=[1, 16])
    for number, values in enumerate(contents.pop("values")):
        getattr(made.inputs[number].contents, contents["field"]).extend(values)
    for number in range(2):
        made.outputs.add(name=f"OUTPUT{number}")
    return made


def test_grpc_explicit_int_content_client(stub: Any) -> None:
    message = explicit("simple", "INT32", field="int_contents", values=[range(16), [1] * 16])
    reply = stub.ModelInfer(message)
    found = [np.frombuffer(raw, np.int32).tolist() for raw in reply.raw_output_contents]
    assert found == [[value + 1 for value in range(16)], [value - 1 for value in range(16)]]
    assert reply.id == "my request id"


def test_grpc_explicit_int8_content_client(stub: Any) -> None:
    message = explicit("simple_int8", "INT8", field="int_contents", values=[range(16), [1] * 16])
    found = [np.frombuffer(raw, np.int8).tolist() for raw in stub.ModelInfer(message).raw_output_contents]
    assert found == [[value + 1 for value in range(16)], [value - 1 for value in range(16)]]


def test_grpc_explicit_byte_content_client(stub: Any) -> None:
    texts = [str(value).encode() for value in range(16)]
    message = explicit("simple_string", "BYTES", field="bytes_contents", values=[texts, [b"1"] * 16])
    reply = stub.ModelInfer(message)
    found = [utils.deserialize_bytes_tensor(raw).astype(np.int32).tolist() for raw in reply.raw_output_contents]
    assert found == [[value + 1 for value in range(16)], [value - 1 for value in range(16)]]


def test_grpc_client(stub: Any) -> None:
    """Every call of the service with generated messages, and raw contents."""
    assert stub.ServerLive(service_pb2.ServerLiveRequest()).live
    assert stub.ServerReady(service_pb2.ServerReadyRequest()).ready
    assert stub.ModelReady(service_pb2.ModelReadyRequest(name="simple", version="1")).ready
    assert stub.ModelMetadata(service_pb2.ModelMetadataRequest(name="simple")).inputs[0].shape == [-1, 16]
    assert stub.ModelConfig(service_pb2.ModelConfigRequest(name="simple", version="1")).config.max_batch_size == 8
    message = explicit("simple", "INT32", field="int_contents", values=[])
    message.raw_input_contents.extend([COUNTED.tobytes(), ONES.tobytes()])
    found = [np.frombuffer(raw, np.int32) for raw in stub.ModelInfer(message).raw_output_contents]
    np.testing.assert_array_equal(found, [(COUNTED + ONES)[0], (COUNTED - ONES)[0]])


# --- memory ---


def test_memory_growth(server: ForebayServer) -> None:
    """The example ``memory_growth_test``, shortened: what a request takes is given back."""

    def anonymous_kib() -> int:
        text = Path(f"/proc/{server.pid_of('grpc')}/status").read_text()
        return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon:"))

    def use() -> None:
        for _ in range(20):
            with grpcclient.InferenceServerClient(url_of(server)) as client:
                for _ in range(50):
                    check_simple(client.infer("simple", simple_inputs(), outputs=simple_outputs()))
        gc.collect()

    use()
    before = anonymous_kib()
    use()
    assert anonymous_kib() - before < 2000
