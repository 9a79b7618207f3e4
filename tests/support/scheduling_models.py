"""A repository with a model for every scheduler, for tests with real processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

FAULT = """
backend: "forebay_fault"
max_batch_size: {max_batch}
input {{ name: "X" data_type: TYPE_FP32 dims: [ 1 ] }}
output {{ name: "Y" data_type: TYPE_FP32 dims: [ 1 ] }}
instance_group {{ count: {count} kind: KIND_CPU {group} }}
parameters {{ key: "delay_ms" value {{ string_value: "{delay_ms}" }} }}
{scheduling}
"""

#: Prints every control tensor and answers with them; CORRID as text.
SEQUENCE_MODEL = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.name = args["model_instance_name"]
        self.sums = {}

    def execute(self, requests):
        answers = []
        for position, request in enumerate(requests):
            seen = {t.name(): t for t in request.inputs()}
            start, end, ready = (int(seen[n].as_numpy().reshape(-1)[0]) for n in ("START", "END", "READY"))
            corrid = seen["CORRID"].as_numpy().reshape(-1)[0]
            key = request.correlation_id()
            if ready:
                value = float(seen["X"].as_numpy().reshape(-1)[0])
                self.sums[key] = value + (0.0 if start else self.sums.get(key, 0.0))
            controls = np.array([[start, end, ready, position, len(requests)]], np.int32)
            ids = np.array([[str(corrid if not isinstance(corrid, bytes) else corrid.decode())]], np.object_)
            answers.append(pb_utils.InferenceResponse([
                pb_utils.Tensor("SUM", np.array([[self.sums.get(key, 0.0)]], np.float32)),
                pb_utils.Tensor("CONTROLS", controls),
                pb_utils.Tensor("ID", ids),
                pb_utils.Tensor("INSTANCE", np.array([[self.name]], np.object_)),
            ]))
        return answers
"""

SEQUENCE = """
backend: "python"
max_batch_size: {max_batch}
input {{ name: "X" data_type: TYPE_FP32 dims: [ 1 ] }}
output {{ name: "SUM" data_type: TYPE_FP32 dims: [ 1 ] }}
output {{ name: "CONTROLS" data_type: TYPE_INT32 dims: [ 5 ] }}
output {{ name: "ID" data_type: TYPE_STRING dims: [ 1 ] }}
output {{ name: "INSTANCE" data_type: TYPE_STRING dims: [ 1 ] }}
instance_group {{ count: {count} kind: KIND_CPU }}
sequence_batching {{
  max_sequence_idle_microseconds: {idle_us}
  {strategy}
  control_input {{ name: "START" control {{ kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] }} }}
  control_input {{ name: "END" control {{ kind: CONTROL_SEQUENCE_END fp32_false_true: [ 0, 1 ] }} }}
  control_input {{ name: "READY" control {{ kind: CONTROL_SEQUENCE_READY bool_false_true: [ false, true ] }} }}
  control_input {{ name: "CORRID" control {{ kind: CONTROL_SEQUENCE_CORRID data_type: {corrid} }} }}
}}
"""

#: Answers with how often the request came, when it has come X times.
ITERATIVE_MODEL = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.counts = {}

    def execute(self, requests):
        answers = []
        for request in requests:
            seen = {t.name(): t.as_numpy() for t in request.inputs()}
            key = int(seen["CORRID"].reshape(-1)[0])
            if seen["START"].reshape(-1)[0]:
                self.counts[key] = 0
            self.counts[key] += 1
            if self.counts[key] < seen["X"].reshape(-1)[0]:
                request.set_release_flags(pb_utils.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE)
                answers.append(None)
            else:
                count = np.array([[self.counts.pop(key)]], np.float32)
                answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("Y", count)]))
        return answers
