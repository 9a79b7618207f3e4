"""Completing a configuration from a model file, and comparing the two."""

from __future__ import annotations

from typing import Protocol

import pytest

from forebay.engine.repository.auto_complete import (
    DescribedModel,
    DescribedTensor,
    check_described,
    complete_config,
    described_problems,
    is_complete,
    merge_completed,
    require_config,
)
from forebay.engine.repository.config import parse_config_json
from forebay.engine.repository.config_problem import ConfigError
from forebay.engine.repository.model_config_schema import ModelConfig
from forebay.engine.repository.normalise import Gpu
from forebay.ipc.errors import NotFound


class Normalised(Protocol):
    def __call__(
        self, text: str, name: str = "m", files: dict[str, bool] | None = None, gpus: tuple[Gpu, ...] = ()
    ) -> ModelConfig: ...


def tensor(name: str, *shape: int, datatype: str = "TYPE_FP32", optional: bool = False) -> DescribedTensor:
    return DescribedTensor(name, datatype, shape, optional)


BATCHING = DescribedModel((tensor("x", -1, 3),), (tensor("y", -1),))
FIXED = DescribedModel((tensor("x", 1, 3),), (tensor("y", -1),))
ONNX = 'backend: "onnxruntime" '
IO = 'input { name: "x" data_type: TYPE_FP32 dims: 3 } output { name: "y" data_type: TYPE_FP32 dims: 1 reshape { } } '


def test_a_batching_model_gets_batch_size_four_and_the_dynamic_batcher(normalised: Normalised) -> None:
    """Spec R-063, R-069, D-016."""
    config = normalised(ONNX)
    completed = complete_config(config, BATCHING)
    message = completed.config.message
    assert message.max_batch_size == 4
    assert list(message.dynamic_batching.preferred_batch_size) == [4]
    assert (message.input[0].name, list(message.input[0].dims), message.input[0].HasField("reshape")) == (
        "x",
        [3],
        False,
    )
    assert (list(message.output[0].dims), message.output[0].HasField("reshape")) == ([1], True)
    assert list(message.output[0].reshape.shape) == []
    assert completed.log == (
        "autofilled max_batch_size to 4 for model 'm' since batching is supporrted but no max_batch_size is specified "
        "in model configuration. Must specify max_batch_size to utilize autofill with a larger max batch size",
    )
    assert not config.message.input, "what was passed in is unchanged"


@pytest.mark.parametrize(
    ("text", "default", "batch_size", "scheduling"),
    [
        ("", 16, 16, "dynamic_batching"),
        ("", 1, 1, None),
        ("", 0, 0, None),
        ("max_batch_size: 7", 4, 7, "dynamic_batching"),
        ("max_batch_size: 1", 4, 1, None),
        ("max_batch_size: 7 sequence_batching { }", 4, 7, "sequence_batching"),
    ],
)
def test_what_is_given_is_respected(
    normalised: Normalised, text: str, default: int, batch_size: int, scheduling: str | None
) -> None:
    """Spec R-062, R-063, B-002."""
    completed = complete_config(normalised(ONNX + text), BATCHING, default_max_batch_size=default)
    assert completed.config.max_batch_size == batch_size
    assert completed.config.message.WhichOneof("scheduling_choice") == scheduling


def test_a_model_with_a_fixed_first_dimension_does_not_batch(normalised: Normalised) -> None:
    """Spec R-063, B-020."""
    message = complete_config(normalised(ONNX), FIXED).config.message
    assert (message.max_batch_size, list(message.input[0].dims), list(message.output[0].dims)) == (0, [1, 3], [-1])
    with pytest.raises(ConfigError) as caught:
        complete_config(normalised(ONNX + "max_batch_size: 8"), FIXED)
    assert caught.value.text == (
        "autofill failed for model 'm': model does not support batching while non-zero max_batch_size is specified"
    )
    assert "'x' [1,3]" in caught.value.problems[0].hint


