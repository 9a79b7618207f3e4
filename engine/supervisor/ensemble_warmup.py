"""Warm-up of an ensemble: a process of its own runs the samples before anybody is told of the ensemble.

It comes in by a side door as one more shared-memory client, runs the ensemble's steps on its models, which are READY by
then, and ends; see ``engine/backends/ensemble_warmup_backend.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from forebay.engine.backend_families import family_of
from forebay.engine.supervisor.plant import Plant
from forebay.engine.supervisor.preparation import PreparedVersion
from forebay.engine.supervisor.worker_handle import WorkerHandle
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.log import log
from forebay.ipc.worker_messages import InstanceSpec

_BACKEND = "forebay_ensemble_warmup"


async def warm_up_ensemble(
    plant: Plant, prepared: PreparedVersion, entry: ModelEntry, on_phase: Callable[[str], None], *, quietly: bool
) -> None:
    """Run the samples of an ensemble's configuration; nothing of the process is left afterwards.

    Args:
        entry: what the process is told of the ensemble.
        quietly: others serve meanwhile; none of their requests waits for it.

    Raises:
        ServingError: a sample failed (spec C-114), the process died, or it took longer than ``--load-timeout-secs``.
    """
    found = prepared.found
    number = next(plant.next_instance)
    worker = WorkerHandle(number, f"{found.name}:{prepared.version} warm-up", lambda _worker: None)
    worker.loads_quietly = quietly
    on_phase("warming up")
    with plant.side_door(entry) as path:
        spec = InstanceSpec(
            model=found.name,
            version=prepared.version,
            route=entry.route,
            instance=number,
            instance_name="warm-up",
            backend=_BACKEND,
            model_path=found.path,
            version_path=found.version_path(prepared.version),
            model_file="",
            max_batch_size=prepared.spec.max_batch_size,
            extra={"door": path, "samples": msgspec.to_builtins(prepared.spec.warmup)},
        )
        try:
            await plant.fork(family_of(_BACKEND), worker)
            loaded = await worker.load(spec, plant.settings.process.load_timeout_secs)
        finally:
            # It holds nothing that must be put in order. One that is just being forked is ended as soon as it is known.
            if not worker.ended.is_set():
                worker.kill()
    log.info(f"{found.name}:{prepared.version}: warmed up in {loaded.load_ns / 1e9:.3f} s")
