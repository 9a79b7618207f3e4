"""Checks of a request against a model's signature, the same for HTTP, gRPC, ensembles and shared-memory clients. Pure.

`InferenceRequest::Normalize` of Triton's infer_request.cc, in its order: output names, number of inputs, input names,
batch size, datatype, shape, byte size. Triton walks over its inputs in the order of a hash map, newest first for few
inputs, and so do we: where two inputs are wrong, the later one is named.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import msgspec

from forebay.ipc.catalog import ModelEntry
from forebay.ipc.errors import InvalidArgument
from forebay.ipc.tensor import DATATYPES, MAX_ELEMENT_COUNT, MAX_RANK, TensorSpec

#: Any bytes.
Buffer = bytes | bytearray | memoryview


def id_prefix(request_id: str) -> str:
    """Return what core validation errors start with (spec H-093)."""
    return f"[request id: {request_id or '<id_unknown>'}] "


def tensor_element_count(name: str, shape: Sequence[int]) -> int:
    """Return the product of a tensor's dimensions.

    Raises:
        InvalidArgument: a dimension is negative or the product beyond MAX_ELEMENT_COUNT (spec H-092).
    """
    if len(shape) > MAX_RANK:
        raise InvalidArgument(f"Input '{name}' has {len(shape)} dimensions, at most {MAX_RANK} are supported")
    count = 1
    for dim in shape:
        if not 0 <= dim <= MAX_ELEMENT_COUNT:
            raise InvalidArgument(f"Input '{name}' contains one or more invalid dimensions")
        count *= dim
    if count > MAX_ELEMENT_COUNT:
        raise InvalidArgument(
            f"Input '{name}' causes total element count to exceed maximum size of {MAX_ELEMENT_COUNT}"
        )
    return count


def tensor_byte_size(name: str, datatype: str, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor of a fixed-size datatype (not BYTES).

    Raises:
        InvalidArgument: as :func:`tensor_element_count`, and for a size beyond 2^63-1 bytes.
    """
    size = tensor_element_count(name, shape) * DATATYPES[datatype].item_bytes
    if size > MAX_ELEMENT_COUNT:
        raise InvalidArgument(f"byte size overflow for input '{name}'")
    return size


