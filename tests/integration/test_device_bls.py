"""Python models with tensors on a GPU, which the host may play, that call models there (issue 8, 4; spec P-056, P-097).

``gpu_tensors.py`` has or plays the models' own library for GPUs.
"""

from __future__ import annotations

import base64
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as httpclient
from device_models import add_chain, add_doubler
from forebay_server import ForebayServer
from tritonclient.utils import InferenceServerException

from forebay.engine.devices.opening import PLAYED_GPUS_VARIABLE, open_device

KINDS = ["host", pytest.param("cuda", marks=pytest.mark.gpu)]

#: Of a request of one row.
ROW_BYTES = 16

CALLER = """
import asyncio
import json
import sys

import numpy as np
import triton_python_backend_utils as pb_utils

sys.path.append(SUPPORT)
from gpu_tensors import PlacedTensor as GpuTensor

ON_GPU = pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_GPU, 0)
ON_HOST = pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU)


def gpu_tensor(value):
    return pb_utils.Tensor.from_dlpack("X", GpuTensor(np.full((1, 4), value, np.float32)))


def request(model, tensor, memory=None):
    return pb_utils.InferenceRequest(
        model_name=model, requested_output_names=["Y"], inputs=[tensor], preferred_memory=memory
    )


def output(response):
    if response.has_error():
        raise pb_utils.TritonModelException(response.error().message())
    return pb_utils.get_output_tensor_by_name(response, "Y")


def call(model, tensor, memory=None):
    return output(request(model, tensor, memory).exec())


def shown(tensor):
    array = tensor.as_numpy() if tensor.is_cpu() else GpuTensor.from_dlpack(tensor).array
    return [tensor.is_cpu(), array.tolist()]


class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse([self.answer(request)]) for request in requests]

    def answer(self, request):
        what, value = pb_utils.get_input_tensor_by_name(request, "WHAT").as_numpy()[0].decode().split()
        result = getattr(self, what)(float(value))
        return pb_utils.Tensor("RESULT", np.array([json.dumps(result).encode()], dtype=object))

    def chain(self, value):
        tensor = gpu_tensor(value)
        for _ in range(3):
            answer = call("gpu", tensor)
            tensor = pb_utils.Tensor.from_dlpack("X", GpuTensor.from_dlpack(answer))
        return shown(answer)

    def to_host(self, value):
        return shown(call("gpu", gpu_tensor(value), ON_HOST))

    def from_host(self, value):
        return shown(call("gpu", pb_utils.Tensor("X", np.full((1, 4), value, np.float32)), ON_GPU))

    def from_host_to_anywhere(self, value):
        return shown(call("gpu", pb_utils.Tensor("X", np.full((1, 4), value, np.float32))))

    def cpu(self, value):
        return shown(call("cpu", gpu_tensor(value)))

    def cpu_to_gpu(self, value):
        return shown(call("cpu", gpu_tensor(value), ON_GPU))

    def varying(self, value):
        return shown(call("gpu_varying", gpu_tensor(value), ON_GPU))

    def varying_longer(self, value):
        tensor = pb_utils.Tensor.from_dlpack("X", GpuTensor(np.full((1, 8), value, np.float32)))
        return shown(call("gpu_varying", tensor, ON_GPU))

    def ensemble(self, value):
        return shown(call("chain", gpu_tensor(value), ON_GPU))

    def ensemble_to_anywhere(self, value):
        return shown(call("chain", gpu_tensor(value)))

    def ensemble_to_host(self, value):
        return shown(call("chain", gpu_tensor(value), ON_HOST))

    def ensemble_from_host(self, value):
        return shown(call("chain", pb_utils.Tensor("X", np.full((1, 4), value, np.float32)), ON_GPU))

    def nested_ensemble(self, value):
        return shown(call("nested", gpu_tensor(value), ON_GPU))

    def varying_ensemble(self, value):
        tensor = pb_utils.Tensor.from_dlpack("X", GpuTensor(np.full((1, int(value)), value, np.float32)))
        return shown(call("chain_varying", tensor, ON_GPU))

    def half_ensemble(self, value):
        return shown(call("half", gpu_tensor(value), ON_GPU))

    def ensembles_in_a_row(self, value):
        tensor = gpu_tensor(value)
        for _ in range(3):
            answer = call("chain", tensor, ON_GPU)
            tensor = pb_utils.Tensor.from_dlpack("X", GpuTensor.from_dlpack(answer))
        return shown(answer)

    def receiver(self, value):
        return shown(call("receiver", gpu_tensor(value)))

    def side_by_side(self, value):
        async def all_of_them():
            calls = [request("gpu", gpu_tensor(value + n), ON_GPU).async_exec() for n in range(8)]
            return await asyncio.gather(*calls)
        return [shown(output(response)) for response in asyncio.run(all_of_them())]

    def kept(self, value):
        # More than the pool has room for, all of it kept.
        tensors = [call("gpu", gpu_tensor(value), ON_GPU) for _ in range(40)]
        return [all(not tensor.is_cpu() for tensor in tensors), shown(tensors[-1])]
"""

