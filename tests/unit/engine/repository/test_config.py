"""Reading text and JSON, printing ``/config``."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.engine.repository.auto_complete import DescribedModel, DescribedTensor, complete_config, merge_completed
from forebay.engine.repository.config import (
    MAX_CONFIG_BYTES,
    config_json,
    parse_config_bytes,
    parse_config_json,
    parse_config_text,
)
from forebay.engine.repository.config_problem import ConfigError, Problem
from forebay.engine.repository.model_config_schema import ModelConfig
from forebay.engine.repository.normalise import detect_backend, normalise_defaults, normalise_instance_groups
from forebay.engine.repository.text_source import TextSource


def problems_of(text: str) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as caught:
        parse_config_text(text)
    return caught.value.problems


# ---- text ------------------------------------------------------------------------------------------------------------


def test_every_way_of_writing_is_understood(data_directory: pathlib.Path) -> None:
    """Spec R-017: comments, lists or repeated blocks, braces or angles, separators, quotes, numbers, maps."""
    text = (data_directory / "wide_syntax.pbtxt").read_text()
    config = parse_config_text(text)
    message = config.message
    assert message.backend == "identity"
    assert message.max_batch_size == 8
    assert [tensor.name for tensor in message.input] == ["ABC", "D", "E"]
    assert list(message.input[1].dims) == [2, 4]
    assert message.input[1].data_type == 8
    assert message.output[0].name == 'OAB\n"quoted"'
    assert {key: value.string_value for key, value in message.parameters.items()} == {
        "k": "v",
        "l": "w",
        "m": "x",
        "n": "",
    }
    assert list(message.dynamic_batching.preferred_batch_size) == [4, 8, 2]
    assert message.dynamic_batching.max_queue_delay_microseconds == 8
    assert message.dynamic_batching.priority_queue_policy[3].max_queue_size == 7
    assert message.version_policy.WhichOneof("policy_choice") == "all"
    assert TextSource("wide", text).problems == (), "the reader that finds positions accepts it as well"


def test_an_empty_text_is_an_empty_config() -> None:
    assert parse_config_text("").to_bytes() == b""
    assert parse_config_bytes(b"\xef\xbb\xbf# only a comment\n").to_bytes() == b""


def test_an_unknown_field_names_place_possibilities_and_likely_meaning() -> None:
    """Spec R-017: an unknown field is an error."""
    (problem,) = problems_of('name: "x"\n  max_batchsize: 3\n')
    assert problem.text == 'Message type "inference.ModelConfig" has no field named "max_batchsize".'
    assert (problem.source, problem.line, problem.column) == ("config.pbtxt", 2, 3)
    assert problem.written == "max_batchsize"
    assert problem.suggestion == "max_batch_size"
    assert "instance_group" in problem.possible
    assert "did you mean `max_batch_size`?" in problem.describe()


@pytest.mark.parametrize(
    ("text", "expected", "suggestion", "place"),
    [
        ("instance_group { kind: GPU }", 'Unknown enumeration value of "GPU" for field "kind".', "KIND_GPU", (1, 24)),
        (
            'input { data_type: "TYPE_FP32" }',
            'Unknown enumeration value of "TYPE_FP32" for field "data_type".',
            "TYPE_FP32",
            (1, 20),
        ),
        (
            "input { data_type: FP32 }",
            'Unknown enumeration value of "FP32" for field "data_type".',
            "TYPE_FP32",
            (1, 20),
        ),
        ('max_batch_size: "8"', 'Expected integer, got: "8"', "8", (1, 17)),
        ("max_batch_size: 1.5", "Expected integer, got: 1.5", "", (1, 17)),
        ("max_batch_size: 3000000000", "Integer out of range (3000000000)", "", (1, 17)),
        ("name: model", "Expected string, got: model", '"model"', (1, 7)),
        (
            "response_cache { enable: yes }",
            'Invalid value for boolean field "enable". Value: "yes".',
            "",
            (1, 26),
        ),
        ("max_batch_size: 1 max_batch_size: 2", 'Non-repeated field "max_batch_size" is specified', "", (1, 19)),
        ('name "x"', 'Expected ":", found ""x"".', "", (1, 6)),
        ("input [ { dims: [ 1 2 ] } ]", 'Expected "," or "]", found "2".', "", (1, 21)),
        ("input: 3", 'Expected "{", found "3".', "", (1, 8)),
        ("input {", 'Expected "}" or a field name, found "end of file".', "", (1, 8)),
        ("}", 'Expected a field name, found "}".', "", (1, 1)),
        ("name: ", 'Expected string, got: "end of file".', "", (1, 7)),
    ],
)
def test_a_wrong_value_names_what_was_expected(
    text: str, expected: str, suggestion: str, place: tuple[int, int]
) -> None:
    first = problems_of(text)[0]
    assert first.text.startswith(expected)
    assert first.suggestion == suggestion
    assert (first.line, first.column) == place


def test_two_scheduling_blocks_are_refused() -> None:
    """Spec C-010."""
    (problem,) = problems_of("dynamic_batching { }\nsequence_batching { }")
    assert problem.text == (
        'Field "sequence_batching" is specified along with field "dynamic_batching", another member of oneof '
        '"scheduling_choice".'
    )
    assert problem.line == 2


def test_all_problems_of_a_text_are_found_at_once() -> None:
    text = 'nam: { a: [1, {b: "}"}] }\ninput { dats_type: TYPE_FP32 dims: [ "1" ] }\nmax_batch_size: x\n'
    assert [(problem.line, problem.suggestion) for problem in problems_of(text)] == [
        (1, "name"),
        (2, "data_type"),
        (2, "1"),
        (3, ""),
    ]


def test_problems_are_counted_in_the_one_line_text() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config_text("nam: 1\nbackendd: 2", "m/config.pbtxt")
    assert caught.value.text_with_hint == (
        'm/config.pbtxt:1:1: Message type "inference.ModelConfig" has no field named "nam".; '
        "did you mean 'name'? (1 more problems)"
    )
    assert caught.value.describe().count("\n") >= 3


def test_a_text_that_is_not_utf8_names_the_line() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config_bytes(b'name: "x"\nbackend: "\xff"')
    (problem,) = caught.value.problems
    assert (problem.text, problem.line, problem.column) == ("model configuration is not UTF-8 text", 2, 11)


def test_size_and_depth_are_bounded() -> None:
    with pytest.raises(ConfigError, match="larger than"):
        parse_config_text("#" * (MAX_CONFIG_BYTES + 1))
    with pytest.raises(ConfigError, match="larger than"):
        parse_config_json(" " * (MAX_CONFIG_BYTES + 1))
    with pytest.raises(ConfigError):
        parse_config_text("a { " * 100_000)
    with pytest.raises(ConfigError, match="JSON: nested too deeply"):
        parse_config_json("[" * 100_000)
    with pytest.raises(ConfigError) as caught:
        parse_config_text("a: 1\n" * 10_000)
    assert len(caught.value.problems) == 50


@given(st.text(alphabet="name:{}[]<>\"'#,; \n\\0123456789.-xTYPE_FP32abcinputdims", max_size=60))
def test_any_text_is_either_read_or_refused_with_a_problem(text: str) -> None:
    try:
        config = parse_config_text(text)
    except ConfigError as error:
        refused = error
    else:
        assert TextSource("text", text).problems == ()
        assert config_json(config)
        return
    assert all(problem.text for problem in refused.problems)


# ---- JSON ------------------------------------------------------------------------------------------------------------


def test_an_override_may_use_numbers_or_strings_and_any_case_of_enums() -> None:
    """Spec H-215; enum names in any case as in core's JsonToModelConfig."""
    config = parse_config_json(
        '{"backend":"identity","max_batch_size":4,"input":[{"name":"A","data_type":"type_fp32","dims":["-1",3]}],'
        '"parameters":{"k":{"string_value":"v"}},"dynamic_batching":{"priority_queue_policy":{"2":{}}}}'
    )
    assert list(config.message.input[0].dims) == [-1, 3]
    assert config.message.input[0].data_type == 11
    assert config.message.parameters["k"].string_value == "v"
    assert list(config.message.dynamic_batching.priority_queue_policy) == [2]


