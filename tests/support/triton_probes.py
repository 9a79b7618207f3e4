"""Requests at the edges of the HTTP protocol, to be sent to a real Triton and to us: see ``compare_with_triton.py``.

They ask the models of :func:`make_repository`: those of the recorded transcripts, with Python models in place of the
``identity`` backend, which Triton's wheel on PyPI does not have.
"""

from __future__ import annotations

import gzip
import json
import shutil
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from http_wire import get, post

TRANSCRIPT_MODELS = Path(__file__).resolve().parents[1] / "data" / "transcript_models"

#: Versions of the models that have other than 1; their directories are empty, so a repository cannot hold them.
VERSIONS = {"cached": ("1", "3"), "ens": ("3",), "bad": ()}

#: What stands in for the identity backend: INPUTn comes back as OUTPUTn.
IDENTITY_MODEL = """import triton_python_backend_utils as pb_utils

def identity(tensor):
    name = "OUTPUT" + tensor.name().removeprefix("INPUT")
    try:
        return pb_utils.Tensor(name, tensor.as_numpy())
    except Exception:  # BF16, which numpy does not know
        return pb_utils.Tensor.from_dlpack(name, tensor.to_dlpack())


class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse([identity(tensor) for tensor in request.inputs()]) for request in requests]
"""

#: Shows what a request looks like from inside.
ECHO_MODEL = """import json

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            parameters = json.loads(request.parameters())
            seen = {
                "id": request.request_id(),
                "correlation_id": request.correlation_id(),
                "flags": request.flags(),
                "timeout": request.timeout(),
                "priority": request.priority() if hasattr(request, "priority") else None,
                "parameters": dict(sorted(parameters.items())),
                "outputs": sorted(request.requested_output_names()),
                "inputs": {tensor.name(): list(tensor.shape()) for tensor in request.inputs()},
            }
            text = np.array([json.dumps(seen)], dtype=np.object_)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("SEEN", text)]))
        return responses
"""

ECHO_CONFIG = """backend: "python"
input [ { name: "A" data_type: TYPE_INT32 dims: [ -1, -1 ] },
        { name: "B" data_type: TYPE_STRING dims: [ 1 ] optional: true },
        { name: "C" data_type: TYPE_FP32 dims: [ 2, 2 ] optional: true } ]
output [ { name: "SEEN" data_type: TYPE_STRING dims: [ 1 ] } ]
"""


@dataclass(frozen=True)
class Probe:
    """One request."""

    what: str
    message: bytes
    metrics: bool = False


def make_repository(repository: Path) -> None:
    """Write the models that both servers can serve."""
    for source in sorted(TRANSCRIPT_MODELS.iterdir()):
        if source.name == "ort_auto" or not ((source / "config.pbtxt").exists() or (source / "1").exists()):
            continue
        model = repository / source.name
        shutil.copytree(source, model)
        for version in VERSIONS.get(source.name, ("1",)):
            (model / version).mkdir(exist_ok=True)
        config = model / "config.pbtxt"
        if config.exists() and 'backend: "identity"' in config.read_text() and source.name != "bad":
            config.write_text(config.read_text().replace('backend: "identity"', 'backend: "python"'))
            for version in VERSIONS.get(source.name, ("1",)):
                (model / version / "model.py").write_text(IDENTITY_MODEL)
    (repository / "empty").mkdir()
    (repository / "seen" / "1").mkdir(parents=True)
    (repository / "seen" / "config.pbtxt").write_text(ECHO_CONFIG)
    (repository / "seen" / "1" / "model.py").write_text(ECHO_MODEL)


def a_post(path: str, body: object = b"", *headers: str) -> Probe:
    """Return a POST; a body that is no bytes or text is sent as JSON."""
    data = body if isinstance(body, bytes) else body.encode() if isinstance(body, str) else json.dumps(body).encode()
    shown = data if len(data) < 400 else data[:400] + b"..."
    return Probe(f"POST {path} {' '.join(headers)} {shown!r}", post(path, data, *headers))


def a_get(path: str, *headers: str) -> Probe:
    """Return a GET."""
    return Probe(f"GET {path} {' '.join(headers)}", get(path, *headers))


