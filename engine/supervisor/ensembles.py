"""What ensembles need of other models: loaded before them, checked against them, and watched while they serve.

Behaviour: spec R-095..R-097, S-102..S-104, S-108, S-109. The graph by itself was judged with the configuration
(``repository/ensemble_graph.py``).
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import msgspec

from forebay.engine.repository.config import config_json
from forebay.engine.repository.ensemble_check import check_ensemble, circle_problem, step_identity
from forebay.engine.repository.found_model import FoundModel
from forebay.engine.repository.model_spec import EnsembleSpec, EnsembleStepSpec, ModelSpec
from forebay.engine.supervisor.models import DependencyFailed
from forebay.engine.supervisor.preparation import MissingLibrary, PreparedVersion
from forebay.ipc.catalog import EnsembleStep
from forebay.ipc.errors import Code, InvalidArgument, ServingError
from forebay.ipc.log import log

if TYPE_CHECKING:
    from forebay.engine.supervisor.lifecycle import ModelLifecycle
    from forebay.engine.supervisor.models import Model


def is_ensemble(found: FoundModel) -> bool:
    """Whether a model's configuration says that it is an ensemble."""
    return found.config is not None and found.config.message.WhichOneof("scheduling_choice") == "ensemble_scheduling"


def configured_models(found: FoundModel) -> tuple[tuple[str, str], ...]:
    """Return (namespace, name) of each model of an ensemble once, as configured; empty for other models."""
    if found.config is None or not is_ensemble(found):
        return ()
    steps = found.config.message.ensemble_scheduling.step
    return tuple(dict.fromkeys((step.model_namespace, step.model_name) for step in steps))


