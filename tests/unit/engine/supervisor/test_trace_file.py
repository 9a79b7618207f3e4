"""Triton's trace files: complete after every write, numbered or not (spec O-002..O-007)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forebay.engine.supervisor.trace_file import TraceFile
from forebay.ipc.trace import TracedTensor, TraceRecord, TraceSpan


def record(request_id: str = "", steps: int = 0) -> TraceRecord:
    root = TraceSpan("m", 2, request_id, -1, (("HTTP_RECV_START", 1),), (("REQUEST_START", 3),))
    below = [TraceSpan("step", 1, "", 0, (), ()) for _ in range(steps)]
    return TraceRecord(1, (root, *below))


def test_the_file_is_whole_after_every_write(tmp_path: Path) -> None:
    """O-003, O-004: appendix G."""
    path = tmp_path / "t"
    file = TraceFile(str(path))
    file.write([(record("r"), 0)])
    first = [
        {"id": 1, "timestamps": [{"name": "HTTP_RECV_START", "ns": 1}]},
        {"id": 1, "model_name": "m", "model_version": 2, "request_id": "r"},
        {"id": 1, "timestamps": [{"name": "REQUEST_START", "ns": 3}]},
    ]
    assert json.loads(path.read_text()) == first
    file.write([(record(), 0), (record(), 0)])
    found = json.loads(path.read_text())
    assert found[:3] == first
    assert [item["id"] for item in found] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    file.close()
    assert json.loads(path.read_text()) == found


def test_steps_name_their_parents_and_tensors_are_objects(tmp_path: Path) -> None:
    """O-007, O-008."""
    path = tmp_path / "t"
    file = TraceFile(str(path))
    file.write([(record(), 0), (record(steps=2), 0)])
    starts = [item for item in json.loads(path.read_text()) if "model_name" in item]
    assert [(item["id"], item.get("parent_id")) for item in starts] == [(1, None), (2, None), (3, 2), (4, 2)]
    span = TraceSpan("m", 1, "", -1, (), (), (TracedTensor("TENSOR_QUEUE_INPUT", "IN", "1,2", "2", "FP32"),))
    file.write([(TraceRecord(1, (span,)), 0)])
    assert json.loads(path.read_text())[-1] == {
        "id": 5,
        "activity": "TENSOR_QUEUE_INPUT",
        "tensor": {"name": "IN", "data": "1,2", "shape": "2", "dtype": "FP32"},
    }


def test_numbered_files_hold_so_many_traces_each(tmp_path: Path) -> None:
    file = TraceFile(str(tmp_path / "t"))
    file.write([(record(), 2) for _ in range(5)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.0", "t.1", "t.2"]
    ids = [{item["id"] for item in json.loads((tmp_path / f"t.{n}").read_text())} for n in range(3)]
    assert ids == [{1, 2}, {3, 4}, {5}]


def test_a_file_that_cannot_be_written_ends_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = TraceFile(str(tmp_path / "missing" / "t"))
    file.write([(record(), 0)])
    file.write([(record(), 0)])
    assert capfd.readouterr().err.count("failed to write the trace file") == 1
