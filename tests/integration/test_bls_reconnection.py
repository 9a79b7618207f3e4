"""A model whose connection for nested calls (BLS) has ended calls over a new one, and leaves nothing of the old."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from forebay_server import ForebayServer, wait_until
from http_models import write_identity

from forebay.engine.backends.python_model.engine_access import NestedRequest, NestedResponse
from forebay.engine.backends.python_model.shm_access import ShmEngineAccess
from forebay.engine.backends.python_model.tensor import Tensor


@pytest.fixture
def access(tmp_path: Path) -> Iterator[ShmEngineAccess]:
    """A worker's way to other models, in this process."""
    write_identity(tmp_path, "echo", [("TYPE_FP32", "1")])
    with ForebayServer(tmp_path, protocols=("http",)) as server:
        made = ShmEngineAccess(str(next(server.runtime_base.iterdir())))
        yield made
        made.close()


def ask(access: ShmEngineAccess) -> NestedResponse:
    """Ask as an event loop does: another thread reads the answer."""
    call = access.infer(
        NestedRequest("echo", -1, "", (Tensor("INPUT0", np.ones(1, np.float32)),), (), {}, 0, 0, 0, None, False)
    )
    has_news = threading.Event()
    call.notify(has_news.set)
    assert has_news.wait(60)
    (response,) = call.take()
    return response


def readers() -> int:
    return sum(thread.name == "bls" for thread in threading.enumerate())


def test_connection_that_was_cut_off_is_replaced(access: ShmEngineAccess) -> None:
    assert ask(access).error is None
    connection = access.connection
    assert connection is not None
    connection.completions.shutdown()  # As the server does with who does not read.
    with pytest.raises(Exception, match="the engine is gone"):
        connection.completions.wait_any()
    assert ask(access).error is None
    assert access.connection is not connection
    assert connection.completions.fileno() < 0
    wait_until(lambda: readers() == 1, "the end of the thread that read the old one")
