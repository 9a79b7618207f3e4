"""Derive ``service.binpb`` from the copies of Triton's schemas that tritonclient ships.

A developer's tool, run by hand when Triton's service grows::

    python -m forebay.frontend.grpc.make_descriptors

``grpc_service.proto`` and ``model_config.proto`` of triton-inference-server/common are BSD-3-Clause and reach PyPI only
as generated modules. Their descriptors are taken from there; that of ``grpc.health.v1`` (Apache-2.0) is small enough to
be written out. Nothing of it runs in a server.
"""

from __future__ import annotations

import importlib
import pathlib
import sys
from typing import Any

_TARGET = pathlib.Path(__file__).parent / "service.binpb"


def health_file() -> Any:
    """Return the FileDescriptorProto of ``grpc/health/v1/health.proto``."""
    descriptor_pb2 = importlib.import_module("google.protobuf.descriptor_pb2")
    file: Any = descriptor_pb2.FileDescriptorProto(
        name="grpc/health/v1/health.proto", package="grpc.health.v1", syntax="proto3"
    )
    request = file.message_type.add(name="HealthCheckRequest")
    request.field.add(name="service", number=1, type=9, label=1, json_name="service")
    response = file.message_type.add(name="HealthCheckResponse")
    kind = ".grpc.health.v1.HealthCheckResponse.ServingStatus"
    response.field.add(name="status", number=1, type=14, label=1, type_name=kind, json_name="status")
    states = response.enum_type.add(name="ServingStatus")
    for number, name in enumerate(("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")):
        states.value.add(name=name, number=number)
    service = file.service.add(name="Health")
    types = {"input_type": ".grpc.health.v1.HealthCheckRequest", "output_type": ".grpc.health.v1.HealthCheckResponse"}
    service.method.add(name="Check", **types)
    service.method.add(name="Watch", server_streaming=True, **types)
    return file


def main() -> int:
    """Write the file; returns the exit code."""
    descriptor_pb2 = importlib.import_module("google.protobuf.descriptor_pb2")
    files: list[Any] = []
    for name in ("model_config_pb2", "service_pb2"):
        file: Any = descriptor_pb2.FileDescriptorProto()
        importlib.import_module(f"tritonclient.grpc.{name}").DESCRIPTOR.CopyToProto(file)
        files.append(file)
    files.append(health_file())
    file_set: Any = descriptor_pb2.FileDescriptorSet(file=files)
    _TARGET.write_bytes(file_set.SerializeToString(deterministic=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
