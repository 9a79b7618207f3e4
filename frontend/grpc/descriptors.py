"""Triton's service messages as protobuf classes in a private descriptor pool; for every call but inference.

The schema is data (``service.binpb``, made by ``make_descriptors.py``), not generated code: generated code would
register the package ``inference`` in the process-wide pool, where a tritonclient in the same process has already put
its own copy, and would tie us to one protobuf major version. Dynamic message classes have no static types: everything
untyped stays in this module and in the handlers that fill messages.
"""

from __future__ import annotations

import functools
import importlib
import pathlib
from collections.abc import Mapping
from typing import Any

from forebay.frontend.grpc.wire import Malformed

_BINARY = pathlib.Path(__file__).parent / "service.binpb"


@functools.cache
def file_set() -> Any:
    """Return the FileDescriptorSet: model_config.proto, grpc_service.proto, health.proto."""
    descriptor_pb2 = importlib.import_module("google.protobuf.descriptor_pb2")
    return descriptor_pb2.FileDescriptorSet.FromString(_BINARY.read_bytes())


@functools.cache
def pool() -> Any:
    """Return the private pool."""
    descriptor_pool = importlib.import_module("google.protobuf.descriptor_pool")
    made: Any = descriptor_pool.DescriptorPool()
    for file in file_set().file:
        made.AddSerializedFile(file.SerializeToString())
    return made


@functools.cache
def message_class(name: str) -> Any:
    """Return a message class, for example ``message_class("inference.ModelConfig")``."""
    message_factory = importlib.import_module("google.protobuf.message_factory")
    return message_factory.GetMessageClass(pool().FindMessageTypeByName(name))


def parse(name: str, data: memoryview) -> Any:
    """Return a message of type ``inference.<name>``.

    Raises:
        Malformed: it is none.
    """
    message_module = importlib.import_module("google.protobuf.message")
    try:
        return message_class(f"inference.{name}").FromString(bytes(data))
    except message_module.DecodeError:
        raise Malformed from None


def build(name: str, /, **values: Any) -> Any:
    """Return a message of type ``inference.<name>`` with these fields."""
    return message_class(f"inference.{name}")(**values)


def from_json(name: str, text: bytes) -> Any:
    """Return a message of type ``inference.<name>`` from its JSON form; unknown fields are left out."""
    json_format = importlib.import_module("google.protobuf.json_format")
    return json_format.Parse(text, message_class(f"inference.{name}")(), ignore_unknown_fields=True)


def from_plain(name: str, values: Mapping[str, Any]) -> Any:
    """Return a message of type ``inference.<name>`` from plain data; unknown fields are left out."""
    json_format = importlib.import_module("google.protobuf.json_format")
    return json_format.ParseDict(dict(values), message_class(f"inference.{name}")(), ignore_unknown_fields=True)