#: Answers Y = X + X, computed where X is, and on the GPU.
RECEIVER = """
import sys

import numpy as np
import triton_python_backend_utils as pb_utils

sys.path.append(SUPPORT)
from gpu_tensors import PlacedTensor as GpuTensor


class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse([self.answer(request)]) for request in requests]

    def answer(self, request):
        tensor = pb_utils.get_input_tensor_by_name(request, "X")
        array = tensor.as_numpy() if tensor.is_cpu() else GpuTensor.from_dlpack(tensor).array
        pb_utils.Logger.log_info(f"X is on the {'host' if tensor.is_cpu() else 'GPU'}")
        return pb_utils.Tensor.from_dlpack("Y", GpuTensor(array + array))
"""

FLOATS = """
max_batch_size: 8
input { name: "X" data_type: TYPE_FP32 dims: [ 4 ] }
output { name: "Y" data_type: TYPE_FP32 dims: [ 4 ] }
"""


#: A model on the GPU, then one in Python that takes what it is given there, and the first again.
MIXED = """
platform: "ensemble"
max_batch_size: 8
input { name: "X" data_type: TYPE_FP32 dims: [ 4 ] }
output { name: "Y" data_type: TYPE_FP32 dims: [ 4 ] }
ensemble_scheduling {
  step { model_name: "gpu" model_version: -1 input_map { key: "X" value: "X" } output_map { key: "Y" value: "A" } }
  step { model_name: "receiver" model_version: -1 input_map { key: "X" value: "A" } output_map { key: "Y" value: "B" } }
  step { model_name: "gpu" model_version: -1 input_map { key: "X" value: "B" } output_map { key: "Y" value: "Y" } }
}
"""


def add_python(root: Path, name: str, source: str, config: str) -> None:
    (root / name / "1").mkdir(parents=True)
    support = Path(__file__).parents[1] / "support"
    (root / name / "1" / "model.py").write_text(source.replace("SUPPORT", repr(str(support))))
    (root / name / "config.pbtxt").write_text(f'backend: "python"\ninstance_group {{ kind: KIND_GPU }}\n{config}')


