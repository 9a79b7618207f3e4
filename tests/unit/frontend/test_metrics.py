"""The metrics page: names, HELP texts, labels, values, order."""

from __future__ import annotations

import pytest
from fake_frontend import entry
from prometheus_client.parser import text_string_to_metric_families

from forebay.frontend.catalog_view import CatalogView
from forebay.frontend.metrics import MetricsPage, MetricsSettings, format_value, render_labels
from forebay.ipc.catalog import Catalog, GpuInstance, ModelEntry
from forebay.ipc.counters import (
    PRODUCER_WORDS,
    SCHEDULER_WORDS,
    CountersFile,
    InstanceCounter,
    ProducerCounter,
    SchedulerCounter,
    instance_words,
)

TRITON_FAMILIES = {
    "nv_inference_request_success": "Number of successful inference requests, all batch sizes",
    "nv_inference_request_failure": "Number of failed inference requests, all batch sizes",
    "nv_inference_count": "Number of inferences performed (does not include cached requests)",
    "nv_inference_exec_count": "Number of model executions performed (does not include cached requests)",
    "nv_inference_request_duration_us": (
        "Cumulative inference request duration in microseconds (includes cached requests)"
    ),
    "nv_inference_queue_duration_us": (
        "Cumulative inference queuing duration in microseconds (includes cached requests)"
    ),
    "nv_inference_compute_input_duration_us": (
        "Cumulative compute input duration in microseconds (does not include cached requests)"
    ),
    "nv_inference_compute_infer_duration_us": (
        "Cumulative compute inference duration in microseconds (does not include cached requests)"
    ),
    "nv_inference_compute_output_duration_us": (
        "Cumulative inference compute output duration in microseconds (does not include cached requests)"
    ),
    "nv_inference_pending_request_count": ("Instantaneous number of pending requests awaiting execution per-model."),
    "nv_model_load_duration_secs": "Model load time in seconds",
    "nv_pinned_memory_pool_total_bytes": "Pinned memory pool total memory size, in bytes",
    "nv_pinned_memory_pool_used_bytes": "Pinned memory pool used memory size, in bytes",
    "nv_cpu_utilization": "CPU utilization rate [0.0 - 1.0]",
    "nv_cpu_memory_total_bytes": "CPU total memory (RAM), in bytes",
    "nv_cpu_memory_used_bytes": "CPU used memory (RAM), in bytes",
}


def page(*models: ModelEntry, words: memoryview | None = None, **settings: object) -> str:
    chosen = MetricsSettings(**settings)  # type: ignore[arg-type]
    rendered = MetricsPage(words if words is not None else CountersFile().words, chosen)
    rendered.take_catalog(CatalogView(Catalog(generation=1, models=models)))
    return rendered.render().decode()


def lines_of(text: str, family: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith((f"{family} ", f"{family}{{"))]


def test_every_series_of_a_ready_model_starts_at_zero() -> None:
    """Spec M-006, M-021, appendix G: four failure reasons, integers without decimals, labels by name."""
    text = page(entry("f32"))
    assert lines_of(text, "nv_inference_request_success") == ['nv_inference_request_success{model="f32",version="1"} 0']
    assert lines_of(text, "nv_inference_request_failure") == [
        'nv_inference_request_failure{model="f32",reason="OTHER",version="1"} 0',
        'nv_inference_request_failure{model="f32",reason="BACKEND",version="1"} 0',
        'nv_inference_request_failure{model="f32",reason="REJECTED",version="1"} 0',
        'nv_inference_request_failure{model="f32",reason="CANCELED",version="1"} 0',
    ]


def test_families_have_triton_names_help_and_order() -> None:
    """Spec 9.2, 9.3, M-008."""
    helps = [
        line[len("# HELP ") :].split(" ", 1) for line in page(entry("m")).splitlines() if line.startswith("# HELP")
    ]
    assert [(name, text) for name, text in helps if name.startswith("nv_")] == list(TRITON_FAMILIES.items())
    assert [name for name, _ in helps[len(TRITON_FAMILIES) :] if not name.startswith("forebay_")] == []


