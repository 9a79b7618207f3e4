"""The rate limiter's share in loading: what instances need, and whether there can be enough (spec S-150..S-155)."""

from __future__ import annotations

from forebay.engine.repository.model_spec import InstanceSpec, ModelSpec
from forebay.engine.settings import RateLimitSettings
from forebay.ipc.errors import InvalidArgument
from forebay.ipc.scheduler_messages import Resource

#: Device of a resource that belongs to none.
GLOBAL_DEVICE = -1


def resources_of(instance: InstanceSpec) -> tuple[Resource, ...]:
    """Return what an execution of the instance occupies."""
    return tuple(
        Resource(need.name, need.count, GLOBAL_DEVICE if need.is_global else instance.device_id)
        for need in instance.resources
    )


def limits_of(settings: RateLimitSettings) -> tuple[Resource, ...]:
    """Return the limits that were set."""
    return tuple(Resource(limit.name, limit.count, limit.device) for limit in settings.resources)


def check_resources(spec: ModelSpec, settings: RateLimitSettings) -> None:
    """Refuse a model whose instances could never run.

    Raises:
        InvalidArgument: with Triton's text (spec S-153).
    """
    if settings.mode == "off":
        return
    limits = {(limit.name, limit.device): limit.count for limit in settings.resources}
    for instance in spec.instances:
        for need in resources_of(instance):
            limit = limits.get((need.name, need.device), limits.get((need.name, GLOBAL_DEVICE)))
            if limit is not None and limit < need.count:
                raise InvalidArgument(
                    f'Resource count for "{need.name}" is limited to {limit} which will prevent scheduling of one or '
                    f"more model instances, the minimum required count is {need.count}"
                )
