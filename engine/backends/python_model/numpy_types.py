"""Which numpy type a datatype has, for models: by its number and by its name in configurations (spec P-113, P-114)."""

from __future__ import annotations

from typing import Any

import numpy as np

from forebay.ipc.tensor import BY_CONFIG_NAME, DATATYPES, DataType


def _numpy_type(row: DataType) -> Any:
    return np.object_ if row.name == "BYTES" else row.numpy_dtype.type


#: By the number of the datatype (spec D-002); BF16 has none.
_BY_NUMBER = {row.number: _numpy_type(row) for row in DATATYPES.values() if row.name != "BF16"}

#: By ``TYPE_*``. Models read this table, too.
TRITON_STRING_TO_NUMPY = {name: _numpy_type(row) for name, row in BY_CONFIG_NAME.items() if row.name != "BF16"}
TRITON_STRING_TO_NUMPY["TYPE_BOOL"] = bool


def triton_to_numpy_type(data_type: int) -> Any:
    """Return the numpy type of a datatype number, None if it has none."""
    return _BY_NUMBER.get(data_type)


def numpy_to_triton_type(data_type: Any) -> int | None:
    """Return the datatype number of a numpy type, None if it has none."""
    if data_type == np.bytes_:
        return DATATYPES["BYTES"].number
    return next((number for number, known in _BY_NUMBER.items() if data_type == known), None)


def triton_string_to_numpy(triton_type_string: str) -> Any:
    """Return the numpy type of ``TYPE_*``.

    Raises:
        KeyError: it has none.
    """
    return TRITON_STRING_TO_NUMPY[triton_type_string]