def test_printed_configs_can_be_loaded_again(data_directory: pathlib.Path) -> None:
    config = parse_config_text((data_directory / "wide_syntax.pbtxt").read_text())
    assert parse_config_json(config_json(config)) == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"backend":"identity","bogus":1}', "bogus: Cannot find field."),
        ('{"input":[{"nam":"x"}]}', "nam: Cannot find field."),
        ('{"input":[{"data_type":"TYPE_X"}]}', 'data_type: invalid value "TYPE_X" for type DataType'),
        ('{"name":"a","name":"b"}', "JSON: key 'name' is given more than once"),
        ("{", "JSON: Expecting property name enclosed in double quotes"),
        ("[]", "model configuration must be a JSON object"),
        ("null", "model configuration must be a JSON object"),
    ],
)
def test_a_bad_override_says_what_is_wrong(text: str, expected: str) -> None:
    """Spec H-215, E-099, E-102."""
    with pytest.raises(ConfigError) as caught:
        parse_config_json(text)
    assert caught.value.text == expected


@pytest.mark.parametrize(
    "text",
    [
        '{"max_batch_size":"x"}',
        '{"max_batch_size":1.5}',
        '{"max_batch_size":99999999999}',
        '{"input":{"name":"x"}}',
        '{"name":["x"]}',
        '{"dynamic_batching":{},"sequence_batching":{}}',
        '{"parameters":[1]}',
        '{"dynamic_batching":{"priority_queue_policy":{"x":{}}}}',
    ],
)
def test_wrong_types_in_json_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_config_json(text)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "input", "dims", "data_type", "parameters", "optimization", "x"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@given(_JSON)
def test_any_json_is_either_read_or_refused_with_a_problem(document: Any) -> None:
    try:
        config = parse_config_json(json.dumps(document))
    except ConfigError as error:
        refused = error
    else:
        assert json.loads(config_json(config))
        return
    assert all(problem.text for problem in refused.problems)


