"""One instance of a loaded model version: a slot that always tries to have a living worker.

A slot outlives its workers. Its counters stay when a worker is replaced, so that totals never go backwards; its
worker's number is new each time, so that nothing meant for the dead one reaches the living.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from forebay.engine.supervisor.backoff import LOOP_COUNT, LOOP_WINDOW_S, Backoff
from forebay.engine.supervisor.child import describe_exit
from forebay.engine.supervisor.plant import Plant
from forebay.engine.supervisor.worker_handle import WorkerHandle
from forebay.engine.supervisor.worker_processes import WorkerProcesses
from forebay.ipc.counters import InstanceCounter, instance_words
from forebay.ipc.errors import ServingError
from forebay.ipc.log import log
from forebay.ipc.scheduler_messages import Resource
from forebay.ipc.worker_messages import InstanceSpec, Loaded, ModelMetrics

#: A crash loop is tried again so often, s: what it crashed on may have gone away.
LOOP_RETRY_S = 60.0

#: How long a worker may take to finish its last batch when it is stopped, s.
STOP_TIMEOUT_S = 10.0


async def start_all(instances: Iterable[Instance], *, quietly: bool) -> None:
    """Start instances side by side.

    Args:
        quietly: see :meth:`Instance.start`.

    Raises:
        ServingError: the first reason why one could not be started; none is being started any more.
    """
    tasks = [asyncio.create_task(instance.start(quietly=quietly)) for instance in instances]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


@dataclass(frozen=True, slots=True)
class InstanceEvents:
    """What a slot tells its owner, in the event loop."""

    changed: Callable[[], None]
    """It has got or lost its worker."""
    phase: Callable[[str], None]
    """What its worker is doing while it loads."""


class Instance:
    """A slot. Created by its model version; ``start`` once, ``stop`` once."""

    def __init__(
        self,
        plant: Plant,
        spec: InstanceSpec,
        index: int,
        events: InstanceEvents,
        processes: WorkerProcesses,
        *,
        timeout_s: float = 0.0,
        counter_offset: int = 0,
    ) -> None:
        """Allocate the counters.

        Args:
            spec: complete but for ``instance``, ``counter_offset`` and ``cores``.
            index: its place among the version's instances, for its name in ps.
            processes: where its workers live.
            timeout_s: how long an execution may take; 0: any time.
            counter_offset: go on with this block, of an instance that is gone.
        """
        self._plant = plant
        self._events = events
        self._processes = processes
        self._words = instance_words(spec.max_batch_size)
        self.counter_offset = counter_offset or plant.counters.allocate(self._words)
        self._counters = plant.counters.block(self.counter_offset, self._words)
        self.timeout_s = timeout_s
        self.cores: tuple[int, ...] = ()
        #: Its cores are those of a host policy, and not of the pool.
        self.is_bound_by_policy = False
        self.spec = msgspec.structs.replace(spec, counter_offset=self.counter_offset)
        self.title = f"{spec.model}:{spec.version} #{index}"
        #: Why there is no worker; empty while there is one.
        self.reason = "not started"
        self.memory_bytes = 0
        #: The loaded model wants what only parcels have.
        self.wants_parcels = False
        #: The model says itself whether it is ready.
        self.has_ready_check = False
        #: How often a worker that had died was replaced.
        self.restart_count = 0
        self._worker: WorkerHandle | None = None
        self._is_serving = False
        self._is_stopping = False
        self._since_s = 0.0
        self._backoff = Backoff()
        self._delay_s = 0.0
        self._successes_at_death = self._counters[InstanceCounter.SUCCESS]
        self._restart: asyncio.Task[None] | None = None

    @property
    def is_serving(self) -> bool:
        return self._is_serving

    @property
    def worker(self) -> WorkerHandle | None:
        """Its worker while it takes requests."""
        return self._worker if self._is_serving else None

    @property
    def device_id(self) -> int:
        """Device in whose memory tensors of its requests may lie; -1: there is none, or no worker."""
        return -1 if self.worker is None else self.worker.device_id

    @property
    def is_passive(self) -> bool:
        """True if it is loaded, but gets no requests (spec C-098)."""
        return bool(self.spec.extra.get("passive"))

    @property
    def pid(self) -> int:
        """Its worker's process id, 0 without one."""
        return self._worker.pid if self._worker is not None else 0

    @property
    def serving_pid(self) -> int:
        """Its worker's process id while it takes requests, else 0."""
        return 0 if self.worker is None else self.worker.pid

    @property
    def route(self) -> int:
        return self.spec.route

    def suits(self, spec: InstanceSpec) -> bool:
        """Whether this is the instance that a specification of the same version asks for."""
        ours = self.spec
        return (ours.instance_name, ours.kind, ours.device_id, ours.extra) == (
            spec.instance_name,
            spec.kind,
            spec.device_id,
            spec.extra,
        )

    async def drain(self, timeout_s: float) -> None:
        """Wait until its worker runs nothing and gets nothing any more, at most so long."""
        if self._worker is not None and self._is_serving:
            await self._plant.switchboard.drain_instance(self._worker.number, timeout_s)

    async def start(self, *, quietly: bool = False) -> Loaded:
        """Fork a worker and load the model; serving when this returns.

        Args:
            quietly: others serve meanwhile; none of their requests waits for it.

        Raises:
            ServingError: why not; nothing of the attempt is left.
        """
        plant = self._plant
        # A worker that was killed has left its mark.
        self._counters[InstanceCounter.RUNNING_SINCE_NS] = 0
        worker = WorkerHandle(next(plant.next_instance), self.title, self._ended)
        worker.on_phase = self._events.phase
        worker.on_metrics = plant.on_model_metrics
        worker.loads_quietly = quietly
        self._worker = worker
        spec = msgspec.structs.replace(self.spec, instance=worker.number, cores=self.cores)
        try:
            await self._processes.start(worker, spec)
            plant.switchboard.introduce_worker(worker)
            loaded = await worker.load(spec, plant.settings.process.load_timeout_secs)
        except BaseException:
            self._processes.give_up(worker)
            plant.switchboard.remove_worker(worker)
            self._worker = None
            raise
        if loaded.warmup_ns:
            log.info(
                f"{self.title}: loaded in {loaded.load_ns / 1e9:.3f} s, warmed up in {loaded.warmup_ns / 1e9:.3f} s"
            )
        worker.end_quiet()
        worker.follow_model(str(spec.optimization.get("priority", "")))
        self.memory_bytes = loaded.memory_bytes
        self.wants_parcels = loaded.wants_parcels
        self.has_ready_check = loaded.has_ready_check
        if not self.is_passive:
            plant.switchboard.add_instance(
                spec.route,
                spec.instance_name,
                worker,
                msgspec.convert(spec.extra.get("resources", ()), tuple[Resource, ...]),
                int(spec.extra.get("rate_priority", 1)),
            )
        self._is_serving = True
        plant.watchdog.add(self)
        plant.core_shares.add(self)
        self._since_s = time.monotonic()
        self.reason = ""
        self._events.changed()
        return loaded

    def let_others_first(self) -> None:
        """All instances of its version are about to be stopped: nobody waits for their ends."""
        if self._worker is not None:
            self._worker.let_others_first()

    async def stop(self) -> None:
        """End the worker, after what it runs; nobody sends to it any more. The counters stay until ``release``."""
        self._is_stopping = True
        if self._restart is not None:
            self._restart.cancel()
            await asyncio.gather(self._restart, return_exceptions=True)
        worker = self._worker
        if worker is not None:
            self._is_serving = False
            self._plant.switchboard.remove_worker(worker)
            await worker.stop(STOP_TIMEOUT_S)

    def kill(self) -> None:
        """End the worker at once, for good."""
        self._is_stopping = True
        if self._restart is not None:
            self._restart.cancel()
        if self._worker is not None:
            self._worker.kill()

    def release(self, *, keep_counters: bool = False) -> None:
        """Give counters and cores back; the worker has ended.

        Args:
            keep_counters: the block belongs to the caller from now on.
        """
        self._plant.watchdog.discard(self)
        self._plant.core_shares.discard(self)
        if not keep_counters:
            self._plant.counters.free(self.counter_offset, self._words)
        if not self.is_bound_by_policy:
            self._plant.cores.give_back(self.cores)
        self.cores = ()

    def end_if_hung(self, now_ns: int) -> None:
        """End the worker if what it executes takes longer than it may; its batch fails, and it is replaced."""
        worker = self._worker
        since_ns = self._counters[InstanceCounter.RUNNING_SINCE_NS]
        if worker is None or worker.is_hung or not self.timeout_s or not since_ns:
            return
        if now_ns - since_ns > self.timeout_s * 1e9:
            log.error(f"worker {self.title} has been executing one batch for more than {self.timeout_s:g} s; ending it")
            worker.is_hung = True
            worker.kill()

    # --- restarts ---

    def _ended(self, worker: WorkerHandle) -> None:
        """The worker's process is gone."""
        self._plant.on_model_metrics(ModelMetrics(instance=worker.number, families=()))
        self._plant.switchboard.remove_worker(worker)
        if worker is not self._worker:
            return
        if self._is_serving and not self._is_stopping:
            self._is_serving = False
            self._worker = None
            self._restart = asyncio.create_task(self._keep_restarting(worker))

    async def _keep_restarting(self, worker: WorkerHandle) -> None:
        exit_code = await worker.wait_exit_code()
        ending = "ended" if exit_code is None else f"ended with {describe_exit(exit_code)}"
        if worker.is_hung:
            ending = f"took more than {self.timeout_s:g} s for one batch and was ended"
        self._note_death(f"worker {self.title} {ending}", time.monotonic() - self._since_s)
        while not self._is_serving:
            await asyncio.sleep(self._delay_s)
            try:
                await self.start()
            except (ServingError, OSError) as error:
                # Descriptors may be short for the moment too.
                why = error.text if isinstance(error, ServingError) else error.strerror
                self._note_death(f"worker {self.title} could not be started again: {why}", 0.0)
        self.restart_count += 1
        self._events.changed()
        log.info(f"worker {self.title} is back")

    def _note_death(self, text: str, lived_s: float) -> None:
        successes = self._counters[InstanceCounter.SUCCESS]
        # One that has answered requests since it last died is not in a crash loop, however often it dies.
        if successes != self._successes_at_death:
            lived_s = math.inf
        self._successes_at_death = successes
        delay_s = self._backoff.died(time.monotonic(), lived_s)
        if self._backoff.is_looping:
            delay_s = LOOP_RETRY_S
            self.reason = (
                f"{text}; it ended {LOOP_COUNT} times within {LOOP_WINDOW_S:g} s without answering a request, "
                f"next attempt in {LOOP_RETRY_S:g} s"
            )
        else:
            self.reason = f"{text}; starting it again"
        self._delay_s = delay_s
        log.error(self.reason)
        self._events.changed()
