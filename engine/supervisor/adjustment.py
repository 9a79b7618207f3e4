"""A change of a loaded version without a reload: its instances, and how requests are batched (spec R-090, L-015).

Added instances are loaded first; then the version is the new one for everybody; then instances that it lost finish what
they run and end. At no time are there fewer instances than the smaller of the two configurations asks for.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec

from forebay.engine.supervisor.instance import Instance, start_all
from forebay.engine.supervisor.preparation import PreparedVersion, instance_specs
from forebay.ipc.worker_messages import InstanceSpec

if TYPE_CHECKING:
    from forebay.engine.supervisor.served_version import ServedVersion

#: Fields of a configuration that a loaded version can follow.
ADJUSTABLE_FIELDS = frozenset({"instance_group", "dynamic_batching"})


class Adjustment:
    """``start``, then either ``commit`` and ``retire``, or ``abandon``."""

    def __init__(self, served: ServedVersion, prepared: PreparedVersion) -> None:
        """Compare the instances that there are with those that the new configuration asks for."""
        self._served = served
        self._prepared = prepared
        self._kept: list[tuple[Instance, InstanceSpec]] = []
        self._added: list[Instance] = []
        self._leaving = list(served.instances)
        #: As they will be, in the order of the configuration.
        self._instances: list[Instance] = []
        for index, spec in enumerate(instance_specs(served.plant, prepared, served.route)):
            instance = next((instance for instance in self._leaving if instance.suits(spec)), None)
            if instance is not None:
                self._leaving.remove(instance)
                self._kept.append((instance, spec))
            else:
                instance = served.create_instance(spec, index, spare=len(self._added))
                self._added.append(instance)
            self._instances.append(instance)

    @staticmethod
    def is_possible(served: ServedVersion, prepared: PreparedVersion) -> bool:
        """Whether requests take the same form as before; if not, workers and frontends must be told anew."""
        before = served.prepared
        return (
            before.wants_parcels == prepared.wants_parcels
            and before.spec.is_ensemble == prepared.spec.is_ensemble
            and before.inputs == prepared.inputs
            and before.outputs == prepared.outputs
            and before.spec.max_batch_size == prepared.spec.max_batch_size
            and not _moves(served, prepared)
        )

    async def start(self) -> None:
        """Load what is added.

        Raises:
            ServingError: an instance could not be loaded; the caller abandons.
        """
        self._served.assign_cores(self._added)
        await start_all(self._added, quietly=True)

    def commit(self) -> None:
        """From now on the version is the new one."""
        for instance, spec in self._kept:
            # For its next worker; the one that runs is the same but for how it is called.
            instance.spec = msgspec.structs.replace(spec, counter_offset=instance.counter_offset)
        self._served.adopt(self._prepared, self._instances, self._leaving)

    async def retire(self, timeout_s: float) -> None:
        """Let the instances that are gone from the configuration finish what they run, and end them."""
        await asyncio.gather(*(self._served.dismiss(instance, timeout_s) for instance in self._leaving))

    async def abandon(self) -> None:
        """End what was started."""
        await asyncio.gather(*(self._served.dismiss(instance, 0.0) for instance in self._added))


def _moves(served: ServedVersion, prepared: PreparedVersion) -> bool:
    """Whether all instances are on one GPU, before or afterwards, and not at both times.

    Requests may be under way whose tensors lie there: they must not come to an instance elsewhere.
    """
    before = {(instance.spec.kind, instance.spec.device_id) for instance in served.instances}
    specs = instance_specs(served.plant, prepared, served.route)
    after = {(spec.kind, spec.device_id) for spec in specs}
    return before != after and any([kind for kind, _device in places] == ["GPU"] for places in (before, after))
