"""The life of models: which versions serve, what is loading, and why something is not.

One load of one model is atomic (spec R-086): all versions that its policy selects come up, or what served before goes
on serving. New versions are loaded beside the old ones; then every frontend learns the new catalog and says that it
has; only then are the old ones drained and ended. So no request ever meets a version that is going away.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Iterable

from forebay.engine.backend_families import missing_library
from forebay.engine.repository.config import changed_fields
from forebay.engine.repository.config_problem import ConfigError
from forebay.engine.repository.found_model import FoundModel
from forebay.engine.repository.repository import ModelRepository
from forebay.engine.repository.versions import NoVersionAvailable
from forebay.engine.supervisor.adjustment import ADJUSTABLE_FIELDS, Adjustment
from forebay.engine.supervisor.ensembles import Ensembles
from forebay.engine.supervisor.load_advice import load_advice
from forebay.engine.supervisor.memory import return_memory
from forebay.engine.supervisor.model_view import ModelView
from forebay.engine.supervisor.models import UNLOADED, DependencyFailed, LoadFailed, Model, PollFailed, VersionStatus
from forebay.engine.supervisor.plant import Plant
from forebay.engine.supervisor.preparation import MissingLibrary, PreparedVersion, prepare_version
from forebay.engine.supervisor.served_version import ServedVersion
from forebay.ipc.catalog import Catalog
from forebay.ipc.errors import Internal, NotFound, ServingError
from forebay.ipc.log import log

#: How long frontends may take to say that they know a new catalog before the old version is ended all the same, s.
_CATALOG_TIMEOUT_S = 10.0

#: How long a request may be under way from a frontend to the scheduler, s.
_SUBMISSIONS_GRACE_S = 0.05

#: How long after an unload the memory that it freed is returned, s; several unloads share one time.
_MEMORY_DELAY_S = 1.0

#: Model, version (0: all), phase, instances ready, instances in all, reason.
ProgressSink = Callable[[str, int, str, int, int, str], None]


class ModelLifecycle:
    """All models. Used in the supervisor's event loop only."""

    def __init__(
        self,
        plant: Plant,
        repository: ModelRepository,
        *,
        announce: Callable[[], Awaitable[None]],
        wait_seen: Callable[[int, float], Awaitable[bool]],
        progress: ProgressSink,
    ) -> None:
        """Know nothing yet.

        Args:
            announce: pushes the catalog to all frontends.
            wait_seen: waits until they route by a catalog of at least that generation.
            progress: told of every step, for people who watch.
        """
        self.plant = plant
        self.repository = repository
        self.models: dict[str, Model] = {}
        self.ensembles = Ensembles(self)
        self.view = ModelView(self.models, self.ensembles)
        self.generation = 1
        self.is_live = True
        self.is_initialised = False
        self._announce = announce
        self._wait_seen = wait_seen
        self._progress = progress
        self._load_slots = asyncio.Semaphore(max(1, plant.settings.repository.load_thread_count))
        self._retiring: set[asyncio.Task[None]] = set()
        self._announcing: asyncio.Task[None] | None = None
        self._memory_is_returned_soon = False

    # --- what others are told ---

    def touch(self) -> int:
        """Something changed: push a new catalog soon; return its generation.

        Not before the initial load is done: nobody is served by then, and a frontend's Hello is answered anyway.
        """
        self.generation += 1
        if not self.is_initialised:
            return self.generation
        if self._announcing is None or self._announcing.done():
            self._announcing = asyncio.create_task(self._announce_all())
        return self.generation

    async def _announce_all(self) -> None:
        announced = 0
        while announced < self.generation:
            announced = self.generation
            await self._announce()

    def catalog(self, slot: str, slots: tuple[str, ...]) -> Catalog:
        """Return the catalog for the frontend of ``slot``; ``slots`` are all frontends that count requests."""
        return Catalog(
            generation=self.generation,
            models=self.view.entries(slot, slots),
            live=self.is_live,
            ready=self.is_live and self.is_ready,
            cache_counter_offsets=self.plant.cache_counter_offsets,
        )

    @property
    def is_ready(self) -> bool:
        """What ``GET /v2/health/ready`` says (spec H-031)."""
        if not self.is_initialised:
            return False
        if not self.plant.settings.repository.strict_readiness:
            return True
        return self.view.is_ready

    # --- loading ---

    async def load_at_start(self, wanted: Iterable[str] | None) -> list[str]:
        """Load all models, or those ``wanted`` (explicit mode); return the names of those that failed.

        A model that lacks an optional library is UNAVAILABLE, and not among them.
        """
        scanned = await asyncio.to_thread(self.repository.scan, is_selective=wanted is not None)
        found = {model.identity: model for model in scanned}
        for identity, model in found.items():
            self.models.setdefault(identity, Model(model.name))
            self.models[identity].found = None
        if wanted is None:
            chosen = list(found)
        else:
            chosen = list(dict.fromkeys(wanted))
        named, chosen = chosen, list(self.ensembles.begin_start(chosen, found))
        usable = [found[name] for name in chosen if name in found]
        self._expect_cores(usable)
        for name in chosen:
            self._progress(name, 0, "queued", 0, 0, "")
        results = await asyncio.gather(*(self._start_one(name, found.get(name)) for name in chosen))
        self.ensembles.end_start()
        return [name for name, has_failed in zip(chosen, results, strict=True) if has_failed and name in named]

    async def _start_one(self, name: str, found: FoundModel | None) -> bool:
        try:
            return await self._load_one_at_start(name, found)
        finally:
            self.ensembles.started(name)

    async def _load_one_at_start(self, name: str, found: FoundModel | None) -> bool:
        """Load one model; whether it failed."""
        for attempt in range(self.plant.settings.repository.load_retry_count + 1):
            if attempt:
                log.info(f"retrying to load '{name}', attempt {attempt + 1}")
            try:
                if found is None:
                    raise NotFound(f"failed to poll model '{name}': not found in any model repository")
                if self.repository.is_partial(found):
                    found = await asyncio.to_thread(self.repository.poll_model, found.name, namespace=found.namespace)
                await self.load(name, found)
            except ServingError as error:
                model = self.models.setdefault(name, Model(name))
                if not model.status and not model.problem:
                    model.problem = f"{error.code.label}: {error.text}"
                    self._progress(name, 0, "failed", 0, 0, error.text)
            else:
                return False
        return not self.models[name].is_excused

    @property
    def _has_clients(self) -> bool:
        """Whether there may be requests that a load would disturb."""
        return self.is_initialised and any(model.serving for model in self.models.values())

    def _expect_cores(self, models: Iterable[FoundModel]) -> None:
        """Pin instances to cores only if all that are about to be loaded find one."""
        count = 0
        for model in models:
            if model.config is None or missing_library(model.config.backend) is not None:
                continue
            try:
                versions = len(model.chosen_versions().numbers)
            except ConfigError:
                continue
            groups = model.config.message.instance_group
            count += versions * (sum(max(group.count, 1) for group in groups) or 1)
        self.plant.cores.expect(count)

    async def load(self, name: str, found: FoundModel) -> None:
        """Load or update one model; returns when the new versions serve.

        Takes ownership of ``found``'s temporary directory.

        Raises:
            PollFailed: its directory or configuration cannot be used.
            LoadFailed: a version could not be loaded, or there is none.
        """
        model = self.models.setdefault(name, Model(found.name))
        async with model.lock:
            try:
                await self._load(model, found)
            except BaseException:
                if model.found is not found:
                    await asyncio.to_thread(found.discard)
                raise

    async def _load(self, model: Model, found: FoundModel) -> None:
        name = found.name
        model.backend = found.config.backend if found.config is not None else ""
        try:
            chosen = found.chosen_versions()
        except ConfigError as error:
            raise self._unusable(model, found, error) from None
        model.has_no_version = model.lacks_models = False
        model.load_error = ""
        for line in (*found.versions.warnings, *chosen.errors):
            log.warning(line)
        kept = self._unchanged(model, found, chosen.numbers)
        adjustments = await self._plan_adjustments(model, found, kept)
        if kept and not adjustments and len(kept) == len(chosen.numbers) == len(model.serving):
            # Nothing changed (spec R-089), but a version that had failed may be gone.
            model.found, model.problem = found, ""
            model.forget_failures()
            self.touch()
            return
        starting = [version for version in chosen.numbers if version not in kept]
        for version in starting:
            log.info(f"loading: {name}:{version}")
            if version not in model.serving:
                model.status[version] = VersionStatus("LOADING")
            self._progress(name, version, "queued", 0, 0, "")
        self.touch()
        try:
            # Before a slot is taken: the models that it waits for need slots too.
            await self.ensembles.require(found)
        except ServingError as error:
            await self._abandon(model, {}, starting)
            raise self._load_failed(model, found, dict.fromkeys(starting, error), starting) from None
        async with self._load_slots:
            results = await asyncio.gather(
                *(self._start_version(found, version) for version in starting),
                *(adjustment.start() for adjustment in adjustments.values()),
                return_exceptions=True,
            )
        started: dict[int, ServedVersion] = {}
        failed: dict[int, ServingError] = {}
        broken: BaseException | None = None
        for version, result in zip((*starting, *adjustments), results, strict=True):
            if isinstance(result, ServedVersion):
                started[version] = result
            elif isinstance(result, ServingError):
                failed[version] = result
            elif result is not None:
                broken = result
        if failed or broken is not None:
            await self._abandon(model, started, starting)
            await asyncio.gather(*(adjustment.abandon() for adjustment in adjustments.values()))
            if broken is not None:
                raise broken
            raise self._load_failed(model, found, failed, (*starting, *adjustments))
        for adjustment in adjustments.values():
            adjustment.commit()
        await self._switch(model, found, started, kept)
        for adjustment in adjustments.values():
            self._retire_in_background(self._finish_adjustment(adjustment))

    def _unchanged(self, model: Model, found: FoundModel, versions: Iterable[int]) -> set[int]:
        """Return the serving versions that need no reload: their files are the same (spec R-090, R-091)."""
        older = model.found
        if older is None or found.is_override or older.is_override or found.fingerprint is None:
            return set()
        if older.config is None or found.config is None or older.fingerprint is None:
            return set()
        if older.fingerprint.shared != found.fingerprint.shared:
            return set()
        if changed_fields(older.config, found.config) - {"version_policy"} - ADJUSTABLE_FIELDS:
            return set()
        changed = found.fingerprint.changed_versions(older.fingerprint)
        return {version for version in versions if version in model.serving and version not in changed}

    async def _plan_adjustments(self, model: Model, found: FoundModel, kept: set[int]) -> dict[int, Adjustment]:
        """Return what changes for versions that are kept; takes those out of ``kept`` that must be loaded again.

        Raises:
            LoadFailed: the new configuration cannot be used.
        """
        older = model.found
        if (
            not kept
            or older is None
            or not changed_fields(older.usable_config, found.usable_config) & ADJUSTABLE_FIELDS
        ):
            return {}
        prepared: dict[int, PreparedVersion] = {}
        for version in sorted(kept):
            try:
                looked_at = await prepare_version(self.plant, found, version, quietly=True)
                prepared[version] = self.ensembles.join(looked_at)
            except ServingError as error:
                raise self._load_failed(model, found, {version: error}, [version]) from None
        possible = {v: new for v, new in prepared.items() if Adjustment.is_possible(model.serving[v], new)}
        kept.intersection_update(possible)
        for version in possible:
            log.info(f"adjusting: {model.name}:{version}")
        return {version: Adjustment(model.serving[version], new) for version, new in possible.items()}

    async def _finish_adjustment(self, adjustment: Adjustment) -> None:
        await adjustment.retire(float(self.plant.settings.server.exit_timeout_secs))
        self.touch()

    async def _start_version(self, found: FoundModel, version: int) -> ServedVersion:
        """Prepare and start one version; LOADING until the whole model is."""
        name = found.name
        self._progress(name, version, "loading config", 0, 0, "")
        try:
            quietly = self._has_clients
            prepared = self.ensembles.join(await prepare_version(self.plant, found, version, quietly=quietly))
            served = self._create(prepared)
            count = len(served.instances)
            self._progress(name, version, "starting worker", 0, count, "")
            await served.start(quietly=quietly)
        except ServingError as error:
            self._progress(name, version, "failed", 0, 0, error.text)
            raise
        except OSError as error:
            # Too few descriptors, no room on a disk: no fault of ours.
            raise Internal(error.strerror or str(error)) from error
        except Exception as error:
            log.error(f"loading {name}:{version} failed:\n{traceback.format_exc()}")
            raise Internal(f"{type(error).__name__}: {error}") from error
        self._progress(name, version, "ready", count, count, "")
        return served

    def _create(self, prepared: PreparedVersion) -> ServedVersion:
        name, version = prepared.found.name, prepared.version
        served: ServedVersion

        def show(text: str) -> None:
            phase = "warming" if text.startswith("warm") else "loading"
            self._progress(name, version, phase, served.serving_count, len(served.instances), "")

        def changed() -> None:
            if served.load_ns:
                self.touch()
            else:
                show("loading")

        served = ServedVersion(self.plant, prepared, on_change=changed, on_phase=show)
        return served

    async def _abandon(self, model: Model, started: dict[int, ServedVersion], starting: Iterable[int]) -> None:
        """End what a failed load had started."""
        await asyncio.gather(*(served.stop() for served in started.values()))
        for version in starting:
            if version in started:
                log.info(f"unloading '{model.name}' version {version} again: the load failed as a whole")
            if version in model.serving:
                continue
            if version in started:
                model.status[version] = VersionStatus("UNAVAILABLE", UNLOADED)
            else:
                model.status.pop(version, None)
        self.touch()

    def _unusable(self, model: Model, found: FoundModel, error: ConfigError) -> PollFailed | LoadFailed:
        for line in error.describe().splitlines():
            log.error(line)
        model.problem = f"{error.code.label}: {error.text_with_hint}"
        if not model.serving:
            model.status.clear()
        self._progress(model.name, 0, "failed", 0, 0, error.text_with_hint)
        model.has_no_version = isinstance(error, NoVersionAvailable)
        self.touch()
        if model.has_no_version:
            # Triton has polled the model by then.
            return self._refusal(model, error.text)
        # Triton's text has no reason; the index, the log and the catalog have it.
        text = f"failed to load '{model.name}', failed to poll from model repository"
        if model.serving and not found.is_override:
            # Whoever deploys an update must be told why it is not there, and that nothing was lost (L-014).
            versions = ", ".join(str(version) for version in sorted(model.serving))
            text += f": {error.text_with_hint} (goes on serving as before: version {versions})"
        return PollFailed(text)

    def _load_failed(
        self, model: Model, found: FoundModel, failed: dict[int, ServingError], starting: Iterable[int]
    ) -> LoadFailed:
        parts: list[str] = []
        excused = all(isinstance(error, MissingLibrary) for error in failed.values())
        for version in starting:
            error = failed.get(version)
            if error is None:
                continue
            log.error(f"failed to load '{model.name}' version {version}: {error.code.label}: {error.text}")
            if advice := load_advice(error.text):
                log.error(f"  {advice}")
            reason = f"{error.code.label}: {found.without_paths(error.text)}"
            parts.append(f"version {version} is at UNAVAILABLE state: {reason};")
            if version not in model.serving:
                model.status[version] = VersionStatus("UNAVAILABLE", reason, isinstance(error, MissingLibrary))
        model.is_excused = excused
        if model.serving:
            first = next(iter(failed.values()))
            model.problem = f"{first.code.label}: {found.without_paths(first.text)}"
        self.touch()
        lacking = next((error for error in failed.values() if isinstance(error, DependencyFailed)), None)
        model.lacks_models = lacking is not None
        return self._refusal(model, lacking.text if lacking is not None else "\n".join(parts))

    def _refusal(self, model: Model, why: str) -> LoadFailed:
        model.load_error = why
        return LoadFailed(f"load failed for model '{model.name}': {why}\n")

    async def _switch(self, model: Model, found: FoundModel, started: dict[int, ServedVersion], kept: set[int]) -> None:
        """Route to the new versions, then end the old ones in the background."""
        old_found = model.found
        retired = [served for version, served in model.serving.items() if version not in kept]
        model.serving = {**{version: model.serving[version] for version in kept}, **started}
        model.found, model.problem, model.is_excused = found, "", False
        replaced = {served.version for served in retired if served.version in started}
        model.forget_failures()
        for served in retired:
            if served.version not in model.serving:
                model.status[served.version] = VersionStatus("UNLOADING")
        for version in started:
            model.status[version] = VersionStatus("READY")
        generation = self.touch()
        log.info(f"successfully loaded '{model.name}'")
        self.ensembles.loaded(found.identity)
        if retired:
            left_over = old_found if old_found is not found else None
            self._retire_in_background(self._retire(model, retired, replaced, generation, left_over))
        if self.is_initialised:
            # Whoever asked for the load may use the model on any connection as soon as it has the answer (spec H-214).
            await self._wait_seen(generation, _CATALOG_TIMEOUT_S)

    # --- unloading ---

    async def unload(self, name: str) -> None:
        """Take all versions of a model out of service; returns before requests in flight have finished.

        An unknown model is no error (spec H-220).
        """
        model = self.models.get(name)
        if model is None:
            return
        async with model.lock:
            retired = list(model.serving.values())
            model.serving = {}
            model.problem = ""
            model.is_excused = False
            for version in model.status:
                is_serving = any(served.version == version for served in retired)
                model.status[version] = (
                    VersionStatus("UNLOADING") if is_serving else VersionStatus("UNAVAILABLE", UNLOADED)
                )
            generation = self.touch()
            found, model.found = model.found, None
            if retired:
                self._retire_in_background(self._retire(model, retired, set(), generation, found))
            # New requests are refused from here on (spec R-094).
            await self._wait_seen(generation, _CATALOG_TIMEOUT_S)

    def forget(self, name: str) -> None:
        """Its directory is gone, and it serves no more: the index does not list it any longer."""
        model = self.models.get(name)
        if model is not None and not model.serving:
            del self.models[name]
            self.touch()

    def _retire_in_background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _retire(
        self,
        model: Model,
        retired: list[ServedVersion],
        replaced: set[int],
        generation: int,
        found: FoundModel | None,
    ) -> None:
        """Drain and end versions that no catalog of ``generation`` or later routes to."""
        if not await self._wait_seen(generation, _CATALOG_TIMEOUT_S):
            log.warning(f"a frontend did not take in the new catalog within {_CATALOG_TIMEOUT_S:g} s")
        # "Seen" may overtake, on its own socket, what was submitted before it.
        await asyncio.sleep(_SUBMISSIONS_GRACE_S)
        for served in retired:
            timeout_s = float(self.plant.settings.server.exit_timeout_secs)
            if not await served.drain(timeout_s):
                log.error(f"requests to '{model.name}' version {served.version} did not end within {timeout_s:g} s")
            await served.stop()
            self.ensembles.forget(served.route)
            if served.version not in replaced:
                status = model.status.get(served.version)
                if status is not None and status.state == "UNLOADING":
                    model.status[served.version] = VersionStatus("UNAVAILABLE", UNLOADED)
            log.info(f"successfully unloaded '{model.name}' version {served.version}")
        if found is not None:
            await asyncio.to_thread(found.discard)
        self.touch()
        if not self._memory_is_returned_soon:
            self._memory_is_returned_soon = True
            asyncio.get_running_loop().call_later(_MEMORY_DELAY_S, self._return_memory)

    def _return_memory(self) -> None:
        self._memory_is_returned_soon = False
        return_memory()

    # --- the server's end ---

    @property
    def live_count(self) -> int:
        """How many versions are loaded."""
        return sum(len(model.serving) for model in self.models.values()) + len(self._retiring)

    async def unload_all(self) -> None:
        """Unload every model and wait until all workers have ended."""
        await asyncio.gather(*(self.unload(name) for name in self.models))
        await asyncio.gather(*self._retiring)

    def kill_all(self) -> None:
        """End all workers at once."""
        for task in self._retiring:
            task.cancel()
        for model in self.models.values():
            for served in model.serving.values():
                served.kill()

    async def close(self) -> None:
        """Push nothing any more."""
        self.ensembles.close()
        if self._announcing is not None:
            self._announcing.cancel()
            await asyncio.gather(self._announcing, return_exceptions=True)
