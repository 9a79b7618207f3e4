"""What headers say (gRPC over HTTP/2; spec G-056, G-080, G-089)."""

from __future__ import annotations

import pytest

from forebay.frontend.grpc.request_head import HeadReader, RequestHead
from forebay.frontend.grpc.settings import GrpcView
from forebay.frontend.grpc.status import RpcError, Status, percent_encode, status_of
from forebay.frontend.handlers.context import RestrictedApi
from forebay.ipc.errors import Code, InvalidArgument, QueueFull, from_wire

BASE = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/inference.GRPCInferenceService/ModelInfer"),
    (b":authority", b"here"),
    (b"content-type", b"application/grpc"),
    (b"te", b"trailers"),
]


def read(*fields: tuple[bytes, bytes], pattern: str = "", settings: GrpcView | None = None) -> RequestHead:
    restrictions = settings.restrictions if settings is not None else {}
    return HeadReader(pattern, restrictions).read([*BASE, *fields])


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [(b"1H", 3_600 * 10**9), (b"2M", 120 * 10**9), (b"3S", 3 * 10**9), (b"4m", 4 * 10**6), (b"5u", 5_000), (b"6n", 6)],
)
def test_timeouts(text: bytes, nanoseconds: int) -> None:
    assert read((b"grpc-timeout", text)).timeout_ns == nanoseconds


def test_a_timeout_that_never_comes_is_none() -> None:
    """What clients say when they have none; as a number of nanoseconds it would not fit into a message."""
    assert read((b"grpc-timeout", b"99999999H")).timeout_ns == 0


@pytest.mark.parametrize("text", [b"", b"1", b"S", b"123456789S", b"-1S", b"1s"])
def test_broken_timeouts(text: bytes) -> None:
    error = read((b"grpc-timeout", text)).error
    assert isinstance(error, RpcError)
    assert error.status is Status.INTERNAL


def test_compression() -> None:
    accepted = ((b"grpc-accept-encoding", b"identity, deflate"), (b"grpc-accept-encoding", b"gzip,snappy"))
    head = read((b"grpc-encoding", b"gzip"), *accepted)
    assert (head.encoding, head.accepts) == ("gzip", ("identity", "deflate", "gzip"))
    error = read((b"grpc-encoding", b"snappy")).error
    assert isinstance(error, RpcError)
    assert error.status is Status.UNIMPLEMENTED


def test_metadata_are_forwarded_by_pattern() -> None:
    """Spec G-056; of repeated ones a model of Triton's sees the last."""
    head = read((b"x-a", b"1"), (b"x-b", b"2"), (b"x-b", b"3"), (b"y", b"4"), pattern="^X-.*")
    assert head.forwarded == {"x-a": "1", "x-b": "3"}
    assert isinstance(read((b"timeout", b"1"), pattern=".*").error, InvalidArgument)
    with pytest.raises(InvalidArgument):
        HeadReader("[", {})


def test_restricted_protocols_need_their_key() -> None:
    """Spec G-080."""
    settings = GrpcView(restricted_protocols=(RestrictedApi(("inference",), "Key", "value"),))
    error = read(settings=settings).error
    assert isinstance(error, RpcError)
    assert (error.status, error.text) == (
        Status.UNAVAILABLE,
        "This protocol is restricted, expecting header 'triton-grpc-protocol-key'",
    )
    assert read((b"triton-grpc-protocol-key", b"value"), settings=settings).error is None


def test_the_first_of_repeated_metadata_counts() -> None:
    """As in Triton 2.51 (spec G-067, G-080)."""
    settings = GrpcView(restricted_protocols=(RestrictedApi(("inference",), "Key", "value"),))
    right, wrong = (b"triton-grpc-protocol-key", b"value"), (b"triton-grpc-protocol-key", b"other")
    assert read(right, wrong, settings=settings).error is None
    assert read(wrong, right, settings=settings).error is not None
    assert read((b"triton_grpc_error", b"true"), (b"triton_grpc_error", b"false")).wants_grpc_errors


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param([*BASE, (b":path", b"/twice")], id="pseudo header after others"),
        pytest.param([BASE[0], *BASE], id="pseudo header twice"),
        pytest.param([(b":unknown", b""), *BASE], id="unknown pseudo header"),
        pytest.param(BASE[1:], id="no method"),
        pytest.param([*BASE, (b"Upper", b"x")], id="upper case"),
        pytest.param([*BASE, (b"", b"x")], id="no name"),
        pytest.param([*BASE, (b"a b", b"x")], id="space in a name"),
        pytest.param([*BASE, (b"connection", b"close")], id="connection"),
        pytest.param([*BASE, (b"a", b"x\r\ny")], id="line break"),
        pytest.param([*BASE[:-1], (b"te", b"gzip")], id="te"),
    ],
)
def test_malformed_headers(fields: list[tuple[bytes, bytes]]) -> None:
    """RFC 9113, 8.2 and 8.3."""
    assert HeadReader("", {}).read(fields).is_malformed


def test_other_http_requests() -> None:
    get = [(b":method", b"GET"), *BASE[1:]]
    assert HeadReader("", {}).read(get).http_status == 405
    json = [*BASE[:4], (b"content-type", b"application/json")]
    assert HeadReader("", {}).read(json).http_status == 415


def test_messages_are_percent_encoded() -> None:
    assert percent_encode("plain text") == b"plain text"
    assert percent_encode("50% ü\n") == b"50%25 %C3%BC%0A"


def test_every_code_has_its_status() -> None:
    """Spec 00."""
    expected = {
        Code.UNKNOWN: "UNKNOWN",
        Code.INTERNAL: "INTERNAL",
        Code.NOT_FOUND: "NOT_FOUND",
        Code.INVALID_ARG: "INVALID_ARGUMENT",
        Code.UNAVAILABLE: "UNAVAILABLE",
        Code.UNSUPPORTED: "UNIMPLEMENTED",
        Code.ALREADY_EXISTS: "ALREADY_EXISTS",
        Code.CANCELLED: "CANCELLED",
    }
    for code, name in expected.items():
        status, text = status_of(from_wire(code, "why"))
        assert (status.name, text) == (name, "why")
    assert status_of(QueueFull("full"))[0] is Status.UNAVAILABLE
    assert status_of(ValueError("secret")) == (Status.INTERNAL, "internal error")