def a_method(method: str, path: str) -> Probe:
    """Return a request of another method."""
    return Probe(f"{method} {path}", f"{method} {path} HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\n\r\n".encode())


def tensor(
    name: object = "INPUT0", datatype: object = "FP32", shape: object = (2,), data: object = (1, 2), **more: object
) -> dict[str, object]:
    """Return one member of ``inputs``; None leaves a key out."""
    members = {"name": name, "datatype": datatype, "shape": shape, "data": data, **more}
    return {key: value for key, value in members.items() if value is not None}


def infer(model: str, inputs: object, *headers: str, **more: object) -> Probe:
    """Return an inference request in JSON."""
    return a_post(f"/v2/models/{model}/infer", {**more, "inputs": inputs}, *headers)


def binary(model: str, head: object, data: bytes, *headers: str, length: str | None = None) -> Probe:
    """Return an inference request with tensors behind its JSON."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    said = str(len(text)) if length is None else length
    return a_post(f"/v2/models/{model}/infer", text + data, f"Inference-Header-Content-Length: {said}", *headers)


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


def packed(*elements: bytes) -> bytes:
    """Return BYTES as they lie in memory."""
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def binaries() -> Iterator[Probe]:
    """The binary extension, and raw requests."""

    def head(size: object = 8, **more: object) -> dict[str, object]:
        return {"inputs": [tensor(data=None, parameters={"binary_data_size": size})], **more}

    data = struct.pack("<2f", 1, 2)
    for size in (8, 0, 4, 12, 7, 9, -1, "8", 8.0, True, None, [], 2**31, 2**32, 2**63, 2**64 - 1):
        yield binary("f32", head(size), data)
    for tail in (b"", data[:4], data + b"x", data * 2):
        yield binary("f32", head(), tail)
    for length in (
        "0",
        "-1",
        "abc",
        "",
        " 100",
        "100000",
        "+0",
        "1",
        "10",
        "99999999999999999999",
        "1.5",
        "12abc",
        "0x10",
        "2147483648",
        "4294967296",
    ):
        yield binary("f32", head(), data, length=length)
    text = json.dumps(head()).encode()
    yield binary("f32", text, data, length=f" {len(text)} ")
    yield binary("f32", text, data, length=f"{len(text)}abc")
    yield binary("f32", text, data, length=f"+{len(text)}")
    yield binary("f32", text, data, length=f"00{len(text)}")
    yield a_post("/v2/models/f32/infer", text + data)
    yield a_post("/v2/models/f32/infer", text)
    yield binary("f32", json.dumps({"inputs": [tensor()]}).encode(), b"")
    yield binary("f32", json.dumps({"inputs": [tensor()]}).encode(), b"x")
    yield binary("f32", head(0), b"")
    yield binary("f32", {"inputs": [tensor(shape=[0], data=None, parameters={"binary_data_size": 0})]}, b"")
    both = tensor(parameters={"binary_data_size": 8})
    yield binary("f32", {"inputs": [both]}, data)
    yield binary("f32", {"inputs": [tensor(parameters={"binary_data_size": 8, "shared_memory_region": "r"})]}, data)
    shm = {"shared_memory_region": "r", "binary_data_size": 8}
    yield binary("f32", {"inputs": [tensor(data=None, parameters=shm)]}, data)
    yield binary(
        "f32", {"inputs": [tensor(data=None, parameters={"binary_data_size": 8, "shared_memory_region": 5})]}, data
    )
    for payload in (
        packed(b"a", b"b"),
        packed(b"a"),
        packed(b"a", b"b", b"c"),
        b"",
        b"\1",
        b"\1\0\0\0",
        b"\5\0\0\0abc",
        packed(b"a") + b"\2\0",
        packed(b"a") + b"\xff\xff\xff\xffx",
        packed(b"\xff\xfe", b"\0"),
        packed(b"", b""),
        packed(b'"\\\n\x01\x7f', "é".encode()),
    ):
        spec = tensor("INPUT0", "BYTES", [2], None, parameters={"binary_data_size": len(payload)})
        yield binary("str", {"inputs": [spec]}, payload)
        yield binary("str", {"inputs": [spec], "parameters": {"binary_data_output": True}}, payload)
    mixed = [tensor(shape=[1, 2]), tensor("INPUT4", "INT8", [1, 3], None, parameters={"binary_data_size": 3})]
    yield binary("id_all", {"inputs": mixed}, b"\x01\x02\xff")
    yield binary("id_all", {"inputs": mixed, "parameters": {"binary_data_output": True}}, b"\x01\x02\xff")
    for model, payloads in {
        "f32": (b"", data, data[:3], data[:4], data * 100),
        "str": (b"", b"x", b"hello"),
        "id_all": (b"", b"abc"),
        "seen": (b"", b"abcd"),
        "boolm": (b"\1\0\2", b""),
        "seq": (b"\1\0\0\0",),
        "i8": (b"\x80\x7f", b""),
        "f16": (b"\0\x3c",),
        "bf16": (b"\0\x3c",),
        "u64": (b"\1" * 8, b"\1" * 12),
        "dec": (b"",),
        "multi": (b"\0" * 8,),
        "auto": (b"\0" * 16, b"\0" * 8),
    }.items():
        for payload in payloads:
            yield binary(model, b"", payload, length="0")
    yield a_post("/v2/models/multi/infer", struct.pack("<f", 30), "Inference-Header-Content-Length: 0")


def encodings() -> Iterator[Probe]:
    """Compression both ways, and other headers."""
    at, plain = "/v2/models/f32/infer", json.dumps({"inputs": [tensor()]}).encode()
    squeezed = {"gzip": gzip.compress(plain, mtime=0), "deflate": zlib.compress(plain)}
    for encoding in ("gzip", "deflate", "identity", "", "br", "GZIP", "gzip, deflate", "x-gzip", "zstd"):
        for body in (plain, squeezed["gzip"], squeezed["deflate"], b""):
            yield a_post(at, body, f"Content-Encoding: {encoding}")
    raw_deflate = zlib.compressobj(wbits=-15)
    yield a_post(at, raw_deflate.compress(plain) + raw_deflate.flush(), "Content-Encoding: deflate")
    yield a_post(at, squeezed["gzip"][:-9], "Content-Encoding: gzip")
    yield a_post(at, squeezed["gzip"] + b"junk", "Content-Encoding: gzip")
    yield a_post(at, squeezed["gzip"] * 2, "Content-Encoding: gzip")
    head = json.dumps({"inputs": [tensor(data=None, parameters={"binary_data_size": 8})]}).encode()
    whole = head + struct.pack("<2f", 1, 2)
    for encoding, body in (("gzip", gzip.compress(whole, mtime=0)), ("deflate", zlib.compress(whole))):
        yield a_post(at, body, f"Content-Encoding: {encoding}", f"Inference-Header-Content-Length: {len(head)}")
        yield a_post(at, body, f"Content-Encoding: {encoding}", "Inference-Header-Content-Length: 0")
        yield a_post(at, body, f"Content-Encoding: {encoding}", "Inference-Header-Content-Length: 100000")
    accepts = (
        "gzip",
        "deflate",
        "identity",
        "br",
        "*",
        "",
        "gzip;q=0",
        "gzip;q=0.5, deflate;q=0.8",
        "identity, gzip",
        "gzip, deflate, br",
        "deflate, gzip",
        "GZIP",
        "gzip;q=x",
        "gzip; q=0.5",
        " gzip",
        "gzip ",
        ",,gzip",
        "gzip;q=1, identity;q=1",
        "gzip;q=0.5, identity;q=0.4",
        "gzip;q=-1",
        "gzip;q=2, deflate;q=1",
    )
    for accept in accepts:
        yield a_post(at, plain, f"Accept-Encoding: {accept}")
    yield a_post(
        at, json.dumps({"inputs": [tensor()], "parameters": {"binary_data_output": True}}), "Accept-Encoding: gzip"
    )
    yield a_post(at, "xx", "Accept-Encoding: gzip")
    yield a_get("/v2", "Accept-Encoding: gzip")
    yield a_get("/v2/models/stats", "Accept-Encoding: gzip")
    ask = {"inputs": [tensor("A", "INT32", [1, 1], [1])]}
    for header in ("X-Fwd: a", "x-fwd-b: c", "My-X-Fwd-D: e", "X-Fw: a", "X-FWD: \u00e9", "X-Fwd:", "X-Fwd-1: a b  "):
        yield a_post("/v2/models/seen/infer", ask, header)
        yield a_post("/v2/models/seen/generate", {"A": 1}, header)
    yield a_post("/v2/models/seen/infer", {**ask, "parameters": {"X-Fwd": "p", "z": 1}}, "X-Fwd: h", "x-fwd: i")
    yield a_post(at, plain, "Content-Type: text/plain")
    yield a_post(at, plain, "Accept: text/html")
    yield a_post(at, plain, "Connection: close")
    yield a_get("/v2", "Connection: close")
    yield a_get("/v2/health/live", "Connection: close")
    yield Probe("HTTP/1.0 GET /v2", get("/v2", version="1.0"))
    yield Probe("HTTP/1.0 GET /v2 keep-alive", get("/v2", "Connection: keep-alive", version="1.0"))
    yield Probe("HTTP/1.0 POST infer", post(at, plain, version="1.0"))
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(plain), plain)
    yield Probe(
        "chunked infer", f"POST {at} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + chunks
    )
    yield Probe(
        "chunked index",
        b"POST /v2/repository/index HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        b'c\r\n{"ready":1} \r\n0\r\n\r\n',
    )


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


def regions() -> Iterator[Probe]:
    """Shared memory; ``/triton_probe`` is 64 bytes that the comparison makes."""
    at = "/v2/systemsharedmemory/region/r/register"
    bodies: Sequence[object] = (
        "",
        "xx",
        "[]",
        "5",
        "null",
        {},
        {"key": "/triton_probe"},
        {"byte_size": 8},
        {"key": 5, "byte_size": 8},
        {"key": None, "byte_size": 8},
        {"key": "/triton_probe", "byte_size": "8"},
        {"key": "/triton_probe", "byte_size": -1},
        {"key": "/triton_probe", "byte_size": 1.5},
        {"key": "/triton_probe", "byte_size": 8, "offset": "0"},
        {"key": "/triton_probe", "byte_size": 8, "offset": -1},
        {"key": "/nope", "byte_size": 8},
        {"key": "", "byte_size": 8},
        {"key": "nope", "byte_size": 8},
        {"key": "/a/b", "byte_size": 8},
        {"key": "../../etc/passwd", "byte_size": 8},
        {"key": "x" * 300, "byte_size": 8},
        {"key": "/triton_probe", "byte_size": 65},
        {"key": "/triton_probe", "byte_size": 2**40},
        {"key": "/triton_probe", "byte_size": 2**64 - 1},
        {"key": "/triton_probe", "byte_size": 64, "offset": 8},
        {"key": "/triton_probe", "byte_size": 8, "offset": 2**63},
        {"key": "/triton_probe", "byte_size": 8, "offset": 64},
        {"key": "/triton_python_backend_shm_region_x", "byte_size": 8},
        {"key": "triton_python_backend_shm_region_x", "byte_size": 8},
        {"key": "/triton_probe", "byte_size": 0},
    )
    yield from (a_post(at, body) for body in bodies)
    yield a_get("/v2/systemsharedmemory/status")
    yield a_post("/v2/systemsharedmemory/region/r/unregister")
    yield a_post(at, {"key": "/triton_probe", "byte_size": 64})
    yield a_post(at, {"key": "/triton_probe", "byte_size": 64})
    yield a_post("/v2/systemsharedmemory/region/s/register", {"key": "/triton_probe", "byte_size": 16, "offset": 0})
    yield a_post("/v2/systemsharedmemory/region/a%20b/register", {"key": "/triton_probe", "byte_size": 16})
    yield a_get("/v2/systemsharedmemory/status")
    yield a_get("/v2/systemsharedmemory/region/r/status")
    yield a_get("/v2/systemsharedmemory/region/zz/status")
    yield a_get("/v2/cudasharedmemory/region/r/status")
    places: Sequence[dict[str, object]] = (
        {"shared_memory_byte_size": 8},
        {"shared_memory_byte_size": 8, "shared_memory_offset": 8},
        {},
        {"shared_memory_byte_size": 12},
        {"shared_memory_byte_size": 4},
        {"shared_memory_byte_size": 65},
        {"shared_memory_byte_size": 8, "shared_memory_offset": 57},
        {"shared_memory_byte_size": 8, "shared_memory_offset": 64},
        {"shared_memory_byte_size": 8, "shared_memory_offset": 63},
        {"shared_memory_byte_size": 0},
        {"shared_memory_byte_size": 8, "shared_memory_offset": 1000},
        {"shared_memory_byte_size": "8"},
        {"shared_memory_byte_size": -8},
        {"shared_memory_byte_size": 8, "shared_memory_offset": "0"},
        {"shared_memory_byte_size": 2**64 - 1},
        {"shared_memory_byte_size": 8, "shared_memory_offset": 2**64 - 8},
    )
    for place in places:
        where = {"shared_memory_region": "r", **place}
        yield infer("f32", [tensor(data=None, parameters=where)])
        yield infer("f32", [tensor()], outputs=[{"name": "OUTPUT0", "parameters": where}])
        yield infer("f32", [tensor(data=None, parameters={**where, "shared_memory_region": "zz"})])
        yield infer(
            "f32", [tensor()], outputs=[{"name": "OUTPUT0", "parameters": {**where, "shared_memory_region": "zz"}}]
        )
    both = {"shared_memory_region": "r", "shared_memory_byte_size": 8}
    yield infer("f32", [tensor(data=None, parameters=both)], outputs=[{"name": "OUTPUT0", "parameters": both}])
    yield infer(
        "f32", [tensor(data=None, parameters=both)], outputs=[{"name": "OUTPUT0", "parameters": {"binary_data": True}}]
    )
    yield infer("f32", [tensor(parameters=both)])
    yield infer("str", [tensor("INPUT0", "BYTES", [2], None, parameters=both)])
    yield infer("f32", [tensor(shape=[0], data=None, parameters={**both, "shared_memory_byte_size": 0})])
    yield a_post("/v2/cudasharedmemory/region/r/unregister")
    yield a_post("/v2/systemsharedmemory/region/r/unregister", "xx")
    yield a_post("/v2/systemsharedmemory/region/r/unregister")
    yield a_get("/v2/systemsharedmemory/status")
    yield a_post("/v2/systemsharedmemory/unregister")
    yield a_get("/v2/systemsharedmemory/status")
    yield a_post("/v2/systemsharedmemory/register", {"key": "/triton_probe", "byte_size": 64})
    handle = "A" * 86 + "=="
    cuda: Sequence[object] = (
        "",
        "xx",
        "[]",
        {},
        {"raw_handle": {}},
        {"raw_handle": 5},
        {"raw_handle": {"b64": 5}},
        {"raw_handle": {"b64": handle}},
        {"raw_handle": {"b64": handle}, "byte_size": 8},
        {"raw_handle": {"b64": handle}, "byte_size": 8, "device_id": "0"},
        {"raw_handle": {"b64": handle}, "byte_size": 8, "device_id": -1},
        {"raw_handle": {"b64": "AAAA"}, "byte_size": 8, "device_id": 0},
        {"raw_handle": {"b64": "!!!"}, "byte_size": 8, "device_id": 0},
        {"raw_handle": {"b64": ""}, "byte_size": 8, "device_id": 0},
        {"raw_handle": {"b64": handle}, "byte_size": 8, "device_id": 0},
        {"raw_handle": {"b64": handle[:-2]}, "byte_size": 8, "device_id": 0},
    )
    yield from (a_post("/v2/cudasharedmemory/region/c/register", body) for body in cuda)
    yield a_post("/v2/cudasharedmemory/register", {})
    yield a_post("/v2/cudasharedmemory/region/c/unregister")
    yield a_post("/v2/cudasharedmemory/unregister")


def metrics() -> Iterator[Probe]:
    """The metrics port, all but the values."""
    for path in ("/", "/metric", "/metrics/", "/metrics?x=1", "/v2", "/metrics/x"):
        yield Probe(f"METRICS GET {path}", get(path), metrics=path != "/metrics?x=1")
    for path in ("/", "/metrics"):
        yield Probe(f"METRICS POST {path}", post(path), metrics=True)


GROUPS = (
    paths,
    restricted,
    bodies,
    inputs,
    outputs,
    binaries,
    encodings,
    generates,
    schedules,
    regions,
    traces,
    repository,
    metrics,
)