class InputFacts(msgspec.Struct, frozen=True):
    """What is known of an input that has arrived, or whose place is known."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    """Batch dimension included."""
    byte_size: int
    """Bytes that are there."""
    content: Buffer | None = None
    """The bytes themselves if they are at hand; only looked at for BYTES. None: not walked (spec D-005: CPU data)."""
    label: str = ""
    """What the byte size error calls it, if not its name (spec H-132)."""


class Validated(msgspec.Struct, frozen=True):
    """A request that fits the model."""

    batch_size: int
    """First dimension of every input; 0 for a model that does not batch."""
    byte_sizes: tuple[int, ...]
    """Bytes of each input, in the order given."""

    @property
    def row_count(self) -> int:
        """Rows the request takes in a slab, and what it adds to the inference count."""
        return max(1, self.batch_size)


def validate_request(
    entry: ModelEntry, request_id: str, inputs: Sequence[InputFacts], output_names: Sequence[str]
) -> Validated:
    """Return batch size and byte sizes of a request that fits the model.

    Args:
        inputs: names are unique.
        output_names: requested outputs; empty: all.

    Raises:
        InvalidArgument: with Triton's text, spec H-082..H-092.
    """
    return _Check(entry, request_id, inputs).run(output_names)


class _Check:
    """One validation: the steps of appendix D as methods."""

    def __init__(self, entry: ModelEntry, request_id: str, inputs: Sequence[InputFacts]) -> None:
        self._entry = entry
        self._prefix = id_prefix(request_id)
        self._inputs = inputs
        self._specs = {spec.name: spec for spec in entry.inputs}

    def run(self, output_names: Sequence[str]) -> Validated:
        self._check_output_names(output_names)
        self._check_inputs()
        batch_size = self._check_batch_size()
        pairs = [(tensor, self._specs[tensor.name]) for tensor in reversed(self._inputs)]
        for tensor, spec in pairs:
            self._check_datatype(tensor, spec)
            self._check_shape(tensor, spec)
        is_batched = self._entry.max_batch_size > 0
        for tensor, spec in pairs:
            # Triton leaves a batch dimension of 0 out of its sums, which is how such a request fails there.
            is_empty_batch = is_batched and batch_size == 0 and not spec.is_shape_tensor
            self._check_content(tensor, tensor.shape[1:] if is_empty_batch else tensor.shape)
        if is_batched and batch_size == 0:
            raise self._fault("inference request batch-size must be >= 1 for")
        return Validated(batch_size, tuple(tensor.byte_size for tensor in self._inputs))

    def _check_output_names(self, output_names: Sequence[str]) -> None:
        known = {spec.name for spec in self._entry.outputs}
        for name in sorted(output_names):
            if name not in known:
                raise InvalidArgument(f"unexpected inference output '{name}' for model '{self._entry.name}'")

    def _check_inputs(self) -> None:
        """Check how many inputs there are, then their names, then that no required one is missing.

        The last Triton does not check where optional inputs make up the number; its backends meet such requests.
        """
        required = [spec.name for spec in self._entry.inputs if not spec.optional]
        got = [tensor.name for tensor in reversed(self._inputs)]
        missing = [name for name in required if name not in got]
        if not len(required) <= len(got) <= len(self._entry.inputs):
            raise self._count_fault(required, got, missing)
        for name in got:
            if name not in self._specs:
                raise InvalidArgument(f"unexpected inference input '{name}' for model '{self._entry.name}'")
        if missing:
            raise self._count_fault(required, got, missing)

    def _count_fault(self, required: list[str], got: list[str], missing: list[str]) -> InvalidArgument:
        expected_count = len(self._entry.inputs)
        expected = (
            f"{expected_count} inputs"
            if len(required) == expected_count
            else f"number of inputs between {len(required)} and {expected_count}"
        )
        return InvalidArgument(
            f"{self._prefix}expected {expected} but got {len(got)} inputs for model '{self._entry.name}'. "
            # Triton loses the opening bracket of an empty list here.
            f"Got input(s) {_name_list(got)}, but missing required input(s) {_name_list(missing) if missing else ']'}. "
            "Please provide all required input(s)."
        )

    def _check_batch_size(self) -> int:
        limit = self._entry.max_batch_size
        if limit <= 0:
            return 0
        batch_size: int | None = None
        for tensor in reversed(self._inputs):
            if self._specs[tensor.name].is_shape_tensor:
                continue
            if not tensor.shape:
                raise self._fault(f"input '{tensor.name}' has no shape but model requires batch dimension for")
            if not batch_size:
                batch_size = tensor.shape[0]
            elif tensor.shape[0] != batch_size:
                raise self._fault(f"input '{tensor.name}' batch size does not match other inputs for")
        if batch_size is None:
            return 1
        if batch_size > limit:
            raise self._fault(f"inference request batch-size must be <= {limit} for")
        return batch_size

    def _fault(self, text: str) -> InvalidArgument:
        return InvalidArgument(f"{self._prefix}{text} '{self._entry.name}'")

    def _check_datatype(self, tensor: InputFacts, spec: TensorSpec) -> None:
        if tensor.datatype != spec.datatype:
            datatype = tensor.datatype if tensor.datatype in DATATYPES else "<invalid>"
            raise InvalidArgument(
                f"{self._prefix}inference input '{tensor.name}' data-type is '{datatype}', "
                f"but model '{self._entry.name}' expects '{spec.datatype}'"
            )

    def _check_shape(self, tensor: InputFacts, spec: TensorSpec) -> None:
        is_batched = self._entry.max_batch_size > 0
        given = tensor.shape[1:] if is_batched and not spec.is_shape_tensor else tensor.shape
        if len(given) == len(spec.dims) and all(
            dim in (-1, size) and size >= 0 for dim, size in zip(spec.dims, given, strict=True)
        ):
            return
        if len(given) == len(spec.dims) and -1 in given:
            raise InvalidArgument(
                f"{self._prefix}All input dimensions should be specified for input '{tensor.name}' for model "
                f"'{self._entry.name}', got {_dims(tensor.shape)}"
            )
        expected = (-1, *spec.dims) if is_batched else spec.dims
        note = (
            "NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be prepended "
            "to each input shape. If you want to specify the full shape including the batch dim in your input dims "
            "config, try setting max_batch_size to zero. See the model configuration docs for more info on "
            "max_batch_size."
            if is_batched
            else ""
        )
        raise InvalidArgument(
            f"{self._prefix}unexpected shape for input '{tensor.name}' for model '{self._entry.name}'. "
            f"Expected {_dims(expected)}, got {_dims(tensor.shape)}. {note}"
        )

    def _check_content(self, tensor: InputFacts, shape: tuple[int, ...]) -> None:
        name = tensor.name
        if tensor.datatype == "BYTES":
            expected_count = tensor_element_count(name, shape)
            if tensor.content is not None:
                self._walk_elements(name, memoryview(tensor.content), expected_count)
            return
        expected = tensor_byte_size(name, tensor.datatype, shape)
        if tensor.byte_size != expected:
            raise InvalidArgument(
                f"{self._prefix}input byte size mismatch for input '{tensor.label or name}' "
                f"for model '{self._entry.name}'. Expected {expected}, got {tensor.byte_size}"
            )

    def _walk_elements(self, name: str, content: memoryview, expected_count: int) -> None:
        """Follow the length prefixes of a BYTES tensor to its end (spec D-004, H-091)."""
        subject = f"inference input '{name}' for model '{self._entry.name}'"
        offset, end, count, length = 0, len(content), 0, 0
        unpack = struct.Struct("<I").unpack_from
        while offset + 4 <= end:
            if count == expected_count:
                raise InvalidArgument(
                    f"{self._prefix}unexpected number of string elements {count + 1} for {subject}, "
                    f"expecting {expected_count}"
                )
            (length,) = unpack(content, offset)
            offset += 4 + length
            count += 1
        if offset < end:
            raise InvalidArgument(
                f"{self._prefix}incomplete string length indicator for {subject}, expecting 4 bytes but only "
                f"{end - offset} bytes available. Please make sure the string length indicator is in one buffer."
            )
        if count != expected_count:
            raise InvalidArgument(f"{self._prefix}expected {expected_count} string elements for {subject}, got {count}")
        if offset > end:
            raise InvalidArgument(
                f"incomplete string data for inference input '{name}', expecting string of length {length} "
                f"but only {end - (offset - length)} bytes available"
            )


def _dims(shape: Sequence[int]) -> str:
    return f"[{','.join(map(str, shape))}]"


def _name_list(names: Sequence[str]) -> str:
    return "[" + ",".join(f"'{name}'" for name in names) + "]"
