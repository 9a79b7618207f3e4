"""Tracing over real processes: settings, files, both protocols, ensembles, a collector (spec 11, H-250..H-260)."""

from __future__ import annotations

import json
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from forebay_server import PATIENCE_S, ForebayServer, wait_until
from http_models import write_identity

CORE_EVENTS = {
    "REQUEST_START",
    "QUEUE_START",
    "COMPUTE_START",
    "COMPUTE_INPUT_END",
    "COMPUTE_OUTPUT_START",
    "COMPUTE_END",
    "INFER_RESPONSE_COMPLETE",
    "REQUEST_END",
}
#: Of a request that was made for another one.
CHILD_EVENTS = CORE_EVENTS - {"INFER_RESPONSE_COMPLETE"}
HTTP_EVENTS = {"HTTP_RECV_START", "HTTP_RECV_END", "HTTP_SEND_START", "HTTP_SEND_END"}
GRPC_EVENTS = {"GRPC_WAITREAD_START", "GRPC_WAITREAD_END", "GRPC_SEND_START", "GRPC_SEND_END"}


_CONTEXT = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor("OUT", np.array([str(request.trace().get_context())], dtype=object))]
            )
            for request in requests
        ]
"""

_CALLER = """
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        tensor = pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()
        for model, name, output, request_id in CALLS:
            answer = pb_utils.InferenceRequest(
                request_id=request_id,
                model_name=model,
                inputs=[pb_utils.Tensor(name, tensor)],
                requested_output_names=[output],
                trace=None if request_id == "untraced" else request.trace(),
            ).exec()
            if request_id == "refused":
                assert answer.has_error()
                continue
            tensor = pb_utils.get_output_tensor_by_name(answer, output).as_numpy()
        return pb_utils.InferenceResponse([pb_utils.Tensor("OUT", tensor)])
