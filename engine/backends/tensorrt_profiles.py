"""Optimisation profiles: the sizes, and the values of shape tensors, that an engine was built for.

Of several profiles the one whose usual sizes and values are nearest runs a batch (spec B-070); Triton's TensorRT
backend chooses in the same way and says the same of what no profile takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from forebay.ipc.errors import InvalidArgument
from forebay.ipc.worker_messages import InstanceSpec

Numbers = tuple[int, ...]


class Range(NamedTuple):
    """The sizes of an input, or the values of a shape tensor, under one profile."""

    least: Numbers
    usual: Numbers
    most: Numbers

    def outside(self, given: Numbers) -> int | None:
        """Return the index of the first number that is out of range; None: there is none.

        Args:
            given: as many numbers as the range has.
        """
        for index, (low, number, high) in enumerate(zip(self.least, given, self.most, strict=True)):
            if not low <= number <= high:
                return index
        return None

    def distance(self, given: Numbers) -> int | None:
        """Return how far numbers are from the usual ones, all differences added up; None: they are out of range."""
        if len(given) != len(self.usual) or self.outside(given) is not None:
            return None
        return sum(abs(number - usual) for number, usual in zip(given, self.usual, strict=True))


class Profile:
    """What one optimisation profile of an engine takes."""

    def __init__(self, engine: Any, number: int, inputs: Iterable[str]) -> None:
        self.sizes: dict[str, Range] = {}
        #: Of shape tensors. Their own sizes are fixed, and an engine that cannot tell the values takes any.
        self.values: dict[str, Range] = {}
        for name in inputs:
            if not engine.is_shape_inference_io(name):
                self.sizes[name] = Range(*map(tuple, engine.get_tensor_profile_shape(name, number)))
            # The number comes first, whatever the parameters are called.
            elif values := engine.get_tensor_profile_values(number, name):
                self.values[name] = Range(*map(tuple, values))

    @property
    def max_batch_size(self) -> int:
        """The largest first size of the inputs; of a shape tensor the first value is the batch size (spec D-018)."""
        ranges = (*self.sizes.values(), *self.values.values())
        return max(min((one.most[0] if one.most else 0 for one in ranges), default=0), 0)

    def distance(self, shapes: Mapping[str, Numbers], values: Mapping[str, Numbers]) -> int | None:
        """Return how far inputs are from those that the profile is best at; None: it does not take them."""
        total = 0
        for ranges, given in ((self.sizes, shapes), (self.values, values)):
            for name, one in ranges.items():
                distance = one.distance(given[name])
                if distance is None:
                    return None
                total += distance
        return total

    def problem(self, instance_name: str, shapes: Mapping[str, Numbers], values: Mapping[str, Numbers]) -> str:
        """Return why the profile does not take inputs, in Triton's words; empty if it does."""
        for name, sizes in self.sizes.items():
            if found := _size_problem(sizes, shapes[name]):
                return f"request specifies invalid shape for input '{name}' for {instance_name}. Error details: {found}"
        return next(filter(None, (_value_problem(one, values[name]) for name, one in self.values.items())), "")


def _size_problem(sizes: Range, given: Numbers) -> str:
    if len(given) != len(sizes.most):
        return f"model expected {len(sizes.most)} dimensions but received {len(given)} dimensions"
    index = sizes.outside(given)
    if index is None:
        return ""
    return (
        f"model expected the shape of dimension {index} to be between {sizes.least[index]} and {sizes.most[index]} but "
        f"received {given[index]}"
    )


def _value_problem(values: Range, given: Numbers) -> str:
    if len(given) != len(values.most):
        return f"mismatch between the number of shape values. Expecting {len(values.most)}. Got {len(given)}"
    index = values.outside(given)
    if index is None:
        return ""
    return (
        f"The shape value at index {index} is expected to be in range from {values.least[index]} to "
        f"{values.most[index]}, Got: {given[index]}"
    )


def profile_numbers(spec: InstanceSpec, count: int) -> list[int]:
    """Return the numbers of the optimisation profiles that are configured; by default the first.

    Raises:
        InvalidArgument: with Triton's text (spec C-097).
    """
    numbers: dict[int, None] = {}
    for text in spec.extra.get("profiles", ()):
        if not str(text).isdigit() or int(text) >= count:
            raise InvalidArgument(
                f"unable to autofill for '{spec.model}', configuration specified invalid profile {text} . Number of "
                f"profiles supported by TensorRT engine: {count}"
            )
        numbers[int(text)] = None
    return list(numbers) or [0]
