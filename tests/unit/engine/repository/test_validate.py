"""Every sentence of spec 05 and 06 about a configuration that makes no sense."""

from __future__ import annotations

from typing import Protocol

import pytest

from forebay.engine.repository.config import parse_config_text
from forebay.engine.repository.config_problem import ConfigError, path_text
from forebay.engine.repository.model_config_schema import ModelConfig
from forebay.engine.repository.normalise import Gpu
from forebay.engine.repository.validate import (
    check_load,
    check_poll,
    directory_name_problem,
    load_problems,
    poll_problems,
)

IO = 'input { name: "i" data_type: TYPE_FP32 dims: 1 } output { name: "o" data_type: TYPE_FP32 dims: 1 } '
BASE = 'backend: "x" '
ONNX = 'backend: "onnxruntime" '
TENSORRT = 'backend: "tensorrt" '


class Normalised(Protocol):
    def __call__(
        self, text: str, name: str = "m", files: dict[str, bool] | None = None, gpus: tuple[Gpu, ...] = ()
    ) -> ModelConfig: ...


def dynamic(inside: str, max_batch_size: int = 8) -> str:
    return f"{BASE}max_batch_size: {max_batch_size} dynamic_batching {{ {inside} }}"


def sequence(inside: str, max_batch_size: int = 8) -> str:
    return f"{BASE}max_batch_size: {max_batch_size} sequence_batching {{ {inside} }}"


def control(inside: str, kind: str = "START") -> str:
    return sequence(f'control_input {{ name: "c" control {{ kind: CONTROL_SEQUENCE_{kind} {inside} }} }}')


def ensemble(steps: str, extra: str = "") -> str:
    return (
        'platform: "ensemble" input { name: "I" data_type: TYPE_FP32 dims: 1 } '
        f'output {{ name: "O" data_type: TYPE_FP32 dims: 1 }} ensemble_scheduling {{ {steps} }} {extra}'
    )


def step(model: str, inputs: dict[str, str], outputs: dict[str, str]) -> str:
    maps = "".join(f'input_map {{ key: "{key}" value: "{value}" }} ' for key, value in inputs.items())
    maps += "".join(f'output_map {{ key: "{key}" value: "{value}" }} ' for key, value in outputs.items())
    return f'step {{ model_name: "{model}" model_version: -1 {maps} }} '


GOOD_STEP = step("a", {"x": "I"}, {"y": "O"})
BOOLEAN = "int32_false_true: [ 0, 1 ]"
METRIC = BASE + "model_metrics {{ metric_control {{ {} }} }}"