def test_prometheus_can_parse_the_page() -> None:
    """Spec M-001."""
    tags = {"tg": 'quo"te\\ and\nnewline'}
    families = {family.name: family for family in text_string_to_metric_families(page(entry("m", metric_tags=tags)))}
    assert families["nv_inference_request_success"].type == "counter"
    (sample,) = families["nv_inference_request_success"].samples
    assert sample.labels == {"_tg": tags["tg"], "model": "m", "version": "1"}
    assert families["nv_cpu_utilization"].type == "gauge"


def test_tags_and_namespace_are_labels() -> None:
    """Spec 9.2, appendix G; R-015."""
    text = page(entry("cached", 3, metric_tags={"tg": "tv"}, namespace="repo"))
    assert 'nv_inference_count{_tg="tv",model="cached",namespace="repo",version="3"} 0' in text.splitlines()


def test_only_ready_versions_have_series() -> None:
    """Spec M-007."""
    counters = CountersFile()
    shown = MetricsPage(counters.words, MetricsSettings())
    shown.take_catalog(CatalogView(Catalog(generation=1, models=(entry("a"), entry("b", 1, "LOADING")))))
    text = shown.render().decode()
    assert 'model="a"' in text
    assert 'model="b"' not in text
    shown.take_catalog(CatalogView(Catalog(generation=2, models=(entry("a", 1, "UNLOADING"),))))
    text = shown.render().decode()
    assert "model=" not in text
    assert "nv_inference_count" not in text
    assert "nv_cpu_utilization" in text


def test_values_are_current_at_every_scrape() -> None:
    """Spec M-005: counters are immediate; durations are printed in microseconds (M-024..M-026)."""
    counters = CountersFile()
    instance, producer = counters.allocate(instance_words(8)), counters.allocate(PRODUCER_WORDS)
    model = entry(
        "m", instance_counter_offsets=(instance,), producer_counter_offsets=(producer,), load_ns=1_500_000_000
    )
    shown = MetricsPage(counters.words, MetricsSettings())
    shown.take_catalog(CatalogView(Catalog(generation=1, models=(model,))))
    block = counters.block(instance, instance_words(8))
    block[InstanceCounter.INFERENCES] = 4
    block[InstanceCounter.QUEUE_NS] = 193_999
    block[InstanceCounter.GATHERED_BYTES] = 77
    block[InstanceCounter.SEGMENTS] = 3
    block = counters.block(producer, PRODUCER_WORDS)
    block[ProducerCounter.SUCCESS] = 10**15
    block[ProducerCounter.REJECTED] = 2
    block[ProducerCounter.COPIED_IN_BYTES] = 5
    block[ProducerCounter.ROWS_CAPACITY] = 64
    lines = shown.render().decode().splitlines()
    labels = '{model="m",version="1"}'
    for line in (
        f"nv_inference_request_success{labels} 1000000000000000",
        'nv_inference_request_failure{model="m",reason="REJECTED",version="1"} 2',
        f"nv_inference_count{labels} 4",
        f"nv_inference_queue_duration_us{labels} 193",
        f"nv_model_load_duration_secs{labels} 1.5",
        'forebay_copied_bytes_total{model="m",stage="ingress",version="1"} 5',
        'forebay_copied_bytes_total{model="m",stage="gather",version="1"} 77',
        'forebay_copied_bytes_total{model="m",stage="scatter",version="1"} 0',
        'forebay_copied_bytes_total{model="m",stage="egress",version="1"} 0',
        f"forebay_batch_segments_total{labels} 3",
        f"forebay_slab_rows{labels} 64",
    ):
        assert line in lines
    block[ProducerCounter.SUCCESS] = 11
    assert f"nv_inference_request_success{labels} 11" in shown.render().decode().splitlines()


