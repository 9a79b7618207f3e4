"""Traces in Triton's JSON files (spec O-002..O-007).

A file is a complete JSON array after every write: the closing bracket is written over by what follows it. So a trace
is there as soon as its request has been answered, and after a crash too; Triton writes at its end.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from typing import Any

import orjson

from forebay.ipc.log import log
from forebay.ipc.trace import TraceRecord


class TraceFile:
    """Writes traces to ``path``, or to ``path.0``, ``path.1``... if files are numbered."""

    def __init__(self, path: str) -> None:
        """Write nothing yet."""
        self._path = path
        self._fd = -1
        self._end = 0
        self._is_numbered = False
        self._next_file = 0
        #: Traces in the open file.
        self._count = 0
        self._last_id = 0
        self._has_failed = False

    def write(self, records: Iterable[tuple[TraceRecord, int]]) -> None:
        """Append traces.

        Args:
            records: each with the number of traces after which a new file begins; 0: never.
        """
        pending: list[dict[str, Any]] = []
        for record, frequency in records:
            if bool(frequency) != self._is_numbered:
                self._append(pending)
                pending = []
                self.close()
                self._is_numbered = bool(frequency)
            pending += self._objects(record)
            self._count += 1
            if frequency and self._count >= frequency:
                self._append(pending)
                pending = []
                self.close()
        self._append(pending)

    def _objects(self, record: TraceRecord) -> list[dict[str, Any]]:
        """Return a trace as Triton writes it: one small object per event (spec O-003, O-004, O-007)."""
        found: list[dict[str, Any]] = []
        first_id = self._last_id + 1
        for index, span in enumerate(record.spans):
            number = first_id + index
            found += ({"id": number, "timestamps": [{"name": name, "ns": ns}]} for name, ns in span.received)
            start: dict[str, Any] = {"id": number, "model_name": span.model, "model_version": span.version}
            if span.request_id:
                start["request_id"] = span.request_id
            if span.parent >= 0:
                start["parent_id"] = first_id + span.parent
            found.append(start)
            found += ({"id": number, "timestamps": [{"name": name, "ns": ns}]} for name, ns in span.events)
            found += (
                {
                    "id": number,
                    "activity": tensor.activity,
                    "tensor": {
                        "name": tensor.name,
                        "data": tensor.data,
                        "shape": tensor.shape,
                        "dtype": tensor.datatype,
                    },
                }
                for tensor in span.tensors
            )
        self._last_id += len(record.spans)
        return found

    def _append(self, objects: list[dict[str, Any]]) -> None:
        if not objects:
            return
        body = orjson.dumps(objects)
        try:
            if self._fd < 0:
                self._open()
            if self._end > 1:
                # Over the bracket at the end, and instead of the one at the beginning.
                data, start = b"," + body[1:], self._end - 1
            else:
                data, start = body, 0
            view = memoryview(data)
            while view:
                written = os.pwrite(self._fd, view, start)
                view = view[written:]
                start += written
            self._end = start
            self._has_failed = False
        except OSError as error:
            # A full disk must not end the server; it is said once.
            if not self._has_failed:
                log.error(f"failed to write the trace file '{self._path}': {error.strerror}")
            self._has_failed = True

    def _open(self) -> None:
        path = self._path
        if self._is_numbered:
            path = f"{path}.{self._next_file}"
            self._next_file += 1
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._end = 0

    def close(self) -> None:
        """Finish the open file; the next trace begins another."""
        self._count = 0
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1
            self._end = 0
