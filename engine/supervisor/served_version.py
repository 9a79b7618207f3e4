"""One loaded version of a model: its route, its instances, its counters, and what frontends are told about it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from forebay.engine.backend_families import family_of
from forebay.engine.repository.model_spec import EnsembleSpec
from forebay.engine.supervisor.ensemble_warmup import warm_up_ensemble
from forebay.engine.supervisor.instance import Instance, InstanceEvents, start_all
from forebay.engine.supervisor.latency_settings import (
    first_response_buckets_ms,
    measures_latencies,
    warn_of_unknown_families,
)
from forebay.engine.supervisor.plant import Plant
from forebay.engine.supervisor.preparation import (
    PreparedVersion,
    default_timeout_us,
    instance_specs,
    preserves_ordering,
    scheduling_extra,
    sequence_idle_us,
)
from forebay.engine.supervisor.worker_processes import WorkerProcesses
from forebay.ipc.catalog import GpuInstance, ModelEntry
from forebay.ipc.counters import PRODUCER_WORDS, SCHEDULER_WORDS, ProducerCounter, detail_words, instance_words
from forebay.ipc.errors import Code
from forebay.ipc.scheduler_messages import RouteUp
from forebay.ipc.worker_messages import InstanceSpec

#: How long after its end a version's counters may still be written by those who count its requests, s.
_COUNTERS_QUARANTINE_S = 5.0

#: How often a version that is to be ended looks whether ensembles still need it, s.
_USES_POLL_S = 0.01


class ServedVersion:
    """Created unloaded; ``start`` once, then ``drain`` and ``stop`` once, or ``kill``."""

    def __init__(
        self,
        plant: Plant,
        prepared: PreparedVersion,
        *,
        on_change: Callable[[], None],
        on_phase: Callable[[str], None],
    ) -> None:
        """Allocate numbers and counters; nothing runs yet.

        Args:
            on_change: called when it becomes or ceases to be able to take requests.
            on_phase: called with what its workers are doing while they load.
        """
        self.prepared = prepared
        self.route = next(plant.next_route)
        self.load_ns = 0
        self.plant = plant
        self._on_change = on_change
        self._scheduler_offset = plant.counters.allocate(SCHEDULER_WORDS)
        #: Frontend slot (for example ``http 0``) to the offset of its counters for this route.
        self._producer_offsets: dict[str, int] = {}
        #: The same for what the steps of an ensemble took.
        self._step_offsets: dict[str, int] = {}
        #: Offset and words of the same for details.
        self._details: dict[str, tuple[int, int]] = {}
        self._processes = WorkerProcesses(plant, prepared.runtime.backend)
        self._events = InstanceEvents(changed=on_change, phase=on_phase)
        #: Instances that an adjustment removed, and that still run something.
        self._leaving: list[Instance] = []
        #: Counters of instances that are gone: totals never go backwards. An added instance goes on with one.
        self._spare_offsets: list[int] = []
        specs = instance_specs(plant, prepared, self.route)
        self.instances = [self.create_instance(spec, index) for index, spec in enumerate(specs)]

    @property
    def version(self) -> int:
        return self.prepared.version

    @property
    def serving_count(self) -> int:
        """How many instances have a living worker that gets requests."""
        return sum(instance.is_serving and not instance.is_passive for instance in self.instances)

    @property
    def is_serving(self) -> bool:
        return self.prepared.spec.is_ensemble or self.serving_count > 0

    @property
    def reason(self) -> str:
        """Why it is not serving, as the index shows it."""
        if self.is_serving:
            return ""
        text = next((instance.reason for instance in self.instances if instance.reason), "no instance is running")
        return f"{Code.INTERNAL.label}: {text}"

    @property
    def device(self) -> str:
        """Where the instances run, for tables: ``CPU``, ``CPU 2,3`` or ``GPU 0,1``."""
        kinds: dict[str, list[str]] = {}
        for instance in self.instances:
            spec = instance.spec
            kind = "GPU" if spec.kind == "GPU" else "CPU"
            where = [str(spec.device_id)] if kind == "GPU" else [str(core) for core in instance.cores]
            kinds.setdefault(kind, []).extend(where)
        return " ".join(f"{kind} {','.join(dict.fromkeys(where))}".rstrip() for kind, where in kinds.items())

    async def start(self, *, quietly: bool = False) -> None:
        """Announce the route and load every instance.

        Args:
            quietly: other versions and models serve meanwhile, and are not to notice.

        Raises:
            ServingError: an instance could not be loaded; all are gone again.
        """
        began_ns = time.monotonic_ns()
        warn_of_unknown_families(self.prepared.spec)
        self.assign_cores(self.instances)
        self.plant.switchboard.add_route(self._route_up())
        try:
            if self.instances:
                self.plant.zygotes.start(family_of(self.prepared.runtime.backend))
            await start_all(self.instances, quietly=quietly)
            if self.prepared.spec.is_ensemble and self.prepared.spec.warmup:
                entry = self.entry("", (), state="LOADING", reason="", decoupled=self.prepared.spec.decoupled)
                await warm_up_ensemble(self.plant, self.prepared, entry, self._events.phase, quietly=quietly)
        except BaseException:
            await self.stop()
            raise
        self.load_ns = time.monotonic_ns() - began_ns

    def _route_up(self) -> RouteUp:
        spec = self.prepared.spec
        return RouteUp(
            route=self.route,
            name=self.prepared.found.identity,
            version=self.version,
            batching=self.prepared.batching,
            extra=scheduling_extra(spec),
            counter_offset=self._scheduler_offset,
            row_bytes=self._row_bytes(),
            keeps_requests=self.prepared.sees_requests,
        )

    def _row_bytes(self) -> tuple[int, ...]:
        prepared = self.prepared
        tensors = (*prepared.inputs, *prepared.outputs)
        if prepared.wants_parcels or not all(tensor.is_fixed for tensor in tensors):
            return ()
        return tuple(tensor.row_bytes for tensor in tensors)

    def assign_cores(self, instances: Sequence[Instance]) -> None:
        """Pin instances to the cores of their host policy; others that run on the CPU to cores of their own, if there
        are enough.
        """
        for instance in instances:
            instance.cores = self.plant.host_policies.cores(str(instance.spec.extra.get("host_policy", "")))
            instance.is_bound_by_policy = bool(instance.cores)
        on_cpu = [instance for instance in instances if instance.spec.kind == "CPU" and not instance.is_bound_by_policy]
        for instance, cores in zip(on_cpu, self.plant.cores.take(len(on_cpu)), strict=True):
            instance.cores = cores

    # --- adjustments ---

    def create_instance(self, spec: InstanceSpec, index: int, *, spare: int = 0) -> Instance:
        """Return an instance that is not started yet.

        Args:
            spare: which of the blocks of instances that are gone it goes on with, if there are so many.
        """
        spares = self._spare_offsets
        return Instance(
            self.plant,
            spec,
            index,
            self._events,
            self._processes,
            timeout_s=self.prepared.worker_timeout_s,
            counter_offset=spares[spare] if spare < len(spares) else 0,
        )

    def adopt(self, prepared: PreparedVersion, instances: list[Instance], leaving: list[Instance]) -> None:
        """Go on with another configuration and other instances; ``leaving`` are to be dismissed."""
        self.prepared = prepared
        self.instances = instances
        self._leaving += leaving
        taken = {instance.counter_offset for instance in instances}
        self._spare_offsets = [offset for offset in self._spare_offsets if offset not in taken]
        self.plant.switchboard.add_route(self._route_up())

    async def dismiss(self, instance: Instance, timeout_s: float) -> None:
        """Let an instance finish what it runs, end it, and keep what it counted."""
        await instance.drain(timeout_s)
        await instance.stop()
        if instance in self._leaving:
            self._leaving.remove(instance)
        if instance.counter_offset not in self._spare_offsets:
            self._spare_offsets.append(instance.counter_offset)
        instance.release(keep_counters=True)

    async def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is queued or running; no frontend may route to it any more."""
        end_s = time.monotonic() + timeout_s
        while self._ensemble_uses():
            # Ensembles that will come to this model in a later step.
            if time.monotonic() > end_s:
                return False
            await asyncio.sleep(_USES_POLL_S)
        return await self.plant.switchboard.drain_route(self.route, max(end_s - time.monotonic(), 0.0))

    def _ensemble_uses(self) -> int:
        """Return how many requests to ensembles have a step here."""
        words = self.plant.counters.words
        return sum(words[offset // 8 + ProducerCounter.ENSEMBLE_USES] for offset in self._producer_offsets.values())

    async def stop(self) -> None:
        """End the workers and give everything back."""
        plant = self.plant
        name = self.prepared.found.name
        plant.switchboard.remove_route(
            self.route,
            Code.UNAVAILABLE,
            f"Request for unknown model: '{name}' version {self.version} is not at ready state",
        )
        instances = (*self.instances, *self._leaving)
        for instance in instances:
            instance.let_others_first()
        await asyncio.gather(*(instance.stop() for instance in instances))
        for instance in self.instances:
            instance.release()
        # Scheduler and frontends may still be counting the last requests: their blocks are used again later.
        asyncio.get_running_loop().call_later(_COUNTERS_QUARANTINE_S, self._free_counters)

    def _free_counters(self) -> None:
        counters = self.plant.counters
        counters.free(self._scheduler_offset, SCHEDULER_WORDS)
        for offset in self._spare_offsets:
            counters.free(offset, instance_words(self.prepared.spec.max_batch_size))
        self._spare_offsets.clear()
        for offset in self._producer_offsets.values():
            counters.free(offset, PRODUCER_WORDS)
        self._producer_offsets.clear()
        for offset in self._step_offsets.values():
            counters.free(offset, instance_words(self.prepared.spec.max_batch_size))
        self._step_offsets.clear()
        for offset, words in self._details.values():
            counters.free(offset, words)
        self._details.clear()

    def kill(self) -> None:
        """End the workers at once; the server is going down."""
        for instance in (*self.instances, *self._leaving):
            instance.kill()

    @property
    def _device_id(self) -> int:
        """The GPU that every instance takes tensors on; -1: there is none. Unknown while an instance is replaced."""
        devices = {instance.device_id for instance in self.instances}
        return devices.pop() if len(devices) == 1 else -1

    @property
    def _gpu_uuid(self) -> str:
        """The GPU that every instance runs on, as the driver knows it; empty: there is none."""
        places = {(instance.spec.kind, instance.spec.device_id) for instance in self.instances}
        if len(places) != 1:
            return ""
        kind, device_id = places.pop()
        uuids = {gpu.device_id: gpu.uuid for gpu in self.plant.gpus}
        return uuids.get(device_id, "") if kind == "GPU" else ""

    @property
    def _gpu_instances(self) -> tuple[GpuInstance, ...]:
        uuids = {gpu.device_id: gpu.uuid for gpu in self.plant.gpus}
        # A model that places itself (KIND_MODEL) says where once it is loaded.
        devices = [
            (instance, instance.spec.device_id if instance.spec.kind == "GPU" else instance.device_id)
            for instance in self.instances
        ]
        return tuple(
            GpuInstance(instance.spec.instance_name, uuids.get(device_id, ""), instance.counter_offset)
            for instance, device_id in devices
            if device_id >= 0
        )

    def _allocate_details(self, slots: tuple[str, ...], words: int) -> None:
        counters = self.plant.counters
        for name in slots:
            offset, former_words = self._details.get(name, (0, 0))
            if words != former_words:
                # An ensemble may find out later that it is decoupled.
                if offset:
                    counters.free(offset, former_words)
                    del self._details[name]
                if words:
                    self._details[name] = (counters.allocate(words), words)

    def entry(self, slot: str, slots: tuple[str, ...], *, state: str, reason: str, decoupled: bool) -> ModelEntry:
        """Return what the frontend of ``slot`` is told; ``slots`` are all frontends that count requests."""
        for name in slots:
            if name not in self._producer_offsets:
                self._producer_offsets[name] = self.plant.counters.allocate(PRODUCER_WORDS)
        prepared = self.prepared
        spec = prepared.spec
        ensemble = spec.scheduling if isinstance(spec.scheduling, EnsembleSpec) else None
        for name in slots if ensemble is not None else ():
            if name not in self._step_offsets:
                self._step_offsets[name] = self.plant.counters.allocate(instance_words(spec.max_batch_size))
        has_latencies = measures_latencies(self.plant.settings.metrics)
        self._allocate_details(slots, detail_words(has_latencies=has_latencies, is_decoupled=decoupled))
        details = {name: offset for name, (offset, _words) in self._details.items()}
        return ModelEntry(
            detail_offset=details.get(slot, 0),
            detail_offsets=tuple(details[name] for name in slots if name in details),
            has_latencies=has_latencies,
            first_response_buckets_ms=first_response_buckets_ms(spec),
            name=prepared.found.name,
            version=self.version,
            state=state,
            reason=reason,
            route=self.route,
            platform=spec.metadata_platform,
            max_batch_size=spec.max_batch_size,
            inputs=prepared.inputs,
            outputs=prepared.outputs,
            config_json=prepared.config_json,
            decoupled=decoupled,
            wants_parcels=prepared.wants_parcels or any(instance.wants_parcels for instance in self.instances),
            sees_requests=prepared.sees_requests,
            has_ready_check=any(instance.has_ready_check for instance in self.instances),
            is_ensemble=spec.is_ensemble,
            counter_offset=self._producer_offsets.get(slot, 0),
            # An ensemble has no instances: its frontends count for them.
            instance_counter_offsets=(
                *(instance.counter_offset for instance in (*self.instances, *self._leaving)),
                *self._spare_offsets,
                *(self._step_offsets[name] for name in slots if name in self._step_offsets),
            ),
            producer_counter_offsets=tuple(self._producer_offsets[name] for name in slots),
            metric_tags=spec.metric_tags,
            namespace=prepared.found.namespace,
            load_ns=self.load_ns,
            # Without a cache in the server the model's wish for one means nothing (spec S-170).
            response_cache=spec.response_cache and bool(self.plant.cache_counter_offsets),
            default_timeout_us=default_timeout_us(spec),
            preserve_ordering=preserves_ordering(spec),
            scheduler_counter_offset=self._scheduler_offset,
            worker_restart_count=sum(instance.restart_count for instance in self.instances),
            steps=prepared.steps,
            max_inflight_requests=ensemble.max_inflight_requests if ensemble is not None else 0,
            step_counter_offset=self._step_offsets.get(slot, 0),
            instance_count=len(self.instances),
            device_id=self._device_id,
            gpu_uuid=self._gpu_uuid,
            gpu_instances=self._gpu_instances,
            sequence_idle_us=sequence_idle_us(spec),
            objective_us=prepared.batching.objective_us,
        )
