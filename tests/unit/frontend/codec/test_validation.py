"""Checks against a signature (spec H-082..H-093, D-005, D-010..D-012; appendix D)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.frontend.codec.infer_request import ParsedInfer, ParsedInput, RegionData
from forebay.frontend.codec.json_tensor import frame_element
from forebay.frontend.codec.validation import InputFacts, check_strings, validate_infer, validate_request
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.errors import InvalidArgument, ServingError
from forebay.ipc.tensor import TensorSpec

UNKNOWN = "[request id: <id_unknown>] "
NOTE = (
    "NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be prepended to each "
    "input shape. If you want to specify the full shape including the batch dim in your input dims config, try setting "
    "max_batch_size to zero. See the model configuration docs for more info on max_batch_size."
)


def facts(name, shape, datatype="FP32", byte_size=None, content=None):
    size = 4
    for dim in shape:
        size *= dim
    return InputFacts(name, datatype, tuple(shape), size if byte_size is None else byte_size, content)


def fault(entry, inputs, outputs=(), request_id=""):
    with pytest.raises(InvalidArgument) as caught:
        validate_request(entry, request_id, inputs, outputs)
    return caught.value.text


def test_a_fitting_request(model):
    entry = model("m", [("FP32", (-1,)), ("BYTES", (2,))], max_batch_size=4)
    strings = b"".join(map(frame_element, [b"a", b"", b"\xff", b"bb"]))
    valid = validate_request(
        entry,
        "id",
        [facts("IN1", (2, 2), "BYTES", len(strings), strings), facts("IN0", (2, 0))],
        ["OUT1", "OUT1"],
    )
    assert (valid.batch_size, valid.row_count, valid.byte_sizes) == (2, 2, (len(strings), 0))


def test_without_batching(model):
    """Spec D-010: the shape is the dims, and there is no batch size."""
    valid = validate_request(model("m", [("FP32", (2, -1))]), "", [facts("IN0", (2, 3))], [])
    assert (valid.batch_size, valid.row_count, valid.byte_sizes) == (0, 1, (24,))


def test_unknown_names(model):
    """Spec H-082, H-083: no prefix; outputs before the number of inputs, inputs after it."""
    entry = model("m", [("FP32", (1,))] * 2)
    both = [facts("IN0", (1,)), facts("INX", (1,))]
    assert fault(entry, both) == "unexpected inference input 'INX' for model 'm'"
    assert fault(entry, [], ["Q", "OUT0"]) == "unexpected inference output 'Q' for model 'm'"


def test_wrong_count(model):
    """Spec H-084; E-025, E-045."""
    entry = model("m", [("FP32", (1,))] * 2)
    assert fault(entry, [facts("IN0", (1,))]) == (
        f"{UNKNOWN}expected 2 inputs but got 1 inputs for model 'm'. Got input(s) ['IN0'], but missing required "
        "input(s) ['IN1']. Please provide all required input(s)."
    )
    assert fault(model("n", [("FP32", (1,))] * 5, optional_from=1), [], request_id="r") == (
        "[request id: r] expected number of inputs between 1 and 5 but got 0 inputs for model 'n'. Got input(s) [], "
        "but missing required input(s) ['IN0']. Please provide all required input(s)."
    )
    assert fault(entry, [facts("IN0", (1,)), facts("IN1", (1,)), facts("INX", (1,))]) == (
        f"{UNKNOWN}expected 2 inputs but got 3 inputs for model 'm'. Got input(s) ['INX','IN1','IN0'], but missing "
        "required input(s) ]. Please provide all required input(s)."
    )


def test_optional_inputs_may_be_left_out(model):
    entry = model("m", [("FP32", (1,))] * 2, optional_from=1)
    assert validate_request(entry, "", [facts("IN0", (1,))], []).byte_sizes == (4,)
    assert "missing required input(s) ['IN0']" in fault(entry, [facts("IN1", (1,))])


def test_batch_sizes(model):
    """Spec H-087..H-089; E-041, E-067."""
    entry = model("m", [("FP32", (1,))] * 2, max_batch_size=4)

    def batches(first, second):
        return fault(entry, [facts("IN0", first), facts("IN1", second)])

    assert batches((5, 1), (5, 1)) == f"{UNKNOWN}inference request batch-size must be <= 4 for 'm'"
    mismatch = f"{UNKNOWN}input byte size mismatch for input 'IN1' for model 'm'. Expected 4, got 0"
    assert batches((0, 1), (0, 1)) == mismatch
    open_entry = model("m", [("FP32", (-1,))], max_batch_size=4)
    assert fault(open_entry, [facts("IN0", (0, 0))]) == f"{UNKNOWN}inference request batch-size must be >= 1 for 'm'"
    assert batches((2, 1), (1, 1)) == f"{UNKNOWN}input 'IN0' batch size does not match other inputs for 'm'"
    assert batches((0, 1), (3, 1)) == f"{UNKNOWN}input 'IN0' batch size does not match other inputs for 'm'"
    assert batches((), (1, 1)) == f"{UNKNOWN}input 'IN0' has no shape but model requires batch dimension for 'm'"


def test_wrong_datatype(model):
    """Spec H-085."""
    entry = model("m", [("FP32", (1,))])
    text = "inference input 'IN0' data-type is '{}', but model 'm' expects 'FP32'"
    assert fault(entry, [facts("IN0", (1,), "INT32")], request_id="r") == "[request id: r] " + text.format("INT32")
    assert fault(entry, [facts("IN0", (1,), "FOO")]) == UNKNOWN + text.format("<invalid>")


def test_wrong_shape(model):
    """Spec H-086; E-042, E-115."""
    assert fault(model("m", [("FP32", (16,))], max_batch_size=8), [facts("IN0", (1, 8))]) == (
        f"{UNKNOWN}unexpected shape for input 'IN0' for model 'm'. Expected [-1,16], got [1,8]. {NOTE}"
    )
    assert fault(model("m", [("FP32", (-1,))]), [facts("IN0", ())]) == (
        f"{UNKNOWN}unexpected shape for input 'IN0' for model 'm'. Expected [-1], got []. "
    )


def test_wrong_byte_size(model):
    """Spec H-090, H-116."""
    assert fault(model("m", [("FP32", (-1,))]), [facts("IN0", (2,), byte_size=12)]) == (
        f"{UNKNOWN}input byte size mismatch for input 'IN0' for model 'm'. Expected 8, got 12"
    )


def test_impossible_shapes(model):
    """Spec H-092."""
    entry = model("m", [("FP32", (-1, -1))])
    assert "causes total element count to exceed maximum size of 9223372036854775807" in fault(
        entry, [facts("IN0", (2**40, 2**40), byte_size=4)]
    )
    assert "byte size overflow for input" in fault(entry, [facts("IN0", (4, 2**60), byte_size=4)])


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (
            frame_element(b"a") * 2 + b"\1\0",
            UNKNOWN + "incomplete string length indicator for inference input 'IN0' for model 'm', expecting 4 bytes "
            "but only 2 bytes available. Please make sure the string length indicator is in one buffer.",
        ),
        (
            frame_element(b"a") + b"\5\0\0\0ab",
            "incomplete string data for inference input 'IN0', expecting string of length 5 but only 2 bytes available",
        ),
        (
            frame_element(b"a"),
            UNKNOWN + "expected 2 string elements for inference input 'IN0' for model 'm', got 1",
        ),
        (
            frame_element(b"a") * 3,
            UNKNOWN + "unexpected number of string elements 3 for inference input 'IN0' for model 'm', expecting 2",
        ),
    ],
)
def test_string_framing(model, content, text):
    """Spec H-091, D-005; the texts of a running server."""
    entry = model("m", [("BYTES", (-1,))])
    assert fault(entry, [facts("IN0", (2,), "BYTES", len(content), content)]) == text
    # Content that is not at hand (a region on a device) is not walked.
    assert validate_request(entry, "", [facts("IN0", (2,), "BYTES", len(content))], []).byte_sizes == (len(content),)


def test_strings_in_regions_are_walked_when_they_are_in_their_places(model):
    """Spec H-202."""
    entry = model("m", [("BYTES", (1,))])
    place = RegionData("r", byte_size=5, offset=0)
    request = ParsedInfer(inputs=(ParsedInput("IN0", "BYTES", (1,), place),))
    assert validate_infer(entry, request, b"").byte_sizes == (5,)
    check_strings(entry, request, [frame_element(b"a")])
    check_strings(entry, request, [b""])  # In device memory.
    with pytest.raises(InvalidArgument, match="unexpected number of string elements"):
        check_strings(entry, request, [frame_element(b"") * 2])


def test_shape_tensors_carry_no_batch_dimension():
    """Spec D-018."""
    entry = ModelEntry(
        name="m",
        version=1,
        state="READY",
        max_batch_size=4,
        inputs=(TensorSpec("S", "INT32", (2,), is_shape_tensor=True), TensorSpec("X", "FP32", (1,))),
    )
    assert validate_request(entry, "", [facts("S", (2,), "INT32"), facts("X", (3, 1))], []).batch_size == 3


ENTRY = ModelEntry(name="m", version=1, state="READY", max_batch_size=2, inputs=(TensorSpec("B", "BYTES", (-1,)),))


@given(st.binary(max_size=40), st.lists(st.integers(0, 3), max_size=3).map(tuple))
def test_any_string_content_is_walked_to_its_end_or_refused(content, shape):
    try:
        validate_request(ENTRY, "", [InputFacts("B", "BYTES", shape, len(content), content)], [])
    except ServingError:
        return
    elements = 0
    while content:
        content = content[4 + int.from_bytes(content[:4], "little") :]
        elements += 1
    assert elements == shape[0] * shape[1]
