"""The table of methods: path to what makes its calls, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay.frontend.grpc import health
from forebay.frontend.grpc.call import Call
from forebay.frontend.grpc.control_call import ControlCall
from forebay.frontend.grpc.handlers import HANDLERS
from forebay.frontend.grpc.http2.connection import Connection
from forebay.frontend.grpc.infer_call import InferCall
from forebay.frontend.grpc.reflection import ReflectionCall
from forebay.frontend.grpc.request_head import RequestHead
from forebay.frontend.grpc.stream_call import StreamInferCall

if TYPE_CHECKING:
    from forebay.frontend.grpc.control_call import Handler
    from forebay.frontend.grpc.server import CallFactory, GrpcFrontend

_SERVICE = "/inference.GRPCInferenceService/"
_HEALTH = "/grpc.health.v1.Health/"
_REFLECTION = "/grpc.reflection.{}.ServerReflection/ServerReflectionInfo"


def _control(handler: Handler) -> CallFactory:
    def make(frontend: GrpcFrontend, connection: Connection[RequestHead], number: int, head: RequestHead) -> Call:
        return ControlCall(frontend, connection, number, head, handler)

    return make


def build_methods() -> dict[str, CallFactory]:
    """Return every method that is served."""
    methods: dict[str, CallFactory] = {_SERVICE + name: _control(handler) for name, handler in HANDLERS.items()}
    methods[_SERVICE + "ModelInfer"] = InferCall
    methods[_SERVICE + "ModelStreamInfer"] = StreamInferCall
    methods[_HEALTH + "Check"] = _control(health.check)
    methods[_HEALTH + "Watch"] = health.WatchCall
    for version in ("v1", "v1alpha"):
        methods[_REFLECTION.format(version)] = ReflectionCall
    return methods