"""
#: Model, input, output and id of each request that is made.
_CALLS = {
    "caller": [
        ("fixed", "INPUT0", "OUTPUT0", "model"),
        ("fixed", "INPUT0", "OUTPUT0", "untraced"),
        ("nobody", "IN", "OUT", "refused"),
        ("twice", "IN", "OUT", "ensemble"),
        ("relay", "IN", "OUT", "chain"),
    ],
    "relay": [("fixed", "INPUT0", "OUTPUT0", "from relay")],
}


def _write_models(repository: Path) -> Path:
    write_identity(repository, "fixed", [("TYPE_FP32", "2")], batch=4)
    write_identity(repository, "other", [("TYPE_FP32", "2")])
    directory = repository / "twice"
    (directory / "1").mkdir(parents=True)
    (directory / "config.pbtxt").write_text(
        'platform: "ensemble"\nmax_batch_size: 4\n'
        'input { name: "IN" data_type: TYPE_FP32 dims: [ 2 ] }\n'
        'output { name: "OUT" data_type: TYPE_FP32 dims: [ 2 ] }\n'
        "ensemble_scheduling {\n"
        '  step { model_name: "fixed" model_version: -1 input_map { key: "INPUT0" value: "IN" }'
        ' output_map { key: "OUTPUT0" value: "MID" } }\n'
        '  step { model_name: "fixed" model_version: -1 input_map { key: "INPUT0" value: "MID" }'
        ' output_map { key: "OUTPUT0" value: "OUT" } }\n}\n'
    )
    context = repository / "context"
    (context / "1").mkdir(parents=True)
    (context / "1" / "model.py").write_text(_CONTEXT)
    (context / "config.pbtxt").write_text(
        'backend: "python"\ninput { name: "IN" data_type: TYPE_FP32 dims: [ 1 ] }\n'
        'output { name: "OUT" data_type: TYPE_STRING dims: [ 1 ] }\n'
    )
    for name, calls in _CALLS.items():
        (repository / name / "1").mkdir(parents=True)
        (repository / name / "1" / "model.py").write_text(f"CALLS = {calls!r}\n{_CALLER}")
        (repository / name / "config.pbtxt").write_text(
            'backend: "python"\nmax_batch_size: 4\ninput { name: "IN" data_type: TYPE_FP32 dims: [ 2 ] }\n'
            'output { name: "OUT" data_type: TYPE_FP32 dims: [ 2 ] }\n'
        )
    return repository


def _post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.loads(reply.read())


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=30) as reply:
        return json.loads(reply.read())


def _refusal(url: str, body: bytes) -> tuple[int, str]:
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(url, body), timeout=30)
    with caught.value as error:
        return error.code, json.loads(error.read())["error"]


def _infer_json(
    base: str, model: str, request_id: str = "", name: str = "INPUT0", shape: tuple[int, ...] = (1, 2)
) -> Any:
    body: dict[str, Any] = {"inputs": [{"name": name, "datatype": "FP32", "shape": list(shape), "data": [1, 2.5]}]}
    if request_id:
        body["id"] = request_id
    return _post(f"{base}/v2/models/{model}/infer", body)


def _infer_binary(base: str, model: str, headers: dict[str, str] | None = None) -> bytes:
    """Send the form of request that takes the fast path."""
    header = json.dumps(
        {
            "inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}],
            "outputs": [{"name": "OUTPUT0", "parameters": {"binary_data": True}}],
        }
    ).encode()
    request = urllib.request.Request(
        f"{base}/v2/models/{model}/infer",
        header + struct.pack("<2f", 1, 2),
        {"Inference-Header-Content-Length": str(len(header)), **(headers or {})},
    )
    with urllib.request.urlopen(request, timeout=30) as reply:
        return bytes(reply.read())


def _tell_context(base: str, headers: dict[str, str]) -> str:
    """Return the trace context that a model was given."""
    body = {"inputs": [{"name": "IN", "datatype": "FP32", "shape": [1], "data": [1]}]}
    request = urllib.request.Request(f"{base}/v2/models/context/infer", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as reply:
        return str(json.loads(reply.read())["outputs"][0]["data"][0])


def _items(path: Path) -> list[dict[str, Any]]:
    """Return what is in a file that may just be being written."""
    end_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            items: list[dict[str, Any]] = json.loads(path.read_text())
        except json.JSONDecodeError:
            if time.monotonic() > end_s:
                raise
            time.sleep(0.01)
        else:
            return items


def _traces(path: Path) -> dict[int, dict[str, Any]]:
    """Return by id: the start object, the names of events, the tensors; of a file that nothing was written to: none."""
    found: dict[int, dict[str, Any]] = {}
    if not path.exists():
        return found
    for item in _items(path):
        trace = found.setdefault(item["id"], {"events": [], "tensors": []})
        if "timestamps" in item:
            trace["events"] += [(stamp["name"], stamp["ns"]) for stamp in item["timestamps"]]
        elif "activity" in item:
            trace["tensors"].append((item["activity"], item["tensor"]))
        else:
            trace["start"] = item
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def traced(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ForebayServer, str, Path]]:
    path = tmp_path_factory.mktemp("traces") / "trace.json"
    flags = [f"--trace-config=triton,file={path}", "--trace-config=level=TIMESTAMPS", "--trace-config=rate=1"]
    with ForebayServer(models, *flags, protocols=("http", "grpc", "metrics")) as server:
        yield server, f"http://127.0.0.1:{server.http_port}", path


class TestFile:
    def test_http_requests_on_both_paths_are_written_with_every_event(
        self, traced: tuple[ForebayServer, str, Path]
    ) -> None:
        """O-002..O-005: start object, one object per event, all names, times in order."""
        _server, base, path = traced
        _infer_json(base, "fixed", "r1")
        for _ in range(3):
            _infer_binary(base, "fixed")
        wait_until(lambda: len(_traces(path)) >= 4, "the traces")
        found = _traces(path)
        first = next(trace for trace in found.values() if trace["start"].get("request_id") == "r1")
        assert first["start"]["model_name"] == "fixed"
        assert first["start"]["model_version"] == 1
        for trace in found.values():
            assert {name for name, _ns in trace["events"]} == CORE_EVENTS | HTTP_EVENTS
            times = [ns for _name, ns in trace["events"]]
            assert times == sorted(times)
            assert min(times) > 0

    def test_grpc_requests_are_written(self, traced: tuple[ForebayServer, str, Path]) -> None:
        """O-005: the names of gRPC's events, unary and stream."""
        grpcclient = pytest.importorskip("tritonclient.grpc")
        server, _base, path = traced
        client = grpcclient.InferenceServerClient(f"127.0.0.1:{server.ports()['GRPCInferenceService']}")
        tensor = grpcclient.InferInput("INPUT0", [1, 2], "FP32")
        tensor.set_data_from_numpy(np.ones((1, 2), np.float32))
        for _ in range(3):
            client.infer("fixed", [tensor], request_id="over grpc")
        client.close()

        def ours() -> list[dict[str, Any]]:
            return [t for t in _traces(path).values() if t.get("start", {}).get("request_id") == "over grpc"]

        def names() -> list[set[str]]:
            return [{name for name, _ns in trace["events"]} for trace in ours()]

        wait_until(lambda: names() == [CORE_EVENTS | GRPC_EVENTS] * 3, "the traces")

    def test_steps_of_an_ensemble_have_traces_of_their_own(self, traced: tuple[ForebayServer, str, Path]) -> None:
        """O-008: children with a parent_id."""
        _server, base, path = traced
        _infer_json(base, "twice", "parent", name="IN")

        def parent() -> int:
            for number, trace in _traces(path).items():
                if trace.get("start", {}).get("model_name") == "twice":
                    return number
            return 0

        wait_until(lambda: parent() > 0, "the trace")
        children = [t for t in _traces(path).values() if t["start"].get("parent_id") == parent()]
        assert [child["start"]["model_name"] for child in children] == ["fixed", "fixed"]
        for child in children:
            assert {name for name, _ns in child["events"]} == CHILD_EVENTS

    def test_requests_of_a_model_are_below_its_own(self, traced: tuple[ForebayServer, str, Path]) -> None:
        """P-099, O-008: those made with the trace, of models, of models that call others, of ensembles."""
        _server, base, path = traced
        _infer_json(base, "caller", "top", name="IN")

        def spans() -> dict[int, dict[str, Any]]:
            return {number: trace["start"] for number, trace in _traces(path).items()}

        def made_for(number: int) -> list[tuple[str, str]]:
            children = (start for start in spans().values() if start.get("parent_id") == number)
            return [(start["model_name"], start["request_id"]) for start in children]

        def number_of(request_id: str) -> int:
            return next((number for number, start in spans().items() if start.get("request_id") == request_id), 0)

        wait_until(lambda: number_of("top") > 0, "the trace")
        assert made_for(number_of("top")) == [("fixed", "model"), ("twice", "ensemble"), ("relay", "chain")]
        assert made_for(number_of("chain")) == [("fixed", "from relay")]
        assert made_for(number_of("ensemble")) == [("fixed", "ensemble"), ("fixed", "ensemble")]
        events = [name for name, _ns in _traces(path)[number_of("from relay")]["events"]]
        assert set(events) == CHILD_EVENTS
        assert [name for name, _ns in _traces(path)[number_of("ensemble")]["events"]] == [
            "REQUEST_START",
            "QUEUE_START",
            "REQUEST_END",
        ]


