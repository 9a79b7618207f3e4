"""Spec appendix F replayed: calls that were recorded with a real Triton 2.51, and what it answered."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from forebay_server import ForebayServer, wait_until
from google.protobuf import text_format
from tritonclient.grpc import service_pb2, service_pb2_grpc

MODELS = Path(__file__).resolve().parents[1] / "data" / "transcript_models"
TWO = np.array([1, 2], dtype=np.float32).tobytes()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForebayServer]:
    repository = tmp_path_factory.mktemp("transcripts")
    for name in ("f32", "dec", "seq"):
        shutil.copytree(MODELS / name, repository / name)
        (repository / name / "1").mkdir(exist_ok=True)
    with ForebayServer(repository, "--strict-readiness=false", protocols=("grpc",)) as running:
        yield running


@pytest.fixture(scope="module")
def stub(server: ForebayServer) -> Iterator[Any]:
    with grpc.insecure_channel(f"127.0.0.1:{server.ports()['GRPCInferenceService']}") as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def request(model: str = "f32", raw: Sequence[bytes] = (TWO,), **fields: Any) -> Any:
    """Return a request of two FP32 numbers, or of what ``fields`` say."""
    made = service_pb2.ModelInferRequest(model_name=model, raw_input_contents=raw, **fields)
    made.inputs.add(name="IN" if model == "dec" else "INPUT0", datatype="FP32", shape=[1 if model == "dec" else 2])
    return made


def answer(call: Any, message: Any) -> str:
    """Return a reply as text on one line, or ``ERR`` with code and details, as the transcripts have it."""
    try:
        reply = call(message, timeout=30)
    except grpc.RpcError as error:
        failed: Any = error
        assert not failed.trailing_metadata(), "spec G-090: no trailing metadata"
        return f"ERR {failed.code()} {failed.details()}"
    return one_line(reply)


def one_line(message: Any) -> str:
    """Return a message as text, without the parameters that Triton's own identity backend adds."""
    reply = message.infer_response if hasattr(message, "infer_response") else message
    for name in [name for name in getattr(reply, "parameters", {}) if name.startswith("param")]:
        del reply.parameters[name]
    return text_format.MessageToString(message, as_one_line=True)


GOOD = (
    'model_name: "f32" model_version: "1" {}outputs {{ name: "OUTPUT0" datatype: "FP32" shape: 2 }} '
    'raw_output_contents: "\\000\\000\\200?\\000\\000\\000@"'
)


def with_contents(made: Any, **contents: Any) -> Any:
    made.inputs[0].contents.MergeFrom(service_pb2.InferTensorContents(**contents))
    return made


def parameter(**choice: Any) -> Any:
    return service_pb2.InferParameter(**choice)


