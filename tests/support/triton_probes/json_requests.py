"""Inference requests in JSON: bodies as such, and their outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from triton_probes.probe import Probe, a_post, binary, infer, tensor


def bodies() -> Iterator[Probe]:
    """The request document and its members."""
    at = "/v2/models/f32/infer"
    ok = tensor()
    texts = (
        "",
        " ",
        "xx",
        "{",
        "[]",
        "[1]",
        "5",
        "null",
        "true",
        '"x"',
        "{}",
        "{}x",
        '{"inputs":[]}',
        '{"inputs":{}}',
        '{"inputs":null}',
        '{"inputs":5}',
        '{"inputs":[5]}',
        '{"inputs":[null]}',
        '{"inputs":[[]]}',
        '{"inputs":[{}]}',
        '{"a":1',
        '{"a" 1}',
        "{a:1}",
        "{'a':1}",
        '{"a":tru}',
        '{"a":01}',
        '{"a":1.}',
        '{"a":.5}',
        '{"a":1e}',
        '{"a":"\\x"}',
        '{"a":"\\ud800"}',
        '{"a":"\\u12"}',
        '{"a":"x',
        '{"a":"x\ty"}',
        '{"a":1,}',
        '{"a":[1,]}',
        '{"a":[1 2]}',
        '{"a":1 "b":2}',
        "{,}",
        '{"a":nan}',
        '{"a":-}',
        '{"a":1e999}',
        '{"a":-1e999}',
        '{"a":+1}',
        '{"a":0x1}',
        '{"a":/**/1}',
        "//x\n{}",
        '{"a":1}}',
        '{"a":NaN}',
        '{"a":Infinity}',
        '{"a":Inf}',
        '{"a":-Inf}',
        '{"a":\x00}',
        "\ufeff{}",
        '{"\x80":1}',
    )
    yield from (a_post(at, text) for text in texts)
    yield a_post(at, b'{"a":"\xff\xfe"}')
    yield a_post(at, b'{"a":"\xc3"}')
    good = '"inputs":[{"name":"INPUT0","datatype":"FP32","shape":[2],"data":[1,2]}]'
    yield from (
        a_post(at, text)
        for text in (
            f"{{{good}}}",
            f"{{{good}}} trailing",
            f"{{{good},{good}}}",
            f'{{"x":[[{{}}]],{good}}}',
            f" \n\t{{{good}}}",
            f'{{"id":"a","id":"b",{good}}}',
        )
    )
    for value in ("", "r1", 5, None, True, [], {}, 'é\n"\\', "x" * 300, "a\u0000b"):
        yield infer("f32", [ok], id=value)
        yield infer("f32", [tensor(shape=[2, 2])], id=value)
    values: Sequence[object] = (None, 5, [], "x", {}, {"custom": "x"})
    yield from (infer("f32", [ok], parameters=value) for value in values)
    yield from (infer("f32", [ok], outputs=value) for value in (None, 5, {}, "x", [], [5], [None], [{}]))
    parameters: Sequence[object] = (0, 1, -1, 1.5, True, None, "x", "", [], {}, 2**63, 2**64 - 1, 2**64, "7")
    names = (
        "sequence_id",
        "sequence_start",
        "sequence_end",
        "priority",
        "timeout",
        "binary_data_output",
        "custom",
        "triton_x",
        "triton_enable_empty_final_response",
        "headers",
        "",
    )
    for name in names:
        for value in parameters:
            yield infer("seen", [tensor("A", "INT32", [1, 1], [1])], parameters={name: value})
    yield a_post(
        "/v2/models/seen/infer",
        '{"parameters":{"a":1,"a":2,"b":1e400,"c":1.0,"d":NaN},"inputs":[{"name":"A",'
        '"datatype":"INT32","shape":[1,1],"data":[1]}]}',
    )


def outputs() -> Iterator[Probe]:
    """Members of ``outputs``, classification included."""
    ok = [tensor()]
    asked: Sequence[object] = (
        {"name": "OUTPUT0"},
        {"name": "Q"},
        {"name": 5},
        {},
        {"name": "OUTPUT0", "parameters": None},
        {"name": "OUTPUT0", "parameters": 5},
        {"name": "OUTPUT0", "parameters": {"binary_data": True}},
        {"name": "OUTPUT0", "parameters": {"binary_data": False}},
        {"name": "OUTPUT0", "parameters": {"binary_data": 1}},
        {"name": "OUTPUT0", "parameters": {"binary_data": "true"}},
        {"name": "OUTPUT0", "parameters": {"zz": "true"}},
        {"name": "OUTPUT0", "parameters": {"classification": 1}},
        {"name": "OUTPUT0", "parameters": {"classification": 0}},
        {"name": "OUTPUT0", "parameters": {"classification": 9}},
        {"name": "OUTPUT0", "parameters": {"classification": -1}},
        {"name": "OUTPUT0", "parameters": {"classification": "1"}},
        {"name": "OUTPUT0", "parameters": {"classification": 1.0}},
        {"name": "OUTPUT0", "parameters": {"classification": 4294967296}},
        {"name": "OUTPUT0", "parameters": {"classification": 2, "binary_data": True}},
        {"name": "OUTPUT0", "parameters": {"shared_memory_region": "r"}},
        {"name": "OUTPUT0", "parameters": {"shared_memory_region": 5}},
        {"name": "OUTPUT0", "parameters": {"shared_memory_region": "r", "classification": 1}},
        {"name": "OUTPUT0", "parameters": {"shared_memory_region": "r", "binary_data": True}},
        {"name": "OUTPUT0", "parameters": {"shared_memory_region": "r", "binary_data": 1}},
        {"name": "OUTPUT0", "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": "8"}},
        {"name": "OUTPUT0", "parameters": {"shared_memory_byte_size": "8"}},
        {"name": "OUTPUT0", "parameters": {"shared_memory_offset": -1}},
    )
    for output in asked:
        yield infer("f32", ok, outputs=[output])
    yield infer("f32", ok, outputs=[{"name": "OUTPUT0"}, {"name": "OUTPUT0"}])
    yield infer("f32", ok, outputs=[{"name": "OUTPUT0"}, {"name": "OUTPUT0", "parameters": {"binary_data": True}}])
    yield infer("f32", ok, outputs=[{"name": "OUTPUT0"}], parameters={"binary_data_output": True})
    yield infer("f32", ok, outputs=[], parameters={"binary_data_output": True})
    yield infer("f32", ok, parameters={"binary_data_output": True})
    yield infer("f32", [tensor(shape=[0], data=[])], parameters={"binary_data_output": True})
    yield infer("f32", ok, id="x", parameters={"binary_data_output": True})
    many = [
        tensor(shape=[2, 1], data=[3, 1]),
        tensor("INPUT1", "BYTES", [2, 1], ["a", ""]),
        tensor("INPUT2", "BOOL", [2, 1], [True, False]),
        tensor("INPUT4", "INT8", [2, 1], [-1, 5]),
    ]
    listed = [{"name": f"OUTPUT{number}"} for number in (4, 0, 2)]
    yield infer("id_all", many, outputs=listed)
    yield infer("id_all", many, parameters={"binary_data_output": True})
    yield infer("id_all", many, outputs=[{**listed[0], "parameters": {"binary_data": True}}, listed[1]])
    k2 = {"parameters": {"classification": 2}}
    for shape, data in (([4], [1, 5, 3, 4]), ([1], [7]), ([0], []), ([3], [-1.5, 1e10, 1e-9])):
        yield infer("f32", [tensor(shape=shape, data=data)], outputs=[{"name": "OUTPUT0", **k2}])
    yield infer("f64", [tensor("INPUT0", "FP64", [3], [1e300, -1, 0.1])], outputs=[{"name": "OUTPUT0", **k2}])
    yield infer("i8", [tensor("INPUT0", "INT8", [3], [1, -3, 2])], outputs=[{"name": "OUTPUT0", **k2}])
    yield infer("i64", [tensor("INPUT0", "INT64", [3], [1, -3, 2**60])], outputs=[{"name": "OUTPUT0", **k2}])
    yield infer("u64", [tensor("INPUT0", "UINT64", [3], [1, 2**64 - 1, 2])], outputs=[{"name": "OUTPUT0", **k2}])
    yield infer("boolm", [tensor("INPUT0", "BOOL", [1, 2], [True, False])], outputs=[{"name": "OUTPUT0", **k2}])
    yield infer("id_all", [tensor(shape=[2, 3], data=[1, 2, 3, 6, 5, 4])], outputs=[{"name": "OUTPUT0", **k2}])
    half = {"inputs": [tensor("INPUT0", "FP16", [2], None, parameters={"binary_data_size": 4})]}
    yield binary("f16", half, b"\0\x3c\0\x40")
    yield binary(
        "f16", {**half, "outputs": [{"name": "OUTPUT0", "parameters": {"binary_data": True}}]}, b"\0\x3c\0\x40"
    )
    yield binary("f16", {**half, "outputs": [{"name": "OUTPUT0", **k2}]}, b"\0\x3c\0\x40")
    brain = {"inputs": [tensor("INPUT0", "BF16", [2], None, parameters={"binary_data_size": 4})]}
    yield binary("bf16", brain, b"\0\x3c\0\x40")
    yield binary("bf16", {**brain, "parameters": {"binary_data_output": True}}, b"\0\x3c\0\x40")
    yield binary("bf16", {**brain, "outputs": [{"name": "OUTPUT0", **k2}]}, b"\0\x3c\0\x40")