class Caller:
    """A server whose Python model ``caller`` does what it is told."""

    def __init__(self, root: Path, kind: str, *flags: str) -> None:
        self.kind = kind
        add_doubler(root, "gpu", "KIND_GPU", more="dynamic_batching { }")
        add_doubler(root, "gpu_varying", "KIND_GPU", dim=-1)
        add_doubler(root, "cpu", "KIND_CPU")
        add_chain(root, "chain")
        add_chain(root, "nested", model="chain")
        add_chain(root, "chain_varying", model="gpu_varying", dim=-1)
        add_chain(root, "half", last="cpu")
        add_python(
            root,
            "caller",
            CALLER,
            'input { name: "WHAT" data_type: TYPE_STRING dims: [ 1 ] } '
            'output { name: "RESULT" data_type: TYPE_STRING dims: [ 1 ] }',
        )
        force = 'parameters { key: "FORCE_CPU_ONLY_INPUT_TENSORS" value { string_value: "no" } }'
        add_python(root, "receiver", RECEIVER, FLOATS + force)
        (root / "mixed" / "1").mkdir(parents=True)
        (root / "mixed" / "config.pbtxt").write_text(MIXED)
        #: Times that :meth:`wait_passing` had three calls made.
        self.chain_count = 0
        environment = {PLAYED_GPUS_VARIABLE: "1"} if kind == "host" else {}
        self.server = ForebayServer(root, *flags, environment=environment)

    def do(self, what: str, value: float = 1) -> Any:
        with httpclient.InferenceServerClient(self.server.http_url) as client:
            tensor = httpclient.InferInput("WHAT", [1], "BYTES")
            tensor.set_data_from_numpy(np.array([f"{what} {value}".encode()], dtype=object))
            return json.loads(client.infer("caller", [tensor]).as_numpy("RESULT")[0])

    def wait_passing(self) -> None:
        """Have calls made until there is memory for them on the GPU; they are answered before, too."""
        before = self.passed

        def passes() -> bool:
            assert self.do("chain", 3) == on_gpu(24)
            self.chain_count += 1
            return self.passed > before

        self.server.wait_for(passes, "calls to pass tensors on the GPU")

    @property
    def passed(self) -> int:
        return self.server.counter("forebay_device_passed_bytes_total", model="gpu")

    def crossed(self, model: str) -> tuple[int, int]:
        """Bytes that a model has copied to and from the GPU."""
        family = "forebay_device_copied_bytes_total"
        return (
            self.server.counter(family, model=model, direction="to_device"),
            self.server.counter(family, model=model, direction="from_device"),
        )


def row(value: float) -> list[list[float]]:
    return [[value] * 4]


def on_gpu(value: float) -> list[object]:
    return [False, row(value)]


def on_host(value: float) -> list[object]:
    return [True, row(value)]