class TestSettings:
    def test_shape_of_the_reply_and_inheritance(self, traced: tuple[ForebayServer, str, Path]) -> None:
        """H-250, H-251, H-256, H-257: strings, partial updates, null, and what follows the server."""
        _server, base, path = traced
        url, own = f"{base}/v2/trace/setting", f"{base}/v2/models/other/trace/setting"
        start = {
            "trace_level": ["TIMESTAMPS"],
            "trace_rate": "1",
            "trace_count": "-1",
            "log_frequency": "0",
            "trace_file": str(path),
            "trace_mode": "triton",
        }
        assert _get(url) == start
        assert _get(own) == start
        assert _post(own, {"trace_rate": "7", "unknown": 1})["trace_rate"] == "7"
        assert _post(url, {"log_frequency": "5"})["log_frequency"] == "5"
        assert _get(own) == {**start, "trace_rate": "7", "log_frequency": "5"}
        assert _post(own, {"trace_rate": None}) == {**start, "log_frequency": "5"}
        assert _post(url, {"log_frequency": None}) == start

    def test_count_runs_down_and_stops_the_tracing(self, traced: tuple[ForebayServer, str, Path]) -> None:
        """H-258: count 2, three requests."""
        _server, base, path = traced
        own = f"{base}/v2/models/other/trace/setting"
        assert _post(own, {"trace_count": "2", "trace_rate": "1"})["trace_count"] == "2"
        before = sum(t.get("start", {}).get("model_name") == "other" for t in _traces(path).values())
        for left in ("1", "0", "0"):
            _infer_json(base, "other", shape=(2,))
            assert _get(own)["trace_count"] == left
        after = sum(t.get("start", {}).get("model_name") == "other" for t in _traces(path).values())
        assert after - before == 2
        assert _post(own, {"trace_count": "1"})["trace_count"] == "1"
        _infer_json(base, "other", shape=(2,))
        assert _get(own)["trace_count"] == "0"
        _post(own, {"trace_count": None, "trace_rate": None})

    def test_numbered_files(self, traced: tuple[ForebayServer, str, Path]) -> None:
        """O-002: with a log frequency of 1, each trace has a file of its own."""
        _server, base, path = traced
        _post(f"{base}/v2/trace/setting", {"log_frequency": "1"})
        for _ in range(2):
            _infer_binary(base, "fixed")
        _post(f"{base}/v2/trace/setting", {"log_frequency": None})
        for number in range(2):
            assert len(_traces(path.with_name(f"{path.name}.{number}"))) == 1

    def test_tensors_are_shown(self, traced: tuple[ForebayServer, str, Path]) -> None:
        """O-007: data, shape and datatype of inputs and outputs."""
        _server, base, path = traced
        _post(f"{base}/v2/trace/setting", {"trace_level": ["TENSORS"]})
        _infer_json(base, "fixed", "tensors")
        _post(f"{base}/v2/trace/setting", {"trace_level": None})
        _infer_json(base, "fixed", "after")
        numbered = path.with_name(f"{path.name}.2")
        found = [
            trace
            for candidate in (path, numbered)
            for trace in _traces(candidate).values()
            if trace.get("start", {}).get("request_id") == "tensors"
        ]
        assert len(found) == 1
        assert found[0]["events"] == []
        value = {"data": "1,2.5", "shape": "1,2", "dtype": "FP32"}
        assert found[0]["tensors"] == [
            ("TENSOR_QUEUE_INPUT", {"name": "INPUT0", **value}),
            ("TENSOR_BACKEND_INPUT", {"name": "INPUT0", **value}),
            ("TENSOR_BACKEND_OUTPUT", {"name": "OUTPUT0", **value}),
        ]

    def test_refusals(self, traced: tuple[ForebayServer, str, Path]) -> None:
        """H-253..H-255, H-259: Triton's texts."""
        _server, base, _path = traced
        url = f"{base}/v2/trace/setting"
        assert _refusal(url, b'{"trace_rate":"abc"}') == (400, "Unable to parse 'trace_rate', got: abc")
        assert _refusal(url, b'{"trace_level":["OFF","TIMESTAMPS"]}') == (
            400,
            "Expect only one trace level 'OFF' is specified",
        )
        assert _refusal(url, b'{"trace_file":"x"}')[0] == 501
        assert _refusal(f"{base}/v2/models/nobody/trace/setting", b"{}") == (
            400,
            "Request for unknown model : nobody",
        )


