"""Models for tests of the shared-memory client, and a server that serves them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from forebay_server import CONF_MODELS, ForebayServer
from http_models import write_identity

#: A Python model that answers as many times as its input says.
_REPEAT = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            count = int(pb_utils.get_input_tensor_by_name(request, "COUNT").as_numpy()[0])
            for index in range(count):
                values = np.full(20_000 if index % 2 else 2, index, np.int32)
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("INDEX", values)]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""

#: A Python model of fixed shapes: it adds up its inputs, refuses what is negative, and looks at the request's id.
_NAMED_SUM = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        left, right = (tensor.as_numpy() for tensor in request.inputs())
        if (left < 0).any():
            return pb_utils.InferenceResponse(error=pb_utils.TritonError("negative", pb_utils.TritonError.INVALID_ARG))
        return pb_utils.InferenceResponse([pb_utils.Tensor("SUM", left + right + len(request.request_id()))])
"""


def write_models(repository: Path, *, instances: int = 2) -> Path:
    """Write ``alpha_model`` without its queue delay, models of varying shapes, and one that answers many times."""
    alpha = repository / "alpha_model"
    shutil.copytree(CONF_MODELS / "alpha_model", alpha)
    config = (alpha / "config.pbtxt").read_text()
    config = config.replace("max_queue_delay_microseconds: 5000", "max_queue_delay_microseconds: 0")
    (alpha / "config.pbtxt").write_text(re.sub(r"count: \d+", f"count: {instances}", config))
    write_identity(repository, "echo", [("TYPE_FP32", "-1")])
    write_identity(repository, "pair", [("TYPE_FP32", "-1"), ("TYPE_STRING", "-1")], batch=4)
    write_identity(repository, "slow", [("TYPE_FP32", "4")], delay_ms=300)
    _write_python(
        repository / "repeat",
        _REPEAT,
        "model_transaction_policy { decoupled: true }\n"
        'input [ { name: "COUNT" data_type: TYPE_INT32 dims: [ 1 ] } ]\n'
        'output [ { name: "INDEX" data_type: TYPE_INT32 dims: [ -1 ] } ]\n',
    )
    _write_python(
        repository / "named_sum",
        _NAMED_SUM,
        "max_batch_size: 4\n"
        'input { name: "LEFT" data_type: TYPE_FP32 dims: [ 2 ] }\n'
        'input { name: "RIGHT" data_type: TYPE_FP32 dims: [ 2 ] }\n'
        'output [ { name: "SUM" data_type: TYPE_FP32 dims: [ 2 ] } ]\n',
    )
    return repository


def _write_python(folder: Path, source: str, config: str) -> None:
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").write_text(source)
    (folder / "config.pbtxt").write_text(f'backend: "python"\n{config}')


def serve(repository: Path, *arguments: str, settings: dict[str, dict[str, object]] | None = None) -> ForebayServer:
    """Return a server for clients on the same machine; nothing listens but the metrics endpoint."""
    return ForebayServer(repository, *arguments, protocols=("metrics",), settings=settings)
