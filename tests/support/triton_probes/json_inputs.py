"""Inference requests in JSON: their inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from triton_probes.probe import Probe, a_post, binary, infer, tensor


def inputs() -> Iterator[Probe]:
    """Members of ``inputs``."""
    for key in ("name", "datatype", "shape", "data"):
        yield infer("f32", [tensor(**{key: None})])
        wrong: Sequence[object] = (5, 1.5, True, "", "x", [], [1], [[]], {}, [None], [True], ["1"], [1.5])
        yield from (infer("f32", [tensor(**{key: value})]) for value in wrong)
        yield infer("f32", [{**tensor(), key: None}])
    shapes: Sequence[object] = (
        [2],
        [1, 2],
        [2, 1],
        [0],
        [],
        [-1],
        [1, -1],
        [2.0],
        [2, 0],
        [0, 2],
        [3],
        [1],
        [2**31],
        [2**32],
        [2**62],
        [2**63 - 1],
        [2**63],
        [2**64 - 1],
        [2**64],
        [2**40, 2**40],
        [4294967296, 4294967296],
        [[2]],
        ["2"],
    )
    for shape in shapes:
        is_huge = any(isinstance(dim, int) and dim > 1000 for dim in shape) if isinstance(shape, list) else False
        yield binary("f32", {"inputs": [tensor(shape=shape, data=None, parameters={"binary_data_size": 8})]}, b"8" * 8)
        if not is_huge:  # in JSON, Triton takes the memory first
            yield infer("f32", [tensor(shape=shape)])
            yield infer("id_all", [tensor(shape=shape)])
            yield infer("seen", [tensor("A", "INT32", shape)])
    datas: Sequence[object] = (
        [1, 2],
        [[1], [2]],
        [[1, 2]],
        [[[1]], 2],
        [1],
        [1, 2, 3],
        [],
        [[]],
        [[], 1, 2],
        ["1", "2"],
        [True, False],
        [None, 1],
        [1, {}],
        {"0": 1},
        "12",
        5,
        [1.5, -2e10],
        [10**20, -(10**20)],
        [10**400, 1],
    )
    yield from (infer("f32", [tensor(data=data)]) for data in datas)
    one_of: Sequence[object] = (
        [0],
        [1],
        [-1],
        [255],
        [256],
        [-128],
        [-129],
        [300],
        [65535],
        [65536],
        [2**31],
        [2**32],
        [2**63],
        [2**64 - 1],
        [2**64],
        [-(2**63)],
        [-(2**63) - 1],
        [1.0],
        [1.5],
        [1e10],
        [1e400],
        [True],
        [None],
        ["1"],
        ["x"],
        ["é"],
        ["a\u0000b"],
        [""],
        [[]],
        [{}],
        [],
    )
    models = {
        "f32": "FP32",
        "f64": "FP64",
        "i8": "INT8",
        "i64": "INT64",
        "u64": "UINT64",
        "str": "BYTES",
        "f16": "FP16",
        "bf16": "BF16",
    }
    for model, datatype in models.items():
        yield from (infer(model, [tensor("INPUT0", datatype, [1], value)]) for value in one_of)
        yield from (infer(model, [tensor("INPUT0", datatype, [2], [value, value])]) for value in (1, "x", 0.1, True))
        yield infer(model, [tensor("INPUT0", datatype, [0], [])])
        yield infer(model, [tensor("INPUT0", datatype, [0], [1])])
        yield infer(model, [tensor("INPUT0", datatype, [1, 1], [1])])
    for literal in (
        "NaN",
        "Infinity",
        "-Infinity",
        "1e39",
        "-1e39",
        "1e-50",
        "1e-310",
        "-0.0",
        "-0",
        "0.1",
        "1E5",
        "123456789012345678901234567890",
        "0.30000000000000004",
        "16777217",
        "3.4028235e38",
        "3.4028236e38",
        "1.17549435e-38",
        "5e-324",
        "1.7976931348623157e308",
        "2e308",
        "1e21",
        "1e22",
        "123456789.0",
        "0.000001",
        "0.0000001",
        "1e16",
        "1e17",
        "12345678901234567",
        "3.141592653589793",
    ):
        for model, datatype in (("f32", "FP32"), ("f64", "FP64")):
            given = f'{{"name":"INPUT0","datatype":"{datatype}","shape":[1],"data":[{literal}]}}'
            yield a_post(f"/v2/models/{model}/infer", f'{{"inputs":[{given}]}}')
    yield from (
        infer("boolm", [tensor("INPUT0", "BOOL", [1, 1], value)])
        for value in ([True], [False], [1], [0], ["true"], [None], [[True]])
    )
    for datatype in (
        "FP32",
        "fp32",
        "FP16",
        "INT32",
        "BYTES",
        "STRING",
        "TYPE_FP32",
        "",
        "FOO",
        "BOOL",
        "UINT8",
        "BF16",
        "INVALID",
        "FP8",
        "UINT16",
        "UINT32",
        "INT16",
    ):
        yield infer("f32", [tensor(datatype=datatype)])
        yield infer("f32", [tensor(datatype=datatype, shape=[0], data=[])])
        head = {"inputs": [tensor(datatype=datatype, data=None, parameters={"binary_data_size": 8})]}
        yield binary("f32", head, b"\0" * 8)
    ok = tensor()
    yield infer("f32", [ok, ok])
    yield infer("f32", [ok, tensor("X")])
    yield infer("f32", [tensor("X")])
    yield infer("f32", [tensor("X"), tensor("X")])
    yield infer("f32", [tensor("input0")])
    yield infer("f32", [tensor("")])
    yield infer("f32", [tensor('é"\\\n')])
    yield infer("f32", [tensor(parameters={"zz": 1})])
    yield from (infer("f32", [tensor(parameters=value)]) for value in (None, 5, [], "x", {}))
    full = {"INPUT0": ("FP32", 1.5), "INPUT1": ("BYTES", "x"), "INPUT2": ("BOOL", True), "INPUT4": ("INT8", 3)}
    for batch in (0, 1, 2, 4, 5):
        some = [tensor(name, kind, [batch, 1], [value] * batch) for name, (kind, value) in full.items()]
        yield infer("id_all", some)
        yield infer("id_all", some[1:])
        yield infer("id_all", some[::-1])
    yield infer("id_all", [tensor(shape=[1, 2]), tensor("INPUT1", "BYTES", [2, 1], ["a", "b"])])
    yield infer("id_all", [tensor(shape=[1, 2]), tensor("INPUT1", "FP32", [1, 1], [1])])
    yield infer("id_all", [tensor(shape=[1, 2]), tensor("INPUT9", "FP32", [1, 1], [1])])
    yield infer("id_all", [tensor(shape=[2])])
    yield infer("id_all", [tensor(shape=[])])
    yield infer("seen", [])
    yield infer("seen", [tensor("B", "BYTES", [1], ["x"])])
    yield infer("seen", [tensor("A", "INT32", [1, 1], [1]), tensor("C", shape=[2, 2], data=[1, 2, 3, 4])])
    yield infer("seen", [tensor("A", "INT32", [1, 1], [1]), tensor("C", shape=[4], data=[1, 2, 3, 4])])
    yield infer("seen", [tensor("A", "INT32", [1, 1], [1]), tensor("C", shape=[2, 3], data=[1, 2, 3, 4, 5, 6])])
    yield infer("seen", [tensor("A", "INT32", [1, 1], [1]), tensor("B", "BYTES", [2], ["a", "b"])])
    yield infer("seen", [tensor("A", "INT32", [1, 1], [1]), tensor("B", "BYTES", [0], [])])
    yield infer("seen", [tensor("A", "INT32", [0, 5], []), tensor("B", "BYTES", [1], ["\x01"])])
    for version in ("1", "2", "3", "a", "0", "01"):
        yield a_post(
            f"/v2/models/cached/versions/{version}/infer", {"inputs": [tensor("INPUT0", "INT32", [1, 1], [7])]}
        )
    yield infer("nope", [ok])
    yield a_post("/v2/models/nope/infer", "xx")
    yield a_post("/v2/models/nope/infer", "xx", "Content-Encoding: br")
    yield a_post("/v2/models/dec/infer", "xx")
    yield a_post("/v2/models/dec/versions/2/infer", "xx")
    yield a_post("/v2/models/initfail/infer", "xx")
    yield a_post("/v2/models/bad/infer", "xx")
