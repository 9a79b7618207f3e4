"""A shared-memory client that says whatever a test wants it to say."""

from __future__ import annotations

import mmap
import os
import socket
import time
from types import TracebackType
from typing import Self

import msgspec

from forebay.client.discovery import door_paths
from forebay.client.door import Door, OpenedModel
from forebay.ipc.client_wire import NUMBER, SUBMIT_PARCEL, SUBMIT_RUN, SubmitKind
from forebay.ipc.messages import ParcelHead, ReplyHead
from forebay.ipc.wire import HEADER, MESSAGE_BYTES_MAX, RUN, TIMES, TOKEN, Kind

#: How long an answer may take, s.
PATIENCE_S = 10.0


class RawClient:
    """The sockets and the arena, without anybody to check what goes through them."""

    def __init__(self, path: object, arena_bytes: int = 1 << 20) -> None:
        self.door = Door(door_paths(str(path))[0])
        self.welcome = self.door.enter(arena_bytes)
        self.arena = mmap.mmap(self.welcome.arena_fd, self.welcome.arena_bytes)
        self.completions = self.welcome.completions
        self.completions.settimeout(PATIENCE_S)
        self.submissions = self.welcome.submissions
        self.submissions.settimeout(PATIENCE_S)
        self._rings: list[socket.socket] = []

    def open(self, name: str, version: int = 0) -> OpenedModel:
        model = self.door.open_model(name, version)
        self._rings += model.rings.values()
        return model

    # --- sending ---

    def send(self, kind: int, body: bytes, count: int = 1, *, epoch: int | None = None, sender: int = 0) -> None:
        self.submissions.send(
            HEADER.pack(kind, 0, count, sender, self.welcome.epoch if epoch is None else epoch) + body
        )

    def send_run(
        self,
        model: OpenedModel,
        *,
        base: int = 64,
        capacity: int = 64,
        first: int = 0,
        requests: int = 1,
        rows_each: int = 1,
        route: int | None = None,
    ) -> None:
        body = SUBMIT_RUN.pack(
            model.route if route is None else route, requests, base, capacity, first, rows_each, 0, 0, 0, 0, 0
        )
        self.send(SubmitKind.RUNS, body)

    def send_parcel(self, model: OpenedModel, head: ParcelHead | bytes, *, rows: int = 1, token: int = 1) -> None:
        raw = head if isinstance(head, bytes) else msgspec.msgpack.encode(head)
        fields = (model.route, rows, token, 0, 0, 0, time.monotonic_ns(), 0, 0, 0, len(raw), 0, 0, 0)
        self.send(SubmitKind.PARCEL, SUBMIT_PARCEL.pack(*fields) + raw)

    def announce(self, model: OpenedModel) -> None:
        """Say that we hold the model's rings."""
        self.send(SubmitKind.RINGS, b"".join(NUMBER.pack(number) for number in model.rings), len(model.rings))

    def ring(self, ring: socket.socket, ticket: int, **fields: int) -> None:
        """Send a run straight to a worker."""
        run = {"requests": 1, "base": 64, "capacity": 64, "first": 0, "rows": 1, "attempt": 0, "sum_ns": 0} | fields
        ring.send(HEADER.pack(Kind.RUNS, 1, 1, 0, ticket) + RUN.pack(0, *run.values()))

    # --- receiving ---

    def receive(self) -> tuple[int, int, int, bytes]:
        """Return (kind, sender, batch or ticket, body) of the next message; kind 0: end of file."""
        message = self.completions.recv(MESSAGE_BYTES_MAX)
        if not message:
            return 0, 0, 0, b""
        kind, _flags, _count, sender, batch = HEADER.unpack_from(message)
        return kind, sender, batch, message[HEADER.size :]

    def receive_until(self, *kinds: int) -> tuple[int, int, int, bytes]:
        """Return the next message of one of these kinds."""
        while True:
            answer = self.receive()
            if answer[0] in kinds or not answer[0]:
                return answer

    def failure(self) -> str:
        """Return the text of the next answer, which must be an error."""
        kind, _sender, _batch, body = self.receive_until(Kind.RUNS_FAILED, Kind.PARCEL_REPLY, Kind.RUNS_DONE)
        if kind == Kind.RUNS_FAILED:
            return body[TIMES.size + RUN.size + 1 :].decode()
        assert kind == Kind.PARCEL_REPLY
        return msgspec.msgpack.decode(body[TIMES.size + TOKEN.size :], type=ReplyHead).text

    def wait_granted(self, model: OpenedModel) -> tuple[int, int]:
        """Send lone requests until the scheduler grants an instance; return it and the ticket."""
        self.announce(model)
        self.completions.settimeout(0.2)
        for _ in range(200):
            self.send_run(model)
            try:
                while True:
                    kind, sender, ticket, _body = self.receive()
                    if kind == Kind.GRANT:
                        self.completions.settimeout(PATIENCE_S)
                        return sender, ticket
                    if kind == Kind.RUNS_DONE:
                        break
                kind, sender, ticket, _body = self.receive()
                if kind == Kind.GRANT:
                    self.completions.settimeout(PATIENCE_S)
                    return sender, ticket
            except TimeoutError:
                continue
        raise AssertionError("no grant in 200 requests")

    def close(self) -> None:
        self.door.close()
        self.completions.close()
        self.submissions.close()
        self.arena.close()
        os.close(self.welcome.arena_fd)
        for ring in self._rings:
            ring.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