@pytest.fixture(scope="module", params=KINDS)
def caller(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    made = Caller(tmp_path_factory.mktemp("models"), request.param, "--allow-client-shm=true")
    with made.server:
        made.wait_passing()
        requests = 3 * made.chain_count
        counter = "nv_inference_request_success"
        made.server.wait_for(lambda: made.server.counter(counter, model="gpu") == requests, "the client's counts")
        yield made


def test_calls_between_models_on_one_gpu_never_come_to_the_host(caller: Caller) -> None:
    models = ("gpu", "caller")
    passed, crossed = caller.passed, [caller.crossed(model) for model in models]
    for number in range(10):
        assert caller.do("chain", number) == on_gpu(8 * number)
    caller.server.wait_for(lambda: caller.passed == passed + 30 * ROW_BYTES, "the client's counts")
    assert [caller.crossed(model) for model in models] == crossed


def test_outputs_are_where_they_are_preferred(caller: Caller) -> None:
    """P-097."""
    assert caller.do("to_host", 2) == on_host(4)
    assert caller.do("from_host", 2) == on_gpu(4)
    assert caller.do("from_host_to_anywhere", 2) == on_host(4)


def test_models_elsewhere_get_tensors_of_a_gpu_through_the_host(caller: Caller) -> None:
    into, out = caller.crossed("caller")
    assert caller.do("cpu", 2) == on_host(4)
    assert caller.crossed("caller") == (into, out + ROW_BYTES)
    assert caller.do("cpu_to_gpu", 2) == on_gpu(4)
    assert caller.crossed("caller") == (into + ROW_BYTES, out + 2 * ROW_BYTES)


@pytest.mark.parametrize(
    ("what", "answer"),
    [
        ("ensemble", on_gpu(8)),
        ("ensemble_to_anywhere", on_gpu(8)),
        ("nested_ensemble", on_gpu(32)),
        ("ensembles_in_a_row", on_gpu(128)),
    ],
)
def test_ensembles_on_the_callers_gpu_are_called_without_the_host(
    caller: Caller, what: str, answer: list[object]
) -> None:
    """Issue 8, 4: neither inputs nor outputs, nor what their steps tell each other, come to the host."""
    crossed = [caller.crossed(model) for model in ("gpu", "caller")]
    for _ in range(5):
        assert caller.do(what, 2) == answer
    assert [caller.crossed(model) for model in ("gpu", "caller")] == crossed


def test_of_ensembles_only_what_is_wanted_on_the_host_goes_there(caller: Caller) -> None:
    """P-097."""
    (into, out), own = caller.crossed("gpu"), caller.crossed("caller")
    assert caller.do("ensemble_to_host", 2) == on_host(8)
    assert (caller.crossed("gpu"), caller.crossed("caller")) == ((into, out + ROW_BYTES), own)
    assert caller.do("ensemble_from_host", 2) == on_gpu(8)
    assert (caller.crossed("gpu"), caller.crossed("caller")) == ((into + ROW_BYTES, out + ROW_BYTES), own)


def test_ensembles_with_steps_elsewhere_get_what_these_read_through_the_host(caller: Caller) -> None:
    """The first step is on the GPU and the second on the CPU; its output is brought to the GPU as is preferred."""
    (into, out), own = caller.crossed("gpu"), caller.crossed("caller")
    assert caller.do("half_ensemble", 2) == on_gpu(8)
    assert caller.crossed("gpu") == (into, out + ROW_BYTES)
    assert caller.crossed("caller") == (own[0] + ROW_BYTES, own[1])


def test_ensembles_of_varying_size_are_called_without_the_host(caller: Caller) -> None:
    crossed = [caller.crossed(model) for model in ("gpu_varying", "caller")]
    for width in (3, 300, 30):
        assert caller.do("varying_ensemble", width) == [False, [[4.0 * width] * width]]
    assert [caller.crossed(model) for model in ("gpu_varying", "caller")] == crossed


def test_outputs_of_varying_size_stay_on_the_gpu(caller: Caller) -> None:
    """From the first one on, and also if they are larger than those before."""
    crossed = caller.crossed("caller"), caller.crossed("gpu_varying")
    assert caller.do("varying", 2) == on_gpu(4)
    assert caller.do("varying", 3) == on_gpu(6)
    assert caller.do("varying_longer", 3) == [False, [[6.0] * 8]]
    assert (caller.crossed("caller"), caller.crossed("gpu_varying")) == crossed


def test_calls_side_by_side(caller: Caller) -> None:
    assert caller.do("side_by_side", 1) == [on_gpu(2 * (1 + n)) for n in range(8)]


def test_a_python_model_may_take_tensors_where_they_are(caller: Caller) -> None:
    """P-056: FORCE_CPU_ONLY_INPUT_TENSORS is "no"."""
    crossed = caller.crossed("receiver")
    logged = caller.server.stderr.count("X is on the GPU")
    assert caller.do("receiver", 3) == on_gpu(6)
    caller.server.wait_logged("X is on the GPU", count=logged + 1)
    assert caller.crossed("receiver") == crossed
    with httpclient.InferenceServerClient(caller.server.http_url) as client:
        for rows in (1, 2):
            np.testing.assert_array_equal(infer(client, "receiver", 3, rows), np.full((rows, 4), 6))
    assert caller.crossed("receiver") == (crossed[0], crossed[1] + 3 * ROW_BYTES)


def infer(client: httpclient.InferenceServerClient, model: str, value: float, rows: int = 1) -> Any:
    tensor = httpclient.InferInput("X", [rows, 4], "FP32")
    tensor.set_data_from_numpy(np.full((rows, 4), value, np.float32))
    return client.infer(model, [tensor]).as_numpy("Y")


def test_python_models_are_steps_on_the_gpu_like_others(caller: Caller) -> None:
    """P-056: in ensembles that a frontend runs."""
    with httpclient.InferenceServerClient(caller.server.http_url) as client:

        def passes() -> bool:
            before = caller.server.counter("forebay_device_passed_bytes_total", model="receiver")
            np.testing.assert_array_equal(infer(client, "mixed", 3), np.full((1, 4), 24))
            return caller.server.counter("forebay_device_passed_bytes_total", model="receiver") > before

        caller.server.wait_for(passes, "steps to pass tensors on the GPU")
        crossed = caller.crossed("receiver")
        np.testing.assert_array_equal(infer(client, "mixed", 5), np.full((1, 4), 40))
        assert caller.crossed("receiver") == crossed


def test_python_models_take_clients_cuda_regions_as_they_are(caller: Caller) -> None:
    """P-056, H-196."""
    device = open_device(caller.kind)
    memory, stream = device.allocate(4096), device.make_stream()
    values = np.full((1, 4), 5, np.float32)
    stream.copy_in(memory.address, values.ctypes.data, values.nbytes)
    stream.synchronize()
    with httpclient.InferenceServerClient(caller.server.http_url) as client:
        client.register_cuda_shared_memory("r", base64.b64encode(device.export_memory(memory)), 0, 4096)
        tensor = httpclient.InferInput("X", [1, 4], "FP32")
        tensor.set_shared_memory("r", ROW_BYTES)
        wanted = httpclient.InferRequestedOutput("Y")
        wanted.set_shared_memory("r", ROW_BYTES, offset=64)
        crossed = caller.crossed("receiver")
        client.infer("receiver", [tensor], outputs=[wanted])
        stream.copy_out(values.ctypes.data, memory.address + 64, values.nbytes)
        stream.synchronize()
        np.testing.assert_array_equal(values, np.full((1, 4), 10))
        assert caller.crossed("receiver") == crossed
        wanted.set_shared_memory("r", 8, offset=64)
        with pytest.raises(InferenceServerException, match=r"output 'Y' \(8 bytes\) should be at least 16 bytes"):
            client.infer("receiver", [tensor], outputs=[wanted])
        client.unregister_cuda_shared_memory("r")
    memory.close()


def test_calls_go_on_when_a_model_or_the_keeper_of_the_memory_was_replaced(caller: Caller) -> None:
    for round_number, role in enumerate(("worker gpu:1", "worker courier", "worker receiver"), 1):
        os.kill(caller.server.pid_of(role), signal.SIGKILL)
        if role == "worker courier":
            for number in range(3):
                assert caller.do("chain", number) == on_gpu(8 * number)
                assert caller.do("ensemble", number) == on_gpu(4 * number)
        caller.server.wait_logged("is back", count=round_number)
        assert caller.do("chain", round_number) == on_gpu(8 * round_number)
        assert caller.do("ensemble", round_number) == on_gpu(4 * round_number)
    caller.wait_passing()
    assert caller.do("receiver", 3) == on_gpu(6)


@pytest.mark.parametrize("kind", KINDS)
def test_calls_of_ensembles_follow_their_models_off_the_gpu_and_back(tmp_path: Path, kind: str) -> None:
    caller = Caller(tmp_path, kind, "--model-control-mode=explicit", "--load-model=*")
    config = tmp_path / "gpu" / "config.pbtxt"
    there = config.read_text()
    with caller.server:
        caller.wait_passing()
        for text, stays in ((there.replace("KIND_GPU", "KIND_CPU"), False), (there, True)):
            config.write_text(text)
            assert caller.server.post("/v2/repository/models/gpu/load", b"{}")[0] == 200
            before = caller.crossed("caller")
            for _ in range(3):
                assert caller.do("ensemble", 3) == on_gpu(12)
            assert (caller.crossed("caller") == before) == stays


def test_what_finds_no_room_is_on_the_gpu_all_the_same(tmp_path: Path) -> None:
    """F-151: room for eight tensors, of which a caller gets the half; what it has dropped is free again."""
    caller = Caller(tmp_path, "host", "--cuda-memory-pool-byte-size=0:2048")
    with caller.server:
        for _ in range(3):
            assert caller.do("kept", 2) == [True, on_gpu(4)]
            caller.wait_passing()


def test_without_memory_for_calls_everything_goes_through_the_host(tmp_path: Path) -> None:
    caller = Caller(tmp_path, "host", "--cuda-memory-pool-byte-size=0:0")
    with caller.server:
        for number in range(3):
            assert caller.do("chain", number) == on_gpu(8 * number)
            assert caller.do("from_host", number) == on_gpu(2 * number)
        assert caller.passed == 0