def test_given_tensors_are_kept(normalised: Normalised) -> None:
    """Spec R-064."""
    complete = normalised(ONNX + IO)
    completed = complete_config(complete, BATCHING)
    assert is_complete(complete)
    assert completed.config.max_batch_size == 0
    assert completed.log == (
        "skipping model configuration auto-complete for 'm': inputs and outputs already specified",
    )
    partial = normalised(ONNX + 'input { name: "x" data_type: TYPE_FP32 dims: -1 }')
    message = complete_config(partial, BATCHING).config.message
    assert [list(given.dims) for given in message.input] == [[-1]]
    assert [given.name for given in message.output] == ["y"]


def test_controls_and_states_are_not_inputs(normalised: Normalised) -> None:
    """Spec S-063, S-080."""
    config = normalised(
        ONNX + 'max_batch_size: 2 sequence_batching { control_input { name: "start" control { '
        'int32_false_true: [ 0, 1 ] } } state { input_name: "si" output_name: "so" data_type: TYPE_FP32 dims: 1 } }'
    )
    described = DescribedModel(
        (tensor("x", -1, 1), tensor("start", -1, 1, datatype="TYPE_INT32"), tensor("si", -1, 1)),
        (tensor("y", -1, 1), tensor("so", -1, 1)),
    )
    completed = complete_config(config, described).config
    assert [given.name for given in completed.message.input] == ["x"]
    assert [given.name for given in completed.message.output] == ["y"]
    assert described_problems(completed, described) == []


def test_a_python_model_may_set_only_some_fields(normalised: Normalised) -> None:
    """Spec R-062: the name it changes is ignored."""
    config = normalised('backend: "python"')
    returned = parse_config_json(
        '{"name":"other","backend":"evil","max_batch_size":5,"input":[{"name":"a","data_type":"TYPE_BOOL","dims":[1]}],'
        '"output":[{"name":"b","data_type":"TYPE_BOOL","dims":[1]}],"dynamic_batching":{},'
        '"model_transaction_policy":{"decoupled":true},"instance_group":[{"count":9}]}'
    )
    message = merge_completed(config, returned).config.message
    assert (message.name, message.backend, message.max_batch_size) == ("m", "python", 5)
    assert [given.name for given in message.input] == ["a"]
    assert list(message.dynamic_batching.preferred_batch_size) == [5]
    assert message.model_transaction_policy.decoupled
    assert message.instance_group[0].count == 1
    given = normalised('backend: "python" sequence_batching { }')
    assert merge_completed(given, returned).config.message.WhichOneof("scheduling_choice") == "sequence_batching"


def test_a_backend_without_auto_complete_needs_a_config(normalised: Normalised) -> None:
    """Spec R-061, R-067."""
    config = normalised('backend: "pytorch"')
    require_config(config, has_config=True)
    with pytest.raises(NotFound, match="model configuration is not provided for model 'm'"):
        require_config(config, has_config=False)


