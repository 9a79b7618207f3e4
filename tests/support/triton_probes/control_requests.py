"""The repository, traces and metrics."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from http_wire import get, post

from triton_probes.probe import Probe, a_get, a_post, infer, tensor


def repository() -> Iterator[Probe]:
    """The model repository extension."""
    bodies: Sequence[object] = (
        "",
        {},
        "xx",
        "[]",
        "5",
        "null",
        '"x"',
        {"ready": True},
        {"ready": False},
        {"ready": None},
        {"ready": 1},
        {"ready": "true"},
        {"x": 1},
        '{"ready":true} x',
    )
    yield from (a_post("/v2/repository/index", body) for body in bodies)
    yield a_post("/v2/repository/foo/index", {"ready": True})
    yield a_post("/v2/repository/index?x=1")
    at = "/v2/repository/models/i8/load"
    loads: Sequence[object] = (
        "",
        {},
        "xx",
        "[]",
        "5",
        "null",
        '"x"',
        {"parameters": None},
        {"parameters": 5},
        {"parameters": []},
        {"parameters": "x"},
        {"parameters": {}},
        {"x": 1},
        {"parameters": {"foo": "x"}},
        {"parameters": {"foo": 1}},
        {"parameters": {"config": 5}},
        {"parameters": {"config": None}},
        {"parameters": {"config": {}}},
        {"parameters": {"config": ""}},
        {"parameters": {"config": "{"}},
        {"parameters": {"config": "{}"}},
        {"parameters": {"config": "[]"}},
        {"parameters": {"config": "null"}},
        {"parameters": {"config": "xx"}},
        {"parameters": {"config": '{"backend":"nonexist"}'}},
        {"parameters": {"config": '{"backend":"python","bogus":1}'}},
        {"parameters": {"config": '{"platform":"foo"}'}},
        {"parameters": {"config": '{"name":"other"}'}},
        {"parameters": {"config": '{"backend":"python","max_batch_size":-1}'}},
        {"parameters": {"config": '{"backend":"python","max_batch_size":"x"}'}},
        {"parameters": {"file:1/x": "AAAA"}},
        {"parameters": {"file:1/x": 5}},
        {"parameters": {"file:": "AAAA"}},
        {"parameters": {"file:../x": "AAAA", "config": '{"backend":"python"}'}},
        {"parameters": {"file:/x": "AAAA", "config": '{"backend":"python"}'}},
        {"parameters": {"unload_dependents": True}},
        {"parameters": {"": "x"}},
    )
    yield from (a_post(at, body) for body in loads)
    yield a_get("/v2/models/i8/config")
    yield infer("i8", [tensor("INPUT0", "INT8", [1], [1])])
    for name in (
        "nope",
        "bad",
        "empty",
        "initfail",
        "syntax",
        "..%2fx",
        "%2e%2e",
        "a%20b",
        "x" * 300,
        "..",
        ".",
        "f32%00",
    ):
        yield a_post(f"/v2/repository/models/{name}/load")
        yield a_post(f"/v2/repository/models/{name}/unload")
    yield a_post("/v2/repository/foo/models/f32/load")
    yield a_post("/v2/repository/foo/models/f32/load", "xx")
    yield a_post("/v2/repository/foo/models/f32/unload")
    yield a_post("/v2/repository/models//load")
    yield a_post("/v2/repository/models/load")
    unloads: Sequence[object] = (
        "xx",
        "[]",
        "5",
        "null",
        {"parameters": 5},
        {"parameters": None},
        {"parameters": {"unload_dependents": 5}},
        {"parameters": {"unload_dependents": None}},
        {"parameters": {"unload_dependents": "true"}},
        {"parameters": {"x": 1}},
        {"parameters": {"unload_dependents": True}},
        "",
        {},
    )
    yield from (a_post("/v2/repository/models/nope/unload", body) for body in unloads)
    yield from (a_post("/v2/repository/models/u64/unload", body) for body in unloads)
    yield a_post("/v2/repository/index")
    yield a_get("/v2/models/u64")
    yield a_get("/v2/models/u64/ready")
    yield a_get("/v2/models/u64/stats")
    yield a_get("/v2/models/u64/trace/setting")
    yield infer("u64", [tensor("INPUT0", "UINT64", [1], [1])])
    yield a_post("/v2/repository/models/u64/load")
    yield a_get("/v2/models/u64")
    override = {
        "backend": "python",
        "max_batch_size": 2,
        "input": [{"name": "INPUT0", "data_type": "TYPE_UINT64", "dims": [-1]}],
        "output": [{"name": "OUTPUT0", "data_type": "TYPE_UINT64", "dims": [-1]}],
    }
    yield a_post("/v2/repository/models/u64/load", {"parameters": {"config": json.dumps(override)}})
    yield a_get("/v2/models/u64")
    yield a_get("/v2/models/u64/config")
    yield a_post("/v2/repository/models/u64/load")
    yield a_get("/v2/models/u64")
    yield a_post("/v2/repository/models/echo/unload")
    yield a_get("/v2/models/ens/ready")
    yield infer("ens", [tensor("EI", "FP32", [1, 1], [1])])
    yield a_post("/v2/repository/index")
    yield a_post("/v2/repository/models/echo/load")
    yield a_post("/v2/repository/models/ens/load")
    yield a_get("/v2/models/ens/ready")


def traces() -> Iterator[Probe]:
    """Trace settings, global and of a model."""
    names = ("trace_rate", "trace_count", "log_frequency")
    values = (
        "1",
        "0",
        "-1",
        "-2",
        "abc",
        "",
        " 7",
        "7x",
        "1.5",
        "4294967295",
        "4294967296",
        "2147483647",
        "2147483648",
        "99999999999999999999",
        "+5",
        5,
        None,
        True,
        [],
        ["5"],
        {},
    )
    for path in ("/v2/trace/setting", "/v2/models/f32/trace/setting"):
        yield a_get(path)
        for body in ("", "xx", "[]", "5", "null", {}, {"bogus": 1}):
            yield a_post(path, body)
        for name in names:
            yield from (a_post(path, {name: value}) for value in values)
            yield a_post(path, {name: None})
        levels: Sequence[object] = (
            "TIMESTAMPS",
            [],
            ["OFF"],
            ["TIMESTAMPS"],
            ["TENSORS"],
            ["TENSORS", "TIMESTAMPS"],
            ["OFF", "TIMESTAMPS"],
            ["TIMESTAMPS", "OFF"],
            ["OFF", "OFF"],
            ["FOO"],
            ["FOO", "TENSORS"],
            [5],
            [None],
            ["timestamps"],
            ["MIN"],
            ["MAX"],
            ["MIN", "MAX"],
            ["OFF", "FOO"],
            None,
            5,
            {},
            True,
        )
        yield from (a_post(path, {"trace_level": value}) for value in levels)
        for value in ("x", None, 5, ""):
            yield a_post(path, {"trace_file": value})
        yield a_post(path, {"trace_mode": "opentelemetry"})
        yield a_post(path, {"trace_rate": "5", "trace_count": "abc"})
        yield a_get(path)
        yield a_post(path, {"trace_rate": "9", "trace_file": "x"})
        yield a_get(path)
        yield a_post(path, {"trace_rate": None, "trace_count": None, "log_frequency": None, "trace_level": None})
    yield a_post("/v2/models/f32/trace/setting", {"trace_rate": "7"})
    yield a_post("/v2/trace/setting", {"trace_rate": "3", "log_frequency": "2"})
    yield a_get("/v2/models/f32/trace/setting")
    yield a_get("/v2/models/i8/trace/setting")
    yield a_post("/v2/models/f32/trace/setting", {"trace_rate": None})
    yield a_get("/v2/models/f32/trace/setting")
    yield a_post("/v2/models/nope/trace/setting", {"trace_rate": "7"})
    yield a_post("/v2/models/nope/trace/setting", "xx")
    yield a_post("/v2/trace/setting", {"trace_rate": None, "log_frequency": None})
    yield a_get("/v2/trace/setting")


def metrics() -> Iterator[Probe]:
    """The metrics port, all but the values."""
    for path in ("/", "/metric", "/metrics/", "/metrics?x=1", "/v2", "/metrics/x"):
        yield Probe(f"METRICS GET {path}", get(path), metrics=path != "/metrics?x=1")
    for path in ("/", "/metrics"):
        yield Probe(f"METRICS POST {path}", post(path), metrics=True)