class Ensembles:
    """The dependencies between the models of one lifecycle. Used in the supervisor's event loop only."""

    def __init__(self, lifecycle: ModelLifecycle) -> None:
        self._lifecycle = lifecycle
        #: Models that the server is loading as it starts, by identity; done when that is over.
        self._starting: dict[str, asyncio.Future[None]] = {}
        #: The repository as it was read when the server started; empty later.
        self._scanned: Mapping[str, FoundModel] = {}
        #: Ensembles that failed for want of these models.
        self._wanted: dict[str, set[str]] = {}
        self._retries: set[asyncio.Task[None]] = set()
        #: Ensemble's route to (the routes of its models, what is wrong, whether it is decoupled).
        self._judged: dict[int, tuple[tuple[int, ...], str, bool]] = {}

    # --- the start of the server ---

    def begin_start(self, chosen: Iterable[str], scanned: Mapping[str, FoundModel]) -> tuple[str, ...]:
        """Note what is about to be loaded; return it together with the models that ensembles among it need."""
        self._scanned = scanned
        names = list(dict.fromkeys(chosen))
        explicit = frozenset(names)
        for name in names:  # grows while it is walked
            found = scanned.get(name)
            for namespace, model in configured_models(found) if found is not None else ():
                needed = _resolve(namespace, model, found.namespace if found is not None else "", scanned)
                if needed in scanned and needed not in names:
                    names.append(needed)
        loop = asyncio.get_running_loop()
        self._starting = {name: loop.create_future() for name in names}
        for name in names:
            if name not in explicit:
                self._lifecycle.models[name].is_implicit = True
        return tuple(names)

    def started(self, name: str) -> None:
        """A model of :meth:`begin_start` has loaded or failed."""
        waiting = self._starting.get(name)
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    def end_start(self) -> None:
        """All have."""
        self._starting = {}
        self._scanned = {}

    # --- before an ensemble loads ---

    async def require(self, found: FoundModel) -> None:
        """Have every model of an ensemble loaded; returns at once for other models.

        Raises:
            MissingLibrary: a model lacks an optional library.
            DependencyFailed: a model cannot be had, or the ensemble contains itself (spec R-097).
        """
        if not is_ensemble(found):
            return
        identity = found.identity
        polled = await self._poll_all(found)
        graph = {name: self._identities(model) for name, model in polled.items() if model is not None}
        circle = circle_problem(identity, graph)
        if circle is not None:
            raise DependencyFailed(circle.text)
        for name in graph[identity]:
            await self._require_one(name, polled.get(name))
        self._wanted.pop(identity, None)
        for name in graph[identity]:
            problem = self._missing(found.name, name)
            if problem is not None:
                self._wanted[identity] = set(graph[identity])
                raise problem

    async def _poll_all(self, found: FoundModel) -> dict[str, FoundModel | None]:
        """Return the directories of an ensemble's models and of theirs, by identity; None: there is none."""
        lifecycle = self._lifecycle
        polled: dict[str, FoundModel | None] = {found.identity: found}
        pending = [(found, namespace, name) for namespace, name in configured_models(found)]
        while pending:
            user, namespace, name = pending.pop()
            known = {**lifecycle.models, **self._scanned}
            identity = _resolve(namespace, name, user.namespace, known)
            if identity in polled:
                continue
            model = lifecycle.models.get(identity)
            needed = model.found if model is not None and model.serving else self._scanned.get(identity)
            if needed is None:
                try:
                    where = namespace or (user.namespace if identity not in known else "")
                    needed = await asyncio.to_thread(lifecycle.repository.poll_model, name, namespace=where)
                except ServingError as error:
                    log.error(f"ensemble '{user.name}': {error.text}")
            polled[identity] = needed
            if needed is not None:
                pending += [(needed, *configured) for configured in configured_models(needed)]
        return polled

    def _identities(self, found: FoundModel) -> tuple[str, ...]:
        known = {**self._lifecycle.models, **self._scanned}
        return tuple(_resolve(namespace, name, found.namespace, known) for namespace, name in configured_models(found))

    async def _require_one(self, identity: str, found: FoundModel | None) -> None:
        lifecycle = self._lifecycle
        starting = self._starting.get(identity)
        if starting is not None:
            await asyncio.shield(starting)
            return
        model = lifecycle.models.get(identity)
        if model is not None and model.lock.locked():
            async with model.lock:
                pass
        if (model is not None and model.serving) or found is None:
            return
        try:
            await lifecycle.load(identity, found)
        except ServingError as error:
            log.verbose(1, f"loading '{identity}' for an ensemble: {error.text}")
        else:
            lifecycle.models[identity].is_implicit = True

    def _missing(self, ensemble: str, identity: str) -> ServingError | None:
        """Return why a model cannot be part of an ensemble, None if it can (spec R-097)."""
        model = self._lifecycle.models.get(identity)
        if model is None or not (model.serving or model.status or model.has_no_version):
            return DependencyFailed(
                f"ensemble {ensemble} contains models that are not available or ambiguous: {identity}"
            )
        if model.serving:
            return None
        prefix = f"ensemble '{ensemble}' depends on '{identity}' which"
        if model.lacks_models:
            text = f"{prefix} is not valid. Model '{identity}' failed with error: {model.load_error}"
            return DependencyFailed(text)
        text = f"{prefix} has no loaded version."
        if model.load_error:
            text += f" Model '{identity}' loading failed with error: {model.load_error}"
        return MissingLibrary(text) if model.is_excused else DependencyFailed(text)

    # --- an ensemble and its models ---

    def join(self, prepared: PreparedVersion) -> PreparedVersion:
        """Check an ensemble against its loaded models, and say what only they tell: whether it is decoupled.

        Raises:
            DependencyFailed: they contradict it, with Triton's sentences.
        """
        spec = prepared.spec
        if not isinstance(spec.scheduling, EnsembleSpec):
            return prepared
        scheduling = spec.scheduling
        try:
            is_decoupled = check_ensemble(spec, self._specs(prepared.found, spec.scheduling))
        except InvalidArgument as error:
            raise DependencyFailed(error.text) from None
        config = prepared.config
        if is_decoupled and not spec.decoupled:
            config = config.copy()
            config.message.model_transaction_policy.decoupled = True
            spec = msgspec.structs.replace(spec, decoupled=True)
        return dataclasses.replace(
            prepared,
            config=config,
            config_json=config_json(config).encode(),
            spec=spec,
            steps=tuple(self._step(prepared.found, step) for step in scheduling.steps),
        )

    def _specs(self, found: FoundModel, ensemble: EnsembleSpec) -> dict[str, ModelSpec]:
        """Return the specifications of an ensemble's models by step identity; without those that are not loaded.

        Raises:
            InvalidArgument: a step's version is not loaded.
        """
        models = self._lifecycle.models
        specs: dict[str, ModelSpec] = {}
        for step in ensemble.steps:
            identity = _resolve(step.model_namespace, step.model_name, found.namespace, models)
            model = models.get(identity)
            if model is None or not model.serving:
                continue
            if step.model_version > 0 and step.model_version not in model.serving:
                raise InvalidArgument(
                    f"ensemble '{found.name}' depends on '{identity}' whose required version {step.model_version} is "
                    "not loaded."
                )
            version = step.model_version if step.model_version > 0 else max(model.serving)
            specs[step_identity(step)] = model.serving[version].prepared.spec
        return specs

    def _step(self, found: FoundModel, step: EnsembleStepSpec) -> EnsembleStep:
        models = self._lifecycle.models
        model = models.get(_resolve(step.model_namespace, step.model_name, found.namespace, models))
        namespace = model.found.namespace if model is not None and model.found is not None else ""
        return EnsembleStep(
            model=step.model_name,
            version=step.model_version,
            inputs=step.input_map,
            outputs=step.output_map,
            namespace=namespace,
        )

    def judge(self, prepared: PreparedVersion, route: int) -> tuple[str, bool]:
        """Return why a loaded ensemble cannot serve now, empty if it can, and whether it is decoupled (spec R-096)."""
        spec = prepared.spec
        if not isinstance(spec.scheduling, EnsembleSpec):
            return "", spec.decoupled
        routes = self._routes(prepared.found, spec)
        known = self._judged.get(route)
        if known is None or known[0] != routes:
            known = self._judged[route] = (routes, *self._judge(prepared, spec.scheduling))
        return known[1], known[2]

    def _routes(self, found: FoundModel, spec: ModelSpec) -> tuple[int, ...]:
        models = self._lifecycle.models
        routes: list[int] = []
        for identity in self._identities(found) if spec.is_ensemble else ():
            model = models.get(identity)
            if model is not None:
                routes += (served.route for served in model.serving.values())
            routes.append(0)
        return tuple(routes)

    def _judge(self, prepared: PreparedVersion, ensemble: EnsembleSpec) -> tuple[str, bool]:
        for identity in self._identities(prepared.found):
            missing = self._missing(prepared.found.name, identity)
            if missing is not None:
                return f"{missing.code.label}: {missing.text}", prepared.spec.decoupled
        try:
            return "", check_ensemble(prepared.spec, self._specs(prepared.found, ensemble))
        except ServingError as error:
            return f"{Code.INVALID_ARG.label}: {error.text}", prepared.spec.decoupled

    def forget(self, route: int) -> None:
        """A loaded version is gone."""
        self._judged.pop(route, None)

    # --- after something was loaded or is to be unloaded ---

    def loaded(self, identity: str) -> None:
        """A model serves: ensembles that failed for want of it are tried again."""
        for name in [name for name, wanted in self._wanted.items() if identity in wanted]:
            if name in self._starting and not self._starting[name].done():
                continue
            del self._wanted[name]
            task = asyncio.create_task(self._retry(name))
            self._retries.add(task)
            task.add_done_callback(self._retries.discard)

    async def _retry(self, identity: str) -> None:
        lifecycle = self._lifecycle
        model = lifecycle.models.get(identity)
        if model is None or model.serving:
            return
        try:
            found = await asyncio.to_thread(lifecycle.repository.poll_model, model.name)
            await lifecycle.load(identity, found)
        except ServingError as error:
            log.verbose(1, f"trying '{identity}' again: {error.text}")

    def dependents_to_unload(self, model: Model) -> tuple[str, ...]:
        """Return the identities of the models that only this ensemble needs and nobody loaded by name (spec R-095)."""
        if model.found is None:
            return ()
        models = self._lifecycle.models
        own = self._identities(model.found)
        others = {
            identity
            for other in models.values()
            if other is not model and other.serving and other.found is not None
            for identity in self._identities(other.found)
        }
        return tuple(name for name in own if name in models and models[name].is_implicit and name not in others)

    def close(self) -> None:
        """Try nothing again."""
        for task in self._retries:
            task.cancel()


def _resolve(namespace: str, name: str, own_namespace: str, known: Mapping[str, object]) -> str:
    """Return the identity of a step's model: in the given namespace, else in the ensemble's own, else the only one."""
    if namespace:
        return f"{namespace}::{name}"
    if own_namespace:
        own = f"{own_namespace}::{name}"
        if own in known:
            return own
        elsewhere = [identity for identity in known if identity.endswith(f"::{name}")]
        if len(elsewhere) == 1:
            return elsewhere[0]
        return own
    return name
