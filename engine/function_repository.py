"""A model repository made of Python functions: what ``forebay serve module:function`` puts beside the given ones.

Each function gets a directory with a configuration that says where it is; the rest of the configuration comes from its
declaration, which a worker reads (``function_backend.py``). Nothing of the user's code runs here, in the supervisor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from forebay.ipc.errors import InvalidArgument

#: What configurations call the backend.
BACKEND_NAME = "forebay_function"


def model_name_of(location: str) -> str:
    """Return the name that ``module:function`` is served under: the function's."""
    return location.rpartition(":")[2].rpartition(".")[2]


def write_function_repository(path: str, functions: Sequence[str], directory: str) -> None:
    """Write a model directory for each function below ``path``, which is made.

    Args:
        functions: each ``module:function``.
        directory: absolute; where modules are looked for first.

    Raises:
        InvalidArgument: two functions have the same name.
    """
    names: dict[str, str] = {}
    for location in dict.fromkeys(functions):
        name = model_name_of(location)
        if name in names:
            raise InvalidArgument(f"'{names[name]}' and '{location}' would both be served as model '{name}'")
        names[name] = location
    os.mkdir(path, 0o700)
    for name, location in names.items():
        os.makedirs(os.path.join(path, name, "1"))
        with open(os.path.join(path, name, "config.pbtxt"), "x", encoding="utf-8") as file:
            file.write(f'backend: "{BACKEND_NAME}"\n')
            for key, value in (("function", location), ("directory", directory)):
                # A JSON string is also one of protobuf's text format.
                quoted = json.dumps(value, ensure_ascii=False)
                file.write(f'parameters {{ key: "{key}" value {{ string_value: {quoted} }} }}\n')