POLL = [
    ("C-002", 'platform: "odd"', "unexpected platform type 'odd' for m"),
    (
        "C-003",
        'platform: "ensemble" backend: "x"',
        "Ensemble model 'm' must have platform type 'ensemble' and empty backend type",
    ),
    (
        "R-043",
        ONNX + 'platform: "tensorrt_plan"',
        "unexpected 'platform' and 'backend' pair, got:tensorrt_plan, onnxruntime",
    ),
    ("C-006", BASE + "max_batch_size: -1", "'max_batch_size' must be non-negative value for m"),
    ("C-070", dynamic("preferred_batch_size: 0"), "dynamic batching preferred size must be positive for m"),
    (
        "C-070",
        dynamic("preferred_batch_size: 9"),
        "dynamic batching preferred size must be <= max batch size for m",
    ),
    ("C-074", dynamic("priority_levels: 3"), "default priority level must be in range [1, 3] for m"),
    (
        "C-074",
        dynamic("priority_levels: 3 default_priority_level: 4"),
        "default priority level must be in range [1, 3] for m",
    ),
    (
        "C-076",
        dynamic("priority_levels: 3 default_priority_level: 1 priority_queue_policy { key: 9 value { } }"),
        "priority queue policy must have priority level in range [1, 3] for m",
    ),
    (
        "C-072",
        dynamic("priority_levels: 2 default_priority_level: 1 preserve_ordering: true"),
        "Only one priority level is allowed when 'preserve_ordering' is true for m",
    ),
    (
        "C-072",
        dynamic(
            "preserve_ordering: true default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 1 }"
        ),
        "Queue policy can not have DELAY as timeout action when 'preserve_ordering' is true for m",
    ),
    (
        "C-072",
        dynamic(
            "preserve_ordering: true priority_levels: 1 default_priority_level: 1 priority_queue_policy "
            "{ key: 1 value { timeout_action: DELAY default_timeout_microseconds: 1 } }"
        ),
        "Queue policy can not have DELAY as timeout action when 'preserve_ordering' is true for m",
    ),
    (
        "C-122, S-175",
        sequence("") + " response_cache { enable: true }",
        "Response Cache does not currently support model m with sequence batching scheduler. "
        "Please disable the response cache.",
    ),
    (
        "C-122, S-135",
        BASE + "model_transaction_policy { decoupled: true } response_cache { enable: true }",
        "Response Cache does not currently support model m with 'decoupled' transaction policy. "
        "Please disable the response cache.",
    ),
    (
        "C-079",
        sequence(f"control_input {{ control {{ {BOOLEAN} }} }}"),
        "sequence batching control tensor must have a name for m",
    ),
    (
        "C-079",
        sequence(
            f'control_input {{ name: "c" control {{ {BOOLEAN} }} }} '
            f'control_input {{ name: "c" control {{ kind: CONTROL_SEQUENCE_END {BOOLEAN} }} }}'
        ),
        "sequence batching control tensor 'c' is specified for multiple control kinds for m",
    ),
    (
        "C-079",
        sequence(
            f'control_input {{ name: "c" control {{ {BOOLEAN} }} }} control_input {{ name: "d" '
            f"control {{ {BOOLEAN} }} }}"
        ),
        "sequence batching specifies multiple CONTROL_SEQUENCE_START tensors for m",
    ),
    (
        "C-079",
        control("", "READY"),
        "sequence batching must specify either 'int32_false_true', 'fp32_false_true' or 'bool_false_true' for "
        "CONTROL_SEQUENCE_READY for m",
    ),
    (
        "C-079",
        control(BOOLEAN + " bool_false_true: [ false, true ]", "END"),
        "sequence batching specifies more than one from 'int32_false_true', 'fp32_false_true' and "
        "'bool_false_true' for CONTROL_SEQUENCE_END for m",
    ),
    (
        "C-079",
        control("fp32_false_true: 0"),
        "sequence batching control 'fp32_false_true' must have exactly 2 entries for CONTROL_SEQUENCE_START for m",
    ),
    (
        "C-079",
        control("data_type: TYPE_UINT64 " + BOOLEAN, "CORRID"),
        "sequence batching must not specify either 'int32_false_true', 'fp32_false_true' or 'bool_false_true' for "
        "CONTROL_SEQUENCE_CORRID for m",
    ),
    (
        "C-079",
        control("data_type: TYPE_FP32", "CORRID"),
        "unexpected data type for control CONTROL_SEQUENCE_CORRID for m. Allowed data types are TYPE_UINT64, "
        "TYPE_INT64, TYPE_UINT32, TYPE_INT32 and TYPE_STRING",
    ),
    (
        "C-082",
        sequence("oldest { preferred_batch_size: 0 }"),
        "sequence batching preferred batch size must be positive for m",
    ),
    (
        "C-082",
        sequence("oldest { preferred_batch_size: 9 }"),
        "sequence batching preferred batch size must be <= max batch size for m",
    ),
    (
        "C-083",
        sequence("direct { minimum_slot_utilization: 1.5 }"),
        "sequence batching minimum slot utilization must be in range (0.0, 1.0] for m",
    ),
    (
        "C-123",
        BASE + "ensemble_scheduling { }",
        "ensemble scheduling cannot be set for model 'm' whose platform is not ensemble",
    ),
    (
        "C-123",
        'platform: "ensemble"',
        "ensemble scheduling must be set for ensemble m whose platform is ensemble",
    ),
    ("C-123", ensemble(""), "must specify 'step' for ensemble 'm'"),
    ("C-123", ensemble("step { }"), "must specify 'model_name' in step 0 of ensemble 'm'"),
    ("C-123", ensemble(step("a", {}, {"y": "O"})), "must specify 'input_map' in step 0 of ensemble 'm'"),
    (
        "C-123",
        ensemble(GOOD_STEP + step("b", {"x": "I"}, {})),
        "must specify 'output_map' in step 1 of ensemble 'm'",
    ),
    (
        "C-123",
        ensemble(GOOD_STEP + step("b", {"x": "I"}, {"y": "O"})),
        "ensemble tensor 'O' can appear in an output map only once for ensemble 'm' step 1",
    ),
    (
        "C-100",
        ensemble(GOOD_STEP, "instance_group { }"),
        "instance group should not be specified for ensemble 'm'",
    ),
    ("C-100", ensemble(GOOD_STEP, "optimization { }"), "optimization should not be specified for ensemble 'm'"),
    ("C-100", ensemble(GOOD_STEP, "model_warmup { }"), "model_warmup can not be specified for ensemble 'm'"),
    (
        "S-102",
        ensemble(GOOD_STEP, 'input { name: "J" data_type: TYPE_FP32 dims: 1 }'),
        "ensemble input 'J' for ensemble m' is not used",
    ),
    (
        "S-102",
        ensemble(GOOD_STEP, 'output { name: "P" data_type: TYPE_FP32 dims: 1 }'),
        "ensemble output 'P' for ensemble m' is not used",
    ),
    (
        "S-102",
        ensemble(GOOD_STEP + step("b", {"x": "I"}, {"y": "T"})),
        "ensemble tensor 'T' is unused in ensemble 'm'",
    ),
    (
        "S-102",
        ensemble(step("a", {"x": "I", "z": "T"}, {"y": "O"})),
        "output 'O' for ensemble 'm' is not written: at least one of its depending tensors, 'T', is not connected",
    ),
    (
        "S-102",
        ensemble(step("a", {"x": "I", "z": "T"}, {"y": "O"}) + step("b", {"x": "U"}, {"y": "T"})),
        "output 'O' for ensemble 'm' is not written: at least one of its depending tensors, 'U', is not connected",
    ),
    (
        "S-102",
        ensemble(step("a", {"x": "I", "z": "T"}, {"y": "O"}) + step("b", {"x": "O"}, {"y": "T"})),
        "output 'O' for ensemble 'm' is not written",
    ),
    ("C-021", METRIC.format(""), "metric control must specify 'metric_identifier'"),
    ("C-021", METRIC.format("metric_identifier { }"), "metric identifier must specify non-empty 'family'"),
    (
        "C-021",
        METRIC.format('metric_identifier { family: "f" }'),
        "metric control must specify 'histogram_options'",
    ),
    (
        "C-021",
        METRIC.format('metric_identifier { family: "f" } histogram_options { }'),
        "histogram options must specify non-empty 'buckets'",
    ),
]


