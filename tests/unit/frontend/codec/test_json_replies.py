"""The small replies, key for key (spec H-035..H-038, H-191, H-195, H-211, H-230..H-237, H-250, H-261; appendix A)."""

from forebay.frontend.codec.json_replies import (
    BatchStatistics,
    CudaRegion,
    Duration,
    IndexEntry,
    LogSettings,
    MemoryUsage,
    ModelStatistics,
    ResponseStatistics,
    SystemRegion,
    TraceSettings,
    log_settings,
    model_metadata,
    model_statistics,
    region_status,
    repository_index,
    server_metadata,
    trace_settings,
)
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.tensor import TensorSpec


def test_server_metadata():
    """E-001."""
    assert server_metadata("triton", "2.51.0") == (
        b'{"name":"triton","version":"2.51.0","extensions":["classification","sequence","model_repository",'
        b'"model_repository(unload_dependents)","schedule_policy","model_configuration","system_shared_memory",'
        b'"cuda_shared_memory","binary_tensor_data","parameters","statistics","trace","logging"]}'
    )


def test_model_metadata():
    """E-029; the batch dimension is shown as -1 (H-037), but not on shape tensors."""
    entry = ModelEntry(
        name="cached",
        version=1,
        state="READY",
        platform="identity",
        max_batch_size=4,
        inputs=(TensorSpec("INPUT0", "INT32", (-1,)), TensorSpec("S", "INT32", (2,), is_shape_tensor=True)),
        outputs=(TensorSpec("OUTPUT0", "INT32", (-1,)),),
    )
    assert model_metadata(entry, [1, 3]) == (
        b'{"name":"cached","versions":["1","3"],"platform":"identity",'
        b'"inputs":[{"name":"INPUT0","datatype":"INT32","shape":[-1,-1]},{"name":"S","datatype":"INT32","shape":[2]}],'
        b'"outputs":[{"name":"OUTPUT0","datatype":"INT32","shape":[-1,-1]}]}'
    )
    flat = ModelEntry(name="f", version=1, state="READY", inputs=(TensorSpec("X", "FP32", (2, -1)),))
    assert b'"inputs":[{"name":"X","datatype":"FP32","shape":[2,-1]}],"outputs":[]}' in model_metadata(flat, [1])


def test_statistics_of_an_idle_model():
    """E-075."""
    zero = b'{"count":0,"ns":0}'
    assert model_statistics([ModelStatistics("cached", "1")]) == (
        b'{"model_stats":[{"name":"cached","version":"1","last_inference":0,"inference_count":0,"execution_count":0,'
        b'"inference_stats":{"success":Z,"fail":Z,"queue":Z,"compute_input":Z,"compute_infer":Z,"compute_output":Z,'
        b'"cache_hit":Z,"cache_miss":Z},"response_stats":{},"batch_stats":[],"memory_usage":[]}]}'
    ).replace(b"Z", zero)
    assert model_statistics([]) == b'{"model_stats":[]}'


def test_statistics_of_a_busy_model():
    one = Duration(1, 5)
    reply = model_statistics(
        [
            ModelStatistics(
                "m",
                "2",
                response_stats={"0": ResponseStatistics(success=one)},
                batch_stats=(BatchStatistics(4, one, one, one),),
                memory_usage=(MemoryUsage("GPU", 0, 9),),
            )
        ]
    )
    zero = b'{"count":0,"ns":0}'
    assert reply.endswith(
        (
            b'"response_stats":{"0":{"compute_infer":Z,"compute_output":Z,"success":O,"fail":Z,"empty_response":Z,'
            b'"cancel":Z}},"batch_stats":[{"batch_size":4,"compute_input":O,"compute_infer":O,"compute_output":O}],'
            b'"memory_usage":[{"type":"GPU","id":0,"byte_size":9}]}]}'
        )
        .replace(b"Z", zero)
        .replace(b"O", b'{"count":1,"ns":5}')
    )


def test_repository_index():
    """E-013, E-014."""
    entries = [
        IndexEntry("bad"),
        IndexEntry("dec", "1", "READY"),
        IndexEntry("id_all", "1", "UNAVAILABLE", 'Internal: no "init"\n'),
    ]
    assert repository_index(entries) == (
        b'[{"name":"bad"},{"name":"dec","version":"1","state":"READY"},'
        b'{"name":"id_all","version":"1","state":"UNAVAILABLE","reason":"Internal: no \\"init\\"\\n"}]'
    )
    assert repository_index(entries, ready_only=True) == b'[{"name":"dec","version":"1","state":"READY"}]'
    assert repository_index([]) == b"[]"


def test_trace_settings():
    """E-138; other modes have other keys."""
    settings = TraceSettings(("TIMESTAMPS", "TENSORS"), "7", "2", "0", "OUT/trace.json")
    assert trace_settings(settings) == (
        b'{"trace_level":["TIMESTAMPS","TENSORS"],"trace_rate":"7","trace_count":"2","log_frequency":"0",'
        b'"trace_file":"OUT/trace.json","trace_mode":"triton"}'
    )
    assert trace_settings({"trace_mode": "opentelemetry", "url": "x"}) == b'{"trace_mode":"opentelemetry","url":"x"}'


def test_log_settings():
    """E-146."""
    assert log_settings(LogSettings(log_format="ISO8601")) == (
        b'{"log_file":"","log_info":true,"log_warning":true,"log_error":true,"log_verbose_level":0,'
        b'"log_format":"ISO8601"}'
    )


def test_region_status():
    """E-149, H-191, H-195."""
    assert region_status([]) == b"[]"
    assert region_status([SystemRegion("r", "/key", 0, 64), SystemRegion("s", "/k", 4096, 8)]) == (
        b'[{"name":"r","key":"/key","offset":0,"byte_size":64},{"name":"s","key":"/k","offset":4096,"byte_size":8}]'
    )
    assert region_status([CudaRegion("g", 1, 64)]) == b'[{"name":"g","device_id":1,"byte_size":64}]'
