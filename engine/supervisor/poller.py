"""Control mode ``poll``: follow what happens in the repository, without ever loading a half-written model (L-013)."""

from __future__ import annotations

import asyncio

from forebay.engine.repository.fingerprint import Fingerprint
from forebay.engine.repository.found_model import FoundModel
from forebay.engine.supervisor.lifecycle import ModelLifecycle
from forebay.ipc.errors import ServingError
from forebay.ipc.log import log

#: A changed directory is taken as finished when nothing in it changed for so long, s.
SETTLE_S = 2.0


class RepositoryPoller:
    """Looks at the repository every so often; loads what is new or changed, unloads what is gone."""

    def __init__(self, lifecycle: ModelLifecycle, interval_s: float, *, settle_s: float = SETTLE_S) -> None:
        self._lifecycle = lifecycle
        self._interval_s = interval_s
        self._settle_s = min(settle_s, interval_s)
        #: What each model was like when it was last loaded or tried: a failed one waits for a change.
        self._tried: dict[str, Fingerprint | None] = {}
        #: Why the last poll failed, which is said once; empty: it did not.
        self._failure = ""

    async def run(self) -> None:
        """Poll until cancelled; what was loaded at start-up counts as seen."""
        for name, model in self._lifecycle.models.items():
            self._tried[name] = model.found.fingerprint if model.found is not None else None
        while True:
            await asyncio.sleep(self._interval_s)
            await self.poll()

    async def poll(self) -> None:
        """Look once and act on it."""
        try:
            found = await self._scan()
        except ServingError as error:
            # An unmounted repository must not unload everything that it held.
            if error.text != self._failure:
                log.error(f"failed to poll the model repository: {error.text}; what serves goes on serving")
            self._failure = error.text
            return
        if self._failure:
            log.info("the model repository can be polled again")
            self._failure = ""
        changed = [name for name, model in found.items() if self._has_changed(name, model)]
        gone = [name for name in self._lifecycle.models if name not in found]
        if changed or gone:
            found = await self._wait_settled(found, {*changed, *gone})
        tasks = [self._load(name, found[name]) for name in changed if name in found]
        tasks += [self._unload(name) for name in gone if name not in found]
        await asyncio.gather(*tasks)

    async def _scan(self) -> dict[str, FoundModel]:
        return {model.identity: model for model in await asyncio.to_thread(self._lifecycle.repository.scan)}

    def _has_changed(self, name: str, model: FoundModel) -> bool:
        return name not in self._tried or self._tried[name] != model.fingerprint

    async def _wait_settled(self, found: dict[str, FoundModel], names: set[str]) -> dict[str, FoundModel]:
        """Return the repository once two looks in a row agree on ``names``."""
        while True:
            await asyncio.sleep(self._settle_s)
            again = await self._scan()
            if all(_fingerprint(found, name) == _fingerprint(again, name) for name in names):
                return again
            found = again

    async def _load(self, name: str, model: FoundModel) -> None:
        self._tried[name] = model.fingerprint
        try:
            await self._lifecycle.load(name, model)
        except ServingError as error:
            log.verbose(1, f"poll: {error.text}")

    async def _unload(self, name: str) -> None:
        self._tried.pop(name, None)
        await self._lifecycle.unload(name)
        self._lifecycle.forget(name)


def _fingerprint(found: dict[str, FoundModel], name: str) -> tuple[bool, Fingerprint | None]:
    model = found.get(name)
    return model is not None, model.fingerprint if model is not None else None