@pytest.mark.parametrize(("row", "text", "expected"), POLL)
def test_a_bad_config_fails_the_poll_with_tritons_sentence(
    normalised: Normalised, row: str, text: str, expected: str
) -> None:
    config = normalised(text)
    found = [problem.text for problem in poll_problems(config)]
    assert expected in (found if row == "S-102" and found[-1:] == [expected] else found[:1]), row
    with pytest.raises(ConfigError):
        check_poll(config)


def tensor(inside: str, base: str = BASE) -> str:
    return base + 'output { name: "o" data_type: TYPE_FP32 dims: 1 } input { ' + inside + " }"


def output(inside: str) -> str:
    return BASE + 'input { name: "i" data_type: TYPE_FP32 dims: 1 } output { ' + inside + " }"


def batch_input(inside: str) -> str:
    return BASE + IO + f"batch_input {{ {inside} }}"


def batch_output(inside: str) -> str:
    return BASE + IO + f"batch_output {{ kind: BATCH_SCATTER_WITH_INPUT_SHAPE {inside} }}"


def group(inside: str, base: str = BASE) -> str:
    return base + IO + f"instance_group {{ {inside} }}"


def state(inside: str) -> str:
    return sequence(f'state {{ input_name: "a" output_name: "b" {inside} }}') + IO


