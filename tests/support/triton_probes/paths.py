"""Paths, methods and restricted endpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from triton_probes.probe import Probe, a_get, a_method, a_post


def paths() -> Iterator[Probe]:
    """Routing: what is there, what is not, and by which method."""
    yield from (
        a_get(path)
        for path in (
            "/",
            "/v2",
            "/v2/",
            "/v1",
            "/v2/health",
            "/v2/health/",
            "/v2/health/live",
            "/v2/health/ready",
            "/v2/health/x",
            "/v2/health/live?x=1",
            "/v2?x",
            "/v2/models",
            "/v2/models/",
            "/v2/models/stats",
            "/v2/models/nope",
            "/v2/models/f32/",
            "/v2/models/f32/versions",
            "/v2/models/f32/versions/",
            "/v2/models/f32/versions/a",
            "/v2/models/f32/versions/1",
            "/v2/models/f32/versions/01",
            "/v2/models/f32/versions/2",
            "/v2/models/f32/versions/-1",
            "/v2/models/f32/versions/0",
            "/v2/models/f32/versions/99999999999999999999",
            "/v2/models/f32/versions/9223372036854775807",
            "/v2/models/f32/versions/9223372036854775808",
            "/v2/models/f32/versions/1/config",
            "/v2/models/f32/versions/7/config",
            "/v2/models/f32/versions/7/ready",
            "/v2/models/f32/versions/1/ready",
            "/v2/models/f32/versions/1/x",
            "/v2/models/f32/x",
            "/v2/models/f32/config",
            "/v2/models/f32/ready",
            "/v2/models/f32/infer",
            "/v2/models/f32/generate",
            "/v2/models/f32/generate_stream",
            "/v2/models/f32/versions/1/infer",
            "/v2/models/f32/versions/1/generate",
            "/v2/models/f32/trace/setting",
            "/v2/models/nope/trace/setting",
            "/v2/models/f32/versions/1/trace/setting",
            "/v2/models/my%20model",
            "/v2/models/%66%33%32",
            "/v2/models/stats/ready",
            "/v2/models/initfail",
            "/v2/models/initfail/ready",
            "/v2/models/initfail/config",
            "/v2/models/initfail/versions/1",
            "/v2/models/initfail/versions/2",
            "/v2/models/initfail/stats",
            "/v2/models/initfail/trace/setting",
            "/v2/models/bad",
            "/v2/models/bad/ready",
            "/v2/models/bad/stats",
            "/v2/models/empty",
            "/v2/models/empty/config",
            "/v2/models/nope/config",
            "/v2/models/nope/stats",
            "/v2/models/nope/versions/1/stats",
            "/v2/models/f32/versions/1/stats",
            "/v2/models/f32/versions/2/stats",
            "/v2/models/f32/versions/99999999999999999999/stats",
            "/v2/models/cached",
            "/v2/models/cached/versions/1",
            "/v2/models/cached/versions/3",
            "/v2/models/cached/versions/2",
            "/v2/models/cached/versions/2/ready",
            "/v2/models/cached/config",
            "/v2/models/cached/versions/1/config",
            "/v2/repository/index",
            "/v2/repository",
            "/v2/repository/x/index",
            "/v2/repository/models/f32/load",
            "/v2/repository/models/f32/unload",
            "/v2/repository/models/f32/index",
            "/v2/logging",
            "/v2/trace",
            "/v2/trace/setting",
            "/v2/trace/setting/",
            "/v2/systemsharedmemory",
            "/v2/systemsharedmemory/status",
            "/v2/systemsharedmemory/register",
            "/v2/systemsharedmemory/unregister",
            "/v2/systemsharedmemory/region/status",
            "/v2/systemsharedmemory/region/r/status",
            "/v2/systemsharedmemory/region/r/register",
            "/v2/systemsharedmemory/region/r/x",
            "/v2/cudasharedmemory/status",
            "/v2/cudasharedmemory/region/r/status",
            "/v2/cudasharedmemory/register",
            "/v2/cudasharedmemory/region/r/register",
            "//v2",
            "/v2//health/live",
            "/V2",
            "/v2/Models/f32",
            "/metrics",
            "/v2/models/f32#x",
            "/v2/models/f32;x",
            "/v2/models/f32%2Fconfig",
            "/v2/models/../models/f32",
        )
    )
    for name in ("auto", "dec", "echo", "ens", "id_all", "multi", "noexec", "q", "seq", "str", "seen"):
        yield a_get(f"/v2/models/{name}")
        yield a_get(f"/v2/models/{name}/config")
        yield a_get(f"/v2/models/{name}/ready")
    targets = (
        "/v2",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/f32",
        "/v2/models/f32/config",
        "/v2/models/f32/ready",
        "/v2/models/f32/stats",
        "/v2/models/stats",
        "/v2/models/f32/trace/setting",
        "/v2/trace/setting",
        "/v2/systemsharedmemory/status",
        "/v2/cudasharedmemory/status",
        "/v2/nope",
        "/v2/models/nope/ready",
    )
    yield from (a_post(path) for path in targets)
    for method in ("PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE"):
        for path in (
            "/v2",
            "/v2/health/live",
            "/v2/models/f32/infer",
            "/v2/models/f32/generate",
            "/v2/nope",
            "/v2/repository/index",
            "/v2/systemsharedmemory/status",
            "/v2/trace/setting",
        ):
            yield a_method(method, path)
    yield a_method("FOO", "/v2")


def restricted() -> Iterator[Probe]:
    """Logging is restricted by the flags that both servers get."""
    yield a_get("/v2/logging", "lk: x")
    yield a_get("/v2/logging", "LK: lv")
    yield a_get("/v2/logging", "lk: LV")
    yield a_get("/v2/logging", "lk:   lv  ")
    yield a_method("PUT", "/v2/logging")
    yield a_post("/v2/logging", {})
    bodies: Sequence[object] = (
        {},
        "",
        "xx",
        "[]",
        "1",
        "null",
        '""',
        {"log_info": None},
        {"log_file": None},
        {"log_file": "x"},
        {"log_file": ""},
        {"log_file": 5},
        {"log_info": "true"},
        {"log_info": 0},
        {"log_warning": 1},
        {"log_error": []},
        {"log_verbose_level": "1"},
        {"log_verbose_level": 1.5},
        {"log_verbose_level": -1},
        {"log_verbose_level": True},
        {"log_verbose_level": 4294967296},
        {"log_verbose_level": 2147483648},
        {"log_verbose_level": 0},
        {"log_format": "x"},
        {"log_format": 1},
        {"log_format": "iso8601"},
        {"log_format": "ISO8601"},
        {"log_format": "default"},
        {"log_info": False, "log_format": "x"},
        {"log_info": True},
        {"log_warnings": False},
        {"log_warning": False, "log_error": False},
        {"log_warning": True, "log_error": True},
    )
    yield from (a_post("/v2/logging", body, "lk: lv") for body in bodies)
