"""KServe v2 requests and answers as bytes, for the load generators; ours, so that no client library is measured."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


def infer_request(model: str, inputs: Mapping[str, FloatArray], outputs: Sequence[str], port: int = 8000) -> bytes:
    """Return one whole HTTP request with binary inputs that asks for binary outputs, as tritonclient sends it.

    Args:
        inputs: float32 arrays with the batch dimension, by input name.
    """
    header = json.dumps(
        {
            "inputs": [
                {
                    "name": name,
                    "shape": list(array.shape),
                    "datatype": "FP32",
                    "parameters": {"binary_data_size": array.nbytes},
                }
                for name, array in inputs.items()
            ],
            "outputs": [{"name": name, "parameters": {"binary_data": True}} for name in outputs],
        },
        separators=(",", ":"),
    ).encode()
    tensors = b"".join(array.tobytes() for array in inputs.values())
    lines = [
        f"POST /v2/models/{model}/infer HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        "Content-Type: application/octet-stream",
        f"Inference-Header-Content-Length: {len(header)}",
        f"Content-Length: {len(header) + len(tensors)}",
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + header + tensors


def infer_once(port: int, request: bytes) -> dict[str, FloatArray]:
    """Send one request of `infer_request` and return its outputs, to see that a server answers right.

    Raises:
        RuntimeError: the answer is not 200.
    """
    header, _, body = request.partition(b"\r\n\r\n")
    first, *rest = header.decode().split("\r\n")
    method, path, _ = first.split()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body, dict(line.split(": ", 1) for line in rest))
        response = connection.getresponse()
        answer = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise RuntimeError(f"{path} answered {response.status}: {answer[:200]!r}")
    json_bytes = int(response.headers["Inference-Header-Content-Length"])
    outputs: dict[str, FloatArray] = {}
    offset = json_bytes
    for output in json.loads(answer[:json_bytes])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        values = np.frombuffer(answer[offset : offset + size], np.float32)
        outputs[output["name"]] = values.reshape(output["shape"])
        offset += size
    return outputs


def get_json(port: int, path: str) -> Any:
    """Return the JSON answer to a GET request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise RuntimeError(f"{path} answered {response.status}: {body[:200]!r}")
    return json.loads(body)


def execution_counts(port: int, model: str) -> tuple[int, int]:
    """Return a model's (inferences, executions) so far, all versions together; their quotient is the mean batch."""
    statistics = get_json(port, f"/v2/models/{model}/stats")["model_stats"]
    return (
        sum(int(version["inference_count"]) for version in statistics),
        sum(int(version["execution_count"]) for version in statistics),
    )
