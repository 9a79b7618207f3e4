"""What a shared-memory client tells the scheduler of its requests."""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from forebay.client.grants import Grants
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


@pytest.mark.parametrize(("cores", "is_alone", "shares"), [(1, True, True), (1, False, False), (2, True, False)])
@pytest.mark.parametrize("spins", [False, True])
def test_worker_is_called_to_the_one_core_of_a_thread_that_sleeps_while_it_waits(
    cores: int, is_alone: bool, shares: bool, spins: bool
) -> None:
    home = sorted(os.sched_getaffinity(0))
    if len(home) < cores:
        pytest.skip("needs two cores")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ring, worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    submissions = Submissions(ours, 3, 1, Grants(), shares_core=not spins)
    submissions.is_alone = is_alone
    grant: Any = SimpleNamespace(ring=ring, ticket=1, outstanding=None)
    pending: Any = SimpleNamespace(
        model=SimpleNamespace(route=5, grants=[grant], idle_grant=lambda: grant), rows=1, attempt=0, enqueue_ns=MADE_NS
    )
    rows: Any = SimpleNamespace(slab=SimpleNamespace(base=64, capacity=16), first=0, rows=1)

    def ring_once() -> None:
        os.sched_setaffinity(0, home[:cores])
        submissions.submit_rows(pending, rows)

    with ours, theirs, ring, worker, ThreadPoolExecutor(1) as thread:
        thread.submit(ring_once).result()
        place = HEADER.unpack_from(worker.recv(4096))[3]
    assert place == submissions.shared_place == (home[0] + 1 if shares and not spins else 0)