def test_counts_of_what_waits_and_what_came_from_the_cache() -> None:
    """Spec M-027, M-029: cache families only for models that have the cache."""
    counters = CountersFile()
    offset = counters.allocate(SCHEDULER_WORDS)
    block = counters.block(offset, SCHEDULER_WORDS)
    block[SchedulerCounter.PENDING] = 6
    producer = counters.allocate(PRODUCER_WORDS)
    counts = counters.block(producer, PRODUCER_WORDS)
    counts[ProducerCounter.REQUESTS_HELD] = 3
    counts[ProducerCounter.CACHE_HITS] = 2
    counts[ProducerCounter.CACHE_MISS_NS] = 5_999
    cached = entry(
        "cached",
        response_cache=True,
        scheduler_counter_offset=offset,
        producer_counter_offsets=(producer,),
        worker_restart_count=4,
    )
    text = page(cached, entry("plain"), words=counters.words)
    lines = text.splitlines()
    assert 'nv_inference_pending_request_count{model="cached",version="1"} 9' in lines
    assert 'forebay_worker_restarts_total{model="cached",version="1"} 4' in lines
    assert lines_of(text, "nv_cache_num_hits_per_model") == [
        'nv_cache_num_hits_per_model{model="cached",version="1"} 2'
    ]
    assert lines_of(text, "nv_cache_miss_duration_per_model") == [
        'nv_cache_miss_duration_per_model{model="cached",version="1"} 5'
    ]
    assert "nv_cache" not in page(entry("plain"))


def test_settings_switch_families_off() -> None:
    """Spec M-003, M-033, M-052."""
    text = page(entry("m"), allow_cpu=False, counter_latencies=False, pinned_pool_byte_size=123)
    assert "nv_cpu" not in text
    assert "duration_us" not in text
    assert "nv_pinned_memory_pool_total_bytes 123" in text.splitlines()


def test_settings_come_from_the_groups_of_the_server() -> None:
    groups = {
        "metrics": {
            "allow_cpu": False,
            "interval_ms": 100,
            "config": [{"name": "", "setting": "counter_latencies", "value": "False"}],
        },
        "memory": {"pinned_pool_byte_size": 1},
        "http": {"port": 8000},
    }
    assert MetricsSettings.from_groups(groups) == MetricsSettings(
        allow_cpu=False, interval_ms=100, counter_latencies=False, pinned_pool_byte_size=1
    )
    assert MetricsSettings.from_groups({}) == MetricsSettings()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (3.0, "3"), (0.25, "0.25"), (10**16, "10000000000000000"), (1.5e20, "150000000000000000000")],
)
def test_numbers_have_no_needless_decimals(value: float, text: str) -> None:
    assert format_value(value) == text


def test_labels_are_sorted_and_escaped() -> None:
    assert render_labels({"b": 'x"\\\n', "_a": ""}) == '{_a="",b="x\\"\\\\\\n"}'


def test_models_on_a_gpu_say_which_and_what_their_instances_did_there() -> None:
    """M-053's label; other models have neither the label nor the families."""
    counters = CountersFile()
    offsets = [counters.allocate(instance_words(1)) for _ in range(2)]
    for number, offset in enumerate(offsets, start=1):
        counters.block(offset, instance_words(1))[InstanceCounter.DEVICE_NS] = number * 5000
    instances = tuple(GpuInstance(f"gpu_0_{number}", f"GPU-{number}", offset) for number, offset in enumerate(offsets))
    both = entry("gpu", gpu_instances=instances, instance_counter_offsets=tuple(offsets))
    text = page(entry("one", gpu_uuid="GPU-1", device_id=0), entry("cpu"), both, words=counters.words)
    assert lines_of(text, "nv_inference_count") == [
        'nv_inference_count{model="cpu",version="1"} 0',
        'nv_inference_count{model="gpu",version="1"} 0',
        'nv_inference_count{gpu_uuid="GPU-1",model="one",version="1"} 0',
    ]
    assert lines_of(text, "forebay_device_copied_bytes_total") == [
        f'forebay_device_copied_bytes_total{{direction="{way}",gpu_uuid="GPU-{number}",instance="gpu_0_{number}",'
        'model="gpu",version="1"} 0'
        for number in range(2)
        for way in ("to_device", "from_device")
    ]
    assert lines_of(text, "forebay_device_busy_us_total") == [
        'forebay_device_busy_us_total{gpu_uuid="GPU-0",instance="gpu_0_0",model="gpu",version="1"} 5',
        'forebay_device_busy_us_total{gpu_uuid="GPU-1",instance="gpu_0_1",model="gpu",version="1"} 10',
    ]
    assert lines_of(text, "forebay_device_passed_bytes_total") == [
        'forebay_device_passed_bytes_total{gpu_uuid="GPU-1",model="one",version="1"} 0'
    ]
    assert "forebay_cuda_graph_launches_total" not in page(entry("cpu"))