# ---- printing --------------------------------------------------------------------------------------------------------


def described(*names: str) -> DescribedModel:
    first, second = names
    return DescribedModel((DescribedTensor(first, "TYPE_FP32", (-1,)),), (DescribedTensor(second, "TYPE_FP32", (-1,)),))


def test_an_auto_completed_model_prints_as_triton_does(data_directory: pathlib.Path) -> None:
    """Appendix G, byte for byte; spec H-043..H-045, R-063, D-016, C-090, S-014; E-009."""
    config = ModelConfig()
    detect_backend(config, "ort_auto", {"model.onnx": False})
    normalise_defaults(config)
    completed = complete_config(config, described("INPUT0", "OUTPUT0")).config
    normalise_instance_groups(completed)
    text = config_json(completed)
    assert text == (data_directory / "ort_auto.json").read_text().rstrip("\n")
    assert text.startswith((data_directory / "E-009.prefix").read_text().rstrip("\n"))


def test_an_explicit_config_prints_as_in_the_transcripts(data_directory: pathlib.Path) -> None:
    """E-033."""
    text = (
        'backend: "identity"\nmax_batch_size: 4\n'
        'input [ { name: "INPUT0" data_type: TYPE_FP32 dims: [ -1 ] }, '
        '{ name: "INPUT1" data_type: TYPE_STRING dims: [ -1 ] optional: true } ]\n'
        'output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ -1 ] } ]'
    )
    config = parse_config_text(text)
    detect_backend(config, "id_all", {})
    normalise_defaults(config)
    assert config_json(config).startswith((data_directory / "E-033.prefix").read_text().rstrip("\n"))


