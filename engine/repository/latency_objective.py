"""Within what time a model's requests are to be answered: its parameter ``forebay_slo_ms``, or ``--batching slo=``."""

from __future__ import annotations

from forebay.engine.option_values import SLO_MS_MAX, SLO_MS_MIN, parse_slo_ms
from forebay.engine.repository.model_spec import DynamicBatchingSpec, ModelSpec, TimeoutAction
from forebay.ipc.errors import InvalidArgument

#: Model parameter: the latency objective of one model, in milliseconds; ``0`` takes it out of ``--batching slo=``.
SLO_PARAMETER = "forebay_slo_ms"


def objective_us(spec: ModelSpec, batching: str) -> int:
    """Return within what time a model's requests are to be answered; 0: there is no such objective.

    Args:
        batching: the setting ``scheduler.batching``.

    Raises:
        InvalidArgument: the parameter is no time, or the model's configuration excludes it.
    """
    text = spec.parameters.get(SLO_PARAMETER)
    if text is None:
        is_meant = batching.startswith("slo=") and not _what_excludes(spec)
        return round(parse_slo_ms(batching.removeprefix("slo=")) * 1000) if is_meant else 0
    if text.strip() == "0":
        return 0
    try:
        milliseconds = parse_slo_ms(text)
    except ValueError:
        raise InvalidArgument(
            f"parameter '{SLO_PARAMETER}' of model '{spec.name}' must be a number of milliseconds from {SLO_MS_MIN:g} "
            f"to {SLO_MS_MAX:.0f}, or 0 for no objective, got '{text}'"
        ) from None
    obstacle = _what_excludes(spec)
    if obstacle:
        raise InvalidArgument(f"parameter '{SLO_PARAMETER}' of model '{spec.name}' {obstacle}")
    return round(milliseconds * 1000)


def _what_excludes(spec: ModelSpec) -> str:
    """Return why a model can have no latency objective; empty: it can."""
    scheduling = spec.scheduling
    if not isinstance(scheduling, DynamicBatchingSpec):
        return "needs dynamic_batching in its configuration"
    if spec.decoupled:
        return "cannot be used with a decoupled model, whose answers come after its executions"
    policies = (scheduling.default_queue_policy, *scheduling.priority_queue_policies.values())
    if any(policy.default_timeout_us and policy.timeout_action is TimeoutAction.DELAY for policy in policies):
        return "cannot be used with the timeout action DELAY, which keeps what comes too late"
    return ""