"""

ITERATIVE = """
backend: "python"
max_batch_size: 4
input { name: "X" data_type: TYPE_FP32 dims: [ 1 ] }
output { name: "Y" data_type: TYPE_FP32 dims: [ 1 ] }
instance_group { count: 1 kind: KIND_CPU }
sequence_batching {
  iterative_sequence: true
  oldest { max_candidate_sequences: 4 }
  control_input { name: "START" control { kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] } }
  control_input { name: "CORRID" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 } }
}
"""

ACCUMULATE = """
backend: "onnxruntime"
max_batch_size: {max_batch}
input {{ name: "X" data_type: TYPE_FP32 dims: [ 1 ] }}
output {{ name: "Y" data_type: TYPE_FP32 dims: [ 1 ] }}
instance_group {{ count: 1 kind: KIND_CPU }}
sequence_batching {{
  {strategy}
  control_input {{ name: "START" control {{ kind: CONTROL_SEQUENCE_START fp32_false_true: [ 0, 1 ] }} }}
  state {{
    {state}
    input_name: "STATE_IN" output_name: "STATE_OUT" data_type: TYPE_FP32 dims: [ 1 ]
    {initial}
  }}
}}
"""


def accumulator(path: Path, *, batched: bool) -> None:
    """Write an ONNX model: Y = STATE_OUT = X + STATE_IN, plus 1000 at the start of a sequence."""
    shape = ["N", 1] if batched else [1]
    names = ("X", "START", "STATE_IN")
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["X", "STATE_IN"], ["sum"]),
            helper.make_node("Mul", ["START", "thousand"], ["bonus"]),
            helper.make_node("Add", ["sum", "bonus"], ["Y"]),
            helper.make_node("Identity", ["Y"], ["STATE_OUT"]),
        ],
        "accumulator",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("Y", "STATE_OUT")],
        [helper.make_tensor("thousand", TensorProto.FLOAT, [1], [1000.0])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 10
    onnx.save(model, path)


def _write(directory: Path, config: str) -> Path:
    version = directory / "1"
    version.mkdir(parents=True)
    (directory / "config.pbtxt").write_text(config)
    return version


def add_fault_model(
    root: Path, name: str, scheduling: str, *, max_batch: int = 8, count: int = 1, delay_ms: int = 300, group: str = ""
) -> None:
    """Add a model that answers X, after ``delay_ms`` if X is -1."""
    _write(
        root / name,
        FAULT.format(max_batch=max_batch, count=count, delay_ms=delay_ms, scheduling=scheduling, group=group),
    )


def add_sequence_model(
    root: Path,
    name: str,
    strategy: str,
    *,
    max_batch: int = 4,
    count: int = 1,
    idle_us: int = 60_000_000,
    corrid: str = "TYPE_UINT64",
) -> None:
    """Add the Python model that answers with its control tensors."""
    version = _write(
        root / name,
        SEQUENCE.format(max_batch=max_batch, count=count, idle_us=idle_us, strategy=strategy, corrid=corrid),
    )
    (version / "model.py").write_text(SEQUENCE_MODEL)


STREAM_MODEL = """
import threading
import time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            count = int(pb_utils.get_input_tensor_by_name(request, "X").as_numpy().reshape(-1)[0])
            threading.Thread(target=self.stream, args=(request.get_response_sender(), count), daemon=True).start()

    def stream(self, sender, count):
        for index in range(count):
            time.sleep(0.02)
            sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("Y", np.array([index], np.float32))]))
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""

STREAM = """
backend: "python"
max_batch_size: 0
input { name: "X" data_type: TYPE_FP32 dims: [ 1 ] }
output { name: "Y" data_type: TYPE_FP32 dims: [ 1 ] }
instance_group { count: 1 kind: KIND_CPU }
model_transaction_policy { decoupled: true }
"""


def add_stream_model(root: Path, name: str) -> None:
    """Add a decoupled Python model that answers X times, 20 ms apart, from a thread of its own."""
    add_python_model(root, name, STREAM_MODEL, STREAM)


def add_python_model(root: Path, name: str, source: str, config: str) -> None:
    """Add a Python model."""
    version = _write(root / name, config)
    (version / "model.py").write_text(source)


ENSEMBLE = """
platform: "ensemble"
max_batch_size: 8
input {{ name: "X" data_type: TYPE_FP32 dims: [ 1 ] }}
output {{ name: "Y" data_type: TYPE_FP32 dims: [ 1 ] }}
ensemble_scheduling {{
  step {{
    model_name: "{first}" model_version: -1
    input_map {{ key: "X" value: "X" }} output_map {{ key: "Y" value: "between" }}
  }}
  step {{
    model_name: "{second}" model_version: -1
    input_map {{ key: "X" value: "between" }} output_map {{ key: "Y" value: "Y" }}
  }}
}}
"""


def add_two_step_ensemble(root: Path, name: str, steps: tuple[str, str], *, version: int = 1) -> None:
    """Add an ensemble of two models that map X to Y."""
    directory = root / name
    (directory / str(version)).mkdir(parents=True)
    (directory / "config.pbtxt").write_text(ENSEMBLE.format(first=steps[0], second=steps[1]))


def add_iterative_model(root: Path, name: str) -> None:
    """Add a Python model that wants each request X times before it answers."""
    add_python_model(root, name, ITERATIVE_MODEL, ITERATIVE)


def add_accumulator(
    root: Path, name: str, strategy: str, *, max_batch: int = 4, initial: float | None = None, state: str = ""
) -> None:
    """Add the ONNX model with implicit state; ``state``: further fields of it."""
    text = ""
    if initial is not None:
        text = 'initial_state { name: "first" data_type: TYPE_FP32 dims: [ 1 ] data_file: "first.bin" }'
    version = _write(root / name, ACCUMULATE.format(max_batch=max_batch, strategy=strategy, initial=text, state=state))
    accumulator(version / "model.onnx", batched=max_batch > 0)
    if initial is not None:
        (root / name / "initial_state").mkdir()
        (root / name / "initial_state" / "first.bin").write_bytes(np.float32(initial).tobytes())