@pytest.mark.parametrize(
    ("row", "text", "described", "expected"),
    [
        (
            "B-020",
            "max_batch_size: 8 " + IO,
            FIXED,
            "model 'm', tensor 'x': for the model to support batching the shape should have at least 1 dimension and "
            "the first dimension must be -1; but shape expected by the model is [1,3]",
        ),
        (
            "B-021",
            'max_batch_size: 8 input { name: "x" data_type: TYPE_FP32 dims: [ 3, 1 ] } '
            'output { name: "y" data_type: TYPE_FP32 dims: 1 reshape { } }',
            BATCHING,
            "model 'm', tensor 'x': the model expects 2 dimensions (shape [-1,3]) but the model configuration "
            "specifies 3 dimensions (an initial batch dimension because max_batch_size > 0 followed by the explicit "
            "tensor shape, making complete shape [-1,3,1])",
        ),
        (
            "B-021",
            'input { name: "x" data_type: TYPE_FP32 dims: 4 } output { name: "y" data_type: TYPE_FP32 dims: 1 }',
            DescribedModel((tensor("x", 3),), (tensor("y", -1),)),
            "model 'm', tensor 'x': the model expects 1 dimensions (shape [3]) but the model configuration specifies "
            "1 dimensions (shape [4])",
        ),
        (
            "B-022",
            "max_batch_size: 8 " + IO.replace("FP32", "FP16", 1),
            BATCHING,
            "unable to load model 'm', configuration expects datatype TYPE_FP16 for input 'x', model provides "
            "TYPE_FP32",
        ),
        (
            "B-023",
            "max_batch_size: 8 " + IO + 'input { name: "z" data_type: TYPE_FP32 dims: 3 }',
            BATCHING,
            "unable to load model 'm', configuration expects 2 inputs, model provides at most 1",
        ),
        (
            "B-011",
            "max_batch_size: 8 " + IO.replace('"x"', '"xx"'),
            BATCHING,
            "unexpected inference input 'xx', allowed inputs are: x",
        ),
        (
            "B-024",
            "max_batch_size: 8 " + IO.replace("dims: 3", "dims: 3 optional: true"),
            BATCHING,
            "optional input 'x' is not supported for models that support batching",
        ),
        (
            "B-025",
            "max_batch_size: 8 " + IO.replace("dims: 3", "dims: 3 allow_ragged_batch: true"),
            BATCHING,
            "model 'm', tensor 'x': allow_ragged_batch needs an input of shape [-1]; but shape expected by the model "
            "is [-1,3]",
        ),
        (
            "B-023",
            "max_batch_size: 8 " + IO,
            DescribedModel((tensor("x", -1, 3), tensor("w", -1, 3)), (tensor("y", -1),)),
            "unable to load model 'm', configuration expects 1 inputs, model provides 2",
        ),
    ],
)
def test_contradictions_are_named_as_triton_names_them(
    normalised: Normalised, row: str, text: str, described: DescribedModel, expected: str
) -> None:
    config = normalised(ONNX + text)
    assert described_problems(config, described)[0].text == expected, row
    with pytest.raises(ConfigError):
        check_described(config, described)


def test_sequence_controls_must_be_single_numbers_of_the_right_type(normalised: Normalised) -> None:
    """Spec B-026."""
    text = 'max_batch_size: 2 sequence_batching { control_input { name: "c" control { fp32_false_true: [ 0, 1 ] } } } '
    good = DescribedModel((tensor("x", -1, 3), tensor("c", -1, 1)), (tensor("y", -1),))
    bad = DescribedModel((tensor("x", -1, 3), tensor("c", -1, 2, datatype="TYPE_INT32")), (tensor("y", -1),))
    config = normalised(ONNX + text + IO)
    assert described_problems(config, good) == []
    assert [problem.text for problem in described_problems(config, bad)] == [
        "unable to load model 'm', configuration expects datatype TYPE_FP32 for sequence control 'c', model provides "
        "TYPE_INT32",
        "unable to load model 'm', sequence control 'c' must have shape [-1,1], model provides [-1,2]",
    ]
    absent = DescribedModel((tensor("x", -1, 3),), (tensor("y", -1),))
    assert "configured sequence control 'c' is not provided" in described_problems(config, absent)[0].text


def test_a_variable_dimension_of_the_model_takes_any_size(normalised: Normalised) -> None:
    config = normalised(ONNX + "max_batch_size: 8 " + IO)
    described = DescribedModel((tensor("x", -1, -1),), (tensor("y", -1),))
    assert described_problems(config, described) == []


def test_optional_model_inputs_may_be_left_out(normalised: Normalised) -> None:
    """Spec C-037."""
    described = DescribedModel((tensor("x", 3), tensor("w", 3, optional=True)), (tensor("y", 1),))
    config = complete_config(normalised(ONNX), described).config
    assert [given.optional for given in config.message.input] == [False, True]
    text = 'input { name: "x" data_type: TYPE_FP32 dims: 3 } output { name: "y" data_type: TYPE_FP32 dims: 1 }'
    assert described_problems(normalised(ONNX + text), described) == []


def test_scalar_without_batching_is_one_element(normalised: Normalised) -> None:
    """D-013: an empty reshape would be refused; what was completed passes the comparison."""
    described = DescribedModel((tensor("x"),), (tensor("y", 2),))
    completed = complete_config(normalised(ONNX), described).config
    assert list(completed.message.input[0].dims) == [1]
    assert not completed.message.input[0].HasField("reshape")
    check_described(completed, described)