def classified() -> Any:
    made = request()
    made.outputs.add(name="OUTPUT0").parameters["classification"].int64_param = 1
    return made


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        pytest.param(request(id="a"), GOOD.format('id: "a" '), id="F2-01 ok"),
        pytest.param(with_contents(request(raw=()), fp32_contents=[1, 2]), GOOD.format(""), id="F2-02 contents"),
        pytest.param(
            with_contents(request(), fp32_contents=[1, 2]),
            "ERR StatusCode.INVALID_ARGUMENT contents field must not be specified when using raw_input_contents for "
            "'INPUT0' for model 'f32'",
            id="F2-03 both",
        ),
        pytest.param(
            request(raw=()),
            "ERR StatusCode.INVALID_ARGUMENT unable to find data for input tensor 'INPUT0' for model 'f32' in request.",
            id="F2-04 none (spec G-039)",
        ),
        pytest.param(
            with_contents(request(raw=()), int_contents=[1, 2]),
            "ERR StatusCode.INVALID_ARGUMENT unexpected explicit tensor data for input tensor 'INPUT0' for model 'f32' "
            "of type 'INT32', expected datatype 'FP32'",
            id="F2-05 wrongtype",
        ),
        pytest.param(
            request(raw=[b"abc"]),
            "ERR StatusCode.INVALID_ARGUMENT [request id: <id_unknown>] input byte size mismatch for input 'INPUT0' "
            "for model 'f32'. Expected 8, got 3",
            id="F2-06 short",
        ),
        pytest.param(
            request(raw=[bytes(12)]),
            "ERR StatusCode.INVALID_ARGUMENT [request id: <id_unknown>] input byte size mismatch for input 'INPUT0' "
            "for model 'f32'. Expected 8, got 12",
            id="F2-07 long",
        ),
        pytest.param(request(raw=[TWO, b"more"]), GOOD.format(""), id="F2-08 extra raw (spec G-038)"),
        pytest.param(
            request("zz"), "ERR StatusCode.NOT_FOUND Request for unknown model: 'zz' is not found", id="F2-09 nomodel"
        ),
        pytest.param(
            request(model_version="x"),
            "ERR StatusCode.INVALID_ARGUMENT failed to get model version from specified version string 'x' (details: "
            "stol), version should be an integral value > 0",
            id="F2-10 badver",
        ),
        pytest.param(
            request(model_version="9"),
            "ERR StatusCode.NOT_FOUND Request for unknown model: 'f32' version 9 is not found",
            id="F2-11 badver9",
        ),
        pytest.param(
            request("dec", raw=[TWO[:4]]),
            "ERR StatusCode.UNIMPLEMENTED ModelInfer RPC doesn't support models with decoupled transaction policy",
            id="F2-12 dec (spec G-049)",
        ),
        pytest.param(
            request(parameters={"triton_enable_empty_final_response": parameter(bool_param=True)}),
            GOOD.format(""),
            id="F2-26 emptyfinal unary",
        ),
        pytest.param(
            request(parameters={"sequence_id": parameter(bool_param=True)}),
            "ERR StatusCode.INVALID_ARGUMENT invalid value type for 'sequence_id' parameter, expected int64_param or "
            "string_param.",
            id="F2-27 bad seq",
        ),
        pytest.param(
            request(parameters={"triton_zz": parameter(bool_param=True)}),
            "ERR StatusCode.INVALID_ARGUMENT parameter keys starting with 'triton_' are reserved for Triton usage. "
            "Only the following keys starting with 'triton_' are allowed: triton_enable_empty_final_response",
            id="F2-29 triton_",
        ),
        pytest.param(
            classified(),
            'model_name: "f32" model_version: "1" outputs { name: "OUTPUT0" datatype: "BYTES" shape: 1 } '
            'raw_output_contents: "\\016\\000\\000\\0002.000000:1:dog"',
            id="F2-30 class",
        ),
    ],
)
def test_unary_inference(stub: Any, message: Any, expected: str) -> None:
    """Twice, so that both the general path and the plan that it leaves behind are seen."""
    assert answer(stub.ModelInfer, message) == expected
    assert answer(stub.ModelInfer, message) == expected


@pytest.mark.parametrize(
    ("method", "message", "expected"),
    [
        pytest.param(
            "ModelMetadata",
            service_pb2.ModelMetadataRequest(name="f32"),
            'name: "f32" versions: "1" platform: "identity" inputs { name: "INPUT0" datatype: "FP32" shape: -1 } '
            'outputs { name: "OUTPUT0" datatype: "FP32" shape: -1 }',
            id="F2-13 meta",
        ),
        pytest.param(
            "ModelMetadata",
            service_pb2.ModelMetadataRequest(name="zz"),
            "ERR StatusCode.NOT_FOUND Request for unknown model: 'zz' is not found",
            id="F2-14 meta no",
        ),
        pytest.param("ModelReady", service_pb2.ModelReadyRequest(name="zz"), "", id="F2-15 ready no"),
        pytest.param(
            "ModelStatistics",
            service_pb2.ModelStatisticsRequest(name="zz"),
            "ERR StatusCode.INVALID_ARGUMENT requested model 'zz' is not available",
            id="F2-17 stats no",
        ),
        pytest.param(
            "RepositoryIndex",
            service_pb2.RepositoryIndexRequest(),
            'models { name: "dec" version: "1" state: "READY" } models { name: "f32" version: "1" state: "READY" } '
            'models { name: "seq" version: "1" state: "READY" }',
            id="F2-19 index",
        ),
        pytest.param(
            "RepositoryModelLoad",
            service_pb2.RepositoryModelLoadRequest(repository_name="r", model_name="f32"),
            "ERR StatusCode.UNIMPLEMENTED 'repository_name' specification is not supported",
            id="F2-21 load repo",
        ),
        pytest.param(
            "RepositoryModelLoad",
            service_pb2.RepositoryModelLoadRequest(
                model_name="f32", parameters={"foo": service_pb2.ModelRepositoryParameter(string_param="x")}
            ),
            "ERR StatusCode.INVALID_ARGUMENT unrecognized load parameter 'foo'.",
            id="F2-22 load param",
        ),
    ],
)
def test_control(stub: Any, method: str, message: Any, expected: str) -> None:
    assert answer(getattr(stub, method), message) == expected


