"""Latencies, responses and models' own metrics over real processes (spec 9.2, H-236, M-055)."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forebay_server import ForebayServer, wait_until
from http_models import metrics_page, write_identity
from prometheus_client.parser import text_string_to_metric_families

_DECOUPLED = """
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.family = pb_utils.MetricFamily(
            name="requests_seen", description="Requests seen", kind=pb_utils.MetricFamily.COUNTER
        )
        self.metric = self.family.Metric(labels={"model": "stream"})

    def execute(self, requests):
        for request in requests:
            self.metric.increment(1)
            sender = request.get_response_sender()
            for tensor in (1, 2, 3):
                value = pb_utils.get_input_tensor_by_name(request, "IN").as_numpy() + tensor
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("OUT", value)]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""


def _write_models(repository: Path) -> Path:
    write_identity(repository, "fixed", [("TYPE_FP32", "2")], batch=4)
    write_identity(repository, "kept", [("TYPE_FP32", "2")], extra="response_cache { enable: true }")
    directory = repository / "stream"
    (directory / "1").mkdir(parents=True)
    (directory / "1" / "model.py").write_text(_DECOUPLED)
    (directory / "config.pbtxt").write_text(
        'backend: "python"\nmax_batch_size: 0\nmodel_transaction_policy { decoupled: true }\n'
        'input { name: "IN" data_type: TYPE_FP32 dims: [ 1 ] }\n'
        'output { name: "OUT" data_type: TYPE_FP32 dims: [ 1 ] }\n'
        'model_metrics { metric_control { metric_identifier { family: "nv_inference_first_response_histogram_ms" }'
        " histogram_options { buckets: [ 1, 60000 ] } } }\n"
        "instance_group { count: 2 kind: KIND_CPU }\n"
    )
    return repository


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForebayServer]:
    models = _write_models(tmp_path_factory.mktemp("models"))
    flags = (
        "--model-control-mode=explicit",
        "--load-model=*",
        "--cache-config=local,size=1048576",
        "--metrics-config=summary_latencies=true",
        "--metrics-config=histogram_latencies=true",
        "--metrics-config=summary_quantiles=0.5:0.05,bad,0.99:0.001",
    )
    with ForebayServer(models, *flags) as server:
        yield server


def _post(server: ForebayServer, path: str, body: dict[str, Any]) -> bytes:
    request = urllib.request.Request(f"http://127.0.0.1:{server.http_port}{path}", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as reply:
        return bytes(reply.read())


def _sample(page: str, series: str) -> float:
    found = re.search(rf"^{re.escape(series)} (\S+)$", page, re.MULTILINE)
    assert found is not None, f"no {series} in\n{page}"
    return float(found[1])


def test_responses_and_their_histogram(server: ForebayServer) -> None:
    """H-236, M-030, M-055: by index; the model's own buckets; a counter summed over two workers."""
    for _ in range(4):
        reply = _post(server, "/v2/models/stream/generate_stream", {"IN": 1.0})
        assert reply.count(b"data:") == 3
    with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/v2/models/stream/stats", timeout=30) as answer:
        stats = json.loads(answer.read())["model_stats"][0]
    responses = stats["response_stats"]
    assert list(responses) == ["0", "1", "2"]
    for response in responses.values():
        assert list(response) == ["compute_infer", "compute_output", "success", "fail", "empty_response", "cancel"]
        assert response["success"]["count"] == response["compute_infer"]["count"] == 4
        assert response["success"]["ns"] > 0
        assert response["fail"]["count"] == response["empty_response"]["count"] == 0
    page = metrics_page(server)
    name = "nv_inference_first_response_histogram_ms"
    assert _sample(page, f'{name}_bucket{{model="stream",version="1",le="60000"}}') == 4
    assert _sample(page, f'{name}_count{{model="stream",version="1"}}') == 4
    assert 'model="fixed"' not in "".join(line for line in page.splitlines() if line.startswith(name))
    wait_until(
        lambda: _sample(metrics_page(server), 'requests_seen{model="stream"}') == 4, "the metric of the model's own"
    )


def test_summaries_and_our_histograms(server: ForebayServer) -> None:
    """M-031, M-034: quantiles as asked for, counts equal requests; ours can be read by Prometheus' own parser."""
    body = {"inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 3, 4]}]}
    for _ in range(5):
        _post(server, "/v2/models/fixed/infer", body)
    labels = 'model="fixed",version="1"'
    # A worker answers before it counts.
    counted = f"forebay_compute_duration_seconds_count{{{labels}}}"
    wait_until(lambda: _sample(metrics_page(server), counted) == 5, "the worker to have counted")
    page = metrics_page(server)
    for stage in ("request", "queue", "compute_input", "compute_infer", "compute_output"):
        name = f"nv_inference_{stage}_summary_us"
        assert _sample(page, f"{name}_count{{{labels}}}") == 5
        quantiles = re.findall(rf'^{name}{{{labels},quantile="(\S+)"}} (\S+)$', page, re.MULTILINE)
        assert [quantile for quantile, _value in quantiles] == ["0.5", "0.99"]
    families = {family.name: family for family in text_string_to_metric_families(page)}
    for name in (
        "forebay_request_duration_seconds",
        "forebay_queue_duration_seconds",
        "forebay_compute_duration_seconds",
    ):
        samples = [s for s in families[name].samples if s.labels["model"] == "fixed"]
        buckets = [s.value for s in samples if s.name.endswith("_bucket")]
        assert buckets == sorted(buckets)
        assert buckets[-1] == 5
        assert next(s.value for s in samples if s.name.endswith("_count")) == 5
        assert next(s.value for s in samples if s.name.endswith("_sum")) < 10
    sizes = {
        s.labels["le"]: s.value
        for s in families["forebay_batch_size"].samples
        if s.name.endswith("_bucket") and s.labels["model"] == "fixed"
    }
    assert list(sizes) == ["1", "2", "4", "+Inf"]
    assert (sizes["1"], sizes["2"]) == (0, 5)


def test_summaries_of_the_cache(server: ForebayServer) -> None:
    """M-031, M-032: look-ups have summaries of their own, and requests to such models none."""
    body = {"inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": [2], "data": [1, 2]}]}
    for _ in range(3):
        _post(server, "/v2/models/kept/infer", body)
    page = metrics_page(server)
    labels = 'model="kept",version="1"'
    assert _sample(page, f"nv_cache_miss_summary_per_model_count{{{labels}}}") == 1
    assert _sample(page, f"nv_cache_hit_summary_per_model_count{{{labels}}}") == 2
    assert _sample(page, f"nv_inference_compute_infer_summary_us_count{{{labels}}}") == 1
    assert f"nv_inference_request_summary_us_count{{{labels}}}" not in page
    assert 'nv_cache_hit_summary_per_model_count{model="fixed"' not in page


def test_a_worker_that_is_gone_takes_its_metrics_along(server: ForebayServer) -> None:
    """M-007 for models' own series."""
    _post(server, "/v2/repository/models/stream/unload", {})
    wait_until(lambda: "requests_seen" not in metrics_page(server), "the series to go")
