"""Server reflection, v1 and v1alpha, which Triton does not have: ``grpcurl list`` works (spec G-020, L-033).

The few messages of ``grpc.reflection`` are read and written by hand; both versions look the same on the wire.
"""

from __future__ import annotations

import functools
from typing import Any

from forebay.frontend.grpc import descriptors
from forebay.frontend.grpc.call import Call
from forebay.frontend.grpc.status import Status
from forebay.frontend.grpc.wire import LENGTH, field, fields, integer_field, text, text_field

#: Fields of ``ServerReflectionRequest``.
_FILE_BY_NAME, _FILE_BY_SYMBOL, _FILE_BY_EXTENSION, _EXTENSION_NUMBERS, _LIST = 3, 4, 5, 6, 7
#: Fields of ``ServerReflectionResponse``.
_FILES, _NUMBERS, _SERVICES, _ERROR = 4, 5, 6, 7

_REFLECTION_SERVICES = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")


@functools.cache
def _files() -> dict[str, Any]:
    return {file.name: file for file in descriptors.file_set().file}


@functools.cache
def _service_names() -> tuple[str, ...]:
    found = [f"{file.package}.{service.name}" for file in _files().values() for service in file.service]
    return tuple(sorted([*found, *_REFLECTION_SERVICES]))


def _with_imports(name: str) -> bytes:
    """Return a ``FileDescriptorResponse`` field with a file and what it imports."""
    wanted, encoded = [name], b""
    seen: set[str] = set()
    while wanted:
        current = wanted.pop(0)
        file = _files().get(current)
        if file is None or current in seen:
            continue
        seen.add(current)
        encoded += field(1, file.SerializeToString())
        wanted += file.dependency
    return field(_FILES, encoded)


def _error(status: Status, message: str) -> bytes:
    return field(_ERROR, integer_field(1, status) + text_field(2, message))


def _answer(number: int, argument: str) -> bytes:
    """Return the field of a ``ServerReflectionResponse`` that answers a request's field."""
    if number == _LIST:
        return field(_SERVICES, b"".join(field(1, text_field(1, name)) for name in _service_names()))
    if number == _FILE_BY_NAME:
        return _with_imports(argument) if argument in _files() else _error(Status.NOT_FOUND, "File not found.")
    if number == _FILE_BY_SYMBOL:
        for find in (_find_symbol, _find_method):
            name = find(argument)
            if name:
                return _with_imports(name)
        return _error(Status.NOT_FOUND, "Symbol not found.")
    if number == _EXTENSION_NUMBERS:
        if _find_symbol(argument):
            return field(_NUMBERS, text_field(1, argument))
        return _error(Status.NOT_FOUND, "Type not found.")
    if number == _FILE_BY_EXTENSION:
        return _error(Status.NOT_FOUND, "Extension not found.")
    return _error(Status.INVALID_ARGUMENT, "the request asks for nothing")


def _find_symbol(symbol: str) -> str:
    """Return the name of the file that defines a symbol; empty: none."""
    try:
        name: str = descriptors.pool().FindFileContainingSymbol(symbol).name
    except KeyError:
        return ""
    return name


def _find_method(symbol: str) -> str:
    service, _, method = symbol.rpartition(".")
    for file in _files().values():
        for known in file.service:
            if service == f"{file.package}.{known.name}" and any(method == other.name for other in known.method):
                return str(file.name)
    return ""


class ReflectionCall(Call):
    """One ``ServerReflectionInfo``: each message is answered by one."""

    __slots__ = ()

    def take_message(self, message: memoryview) -> None:
        host, number, argument = "", 0, ""
        for found, kind, start, end in fields(message):
            if kind != LENGTH:
                continue
            if found == 1:
                host = text(message[start:end])
            elif found == _FILE_BY_EXTENSION:
                number, argument = found, ""
            elif found in (_FILE_BY_NAME, _FILE_BY_SYMBOL, _EXTENSION_NUMBERS, _LIST):
                number, argument = found, text(message[start:end])
        reply = text_field(1, host) + field(2, bytes(message)) + _answer(number, argument)
        self.send((reply,), len(reply))

    def take_end(self) -> None:
        self.finish()