def warmup(inside: str) -> str:
    return BASE + IO + f'model_warmup {{ name: "w" batch_size: 1 inputs {{ key: "i" value {{ {inside} }} }} }}'


RESHAPED = 'name: "x" data_type: TYPE_FP32 dims: [ {} ] reshape {{ shape: [ {} ] }}'
FP = 'name: "x" data_type: TYPE_FP32 '
NOT_INTEGER = "dimension must be integer >= 1, or -1 to indicate a variable-size dimension for m"

LOAD = [
    ("C-007", BASE, "must specify one or more 'input's for m"),
    ("C-030", tensor("data_type: TYPE_FP32 dims: 1"), "model input must specify 'name' for m"),
    ("C-030", output("data_type: TYPE_FP32 dims: 1"), "model output must specify 'name' for m"),
    ("C-031", tensor('name: "x" dims: 1'), "model input 'x' must specify 'data_type' for m"),
    ("C-031", output('name: "x" dims: 1'), "model output 'x' must specify 'data_type' for m"),
    ("C-031", tensor('name: "x" data_type: 99 dims: 1'), "model input 'x' has an unknown 'data_type', 99 for m"),
    ("C-032", tensor(FP), "model input 'x' must specify 'dims' for m"),
    ("C-032", tensor(FP + "dims: 0"), f"model input 'x' {NOT_INTEGER}"),
    ("C-032", output(FP + "dims: [ 1, -2 ]"), f"model output 'x' {NOT_INTEGER}"),
    ("C-033", tensor(FP + "format: FORMAT_NHWC dims: [ 1, 2 ]"), "model input NHWC/NCHW require 3 dims for m"),
    (
        "C-034",
        tensor(RESHAPED.format("4", "0")),
        "model input 'x' reshape dimensions must be integer >= 1, or -1 to indicate a variable-size dimension for m",
    ),
    ("C-034", tensor(RESHAPED.format("4", "2, 3")), "model input 'x' has different size for dims and reshape for m"),
    (
        "C-034",
        tensor(RESHAPED.format("-1, -1", "-1")),
        "model input 'x' has different number of variable-size dimensions for dims and reshape for m",
    ),
    (
        "D-015",
        tensor(RESHAPED.format("-1, 4", "4, -1")),
        "model input 'x' has different size for dims and reshape for m",
    ),
    ("D-015", tensor(RESHAPED.format("-1", "4")), "model input 'x' has different size for dims and reshape for m"),
    (
        "D-013",
        tensor(RESHAPED.format("1", "")),
        "model input 'x' cannot have empty reshape for non-batching model as scalar tensors are not supported for m",
    ),
    (
        "D-013",
        tensor(RESHAPED.format("2", ""), BASE + "max_batch_size: 4 "),
        "model input 'x' has different size for dims and reshape for m",
    ),
    (
        "C-035",
        tensor(FP + "dims: 1 is_shape_tensor: true", ONNX),
        "shape tensors are only supported for TensorRT platform for m",
    ),
    (
        "C-035",
        output(FP + "dims: 1 is_shape_tensor: true"),
        "shape tensors are only supported for TensorRT platform for m",
    ),
    (
        "C-038",
        tensor(FP + "dims: 1 is_non_linear_format_io: true", ONNX),
        "Non-linear IO format is only supported for the TensorRT platform for m",
    ),
    (
        "C-038",
        tensor(FP + "dims: 1 is_non_linear_format_io: true", TENSORRT),
        "Non-linear IO format input requires 3 dims for m",
    ),
    (
        "C-007",
        BASE + IO + 'input { name: "i" data_type: TYPE_FP32 dims: 1 }',
        "model input 'i' is specified more than once for m",
    ),
    (
        "C-124",
        batch_input("kind: BATCH_ITEM_SHAPE data_type: TYPE_FP32"),
        "batch input kind 'BATCH_ITEM_SHAPE' expects 1 source input, got 0 for m",
    ),
    ("C-124", batch_input("kind: 77"), "unknown batch input kind '77' for m"),
    (
        "C-124",
        batch_input('data_type: TYPE_INT64 source_input: "i"'),
        "batch input data type must be TYPE_INT32 or TYPE_FP32 for m",
    ),
    (
        "C-124",
        batch_input('data_type: TYPE_INT32 source_input: "nope"'),
        "unknown source input name 'nope' for m",
    ),
    (
        "C-124",
        batch_output('source_input: "i" target_name: "nope"'),
        "unknown target output name 'nope' for m",
    ),
    (
        "C-124",
        batch_output('source_input: "i" target_name: [ "o", "o" ]'),
        "target output name 'o' can only be specified once for m",
    ),
    (
        "C-124",
        batch_output('target_name: "o"'),
        "batch output kind 'BATCH_SCATTER_WITH_INPUT_SHAPE' expects 1 source input, got 0 for m",
    ),
    (
        "C-093",
        group("count: 100000"),
        "model m asks for 100000 instances, more than the 1024 that one model may have: each is a process of its own",
    ),
    (
        "C-094",
        group("kind: KIND_CPU gpus: 0"),
        "instance group m_0 of model m has kind KIND_CPU but specifies one or more GPUs",
    ),
    (
        "C-094",
        group("kind: KIND_MODEL gpus: 0"),
        "instance group m_0 of model m has kind KIND_MODEL but specifies one or more GPUs",
    ),
    (
        "C-094",
        group("kind: KIND_GPU"),
        "instance group m_0 of model m has kind KIND_GPU but no GPUs are available",
    ),
    (
        "C-094",
        group('name: "g" kind: KIND_GPU gpus: 0'),
        "instance group g of model m specifies invalid or unsupported gpu id 0. GPUs with at least the minimum "
        "required CUDA compute compatibility of 6.000000 are: ",
    ),
    (
        "C-097",
        group('profile: "0"', ONNX),
        "instance group m_0 of model m and platform onnxruntime_onnxspecifies profile field which is only supported "
        "for TensorRT models",
    ),
    (
        "C-097",
        group('profile: "-1"', TENSORRT),
        "instance group m_0 of model m and platform tensorrt_plan specifies invalid profile -1. The field should "
        "contain the string representation of a non-negative integer.",
    ),
    (
        "S-153",
        group('rate_limiter { resources [ { name: "R" global: true count: 1 }, { name: "R" count: 1 } ] }'),
        'Resource "R" is present as both global and device-specific resource in the model configuration.',
    ),
    (
        "C-112",
        warmup("data_type: TYPE_FP32 dims: -1 zero_data: true"),
        "warmup setting expects all variable-size dimensions are specified for input 'i'",
    ),
    ("C-110", warmup("dims: 1 zero_data: true"), "warmup setting must specify 'data_type' for input 'i'"),
    (
        "C-110",
        warmup("data_type: TYPE_FP32 dims: 1"),
        "[request id: <id_unknown>] warmup setting expects input 'i' to have input_data_type set",
    ),
    (
        "C-110",
        BASE + IO + 'model_warmup { name: "w" batch_size: 2 }',
        "warmup sample 'w' has batch size 2, but the model's maximum is 0",
    ),
    ("S-086", sequence("state { }") + IO, "sequence batching state must specify 'input_name' for m"),
    ("S-086", state("dims: 1"), "sequence batching state 'a' must specify 'data_type' for m"),
    (
        "S-086",
        state("data_type: TYPE_FP32"),
        "sequence batching state 'a' must specify 'dims' of integers >= 1, or -1, for m",
    ),
    (
        "S-086",
        sequence(
            'state { input_name: "a" output_name: "b" data_type: TYPE_FP32 dims: 1 } '
            'state { input_name: "a" output_name: "c" data_type: TYPE_FP32 dims: 1 }'
        )
        + IO,
        "sequence batching state 'a' is specified more than once for m",
    ),
    (
        "S-081",
        state("data_type: TYPE_FP32 dims: 1 initial_state { } initial_state { }"),
        "initial_state field for state input 'a' must contain exactly one or zero element. Found '2' elements.",
    ),
    (
        "S-081",
        state(
            'data_type: TYPE_FP32 dims: -1 initial_state { name: "s" data_type: TYPE_FP32 dims: -1 zero_data: true }'
        ),
        "'initial_state' field for state input name 'a' contains variable dimensions.",
    ),
    (
        "S-081",
        state("data_type: TYPE_FP32 dims: 1 initial_state {  }"),
        "The data type used for 'initial_state' field of state 'a' does not match the state data type.",
    ),
    (
        "S-081",
        state("data_type: TYPE_FP32 dims: 1 initial_state { data_type: TYPE_FP32 }"),
        "Field 'name' must be set when using initial_state for state input 'a'.",
    ),
    (
        "S-081",
        state('data_type: TYPE_FP32 dims: 2 initial_state { name: "s" data_type: TYPE_FP32 dims: [ 2, 2 ] }'),
        "Number of dimensions in 'initial_state' doesn't match the size of 'state' dimensions for state input 'a'. "
        "2 != 1",
    ),
    (
        "S-081",
        state('data_type: TYPE_FP32 dims: 2 initial_state { name: "s" data_type: TYPE_FP32 dims: 1 zero_data: true }'),
        "'initial_state' dim for input name 'a' doesn't match 'state' dim description. 1 != 2",
    ),
    (
        "S-081",
        state('data_type: TYPE_FP32 dims: 2 initial_state { name: "s" data_type: TYPE_FP32 dims: 2 }'),
        "initial_state setting expects state'a' to have state_data set",
    ),
    (
        "C-053",
        ONNX + IO + 'optimization { execution_accelerators { cpu_execution_accelerator { name: "openvin" } } }',
        "unknown Execution Accelerator 'openvin' is requested",
    ),
]