#: Of Triton 2.51 from PyPI, beyond the appendix.
@pytest.mark.parametrize("version", ["1", "01", " 1", "+1", "1x", "1.5"])
def test_versions_are_read_as_far_as_they_are_numbers(stub: Any, version: str) -> None:
    assert answer(stub.ModelInfer, request(model_version=version)) == GOOD.format("")
    assert answer(stub.ModelReady, service_pb2.ModelReadyRequest(name="f32", version=version)) == "ready: true"


@pytest.mark.parametrize("version", ["-1", "-5", "x", "99999999999999999999"])
def test_versions_that_cannot_be(stub: Any, version: str) -> None:
    text = (
        f"invalid model version specified '{version}' , "
        if version.startswith("-")
        else f"failed to get model version from specified version string '{version}' (details: stol), "
    )
    expected = f"ERR StatusCode.INVALID_ARGUMENT {text}version should be an integral value > 0"
    assert answer(stub.ModelInfer, request(model_version=version)) == expected
    for kind in ("Ready", "Metadata", "Config", "Statistics"):
        message = getattr(service_pb2, f"Model{kind}Request")(name="f32", version=version)
        assert answer(getattr(stub, f"Model{kind}"), message) == expected


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("log_verbose_level", {"string_param": "1"}, "INVALID_ARGUMENT expect int32 for 'log_verbose_level'"),
        ("log_verbose_level", {}, "INVALID_ARGUMENT expect int32 for 'log_verbose_level'"),
        ("log_info", {"uint32_param": 1}, "INVALID_ARGUMENT expect boolean for 'log_info'"),
        ("log_format", {"uint32_param": 1}, "INVALID_ARGUMENT expect string for 'log_format'"),
        ("log_format", {"string_param": "x"}, "INVALID_ARGUMENT invalid argument for log_format, got: x"),
        (
            "log_file",
            {"string_param": "x"},
            "UNIMPLEMENTED log file location can not be updated through network protocol",
        ),
        ("log_file", {}, "UNIMPLEMENTED log file location can not be updated through network protocol"),
    ],
)
def test_log_settings_that_cannot_be(stub: Any, name: str, value: dict[str, Any], expected: str) -> None:
    message = service_pb2.LogSettingsRequest()
    message.settings[name].CopyFrom(service_pb2.LogSettingsRequest.SettingValue(**value))
    assert answer(stub.LogSettings, message) == f"ERR StatusCode.{expected}"


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("trace_count", ["-2"], "INVALID_ARGUMENT Unable to parse 'trace_count'. Expecting value >= -1, got: -2"),
        ("trace_rate", ["1", "2"], "INVALID_ARGUMENT expect only 1 value for 'trace_rate'"),
        ("trace_file", ["a", "b"], "UNIMPLEMENTED trace file location can not be updated through network protocol"),
        (
            "trace_level",
            ["TIMESTAMPS"],
            "INVALID_ARGUMENT Attempting to set invalid trace setting :trace file name is not given",
        ),
    ],
)
def test_trace_settings_that_cannot_be(stub: Any, name: str, values: list[str], expected: str) -> None:
    message = service_pb2.TraceSettingRequest()
    message.settings[name].value.extend(values)
    assert answer(stub.TraceSetting, message) == f"ERR StatusCode.{expected}"


def test_a_shape_that_is_not_known(stub: Any) -> None:
    made = request()
    made.inputs[0].shape[:] = [-1]
    assert answer(stub.ModelInfer, made) == (
        "ERR StatusCode.INVALID_ARGUMENT [request id: <id_unknown>] All input dimensions should be specified for input "
        "'INPUT0' for model 'f32', got [-1]"
    )


def test_statistics_count_what_succeeded(stub: Any) -> None:
    """F2-18."""

    def statistics() -> Any:
        (seen,) = stub.ModelStatistics(service_pb2.ModelStatisticsRequest(name="f32")).model_stats
        return seen

    before = statistics()
    for _ in range(3):
        stub.ModelInfer(request())
    # Workers count behind their answers.
    wait_until(lambda: statistics().inference_count >= before.inference_count + 3, "the last request is counted")
    after = statistics()
    assert (after.name, after.version) == ("f32", "1")
    assert after.inference_count - before.inference_count == 3
    assert after.execution_count - before.execution_count == 3
    assert after.inference_stats.success.count - before.inference_stats.success.count == 3
    assert after.inference_stats.compute_infer.ns > before.inference_stats.compute_infer.ns


