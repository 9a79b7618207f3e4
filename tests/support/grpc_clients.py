"""What tests with tritonclient's gRPC client share."""

from __future__ import annotations

import queue
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import tritonclient.grpc as grpcclient
from forebay_server import CONF_MODELS, PATIENCE_S, ForebayServer

FloatArray = npt.NDArray[np.float32]


def url_of(server: ForebayServer) -> str:
    return f"127.0.0.1:{server.ports()['GRPCInferenceService']}"


def tensor(name: str, value: npt.NDArray[Any], datatype: str = "FP32") -> grpcclient.InferInput:
    made = grpcclient.InferInput(name, list(value.shape), datatype)
    made.set_data_from_numpy(value)
    return made


def features(rows: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).standard_normal((rows, 50)).astype(np.float32)


def alpha_model_of(version: int = 2) -> Any:
    """Return a function that runs that version of ``alpha_model`` in this process: rows to predictions."""
    session = onnxruntime.InferenceSession(str(CONF_MODELS / f"alpha_model/{version}/model.onnx"))
    return lambda rows: session.run(["prediction"], {"features": rows})[0]


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


def is_final(response: Any) -> bool:
    return bool(response.parameters["triton_final_response"].bool_param)
