"""What the scheduler is told of a model's batching: its configuration, ``--batching``, and its latency objective."""

from __future__ import annotations

import pytest

from forebay.engine.repository.latency_objective import SLO_PARAMETER
from forebay.engine.repository.model_spec import (
    DefaultSchedulingSpec,
    DynamicBatchingSpec,
    ModelSpec,
    QueuePolicySpec,
    Scheduling,
    TimeoutAction,
)
from forebay.engine.supervisor.batching_policy import batching_policy
from forebay.ipc.errors import InvalidArgument

DYNAMIC = DynamicBatchingSpec(preferred_batch_sizes=(4,), max_queue_delay_us=5000)


def model(scheduling: Scheduling = DYNAMIC, *, slo: str | None = None, decoupled: bool = False) -> ModelSpec:
    return ModelSpec(
        name="m",
        backend="onnxruntime",
        platform="",
        inputs=(),
        outputs=(),
        max_batch_size=8,
        scheduling=scheduling,
        decoupled=decoupled,
        parameters={} if slo is None else {SLO_PARAMETER: slo},
    )


def test_batches_are_formed_as_configured_by_default() -> None:
    policy = batching_policy(model(), "triton")
    assert (policy.dynamic, policy.preferred_batch_sizes, policy.max_queue_delay_us) == (True, (4,), 5000)
    assert policy.objective_us == 0
    assert not batching_policy(model(DefaultSchedulingSpec()), "slo=10ms").dynamic


def test_eager_batching_waits_for_nobody() -> None:
    assert batching_policy(model(), "eager").max_queue_delay_us == 0


@pytest.mark.parametrize(
    ("slo", "batching", "objective_us"),
    [("10", "triton", 10_000), ("2.5ms", "eager", 2_500), ("7", "slo=10ms", 7_000), ("0", "slo=10ms", 0)],
)
def test_a_models_own_objective_goes_before_the_flag(slo: str, batching: str, objective_us: int) -> None:
    assert batching_policy(model(slo=slo), batching).objective_us == objective_us


def test_the_flag_gives_every_model_an_objective_that_can_have_one() -> None:
    assert batching_policy(model(), "slo=10ms").objective_us == 10_000
    assert batching_policy(model(decoupled=True), "slo=10ms").objective_us == 0


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (model(slo="soon"), "must be a number of milliseconds from 0.1 to 3600000, or 0 for no objective, got 'soon'"),
        (model(slo="-1"), "must be a number of milliseconds"),
        (model(DefaultSchedulingSpec(), slo="10"), "needs dynamic_batching in its configuration"),
        (model(slo="10", decoupled=True), "cannot be used with a decoupled model"),
        (
            model(
                DynamicBatchingSpec(
                    default_queue_policy=QueuePolicySpec(timeout_action=TimeoutAction.DELAY, default_timeout_us=9)
                ),
                slo="10",
            ),
            "cannot be used with the timeout action DELAY",
        ),
    ],
    ids=["no time", "negative", "no batching", "decoupled", "delay"],
)
def test_an_objective_that_cannot_be_kept_says_why(spec: ModelSpec, text: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        batching_policy(spec, "triton")
    assert refused.value.text.startswith(f"parameter '{SLO_PARAMETER}' of model 'm' ")
    assert text in refused.value.text
