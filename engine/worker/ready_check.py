"""Models that say themselves whether they are ready (spec P-012), asked by the supervisor on behalf of a client."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from forebay.ipc.errors import ServingError
from forebay.ipc.lifeline import Lifeline, PeerClosed
from forebay.ipc.worker_messages import ReadyAnswer, SupervisorToWorker


def start_ready_check(lifeline: Lifeline[SupervisorToWorker], check: Callable[[], bool], request: int) -> None:
    """Ask the model in a thread of its own, and send what it says: whoever serves is not held up by a slow answer."""
    threading.Thread(target=_answer, args=(lifeline, check, request), name="ready check", daemon=True).start()


def _answer(lifeline: Lifeline[SupervisorToWorker], check: Callable[[], bool], request: int) -> None:
    is_ready, text = False, ""
    try:
        is_ready = check()
    except ServingError as error:
        text = error.text
    except Exception as error:  # the model's own code
        text = f"{type(error).__name__}: {error}"
    with contextlib.suppress(PeerClosed, TimeoutError):
        lifeline.send(ReadyAnswer(request=request, is_ready=is_ready, text=text))
