"""What a shared-memory client tells the scheduler of its requests."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import pytest

from forebay.client.submissions import Submissions
from forebay.ipc.client_wire import SUBMIT_RUN
from forebay.ipc.wire import HEADER

MADE_NS = 5_000_000_000


@pytest.mark.parametrize(
    ("deadline_ns", "patience_us"),
    [(0, 0), (MADE_NS + 7_500_000, 7_500), (MADE_NS - 1, 1), (MADE_NS + (1 << 32) * 1000, 0)],
)
def test_deadline_of_a_request_in_rows_is_told_as_the_time_that_is_left(deadline_ns: int, patience_us: int) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    grants: Any = None
    submissions = Submissions(ours, 3, 1, grants)
    pending: Any = SimpleNamespace(
        model=SimpleNamespace(route=5), rows=1, attempt=0, priority=0, timeout_us=0, deadline_ns=deadline_ns,
        enqueue_ns=MADE_NS,
    )  # fmt: skip
    rows: Any = SimpleNamespace(slab=SimpleNamespace(base=64, capacity=16), first=0)
    with ours, theirs:
        submissions.submit_group([pending], rows)
        fields = SUBMIT_RUN.unpack_from(theirs.recv(4096), HEADER.size)
    assert fields[8] == patience_us
