"""An ensemble against the models that it is made of."""

from __future__ import annotations

import pytest

from forebay.engine.repository.config_problem import ConfigError
from forebay.engine.repository.ensemble_check import (
    check_ensemble,
    circle_problem,
    dependencies,
    ensemble_problems,
)
from forebay.engine.repository.model_spec import (
    DefaultSchedulingSpec,
    EnsembleSpec,
    EnsembleStepSpec,
    InputSpec,
    ModelSpec,
    OutputSpec,
)


def model(
    name: str,
    *,
    datatype: str = "FP32",
    dims: tuple[int, ...] = (4,),
    max_batch_size: int = 8,
    decoupled: bool = False,
    more_inputs: tuple[InputSpec, ...] = (),
) -> ModelSpec:
    """A model that makes ``y`` from ``x``."""
    return ModelSpec(
        name=name,
        backend="x",
        platform="",
        max_batch_size=max_batch_size,
        inputs=(InputSpec(name="x", datatype=datatype, dims=dims), *more_inputs),
        outputs=(OutputSpec(name="y", datatype=datatype, dims=dims),),
        scheduling=DefaultSchedulingSpec(),
        decoupled=decoupled,
    )


def step(name: str, inputs: dict[str, str], outputs: dict[str, str]) -> EnsembleStepSpec:
    return EnsembleStepSpec(model_name=name, model_version=-1, input_map=inputs, output_map=outputs)


CHAIN = (step("a", {"x": "I"}, {"y": "T"}), step("b", {"x": "T"}, {"y": "O"}))


def ensemble(*steps: EnsembleStepSpec, max_batch_size: int = 8, dims: tuple[int, ...] = (4,)) -> ModelSpec:
    return ModelSpec(
        name="e",
        backend="",
        platform="ensemble",
        max_batch_size=max_batch_size,
        inputs=(InputSpec(name="I", datatype="FP32", dims=dims),),
        outputs=(OutputSpec(name="O", datatype="FP32", dims=dims),),
        scheduling=EnsembleSpec(steps=steps or CHAIN),
    )


def texts(ensemble: ModelSpec, *models: ModelSpec) -> list[str]:
    return [problem.text for problem in ensemble_problems(ensemble, {model.name: model for model in models})]


def test_a_chain_of_equal_tensors_fits() -> None:
    assert texts(ensemble(), model("a"), model("b")) == []
    assert dependencies(ensemble()) == ("a", "b")
    assert dependencies(model("a")) == ()
    assert ensemble_problems(model("a"), {}) == []


def test_an_ensemble_is_decoupled_if_a_step_is() -> None:
    """Spec S-109."""
    assert not check_ensemble(ensemble(), {"a": model("a"), "b": model("b")})
    assert check_ensemble(ensemble(), {"a": model("a", decoupled=True), "b": model("b")})
    with pytest.raises(ConfigError):
        check_ensemble(ensemble(), {"a": model("a")})


def test_the_batch_size_is_that_of_the_smallest_step() -> None:
    """Spec S-103."""
    assert texts(ensemble(), model("a"), model("b", max_batch_size=4)) == [
        "ensemble e allows maximum batch size 8, but it contains model b which only allows maximum batch size to be 4"
    ]


def test_a_step_without_batching_fits_if_the_whole_shapes_do() -> None:
    """Spec S-104."""
    assert texts(ensemble(), model("a"), model("b", max_batch_size=0, dims=(-1, 4))) == []
    assert texts(ensemble(), model("a"), model("b", max_batch_size=0, dims=(-1, 5))) == [
        "in ensemble e, ensemble tensor T: inconsistent shape: [-1,4] is inferred from model a while [-1,5] is "
        "inferred from model b",
        "in ensemble e, ensemble tensor O: inconsistent shape: [-1,4] is inferred from model e while [-1,5] is "
        "inferred from model b",
    ]


def test_datatypes_must_agree_and_variable_sizes_fit_any() -> None:
    """Spec S-102."""
    assert texts(ensemble(), model("a", dims=(-1,)), model("b")) == []
    assert texts(ensemble(), model("a"), model("b", datatype="BYTES"))[0] == (
        "in ensemble e, ensemble tensor T: inconsistent data type: TYPE_FP32 is inferred from model a while "
        "TYPE_STRING is inferred from model b"
    )


def test_every_input_is_mapped_and_every_mapping_exists() -> None:
    """Spec S-102, S-115."""
    extra = InputSpec(name="z", datatype="FP32", dims=(4,))
    optional = InputSpec(name="z", datatype="FP32", dims=(4,), optional=True)
    assert texts(ensemble(), model("a", more_inputs=(extra,)), model("b")) == [
        "in ensemble e, input z in model a is not mapped to any ensemble tensors"
    ]
    assert texts(ensemble(), model("a", more_inputs=(optional,)), model("b")) == []
    wrong = ensemble(step("a", {"x": "I", "q": "I"}, {"y": "O", "p": "T"}))
    assert texts(wrong, model("a")) == [
        "in ensemble e, ensemble tensor I is mapping to non-existing input q in model a",
        "in ensemble e, ensemble tensor T is mapped from non-existing output p in model a",
    ]


def test_responses_of_two_decoupled_steps_are_not_joined() -> None:
    both = InputSpec(name="z", datatype="FP32", dims=(4,))
    joining = ensemble(
        step("a", {"x": "I"}, {"y": "S"}),
        step("b", {"x": "I"}, {"y": "T"}),
        step("c", {"x": "S", "z": "T"}, {"y": "O"}),
    )
    models = (model("b"), model("c", more_inputs=(both,)))
    assert texts(joining, model("a"), *models) == []
    assert texts(joining, model("a", decoupled=True), *models) == [
        "in ensemble e, step of model 'c' receives inputs originated from different decoupled models"
    ]


@pytest.mark.parametrize(
    ("depends_on", "expected"),
    [
        ({"e": ("a",)}, None),
        ({"e": ("a", "b"), "a": ("b",)}, None),
        ({"e": ("e",)}, "circular dependency between ensembles: e -> ... -> e -> e"),
        ({"e": ("a",), "a": ("b", "e")}, "circular dependency between ensembles: e -> ... -> a -> e"),
        ({"e": ("a",), "a": ("b",), "b": ("a",)}, None),
    ],
)
def test_circles_of_ensembles_are_found(depends_on: dict[str, tuple[str, ...]], expected: str | None) -> None:
    """Spec R-097, S-119; a circle that the ensemble is not part of is another ensemble's problem."""
    problem = circle_problem("e", depends_on)
    assert (None if problem is None else problem.text) == expected