@pytest.mark.parametrize(("row", "text", "expected"), LOAD)
def test_a_bad_config_fails_the_load_with_tritons_sentence(
    normalised: Normalised, row: str, text: str, expected: str
) -> None:
    config = normalised(text)
    assert [problem.text for problem in load_problems(config)][:1] == [expected], row
    assert poll_problems(config) == [], "spec C-121: these are found when the model is loaded"
    with pytest.raises(ConfigError):
        check_load(config)


def test_without_auto_complete_tensors_are_judged_at_the_poll(normalised: Normalised) -> None:
    """Spec R-060."""
    config = normalised(BASE)
    assert poll_problems(config) == []
    assert [problem.text for problem in poll_problems(config, auto_complete=False)] == [
        "must specify one or more 'input's for m",
        "must specify one or more 'output's for m",
    ]


def test_the_identity_backend_judges_missing_tensors_itself(normalised: Normalised) -> None:
    """Spec B-082: its sentence is 'model configuration must have equal input/output pairs'."""
    assert load_problems(normalised('backend: "identity"')) == []


def test_python_models_need_no_tensors(normalised: Normalised) -> None:
    """Triton loads them with the override ``{}`` (spec H-215)."""
    assert load_problems(normalised('backend: "python"')) == []


def test_an_unknown_gpu_lists_those_there_are(normalised: Normalised) -> None:
    """Spec C-094."""
    gpus = (Gpu(0, 9.0), Gpu(1, 8.0))
    config = normalised(group("kind: KIND_GPU gpus: [ 0, 5 ]"), gpus=gpus)
    (problem,) = load_problems(config, gpus)
    assert problem.text.endswith("gpu id 5. GPUs with at least the minimum required CUDA compute compatibility of "
                                 "6.000000 are: 0, 1")  # fmt: skip
    assert problem.field == "instance_group[0].gpus[1]"
    assert "--gpu-fallback" in problem.hint
    assert load_problems(normalised(group("kind: KIND_GPU"), gpus=gpus), gpus) == []