def test_a_completed_python_model_prints_as_in_the_transcripts(data_directory: pathlib.Path) -> None:
    """E-162."""
    config = ModelConfig()
    detect_backend(config, "auto", {"model.py": False})
    normalise_defaults(config)
    returned = parse_config_json(
        '{"max_batch_size":3,"input":[{"name":"IN","data_type":"TYPE_FP32","dims":[4]}],'
        '"output":[{"name":"OUT","data_type":"TYPE_FP32","dims":[4]}],"dynamic_batching":{}}'
    )
    text = config_json(merge_completed(config, returned).config)
    assert text.startswith((data_directory / "E-162.prefix").read_text().rstrip("\n"))
    assert '"dynamic_batching":{"preferred_batch_size":[3],' in text


def test_a_scalar_choice_prints_behind_the_fields_around_it() -> None:
    """Spec H-044, as Triton 2.51 prints ``initial_state``: ``name`` is declared behind ``zero_data``."""
    state = 'input_name: "i" output_name: "o" initial_state { zero_data: true name: "x" data_type: TYPE_FP32 dims: 1 }'
    printed = config_json(parse_config_text(f"sequence_batching {{ state {{ {state} }} }}"))
    assert '"initial_state":[{"data_type":"TYPE_FP32","dims":["1"],"name":"x","zero_data":true}]' in printed


def test_64_bit_numbers_are_numbers_except_where_triton_leaves_strings() -> None:
    """Spec H-043."""
    config = parse_config_text(
        """
        version_policy { specific { versions: [ 2, 1 ] } }
        sequence_batching {
          max_sequence_idle_microseconds: 5
          oldest { max_queue_delay_microseconds: 6 }
          state { dims: [ 7 ] initial_state { dims: [ 8 ] zero_data: true } }
        }
        model_warmup { name: "w" inputs { key: "i" value { dims: [ 9 ] zero_data: true } } }
        optimization { cuda { graph_spec { input { key: "i" value { dim: [ 10 ] } } } } }
        instance_group { secondary_devices { device_id: 11 } }
        """
    )
    document = json.loads(config_json(config))
    batching = document["sequence_batching"]
    assert document["version_policy"] == {"specific": {"versions": [2, 1]}}
    assert batching["max_sequence_idle_microseconds"] == 5
    assert batching["oldest"]["max_queue_delay_microseconds"] == 6
    assert batching["state"][0]["dims"] == [7]
    assert batching["state"][0]["initial_state"][0]["dims"] == ["8"]
    assert document["model_warmup"][0]["inputs"]["i"]["dims"] == [9]
    assert document["optimization"]["cuda"]["graph_spec"][0]["input"]["i"]["dim"] == ["10"]
    assert document["instance_group"][0]["secondary_devices"][0]["device_id"] == "11"
    assert "input_data_file" not in document["model_warmup"][0]["inputs"]["i"], "unset members of a oneof are absent"


@pytest.mark.parametrize(("written", "printed"), [("0.8", "0.8"), ("1", "1"), ("0", "0"), ("0.333333", "0.333333")])
def test_floats_print_short(written: str, printed: str) -> None:
    config = parse_config_text(f"sequence_batching {{ direct {{ minimum_slot_utilization: {written} }} }}")
    assert f'"minimum_slot_utilization":{printed}}}' in config_json(config)


def test_floats_of_buckets_and_infinities_print_as_protobuf_does() -> None:
    config = parse_config_text(
        'model_metrics { metric_control { metric_identifier { family: "f" } histogram_options '
        "{ buckets: [ 0.1, 1, 2.5, inf ] } } }"
    )
    assert '"buckets":[0.1,1,2.5,"Infinity"]' in config_json(config)


def test_text_prints_without_escapes_beyond_json() -> None:
    config = parse_config_text('name: "na\\"me/\\303\\244<>"')
    assert config_json(config).startswith('{"name":"na\\"me/ä<>",')
