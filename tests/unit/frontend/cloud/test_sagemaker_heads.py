"""Spec H-300."""

import pytest

from forebay.frontend.cloud.sagemaker_heads import SageMakerHeads
from forebay.frontend.http.head import HeadError, Target
from forebay.ipc.errors import InvalidArgument

ENVIRONMENT = {"SAGEMAKER_TRITON_DEFAULT_MODEL_NAME": "m"}


def parse(method: str, path: str, *headers: str, **environment: str):
    heads = SageMakerHeads({**ENVIRONMENT, **environment})
    return heads.parse("\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *headers, "", ""]).encode())


@pytest.mark.parametrize(
    ("method", "path", "translated"),
    [
        ("GET", "/ping", "GET /v2/health/ready"),
        ("POST", "/ping", "POST /v2/health/ready"),
        ("GET", "/invocations", "GET /v2/models/m/infer"),
        ("GET", "/models", "GET /models"),
        ("DELETE", "/models/a", "DELETE /models/a"),
        ("GET", "/models/a/invoke", "GET /-/400"),
        ("GET", "/v2/models/m", "GET /-/400"),
        ("POST", "/v2/models/m/infer", "GET /-/400"),
        ("GET", "/-/405", "GET /-/400"),
    ],
)
def test_paths(method: str, path: str, translated: str) -> None:
    head = parse(method, path)
    assert head.raw.startswith(translated.encode() + b" HTTP/1.1\r\nHost: x\r\n")
    assert head.target is Target.OTHER


def test_inference() -> None:
    head = parse("POST", "/invocations?x=1", "Content-Length: 5")
    assert (head.target, head.model, head.content_length, head.is_plain) == (Target.INFER, "m", 5, False)
    assert parse("POST", "/models/other/invoke").model == "other"
    generate = parse("POST", "/invocations", SAGEMAKER_TRITON_INFERENCE_TYPE="generate_stream")
    assert generate.target is Target.GENERATE_STREAM
    assert parse("GET", "/ping", SAGEMAKER_TRITON_PING_MODE="live").raw.startswith(b"GET /v2/health/live ")
    assert SageMakerHeads({}).parse(b"POST /invocations HTTP/1.1\r\n\r\n").model.startswith("unspecified_")


def test_the_content_type_says_where_tensors_begin() -> None:
    length = f"Content-Type: {SageMakerHeads.binary_type}17"
    head = parse("POST", "/invocations", "Inference-Header-Content-Length: 3", length)
    assert head.header_length == "17"
    assert head.binary_type == SageMakerHeads.binary_type
    assert parse("POST", "/invocations", "Inference-Header-Content-Length: 3").header_length == "3"
    assert parse("POST", "/invocations", "Content-Type: application/json").header_length is None


def test_what_is_no_head_is_refused_as_everywhere() -> None:
    with pytest.raises(HeadError):
        SageMakerHeads(ENVIRONMENT).parse(b"nonsense\r\n\r\n")


def test_inference_types_are_checked() -> None:
    with pytest.raises(
        InvalidArgument, match=r"Server has invalid inference type 'x'\. Must be one of: infer, generate"
    ):
        SageMakerHeads({"SAGEMAKER_TRITON_INFERENCE_TYPE": "x"})
