"""Positions of fields in a configuration text."""

from __future__ import annotations

import pytest

from forebay.engine.repository.model_config_schema import FieldPath
from forebay.engine.repository.text_source import TextSource

TEXT = """\
name: "m"
input [
  { name: "A" dims: [ 1,
      -1 ] },
  { name: "B" dims: 2 dims: 3 }
]
parameters { key: "k" value { string_value: "v" } }
parameters { key: "l" value { string_value: "w" } }
dynamic_batching { }
"""


@pytest.mark.parametrize(
    ("path", "line", "column", "written"),
    [
        (("name",), 1, 7, '"m"'),
        (("input", 0, "dims", 1), 4, 7, "-1"),
        (("input", 1, "dims", 1), 5, 29, "3"),
        (("input", 1, "name"), 5, 11, '"B"'),
        (("parameters", "l", "value", "string_value"), 8, 45, '"w"'),
        (("dynamic_batching", "priority_levels"), 9, 18, ""),
        (("input", 1, "data_type"), 5, 3, ""),
        (("input", 9), 5, 3, ""),
    ],
)
def test_fields_and_their_closest_written_ancestors_are_found(
    path: FieldPath, line: int, column: int, written: str
) -> None:
    found = TextSource("config.pbtxt", TEXT).locate(path)
    assert found is not None
    assert (found.line, found.column, found.written) == (line, column, written)


def test_what_was_not_written_has_no_place() -> None:
    assert TextSource("config.pbtxt", TEXT).locate(("max_batch_size",)) is None
    assert TextSource("config.pbtxt", "").locate(()) is None