def test_platform_and_backend_both_missing(normalised: Normalised) -> None:
    """Spec C-002."""
    config = parse_config_text('name: "m"')
    assert [p.text for p in poll_problems(config)] == [
        "must specify 'platform' or 'backend' for 'm'",
        "must specify 'version policy' for m",
    ]


def test_a_name_must_be_that_of_the_directory(normalised: Normalised) -> None:
    """Spec R-009."""
    config = normalised('name: "other" backend: "x"', name="m")
    problem = directory_name_problem(config, "m")
    assert problem is not None
    assert problem.text == ("unexpected directory name 'm' for model 'other', directory name must equal model name")
    assert (problem.line, problem.column, problem.written) == (1, 7, '"other"')
    assert directory_name_problem(config, "other") is None


def test_problems_know_their_line_and_all_are_found(normalised: Normalised) -> None:
    text = 'backend: "x"\nmax_batch_size: 4\ninput {\n  name: "i" data_type: TYPE_FP32\n  dims: [ 1, 0 ] }\n'
    text += 'output { name: "o" dims: 1 }\ndynamic_batching { preferred_batch_size: [ 2,\n  8 ] }'
    found = [(p.line, p.column, p.written, p.field) for p in load_problems(normalised(text))]
    assert found == [
        (8, 3, "8", "dynamic_batching.preferred_batch_size[1]"),
        (5, 14, "0", "input[0].dims[1]"),
        (6, 8, "", "output[0]"),
    ]


