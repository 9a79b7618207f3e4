"""The rate limiter: an instance runs only while the resources that it names are free (spec S-150..S-155). Pure.

Instances with a batch stand in one line over all models, ordered by executions so far times priority. Only the first
may take resources (``rate_limiter.cc``, ``AttemptAllocation``), so that a needy instance is not passed by for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from forebay.engine.scheduler.instances import Instance
from forebay.engine.scheduler.line import Choice
from forebay.ipc.scheduler_messages import Resource

#: A resource and the device whose it is; -1: global.
_Key = tuple[str, int]


class RateLimiter:
    """What there is of every resource, what is in use, and who waits for it."""

    def __init__(self, limits: Iterable[Resource]) -> None:
        """Know the limits that were set; of all others there is as much as the neediest instance wants."""
        self._limits: dict[_Key, int] = {(limit.name, limit.device): limit.count for limit in limits}
        self._capacity: dict[_Key, int] = {}
        self._used: dict[_Key, int] = {}
        self._holders: dict[int, tuple[Resource, ...]] = {}
        self._staged: dict[int, tuple[Instance, Choice]] = {}

    def add(self, instances: Iterable[Instance]) -> None:
        """Work out the capacities for the instances that there are now."""
        capacity: dict[_Key, int] = {}
        for instance in instances:
            for need in instance.resources:
                key = (need.name, need.device)
                # A limit without a device holds for each device (spec S-152).
                limit = self._limits.get(key, self._limits.get((need.name, -1)))
                capacity[key] = limit if limit is not None else max(capacity.get(key, 0), need.count)
        self._capacity = capacity

    def stage(self, instance: Instance, choice: Choice) -> None:
        """An instance has a batch and wants to run it."""
        self._staged[instance.id] = (instance, choice)

    def restage(self, instance: Instance) -> None:
        """The batch of an instance that waits has become smaller."""
        _instance, choice = self._staged[instance.id]
        self._staged[instance.id] = instance, choice._replace(items=instance.items)

    def admit(self) -> Iterator[tuple[Instance, Choice]]:
        """Yield those whose turn it is and whose resources are free; they hold them until :meth:`release`."""
        while self._staged:
            instance, choice = min(self._staged.values(), key=lambda entry: turn(entry[0]))
            if not self._acquire(instance):
                return
            del self._staged[instance.id]
            yield instance, choice

    def _acquire(self, instance: Instance) -> bool:
        for need in instance.resources:
            key = (need.name, need.device)
            if self._used.get(key, 0) + need.count > self._capacity.get(key, 0):
                return False
        for need in instance.resources:
            key = (need.name, need.device)
            self._used[key] = self._used.get(key, 0) + need.count
        self._holders[instance.id] = instance.resources
        instance.executions += 1
        return True

    def release(self, instance: Instance) -> bool:
        """Give an instance's resources, or its place in the line, back; False if it had neither."""
        was_staged = self._staged.pop(instance.id, None) is not None
        held = self._holders.pop(instance.id, ())
        for need in held:
            self._used[need.name, need.device] -= need.count
        return was_staged or bool(held)


def turn(instance: Instance) -> tuple[int, int]:
    """Return an instance's place among those that want to run; the lowest is first."""
    return instance.executions * instance.rate_priority, instance.id
