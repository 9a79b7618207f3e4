"""Control mode ``poll``: follow what happens in the repository, without ever loading a half-written model (L-013)."""

from __future__ import annotations

import asyncio
import traceback
from typing import NamedTuple

from forebay.engine.repository.config_problem import Problem
from forebay.engine.repository.fingerprint import Fingerprint
from forebay.engine.repository.found_model import FoundModel
from forebay.engine.supervisor.lifecycle import ModelLifecycle
from forebay.ipc.errors import ServingError
from forebay.ipc.log import log

#: A changed directory is taken as finished when nothing in it changed for so long, s.
SETTLE_S = 2.0


class Look(NamedTuple):
    """What tells one state of a model's directory from the next."""

    fingerprint: Fingerprint | None
    problems: tuple[Problem, ...]


class RepositoryPoller:
    """Looks at the repository every so often; loads what is new or changed, unloads what is gone."""

    def __init__(self, lifecycle: ModelLifecycle, interval_s: float, *, settle_s: float = SETTLE_S) -> None:
        self._lifecycle = lifecycle
        self._interval_s = interval_s
        self._settle_s = min(settle_s, interval_s)
        #: What each model was like when it was last loaded or tried: a failed one waits for a change.
        self._tried: dict[str, Look] = {}
        #: What models with changes were like at the last look; None: gone.
        self._changing: dict[str, Look | None] = {}
        #: Why the last poll failed, which is said once; empty: it did not.
        self._failure = ""

    async def run(self) -> None:
        """Poll until cancelled; what was loaded at start-up counts as seen. An interval of 0: never, as in Triton."""
        if not self._interval_s:
            return
        for name, model in self._lifecycle.models.items():
            if model.found is not None:
                self._tried[name] = _look(model.found)
        while True:
            await asyncio.sleep(self._settle_s if self._changing else self._interval_s)
            await self.poll()

    async def poll(self) -> bool:
        """Look once, and act on changes that the last look has seen too; return whether there are others.

        So a model that never comes to rest keeps nobody else waiting.
        """
        try:
            scanned = await asyncio.to_thread(self._lifecycle.repository.scan)
        except (ServingError, OSError) as error:
            # An unmounted repository must not unload everything that it held.
            self._note_failure(error.text if isinstance(error, ServingError) else error.strerror or str(error))
            return bool(self._changing)
        self._note_success()
        found = {model.identity: model for model in scanned}
        changed = self._changed(found)
        settled = [name for name, look in changed.items() if name in self._changing and self._changing[name] == look]
        self._changing = {name: look for name, look in changed.items() if name not in settled}
        await asyncio.gather(*(self._follow(name, found.get(name)) for name in settled))
        return bool(self._changing)

    def _changed(self, found: dict[str, FoundModel]) -> dict[str, Look | None]:
        """Return what is not as it was when it was last tried; None: gone."""
        looks = {name: _look(model) for name, model in found.items()}
        changed: dict[str, Look | None] = {name: look for name, look in looks.items() if self._tried.get(name) != look}
        changed.update({name: None for name in self._lifecycle.models if name not in found})
        return changed

    async def _follow(self, name: str, model: FoundModel | None) -> None:
        """Load or unload one model; whatever goes wrong, the others are followed all the same."""
        try:
            if model is None:
                await self._unload(name)
            else:
                self._tried[name] = _look(model)
                await self._lifecycle.load(name, model)
        except ServingError as error:
            log.verbose(1, f"poll: {error.text}")
        except Exception:
            log.error(f"failed to follow the changes of model '{name}':\n{traceback.format_exc()}")

    async def _unload(self, name: str) -> None:
        self._tried.pop(name, None)
        await self._lifecycle.unload(name)
        self._lifecycle.forget(name)

    def _note_failure(self, reason: str) -> None:
        if reason != self._failure:
            log.error(f"failed to poll the model repository: {reason}; what serves goes on serving")
        self._failure = reason

    def _note_success(self) -> None:
        if self._failure:
            log.info("the model repository can be polled again")
        self._failure = ""


def _look(model: FoundModel) -> Look:
    return Look(model.fingerprint, model.problems)
