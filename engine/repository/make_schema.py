"""Derive ``model_config.binpb`` and ``model_config.proto`` from the copy of the schema that tritonclient ships.

A developer's tool, run by hand when Triton's schema grows a field::

    python -m forebay.engine.repository.make_schema

``model_config.proto`` of triton-inference-server/common is BSD-3-Clause and reaches PyPI only as the generated module
``tritonclient.grpc.model_config_pb2``. The descriptor is taken from there and written twice: binary, which
``model_config_schema.py`` loads, and as text, for people to read. Nothing of it runs in a server.
"""

from __future__ import annotations

import importlib
import pathlib
import sys
from typing import Any

#: Where both files go.
FOLDER = pathlib.Path(__file__).parent

LICENCE = """\
// Copyright 2018-2026, NVIDIA CORPORATION & AFFILIATES. All rights reserved.
//
// Redistribution and use in source and binary forms, with or without
// modification, are permitted provided that the following conditions
// are met:
//  * Redistributions of source code must retain the above copyright
//    notice, this list of conditions and the following disclaimer.
//  * Redistributions in binary form must reproduce the above copyright
//    notice, this list of conditions and the following disclaimer in the
//    documentation and/or other materials provided with the distribution.
//  * Neither the name of NVIDIA CORPORATION nor the names of its
//    contributors may be used to endorse or promote products derived
//    from this software without specific prior written permission.
//
// THIS SOFTWARE IS PROVIDED BY THE COPYRIGHT HOLDERS ``AS IS'' AND ANY
// EXPRESS OR IMPLIED WARRANTIES, INCLUDING, BUT NOT LIMITED TO, THE
// IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS FOR A PARTICULAR
// PURPOSE ARE DISCLAIMED.  IN NO EVENT SHALL THE COPYRIGHT OWNER OR
// CONTRIBUTORS BE LIABLE FOR ANY DIRECT, INDIRECT, INCIDENTAL, SPECIAL,
// EXEMPLARY, OR CONSEQUENTIAL DAMAGES (INCLUDING, BUT NOT LIMITED TO,
// PROCUREMENT OF SUBSTITUTE GOODS OR SERVICES; LOSS OF USE, DATA, OR
// PROFITS; OR BUSINESS INTERRUPTION) HOWEVER CAUSED AND ON ANY THEORY
// OF LIABILITY, WHETHER IN CONTRACT, STRICT LIABILITY, OR TORT
// (INCLUDING NEGLIGENCE OR OTHERWISE) ARISING IN ANY WAY OUT OF THE USE
// OF THIS SOFTWARE, EVEN IF ADVISED OF THE POSSIBILITY OF SUCH DAMAGE.
//
// Copyright (c) 2018, TensorFlow Authors. All rights reserved.
//
// Written by make_schema.py from the descriptor in tritonclient; comments of the original are not in it.
"""

_SCALARS = {
    1: "double",
    2: "float",
    3: "int64",
    4: "uint64",
    5: "int32",
    8: "bool",
    9: "string",
    13: "uint32",
}
_MESSAGE, _ENUM, _REPEATED = 11, 14, 3


def main() -> int:
    """Write both files; returns the exit code."""
    descriptor_pb2 = importlib.import_module("google.protobuf.descriptor_pb2")
    model_config_pb2 = importlib.import_module("tritonclient.grpc.model_config_pb2")
    file: Any = descriptor_pb2.FileDescriptorProto()
    model_config_pb2.DESCRIPTOR.CopyToProto(file)
    file_set: Any = descriptor_pb2.FileDescriptorSet(file=[file])
    (FOLDER / "model_config.binpb").write_bytes(file_set.SerializeToString(deterministic=True))
    (FOLDER / "model_config.proto").write_text(proto_text(file))
    return 0


def proto_text(file: Any) -> str:
    """Return a ``.proto`` file for a FileDescriptorProto that uses only what model_config.proto uses."""
    lines = [LICENCE, f'syntax = "{file.syntax}";', "", f"package {file.package};", ""]
    for enum in file.enum_type:
        lines += [*_enum_lines(enum, ""), ""]
    for message in file.message_type:
        lines += [*_message_lines(message, file.package, ""), ""]
    return "\n".join(lines)


def _enum_lines(enum: Any, indent: str) -> list[str]:
    values = [f"{indent}  {value.name} = {value.number};" for value in enum.value]
    return [f"{indent}enum {enum.name} {{", *values, f"{indent}}}"]


def _message_lines(message: Any, package: str, indent: str) -> list[str]:
    lines = [f"{indent}message {message.name} {{"]
    entries = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
    for enum in message.enum_type:
        lines += _enum_lines(enum, indent + "  ")
    for nested in message.nested_type:
        if nested.name not in entries:
            lines += _message_lines(nested, package, indent + "  ")
    open_oneof = -1
    for field in message.field:
        oneof = field.oneof_index if field.HasField("oneof_index") else -1
        if open_oneof not in (-1, oneof):
            lines.append(f"{indent}  }}")
        if oneof != -1 and oneof != open_oneof:
            lines.append(f"{indent}  oneof {message.oneof_decl[oneof].name} {{")
        open_oneof = oneof
        inner = indent + ("    " if oneof != -1 else "  ")
        lines.append(f"{inner}{_field_type(field, entries, package)} {field.name} = {field.number};")
    if open_oneof != -1:
        lines.append(f"{indent}  }}")
    return [*lines, f"{indent}}}"]


def _field_type(field: Any, entries: dict[str, Any], package: str) -> str:
    short = field.type_name.removeprefix(f".{package}.")
    if field.type == _MESSAGE and (entry := entries.get(short.rsplit(".", 1)[-1])) is not None:
        key, value = (_field_type(part, {}, package) for part in entry.field)
        return f"map<{key}, {value}>"
    name = short if field.type in (_MESSAGE, _ENUM) else _SCALARS[field.type]
    return f"repeated {name}" if field.label == _REPEATED else name


if __name__ == "__main__":
    sys.exit(main())
