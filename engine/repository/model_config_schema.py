"""Triton's ``model_config.proto`` as protobuf classes in a private descriptor pool.

The schema is data (``model_config.binpb``, made by ``make_schema.py``), not generated code: generated code would
register the package ``inference`` in the process-wide pool, where a tritonclient in the same process has already put
its own copy ("duplicate symbol"), and would tie us to one protobuf major version. A private pool has neither problem.

Dynamic message classes have no static types. Everything untyped stays behind this module and :class:`ModelConfig`;
code outside ``engine/repository`` reads a ``ModelSpec`` instead.
"""

from __future__ import annotations

import functools
import importlib
import pathlib
import threading
from types import ModuleType
from typing import Any, Protocol

_BINARY = pathlib.Path(__file__).parent / "model_config.binpb"


class EnumValue(Protocol):
    """What we use of a protobuf enum value descriptor."""

    name: str
    number: int


class EnumType(Protocol):
    """What we use of a protobuf enum descriptor."""

    name: str
    values: list[EnumValue]
    values_by_name: dict[str, EnumValue]
    values_by_number: dict[int, EnumValue]


class OneofType(Protocol):
    """What we use of a protobuf oneof descriptor."""

    name: str


class FieldType(Protocol):
    """What we use of a protobuf field descriptor."""

    name: str
    camelcase_name: str
    json_name: str
    type: int
    has_presence: bool
    enum_type: EnumType | None
    message_type: MessageType | None
    containing_oneof: OneofType | None


class MessageType(Protocol):
    """What we use of a protobuf message descriptor."""

    name: str
    full_name: str
    fields: list[FieldType]
    fields_by_name: dict[str, FieldType]


TYPE_DOUBLE, TYPE_FLOAT, TYPE_INT64, TYPE_UINT64, TYPE_INT32, TYPE_BOOL = 1, 2, 3, 4, 5, 8
TYPE_STRING, TYPE_MESSAGE, TYPE_UINT32, TYPE_ENUM = 9, 11, 13, 14

#: Field types that hold an integer.
INTEGER_TYPES = frozenset({TYPE_INT64, TYPE_UINT64, TYPE_INT32, TYPE_UINT32})


def text_format() -> ModuleType:
    """Return ``google.protobuf.text_format``; imported on first use, it costs some 20 ms."""
    return importlib.import_module("google.protobuf.text_format")


def json_format() -> ModuleType:
    """Return ``google.protobuf.json_format``."""
    return importlib.import_module("google.protobuf.json_format")


_BUILDING = threading.Lock()


def _pool() -> Any:
    """Return the one pool; models are read in several threads, and classes of two pools do not mix."""
    with _BUILDING:
        return _build_pool()


@functools.cache
def _build_pool() -> Any:
    descriptor_pb2 = importlib.import_module("google.protobuf.descriptor_pb2")
    descriptor_pool = importlib.import_module("google.protobuf.descriptor_pool")
    file_set: Any = descriptor_pb2.FileDescriptorSet.FromString(_BINARY.read_bytes())
    pool: Any = descriptor_pool.DescriptorPool()
    for file in file_set.file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


@functools.cache
def message_class(name: str) -> Any:
    """Return the message class ``inference.<name>``, for example ``message_class("ModelConfig")``."""
    message_factory = importlib.import_module("google.protobuf.message_factory")
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"inference.{name}"))


def message_type(name: str = "ModelConfig") -> MessageType:
    """Return the descriptor of ``inference.<name>``."""
    descriptor: MessageType = message_class(name).DESCRIPTOR
    return descriptor


@functools.cache
def enum_type(name: str) -> EnumType:
    """Return the enum ``inference.<name>``, for example ``ModelInstanceGroup.Kind``."""
    descriptor: EnumType = _pool().FindEnumTypeByName(f"inference.{name}")
    return descriptor


def enum_number(enum: str, value: str) -> int:
    """Return the number of an enum value: ``enum_number("DataType", "TYPE_FP32")`` is 11."""
    return enum_type(enum).values_by_name[value].number


def enum_name(enum: str, number: int) -> str:
    """Return the name of an enum value, or the number as text for one that this schema does not know."""
    value = enum_type(enum).values_by_number.get(number)
    return str(number) if value is None else value.name


def is_repeated(field: FieldType) -> bool:
    """True for ``repeated`` and map fields; protobuf 5, 6 and 7 spell it differently."""
    flag: Any = getattr(field, "is_repeated", None)
    if flag is None:
        label: int = getattr(field, "label", 0)
        return label == 3
    return bool(flag)


def map_entry(field: FieldType) -> tuple[FieldType, FieldType] | None:
    """Return the key and value fields of a map field, or None if the field is no map."""
    entry: Any = field.message_type
    if entry is None or not entry.GetOptions().map_entry:
        return None
    return entry.fields_by_name["key"], entry.fields_by_name["value"]


class ModelConfig:
    """One model configuration: a protobuf message and, if it was read from text, where each field stood there.

    ``message`` is for the modules of ``engine/repository``; everyone else uses ``spec_from_config``.
    """

    __slots__ = ("message", "source")

    def __init__(self, message: Any | None = None, source: ConfigSource | None = None) -> None:
        self.message: Any = message_class("ModelConfig")() if message is None else message
        self.source = source

    @property
    def name(self) -> str:
        return str(self.message.name)

    @property
    def backend(self) -> str:
        return str(self.message.backend)

    @property
    def platform(self) -> str:
        return str(self.message.platform)

    @property
    def max_batch_size(self) -> int:
        return int(self.message.max_batch_size)

    @property
    def default_model_filename(self) -> str:
        return str(self.message.default_model_filename)

    def copy(self) -> ModelConfig:
        """Return an independent copy that remembers the same source."""
        message = message_class("ModelConfig")()
        message.CopyFrom(self.message)
        return ModelConfig(message, self.source)

    def to_bytes(self) -> bytes:
        """Return the protobuf wire form; what gRPC's ModelConfig reply carries."""
        return bytes(self.message.SerializeToString(deterministic=True))

    @classmethod
    def from_bytes(cls, data: bytes) -> ModelConfig:
        """Rebuild a config that crossed a process; it has no source."""
        return cls(message_class("ModelConfig").FromString(data))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelConfig) and bool(self.message == other.message)

    __hash__ = None  # type: ignore[assignment]  # mutable, compared by value

    def __repr__(self) -> str:
        return f"ModelConfig({self.name!r}, backend={self.backend!r})"


class ConfigSource(Protocol):
    """Finds where in a config file a field was written."""

    @property
    def name(self) -> str:
        """File name as shown to people."""
        ...

    def locate(self, path: FieldPath) -> Position | None:
        """Return where ``path`` or its closest written ancestor stands."""
        ...


class Position(Protocol):
    """A place in a text; both count from 1."""

    @property
    def line(self) -> int: ...

    @property
    def column(self) -> int: ...

    @property
    def written(self) -> str: ...


#: Field names, list indexes and map keys from the root: ``("input", 0, "dims", 1)``.
FieldPath = tuple[str | int, ...]