def test_good_configs_have_no_problems(normalised: Normalised) -> None:
    for text in (
        BASE + IO,
        dynamic("priority_levels: 2 default_priority_level: 1 default_queue_policy { max_queue_size: 1 }") + IO,
        dynamic("preserve_ordering: true default_queue_policy { timeout_action: DELAY }") + IO,
        dynamic("", 0) + IO,
        control("data_type: TYPE_STRING", "CORRID") + IO,
        sequence("direct { minimum_slot_utilization: 1.0 }") + IO,
        ensemble(step("a", {"x": "I"}, {"y": "T"}) + step("b", {"x": "T", "z": "I"}, {"y": "O"})),
        tensor(RESHAPED.format("2, 4, -1, 6", "8, -1, 1, 6")),
        tensor(RESHAPED.format("1", ""), BASE + "max_batch_size: 1 "),
        batch_input('kind: BATCH_ITEM_SHAPE data_type: TYPE_FP32 source_input: "i" target_name: "t"'),
        state('data_type: TYPE_FP32 dims: -1 initial_state { name: "s" data_type: TYPE_FP32 dims: 2 zero_data: true }'),
    ):
        config = normalised(text)
        assert (poll_problems(config), load_problems(config)) == ([], []), text


def test_samples_of_an_ensemble_are_taken_if_a_parameter_says_so(normalised: Normalised) -> None:
    """L-054; without it C-100."""
    samples = 'model_warmup { } parameters { key: "forebay_ensemble_warmup" value: { string_value: "VALUE" } }'
    for value, count in (("true", 0), ("false", 1)):
        problems = poll_problems(normalised(ensemble(GOOD_STEP, samples.replace("VALUE", value))))
        found = [problem for problem in problems if "can not be" in problem.text]
        assert len(found) == count
        assert all("forebay_ensemble_warmup" in problem.hint for problem in found)


def test_paths_read_like_code() -> None:
    assert path_text(("input", 0, "dims", 1)) == "input[0].dims[1]"
    assert path_text(()) == ""
