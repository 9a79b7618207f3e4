"""How the scheduler is told to form a model's batches: its configuration, and what ``--batching`` makes of it."""

from __future__ import annotations

from forebay.engine.repository.latency_objective import objective_us
from forebay.engine.repository.model_spec import DynamicBatchingSpec, ModelSpec, QueuePolicySpec
from forebay.ipc.scheduler_messages import BatchingPolicy, QueuePolicy


def batching_policy(spec: ModelSpec, batching: str) -> BatchingPolicy:
    """Return how the scheduler forms batches (spec 6.1, 6.2).

    Args:
        batching: the setting ``scheduler.batching``.

    Raises:
        InvalidArgument: the model has an objective that is no time, or that its configuration excludes.
    """
    within_us = objective_us(spec, batching)
    scheduling = spec.scheduling
    if not isinstance(scheduling, DynamicBatchingSpec):
        return BatchingPolicy(max_batch_size=spec.max_batch_size)
    return BatchingPolicy(
        max_batch_size=spec.max_batch_size,
        dynamic=True,
        preferred_batch_sizes=scheduling.preferred_batch_sizes,
        max_queue_delay_us=0 if batching == "eager" else scheduling.max_queue_delay_us,
        preserve_ordering=scheduling.preserve_ordering,
        priority_levels=scheduling.priority_levels,
        default_priority_level=scheduling.default_priority_level,
        default_queue_policy=_queue_policy(scheduling.default_queue_policy),
        priority_queue_policy={
            level: _queue_policy(policy) for level, policy in scheduling.priority_queue_policies.items()
        },
        objective_us=within_us,
    )


def _queue_policy(policy: QueuePolicySpec) -> QueuePolicy:
    return QueuePolicy(
        timeout_action=str(policy.timeout_action),
        default_timeout_us=policy.default_timeout_us,
        allow_timeout_override=policy.allow_timeout_override,
        max_queue_size=policy.max_queue_size,
    )
