"""The endpoints of SageMaker (spec H-300, F-090..F-093) and Vertex AI (spec H-301, F-094..F-097)."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forebay_server import ForebayServer
from http_models import write_identity, write_models
from http_wire import Answer, WireClient, get, post

TWO_FLOATS = struct.pack("<2f", 1, 2)
JSON_REQUEST = json.dumps({"inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": [2], "data": [1, 2]}]}).encode()
BINARY_JSON = json.dumps(
    {
        "inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}}],
        "parameters": {"binary_data_output": True},
    }
).encode()


class Endpoint:
    """One port of a server."""

    def __init__(self, server: ForebayServer, service: str) -> None:
        self.server = server
        self._port = server.ports()[service]

    def send(self, message: bytes) -> Answer:
        with WireClient(self._port) as wire:
            return wire.send(message).answer()


def check_binary(endpoint: Endpoint, path: str, binary_type: str) -> None:
    """Tensors behind JSON, whose length rides in the content type both ways."""
    body = BINARY_JSON + TWO_FLOATS
    answer = endpoint.send(post(path, body, f"Content-Type: {binary_type}{len(BINARY_JSON)}"))
    assert answer.status == 200, answer
    kind, _, length = answer.headers["content-type"].rpartition("=")
    assert kind + "=" == binary_type
    assert "inference-header-content-length" not in answer.headers
    assert answer.body[int(length) :] == TWO_FLOATS
    assert json.loads(answer.body[: int(length)])["outputs"][0]["parameters"] == {"binary_data_size": 8}


# --- SageMaker ---

SAGEMAKER_TYPE = "application/vnd.sagemaker-triton.binary+json;json-header-size="


@pytest.fixture(scope="module")
def sagemaker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    repository = write_models(tmp_path_factory.mktemp("sagemaker") / "models")
    flags = ("--allow-sagemaker=true", "--sagemaker-port=0", "--model-control-mode=explicit", "--load-model=echo")
    environment = {"SAGEMAKER_TRITON_DEFAULT_MODEL_NAME": "echo"}
    with ForebayServer(repository, *flags, environment=environment, protocols=("metrics",)) as server:
        server.wait_logged("Started Sagemaker HTTPService")
        yield Endpoint(server, "Sagemaker HTTPService")


def test_sagemaker_pings_and_invokes(sagemaker: Endpoint) -> None:
    ping = sagemaker.send(get("/ping"))
    assert (ping.status, ping.body) == (200, b"")
    assert sagemaker.send(post("/ping")).status == 405
    answer = sagemaker.send(post("/invocations", JSON_REQUEST))
    assert (answer.status, answer.json()["outputs"][0]["data"]) == (200, [1.0, 2.0])
    assert sagemaker.send(post("/invocations", b"xx")).status == 500
    assert sagemaker.send(get("/invocations")).status == 405
    check_binary(sagemaker, "/invocations", SAGEMAKER_TYPE)


@pytest.mark.parametrize("path", ["/", "/v2", "/v2/models/echo/infer", "/ping/", "/-/405", "/models/echo/infer"])
def test_sagemaker_serves_nothing_else(sagemaker: Endpoint, path: str) -> None:
    answer = sagemaker.send(get(path))
    assert (answer.status, answer.body) == (400, b"")


def hosted(tmp_path: Path, *names: str) -> str:
    """Write models as SageMaker unpacks them; return their directory."""
    for name in names:
        write_identity(tmp_path / "archive" / "model", name, [("TYPE_FP32", "-1")])
    return str(tmp_path / "archive" / "model")


def models(endpoint: Endpoint) -> Any:
    return endpoint.send(get("/models")).json()["models"]


def test_sagemaker_hosts_several_models(sagemaker: Endpoint, tmp_path: Path) -> None:
    url = hosted(tmp_path, "anything")
    request = json.dumps({"model_name": "hash1", "url": url}).encode()
    assert models(sagemaker) == []
    assert sagemaker.send(get("/models/hash1")).status == 404
    loaded = sagemaker.send(post("/models", request, "X-Amzn-SageMaker-Target-Model: m.tar.gz"))
    assert (loaded.status, loaded.body) == (200, b"")
    assert sagemaker.send(post("/models", request)).status == 409
    entry = {"modelName": "hash1", "modelUrl": url}
    assert models(sagemaker) == [entry]
    assert sagemaker.send(get("/models/hash1")).json() == entry
    answer = sagemaker.send(post("/models/hash1/invoke", JSON_REQUEST))
    assert (answer.json()["model_name"], answer.json()["outputs"][0]["data"]) == ("hash1", [1.0, 2.0])
    check_binary(sagemaker, "/models/hash1/invoke", SAGEMAKER_TYPE)
    delete = b"DELETE /models/%s HTTP/1.1\r\nHost: x\r\n\r\n"
    assert sagemaker.send(delete % b"hash1").status == 200
    assert sagemaker.send(delete % b"hash1").status == 404
    assert models(sagemaker) == []
    assert sagemaker.send(post("/models/hash1/invoke", JSON_REQUEST)).status == 404
    assert sagemaker.send(post("/models", request)).status == 200
    assert sagemaker.send(delete % b"hash1").status == 200


def test_sagemaker_refuses_what_is_no_model(sagemaker: Endpoint, tmp_path: Path) -> None:
    several = hosted(tmp_path, "one", "two")
    (tmp_path / "empty").mkdir()
    for url in (
        "/dev/shm",
        "/proc/../proc/self",
        "/sys/x",
        "",
        str(tmp_path / "nope"),
        str(tmp_path / "empty"),
        several,
    ):
        answer = sagemaker.send(post("/models", json.dumps({"model_name": "m", "url": url}).encode()))
        assert answer.status == 400, url
    assert sagemaker.send(post("/models", json.dumps({"model_name": "../m", "url": several}).encode())).status == 400
    assert sagemaker.send(post("/models", b"xx")).status == 500
    assert models(sagemaker) == []


def test_sagemaker_lets_a_model_that_fails_be_loaded_again(sagemaker: Endpoint, tmp_path: Path) -> None:
    url = hosted(tmp_path, "m")
    config = Path(url) / "m" / "config.pbtxt"
    good = config.read_text()
    config.write_text('backend: "nonexist"')
    request = post("/models", json.dumps({"model_name": "broken", "url": url}).encode())
    assert sagemaker.send(request).status == 400
    config.write_text(good)
    assert sagemaker.send(request).status == 200


def test_other_ports_stay_in_sagemakers_range(tmp_path: Path) -> None:
    """Spec F-092, F-170."""
    repository = write_models(tmp_path / "models")
    flags = ("--allow-sagemaker=true", "--sagemaker-port=0", "--sagemaker-safe-port-range=9000-9010")
    server = ForebayServer(repository, *flags, protocols=("http",), http_port=8123)
    server.launch()
    assert server.process.wait(30) == 1
    assert (
        "cannot listen to HTTP requests at port 8123, allowed port range is [9000, 9010]"
        in server.stdout + server.stderr
    )


# --- Vertex AI ---

VERTEX_TYPE = "application/vnd.vertex-ai-triton.binary+json;json-header-size="


@pytest.fixture(scope="module")
def vertex_ai(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    repository = tmp_path_factory.mktemp("vertex") / "models"
    write_identity(repository, "only", [("TYPE_FP32", "-1")])
    environment = {
        "AIP_MODE": "PREDICTION",
        "AIP_HTTP_PORT": "0",
        "AIP_PREDICT_ROUTE": "/predict",
        "AIP_HEALTH_ROUTE": "/health",
    }
    with ForebayServer(
        repository, "--allow-client-shm=true", environment=environment, protocols=("metrics",)
    ) as server:
        server.wait_logged("Started Vertex AI HTTPService")
        assert "HTTPService at" not in server.stderr.replace("Vertex AI HTTPService at", "")
        yield Endpoint(server, "Vertex AI HTTPService")


def redirected(endpoint: Endpoint, target: str, body: bytes = b"") -> Answer:
    return endpoint.send(post("/predict", body, f"X-Vertex-Ai-Triton-Redirect: {target}"))


def test_vertex_ai_predicts(vertex_ai: Endpoint) -> None:
    assert vertex_ai.send(get("/health")).status == 200
    answer = vertex_ai.send(post("/predict", JSON_REQUEST))
    assert (answer.json()["model_name"], answer.json()["outputs"][0]["data"]) == ("only", [1.0, 2.0])
    assert vertex_ai.send(get("/predict")).status == 405
    check_binary(vertex_ai, "/predict", VERTEX_TYPE)
    assert vertex_ai.send(get("/v2")).status == 400


def test_vertex_ai_redirects(vertex_ai: Endpoint) -> None:
    assert redirected(vertex_ai, "v2").json()["name"] == "triton"
    assert redirected(vertex_ai, "v2/health/live").status == 200
    assert redirected(vertex_ai, "v2/models/only/ready").status == 200
    assert redirected(vertex_ai, "v2/models/only/config").json()["backend"] == "identity"
    assert redirected(vertex_ai, "v2/models/stats").json()["model_stats"][0]["name"] == "only"
    assert redirected(vertex_ai, "v2/repository/index").json()[0]["state"] == "READY"
    assert redirected(vertex_ai, "v2/systemsharedmemory/status").json() == []
    assert redirected(vertex_ai, "v2/models/only/infer", JSON_REQUEST).status == 200
    assert b"nv_inference_request_success" in redirected(vertex_ai, "metrics").body
    for target in (
        "v2/repository/models/only/load",
        "v2/repository/models/only/unload",
        "v2/systemsharedmemory/region/r/register",
        "v2/logging",
        "v2/models/only/generate",
        "-/400",
        "nope",
    ):
        assert redirected(vertex_ai, target, b"{}").status == 400, target
    wrong = b"GET /predict HTTP/1.1\r\nHost: x\r\nX-Vertex-Ai-Triton-Redirect: v2\r\n\r\n"
    assert vertex_ai.send(wrong).status == 405


def test_vertex_ai_needs_its_routes(tmp_path: Path) -> None:
    write_identity(tmp_path / "models", "only", [("TYPE_FP32", "-1")])
    server = ForebayServer(tmp_path / "models", "--allow-vertex-ai=true", "--vertex-ai-port=0", protocols=("http",))
    server.launch()
    assert server.process.wait(60) == 1
    assert "API_PREDICT_ROUTE is not defined for Vertex AI endpoint" in server.stderr
