"""What a client's calls raise besides the errors that the server itself answers with (:mod:`forebay.ipc.errors`).

::

    ServingError
      Unavailable
        NoServer                no server runs where the client looked
        EngineGone              the server ended, or ended the connection; ``reconnect`` when it is back
        WrongProcess            the connection belongs to the process that forked this one
      Cancelled
        DeadlineExceeded        nobody answered in time; the request may still run
      NotReady
        ModelChanged            the model's inputs or outputs are others now; open it again
"""

from __future__ import annotations

from forebay.ipc.errors import Cancelled, NotReady, Unavailable


class NoServer(Unavailable):
    """No server runs where the client looked; the text says where that was."""


class EngineGone(Unavailable):
    """It broke: the server ended, or ended this connection. Nothing that was in flight will be answered."""


class WrongProcess(Unavailable):
    """You forked: a connection cannot be used by two processes. Connect anew in the child."""


class DeadlineExceeded(Cancelled):
    """Your deadline passed first. The request may still run; its rows come back by themselves."""


class ModelChanged(NotReady):
    """The model was loaded anew with another signature; open it again."""


def changed_text(model: str) -> str:
    """Return the text of :class:`ModelChanged`."""
    return f"model '{model}' was loaded anew with other inputs or outputs; open it again"
