"""Configurations completed from TensorRT engines, with Triton's sentences (spec R-065, D-018)."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from forebay.engine.repository.auto_complete import DescribedModel, DescribedTensor
from forebay.engine.repository.config import parse_config_json
from forebay.engine.repository.config_problem import ConfigError
from forebay.engine.repository.engine_auto_complete import complete_engine_config
from forebay.engine.repository.normalise import normalise_defaults

IMAGE = DescribedTensor("image", "TYPE_FP32", (-1, 3, -1))
SIZE = DescribedTensor("size", "TYPE_INT32", (3,), is_shape_tensor=True)
OUT = DescribedTensor("out", "TYPE_FP16", (-1, 5))
MADE = DescribedTensor("made", "TYPE_INT64", (3,), is_shape_tensor=True)
ENGINE = DescribedModel((IMAGE, SIZE), (OUT, MADE), max_batch_size=8)


def tensor(name: str, *dims: int, **fields: Any) -> dict[str, Any]:
    return {"name": name, **({"dims": list(dims)} if dims else {}), **fields}


def complete(engine: DescribedModel = ENGINE, **config: Any) -> Any:
    """Return the completed message of a configuration."""
    written = msgspec.json.encode({"name": "m", "backend": "tensorrt", **config}).decode()
    given = parse_config_json(written)
    normalise_defaults(given)
    return complete_engine_config(given, engine).config.message


def facts(tensors: Any) -> list[tuple[str, list[int], bool]]:
    return [(one.name, list(one.dims), one.is_shape_tensor) for one in tensors]


def test_largest_batch_and_shape_tensors_come_from_the_engine() -> None:
    message = complete()
    assert message.max_batch_size == 8
    assert message.WhichOneof("scheduling_choice") == "dynamic_batching"
    assert facts(message.input) == [("image", [3, -1], False), ("size", [2], True)]
    assert facts(message.output) == [("out", [5], False), ("made", [2], True)]


def test_engine_that_does_not_batch_keeps_its_shapes() -> None:
    message = complete(msgspec.structs.replace(ENGINE, max_batch_size=0))
    assert message.max_batch_size == 0
    assert message.WhichOneof("scheduling_choice") is None
    assert facts(message.input) == [("image", [-1, 3, -1], False), ("size", [3], True)]


def test_smaller_batch_is_kept_and_a_scheduler_too() -> None:
    message = complete(max_batch_size=4, sequence_batching={})
    assert message.max_batch_size == 4
    assert message.WhichOneof("scheduling_choice") == "sequence_batching"


def test_batch_of_one_gets_no_dynamic_batcher() -> None:
    fixed = DescribedModel((DescribedTensor("x", "TYPE_FP32", (1, 3)),), (OUT,), max_batch_size=1)
    message = complete(fixed)
    assert message.max_batch_size == 1
    assert message.WhichOneof("scheduling_choice") is None
    assert facts(message.input) == [("x", [3], False)]


def test_what_given_tensors_lack_is_added() -> None:
    size = tensor("size", is_shape_tensor=True)
    message = complete(input=[tensor("image", 3, 224), size])
    assert facts(message.input) == [("image", [3, 224], False), ("size", [2], True)]
    assert [one.data_type for one in message.input] == [11, 8]
    assert message.max_batch_size == 8


def test_dims_with_the_batch_dimension_say_that_the_model_does_not_batch() -> None:
    message = complete(input=[tensor("image", -1, 3, -1), tensor("size", 3, is_shape_tensor=True)])
    assert message.max_batch_size == 0
    assert facts(message.output) == [("out", [-1, 5], False), ("made", [3], True)]


def test_scalars_per_item_get_an_empty_reshape() -> None:
    message = complete(DescribedModel((IMAGE,), (DescribedTensor("y", "TYPE_FP32", (-1,)),), max_batch_size=2))
    assert list(message.output[0].dims) == [1]
    assert list(message.output[0].reshape.shape) == []


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"input": [tensor("image", is_shape_tensor=True)]}, "'image' is incorrectly specified as a shape tensor."),
        ({"output": [tensor("made")]}, "'made' is incorrectly specified as an execution tensor."),
        (
            {"max_batch_size": 9},
            "autofill failed for model 'm': configuration specified max-batch 9 but TensorRT engine only supports "
            "max-batch 8",
        ),
        ({"input": [tensor("x", 3)]}, "unexpected inference input 'x', allowed inputs are: image, size"),
        ({"output": [tensor("x")]}, "unexpected inference output 'x', allowed outputs are: made, out"),
        (
            {"input": [tensor("image", 3, 4)], "output": [tensor("out", -1, 5)]},
            "unable to autofill for 'm', model tensor configurations are contradicting each other in terms of whether "
            "batching is supported",
        ),
    ],
)
def test_contradiction_is_refused(config: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        complete(**config)
    assert caught.value.text == text


def test_dims_of_a_batching_model_need_an_engine_that_batches() -> None:
    engine = msgspec.structs.replace(ENGINE, max_batch_size=0)
    ragged = tensor("image", -1, allow_ragged_batch=True)
    for given in (tensor("image", 3, -1), ragged):
        with pytest.raises(ConfigError, match="hints for dynamic batching but the underlying engine doesn't support"):
            complete(engine, input=[given])
