"""Generate requests, and what schedulers look at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from triton_probes.probe import Probe, a_post, infer, tensor


def generates() -> Iterator[Probe]:
    """The generate extension."""
    bodies: Sequence[object] = (
        {},
        "",
        "xx",
        "[]",
        "5",
        "null",
        {"INPUT0": 1},
        {"INPUT0": [1]},
        {"INPUT0": [1, 2]},
        {"INPUT0": []},
        {"INPUT0": [[1]]},
        {"INPUT0": {}},
        {"INPUT0": None},
        {"INPUT0": "x"},
        {"INPUT0": True},
        {"INPUT0": [1, "x"]},
        {"INPUT0": 1, "id": "a"},
        {"INPUT0": 1, "id": 5},
        {"INPUT0": 1, "id": None},
        {"INPUT0": 1, "id": ""},
        {"INPUT0": 1, "parameters": {}},
        {"INPUT0": 1, "parameters": None},
        {"INPUT0": 1, "parameters": 5},
        {"INPUT0": 1, "parameters": []},
        {"INPUT0": 1, "parameters": {"a": 1}},
        {"INPUT0": 1, "parameters": {"a": [1]}},
        {"INPUT0": 1, "parameters": {"parameters": {"INPUT0": 1}}},
        {"parameters": {"INPUT0": 1}},
        {"INPUT0": 1, "parameters": {"INPUT0": 2}},
        {"INPUT0": 1, "x": [1]},
        {"INPUT0": 1, "x": {}},
        {"INPUT0": 1, "x": None},
        {"INPUT0": 1, "x": 1.5},
        {"INPUT0": 1, "x": 2**64},
        {"INPUT0": 1, "triton_x": 1},
        {"INPUT0": 1, "sequence_id": 5},
        {"INPUT0": 1, "priority": "x"},
        {"INPUT0": 1, "timeout": -1},
        {"x": 1},
        {"INPUT0": 1, "": 1},
        '{"INPUT0":1,"INPUT0":2}',
        '{"INPUT0":1} x',
        '{"INPUT0":NaN}',
        '{"INPUT0":1e39}',
        {"INPUT0": 0.1},
    )
    for body in bodies:
        yield a_post("/v2/models/f32/generate", body)
        yield a_post("/v2/models/f32/generate_stream", body)
    for model in ("str", "i8", "f64", "u64", "i64", "f16", "bf16"):
        for value in (1, "x", [1, 2], ["a", "b"], [], 300, -1, 1.5, 2**64 - 1, True, None):
            yield a_post(f"/v2/models/{model}/generate", {"INPUT0": value})
    for model in ("boolm", "cached", "id_all"):
        for value in (1, [1, 2], True, [True, False], [], [[True]]):
            yield a_post(f"/v2/models/{model}/generate", {"INPUT0": value})
    yield a_post("/v2/models/id_all/generate", {"INPUT0": [1, 2], "INPUT1": "s", "INPUT2": True, "INPUT4": [3, 4, 5]})
    for value in (1, [1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5], "x", []):
        yield a_post("/v2/models/seen/generate", {"A": 1, "C": value})
        yield a_post("/v2/models/seen/generate", {"A": value})
        yield a_post("/v2/models/seen/generate", {"A": 1, "B": value})
        yield a_post("/v2/models/auto/generate", {"IN": value})
    yield a_post(
        "/v2/models/seen/generate",
        {
            "A": 1,
            "id": "x",
            "s": "t",
            "b": True,
            "n": -5,
            "f": 0.5,
            "big": 2**62,
            "parameters": {"deep": 1, "s": "other", "id": "y"},
        },
    )
    for value in (0, 1, 2, 3, -1, [1, 2], [], "x"):
        yield a_post("/v2/models/dec/generate", {"IN": value})
        yield a_post("/v2/models/dec/generate_stream", {"IN": value})
        yield a_post("/v2/models/dec/generate_stream", {"IN": value, "id": "q"})
    for path in (
        "/v2/models/nope/generate",
        "/v2/models/nope/generate_stream",
        "/v2/models/f32/versions/9/generate",
        "/v2/models/f32/versions/1/generate",
        "/v2/models/initfail/generate",
        "/v2/models/bad/generate",
    ):
        yield a_post(path, {"INPUT0": 1})
        yield a_post(path, "xx")
    yield a_post("/v2/models/f32/generate", {"INPUT0": 1}, "Content-Encoding: gzip")
    yield a_post("/v2/models/f32/generate", {"INPUT0": 1}, "Content-Encoding: br")
    yield a_post("/v2/models/f32/generate", {"INPUT0": 1}, "Content-Encoding: identity")
    yield a_post("/v2/models/f32/generate", {"INPUT0": 1}, "Accept-Encoding: gzip")
    yield a_post("/v2/models/nope/generate", {"INPUT0": 1}, "Content-Encoding: gzip")
    for value in (0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17, 20, 21, 30):
        yield a_post("/v2/models/multi/generate", {"IN": value})
        yield a_post("/v2/models/multi/generate_stream", {"IN": value})
        yield infer("multi", [tensor("IN", "FP32", [1], [value])], id=f"i{value}")
    yield a_post("/v2/models/noexec/generate", {"IN": 1})
    yield a_post("/v2/models/ens/generate", {"EI": 1})
    yield a_post("/v2/models/ens/generate", {"EI": 98})
    yield a_post("/v2/models/ens/generate_stream", {"EI": 98, "id": "e"})


def schedules() -> Iterator[Probe]:
    """Sequences, ensembles, priorities."""
    one = [tensor("INPUT0", "INT32", [1, 1], [1])]
    for value in (0, 7, "", "s7", -1, 1.5, True, None, [], 2**63, 2**64 - 1, 2**64):
        yield infer("seq", one, parameters={"sequence_id": value})
    yield infer("seq", one)
    yield infer("seq", one, parameters={"sequence_id": 7, "sequence_start": True})
    yield infer("seq", one, parameters={"sequence_id": 7})
    yield infer("seq", one, parameters={"sequence_id": 7, "sequence_start": "true"})
    yield infer("seq", one, parameters={"sequence_id": 7, "sequence_end": 1})
    yield infer("seq", one, parameters={"sequence_id": 7, "sequence_end": True})
    yield infer("seq", one, parameters={"sequence_id": 7})
    yield infer("seq", one, id="r", parameters={"sequence_id": 7})
    yield infer("seq", one, parameters={"sequence_start": True})
    yield infer("seq", one, parameters={"sequence_id": 9, "sequence_start": True, "sequence_end": True})
    yield infer(
        "seq", [tensor("INPUT0", "INT32", [2, 1], [1, 1])], parameters={"sequence_id": 8, "sequence_start": True}
    )
    yield infer("seq", one, parameters={"sequence_id": "s7", "sequence_start": True})
    yield infer("seq", one, id="r", parameters={"sequence_id": "s7", "sequence_start": True})
    for shape in ([1, 1], [1, 3], [4, 1], [5, 1], [1], [0, 1], [1, 0]):
        count = shape[0] * shape[1] if len(shape) > 1 else shape[0]
        yield infer("ens", [tensor("EI", "FP32", shape, [5.5] * count)])
    yield infer("ens", [tensor("EI", "FP32", [1, 1], [98])])
    yield infer("ens", [tensor("EI", "FP32", [1, 1], [98])], id="e")
    yield infer("ens", [tensor("EI", "INT32", [1, 1], [98])])
    yield infer("ens", [tensor("X", "FP32", [1, 1], [98])])
    yield infer("ens", [])
    yield infer("ens", [tensor("EI", "FP32", [1, 1], [1])], outputs=[{"name": "X"}])
    yield infer("ens", [tensor("EI", "FP32", [1, 1], [1])], parameters={"sequence_id": 5, "sequence_start": True})
    for value in (0, 1, 2, 3, 99):
        yield infer("q", [tensor(shape=[1, 1], data=[1])], parameters={"priority": value})
    yield infer("q", [tensor(shape=[1, 1], data=[1])], parameters={"timeout": 1})