def test_deprecated_flags_and_the_rate(models: Path, tmp_path: Path) -> None:
    """O-010, O-001: the old flags still work; one of `rate` requests is traced, on the fast path too."""
    path = tmp_path / "old.json"
    flags = ("--trace-level=TIMESTAMPS", "--trace-rate=3", f"--trace-file={path}", "--http-frontends=1")
    with ForebayServer(models, *flags) as server:
        base = f"http://127.0.0.1:{server.http_port}"
        for _ in range(7):
            _infer_binary(base, "fixed")
        wait_until(lambda: path.exists() and len(_traces(path)) == 2, "two traces")


class _Collector(BaseHTTPRequestHandler):
    bodies: ClassVar[list[bytes]] = []

    def do_POST(self) -> None:
        self.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_spans_reach_a_collector(models: Path) -> None:
    """O-020..O-024: span tree, attributes, resource, and a traceparent that is traced whatever the rate."""
    service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    _Collector.bodies = []
    collector = ThreadingHTTPServer(("127.0.0.1", 0), _Collector)
    thread = threading.Thread(target=collector.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    flags = (
        "--trace-config=mode=opentelemetry",
        "--trace-config=level=TIMESTAMPS",
        "--trace-config=rate=1000",
        f"--trace-config=opentelemetry,url={url}",
        "--trace-config=opentelemetry,resource=service.name=ours",
        "--trace-config=opentelemetry,bsp_schedule_delay=100",
    )
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    try:
        with ForebayServer(models, *flags) as server:
            base = f"http://127.0.0.1:{server.http_port}"
            settings = _get(f"{base}/v2/trace/setting")
            assert settings["trace_mode"] == "opentelemetry"
            assert settings["url"] == url
            assert "trace_file" not in settings
            for _ in range(2):
                _infer_binary(base, "fixed")
            _infer_binary(base, "fixed", {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"})
            told = _tell_context(base, {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"})
            assert _tell_context(base, {}) == "None"
            wait_until(lambda: b"".join(_Collector.bodies).count(b"InferRequest") == 2, "the spans")
    finally:
        collector.shutdown()
        thread.join()
        collector.server_close()
    spans: dict[str, Any] = {}
    for body in _Collector.bodies:
        for resource in service.ExportTraceServiceRequest.FromString(body).resource_spans:
            names = {a.key: a.value.string_value for a in resource.resource.attributes}
            assert names["service.name"] == "ours"
            for scope in resource.scope_spans:
                for span in scope.spans:
                    spans.setdefault(span.name, span)
    assert set(spans) == {"InferRequest", "fixed", "context", "compute"}
    # O-025, P-037: what the model was told is the span that it runs in.
    assert json.loads(told)["traceparent"] == f"00-{trace_id}-{spans['context'].span_id.hex()}-01"
    assert {span.trace_id.hex() for span in spans.values()} == {trace_id}
    assert spans["InferRequest"].parent_span_id.hex() == "b7ad6b7169203331"
    assert spans["fixed"].parent_span_id == spans["InferRequest"].span_id
    assert spans["compute"].parent_span_id == spans["fixed"].span_id
    attributes = {a.key for a in spans["fixed"].attributes}
    assert {"triton.model_name", "triton.model_version", "triton.trace_id", "triton.trace_parent_id"} <= attributes
    assert {event.name for event in spans["compute"].events} >= {"COMPUTE_START", "COMPUTE_END"}