# --- streams ---


def stream(stub: Any, *messages: Any, metadata: Sequence[tuple[str, str]] = ()) -> list[str]:
    return [one_line(reply) for reply in stub.ModelStreamInfer(iter(messages), timeout=30, metadata=metadata)]


def decoupled(count: float, **fields: Any) -> Any:
    return request("dec", raw=[np.float32(count).tobytes()], id="s", **fields)


def data(value: str) -> str:
    return (
        'infer_response { model_name: "dec" model_version: "1" id: "s" parameters { key: "triton_final_response" value '
        '{ bool_param: false } } outputs { name: "OUT" datatype: "FP32" shape: 1 } '
        f'raw_output_contents: "{value}" }}'
    )


FINAL = 'parameters { key: "triton_final_response" value { bool_param: true } }'
ZERO, ONE = "\\000\\000\\000\\000", "\\000\\000\\200?"


def test_stream_of_a_decoupled_model(stub: Any) -> None:
    """F2-31, F2-32; spec G-063: no empty final response unless it is asked for."""
    assert stream(stub, decoupled(2)) == [data(ZERO), data(ONE)]


def test_stream_of_a_decoupled_model_with_empty_final_response(stub: Any) -> None:
    """F2-33..F2-35, spec G-064: of the version it says what the request did."""
    wanted = {"triton_enable_empty_final_response": parameter(bool_param=True)}
    *replies, final = stream(stub, decoupled(2, parameters=wanted))
    assert replies == [data(ZERO), data(ONE)]
    assert final == f'infer_response {{ model_name: "dec" id: "s" {FINAL} }}'
    *_replies, final = stream(stub, decoupled(2, parameters=wanted, model_version="1"))
    assert final == f'infer_response {{ model_name: "dec" model_version: "1" id: "s" {FINAL} }}'


@pytest.mark.parametrize("metadata", [(), (("triton_grpc_error", "true"),)], ids=["F2-37", "F2-39"])
def test_unknown_model_leaves_the_stream_open(stub: Any, metadata: Sequence[tuple[str, str]]) -> None:
    """F2-37..F2-39, spec G-066, G-067: found before the engine, so in-band in any case."""
    bad, good = stream(stub, request("zz", id="k"), request(id="ok"), metadata=metadata)
    assert bad == 'error_message: "Request for unknown model: \\\'zz\\\' is not found" infer_response { id: "k" }'
    assert good.startswith(
        'infer_response { model_name: "f32" model_version: "1" id: "ok" parameters { key: "triton_final_response" '
        "value { bool_param: true } }"
    )


def test_model_error_is_a_reply(stub: Any) -> None:
    """Spec G-066: a model's error carries id, name and the final flag; the version as the request did."""
    (reply,) = stream(stub, decoupled(-1))
    assert reply == f'error_message: "boom" infer_response {{ model_name: "dec" id: "s" {FINAL} }}'
    (reply,) = stream(stub, decoupled(-1, model_version="1"))
    assert reply == f'error_message: "boom" infer_response {{ model_name: "dec" model_version: "1" id: "s" {FINAL} }}'


@pytest.mark.parametrize("metadata", [(), (("triton_grpc_error", "true"),)], ids=["plain", "grpc error"])
def test_what_the_queue_refuses_is_no_response(stub: Any, metadata: Sequence[tuple[str, str]]) -> None:
    """Only the id, and the stream stays open, as for everything that is found before a model has the request."""
    made = service_pb2.ModelInferRequest(model_name="seq", id="k", raw_input_contents=[bytes(4)])
    made.inputs.add(name="INPUT0", datatype="INT32", shape=[1, 1])
    made.parameters["sequence_id"].int64_param = 1234
    bad, good = stream(stub, made, request(id="ok"), metadata=metadata)
    assert bad == (
        "error_message: \"inference request for sequence 1234 to model \\'seq\\' must specify the START flag on the "
        'first request of the sequence" infer_response { id: "k" }'
    )
    assert 'id: "ok"' in good


def test_model_error_ends_the_stream_on_request(stub: Any) -> None:
    """Spec G-067."""
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.ModelStreamInfer(iter([decoupled(-1)]), timeout=30, metadata=(("triton_grpc_error", "true"),)))
    failed: Any = caught.value
    assert failed.details() == "boom"
    assert failed.code() is grpc.StatusCode.INTERNAL
