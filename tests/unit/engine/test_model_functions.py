"""How Python functions are declared as models."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple, TypedDict

import numpy as np
import pytest
from numpy.typing import NDArray

from forebay.engine.model_functions import DeclarationError, Tensor, declaration_of, model, parse_tensor


class Scores(TypedDict):
    mean: Annotated[np.ndarray, "FP32[1]"]
    texts: Annotated[np.ndarray, Tensor("BYTES", (-1, 2))]


class Pair(NamedTuple):
    left: NDArray[np.float64]
    right: NDArray[np.int8]


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ("FP32[50]", Tensor("FP32", (50,))),
        (" INT64 [ 2, -1 ] ", Tensor("INT64", (2, -1))),
        ("BYTES", Tensor("BYTES", (1,))),
        (np.float16, Tensor("FP16", (1,))),
        (np.dtype("uint8"), Tensor("UINT8", (1,))),
        (bool, Tensor("BOOL", (1,))),
        (str, Tensor("BYTES", (1,))),
    ],
)
def test_tensor_declarations(declared: Any, expected: Tensor) -> None:
    assert parse_tensor(declared, "x") == expected


@pytest.mark.parametrize(
    ("declared", "text"),
    [
        ("fp32", "'fp32' is no tensor"),
        ("FP32[a]", "'FP32[a]' is no tensor"),
        ("FP32[1-2]", "'FP32[1-2]' is no tensor"),
        ("FP99[1]", "unknown datatype 'FP99'"),
        ("FP32[0]", "dims must be positive"),
        ("FP32[]", "dims must be positive"),
        (np.complex64, "is no datatype"),
        (object(), "is no datatype"),
    ],
)
def test_impossible_tensor_declarations(declared: Any, text: str) -> None:
    with pytest.raises(DeclarationError) as caught:
        parse_tensor(declared, "input 'x'")
    assert str(caught.value).startswith("input 'x': ")
    assert text in str(caught.value)


def test_declared_function_stays_itself() -> None:
    @model(inputs={"x": "FP32[3]"}, outputs={"y": "FP32[3]"}, max_batch_size=8, instances=2, max_queue_delay_us=50)
    def double(x: Any) -> Any:
        return 2 * x

    assert double(4) == 8
    assert declaration_of(double).config("double") == {
        "name": "double",
        "max_batch_size": 8,
        "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [3]}],
        "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [3]}],
        "instance_group": [{"kind": "KIND_CPU", "count": 2}],
        "dynamic_batching": {"max_queue_delay_microseconds": 50},
    }


def test_annotations_suffice_without_a_decorator() -> None:
    def one(x: Annotated[np.ndarray, "FP32[2]"], y: NDArray[np.int32]) -> NDArray[np.bool_]:
        return x[0] > y

    declared = declaration_of(one)
    assert declared.inputs == {"x": Tensor("FP32", (2,)), "y": Tensor("INT32", (-1,))}
    assert declared.outputs == {"output": Tensor("BOOL", (-1,))}


def test_outputs_of_typed_dictionaries_and_named_tuples() -> None:
    def scores(x: NDArray[np.float32]) -> Scores:
        raise NotImplementedError

    def pair(x: NDArray[np.float32]) -> Pair:
        raise NotImplementedError

    assert declaration_of(scores).outputs == {"mean": Tensor("FP32", (1,)), "texts": Tensor("BYTES", (-1, 2))}
    assert declaration_of(pair).outputs == {"left": Tensor("FP64", (-1,)), "right": Tensor("INT8", (-1,))}


def test_parameter_with_a_default_is_an_optional_input() -> None:
    @model(inputs={"x": "FP32", "scale": "FP32"}, outputs={"y": "FP32"})
    def scaled(x: Any, scale: Any = 2) -> Any:
        return x * scale

    inputs = declaration_of(scaled).inputs
    assert not inputs["x"].optional
    assert inputs["scale"].optional


def test_class_is_called_without_its_self() -> None:
    @model(inputs={"x": "FP32"}, outputs={"y": "FP32"})
    class Doubler:
        def __call__(self, x: Any) -> Any:
            return 2 * x

    assert list(declaration_of(Doubler).inputs) == ["x"]


def test_impossible_models_are_refused_where_they_are_declared() -> None:
    with pytest.raises(DeclarationError, match="has no parameter 'z', it has: x"):

        @model(inputs={"x": "FP32", "z": "FP32"}, outputs={"y": "FP32"})
        def unknown(x: Any) -> Any: ...

    with pytest.raises(DeclarationError, match="needs an input 'z', which is not declared"):

        @model(inputs={"x": "FP32"}, outputs={"y": "FP32"})
        def missing(x: Any, z: Any) -> Any: ...

    with pytest.raises(DeclarationError, match="input 'x' is not declared"):

        @model(outputs={"y": "FP32"})
        def untyped(x: Any) -> Any: ...

    with pytest.raises(DeclarationError, match="what it returns is not declared"):

        @model(inputs={"x": "FP32"})
        def unreturned(x: Any) -> Any: ...

    with pytest.raises(DeclarationError, match="at least one input"):

        @model(outputs={"y": "FP32"})
        def nothing() -> Any: ...

    with pytest.raises(DeclarationError, match="at least one output"):

        @model(inputs={"x": "FP32"}, outputs={})
        def silent(x: Any) -> Any: ...

    with pytest.raises(DeclarationError, match="instances must be at least 1, got 0"):

        @model(inputs={"x": "FP32"}, outputs={"y": "FP32"}, instances=0)
        def none_at_all(x: Any) -> Any: ...

    with pytest.raises(DeclarationError, match="a class needs a __call__ method"):

        @model(inputs={"x": "FP32"}, outputs={"y": "FP32"})
        class Silent: ...

    with pytest.raises(DeclarationError, match="is not a function"):
        declaration_of(3)
