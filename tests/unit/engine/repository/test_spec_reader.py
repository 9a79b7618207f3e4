"""The plain view of a configuration."""

from __future__ import annotations

import subprocess
import sys
from typing import Protocol

import msgspec

from forebay.engine.repository import model_spec as spec
from forebay.engine.repository.model_config_schema import ModelConfig
from forebay.engine.repository.normalise import Gpu
from forebay.engine.repository.spec_reader import spec_from_config

IO = (
    'input { name: "i" data_type: TYPE_STRING dims: -1 } output { name: "o" data_type: TYPE_FP32 dims: 1 reshape { } } '
)


class Normalised(Protocol):
    def __call__(
        self, text: str, name: str = "m", files: dict[str, bool] | None = None, gpus: tuple[Gpu, ...] = ()
    ) -> ModelConfig: ...


def test_a_dynamic_model_with_everything(normalised: Normalised) -> None:
    text = (
        'backend: "onnxruntime" max_batch_size: 8 '
        'input { name: "i" data_type: TYPE_STRING dims: [ -1 ] optional: true allow_ragged_batch: true } '
        'output { name: "o" data_type: TYPE_FP32 dims: 1 reshape { } label_filename: "labels.txt" } '
        "dynamic_batching { preferred_batch_size: [ 8, 4, 8 ] max_queue_delay_microseconds: 5 priority_levels: 2 "
        "default_priority_level: 2 default_queue_policy { default_timeout_microseconds: 9 timeout_action: DELAY } "
        "priority_queue_policy { key: 1 value { max_queue_size: 3 allow_timeout_override: true } } } "
        'parameters { key: "k" value { string_value: "v" } } metric_tags { key: "t" value: "u" } '
        "response_cache { enable: true } version_policy { specific { versions: [ 3, 1 ] } } "
        'cc_model_filenames { key: "8.0" value: "net80.onnx" } model_operations { op_library_filename: "ops.so" } '
        "optimization { priority: PRIORITY_MAX graph { level: -1 } execution_accelerators { "
        'gpu_execution_accelerator { name: "cuda" parameters { key: "a" value: "b" } } } } '
        'model_warmup { name: "w" batch_size: 2 inputs { key: "i" value { data_type: TYPE_STRING dims: 1 '
        'input_data_file: "raw" } } } '
        'model_metrics { metric_control { metric_identifier { family: "f" } histogram_options { buckets: [ 1, 2 ] } } }'
        ' model_repository_agents { agents { name: "checksum" parameters { key: "MD5:a" value: "b" } } }'
    )
    found = spec_from_config(normalised(text))
    assert found.inputs == (
        spec.InputSpec(name="i", datatype="BYTES", dims=(-1,), optional=True, allow_ragged_batch=True),
    )
    assert found.outputs == (
        spec.OutputSpec(name="o", datatype="FP32", dims=(1,), reshape=(), label_filename="labels.txt"),
    )
    batching = found.scheduling
    assert isinstance(batching, spec.DynamicBatchingSpec)
    assert batching.preferred_batch_sizes == (4, 8)
    assert (batching.max_queue_delay_us, batching.priority_levels, batching.default_priority_level) == (5, 2, 2)
    assert batching.priority_queue_policies == {1: spec.QueuePolicySpec(max_queue_size=3, allow_timeout_override=True)}
    assert batching.default_queue_policy.timeout_action is spec.TimeoutAction.DELAY
    assert batching.default_queue_policy.default_timeout_us == 9
    assert batching.has_queue_policy
    assert found.parameters == {"k": "v"}
    assert found.metric_tags == {"t": "u"}
    assert found.response_cache
    assert found.version_policy == "specific 3 1"
    assert (found.default_model_filename, found.cc_model_filenames) == ("model.onnx", {"8.0": "net80.onnx"})
    assert found.op_libraries == ("ops.so",)
    assert found.optimization.priority is spec.ModelPriority.MAX
    assert found.optimization.graph_level == -1
    assert found.optimization.gpu_accelerators == (spec.AcceleratorSpec(name="cuda", parameters={"a": "b"}),)
    assert found.warmup == (
        spec.WarmupSpec(
            name="w",
            batch_size=2,
            count=1,
            inputs=(spec.WarmupInputSpec(name="i", datatype="BYTES", dims=(1,), source="file", filename="raw"),),
        ),
    )
    assert found.histograms == (spec.HistogramSpec(family="f", buckets=(1.0, 2.0)),)
    assert found.agents == (spec.AgentSpec(name="checksum", parameters={"MD5:a": "b"}),)
    assert [instance.name for instance in found.instances] == ["m_0", "m_1"]
    assert found.outputs[0].tensor(("cat",)).labels == ("cat",)
    assert found.inputs[0].tensor().allow_ragged_batch


def test_a_default_model_is_plain(normalised: Normalised) -> None:
    found = spec_from_config(normalised('backend: "python" ' + IO))
    assert found.scheduling == spec.DefaultSchedulingSpec()
    assert found.optimization == spec.OptimizationSpec()
    assert found.metadata_platform == "python", "spec H-038"
    assert not found.is_batching
    assert not spec.DynamicBatchingSpec().has_queue_policy


def test_sequences_have_controls_states_and_a_strategy(normalised: Normalised) -> None:
    """Spec C-077..C-081."""
    text = (
        'backend: "x" max_batch_size: 4 sequence_batching { iterative_sequence: true '
        "oldest { max_candidate_sequences: 6 preferred_batch_size: [ 4, 2 ] preserve_ordering: true } "
        'control_input { name: "s" control { kind: CONTROL_SEQUENCE_START fp32_false_true: [ 0, 1 ] } } '
        'control_input { name: "e" control { kind: CONTROL_SEQUENCE_END bool_false_true: [ false, true ] } } '
        'control_input { name: "c" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_STRING } } '
        'state { input_name: "a" output_name: "b" data_type: TYPE_INT64 dims: -1 '
        'initial_state { name: "z" data_type: TYPE_INT64 dims: 2 data_file: "zero" } } }'
    )
    batching = spec_from_config(normalised(text + IO)).scheduling
    assert batching == spec.SequenceBatchingSpec(
        strategy=spec.OldestStrategy(max_candidate_sequences=6, preferred_batch_sizes=(2, 4), preserve_ordering=True),
        controls=(
            spec.ControlSpec(name="s", kind="START", datatype="FP32"),
            spec.ControlSpec(name="e", kind="END", datatype="BOOL"),
            spec.ControlSpec(name="c", kind="CORRID", datatype="BYTES"),
        ),
        states=(
            spec.StateSpec(
                input_name="a",
                output_name="b",
                datatype="INT64",
                dims=(-1,),
                initial_dims=(2,),
                initial_file="zero",
                initial_name="z",
            ),
        ),
        iterative_sequence=True,
    )
    direct = spec_from_config(normalised('backend: "x" sequence_batching { }' + IO)).scheduling
    assert isinstance(direct, spec.SequenceBatchingSpec)
    assert direct.strategy == spec.DirectStrategy(), "spec C-078: none given is direct"


def test_ensembles_have_steps_and_no_instances(normalised: Normalised) -> None:
    """Spec C-084; a version that is not given is the latest."""
    text = (
        'platform: "ensemble" ensemble_scheduling { max_inflight_requests: 5 '
        'step { model_name: "a" model_version: -1 input_map { key: "x" value: "i" } '
        'output_map { key: "y" value: "t" } }'
        ' step { model_name: "b" model_namespace: "n" input_map { key: "x" value: "t" } '
        'output_map { key: "y" value: "o" } } }'
    )
    found = spec_from_config(normalised(text + IO))
    assert found.is_ensemble
    assert found.instances == ()
    assert found.scheduling == spec.EnsembleSpec(
        max_inflight_requests=5,
        steps=(
            spec.EnsembleStepSpec(model_name="a", model_version=-1, input_map={"x": "i"}, output_map={"y": "t"}),
            spec.EnsembleStepSpec(
                model_name="b", model_version=-1, input_map={"x": "t"}, output_map={"y": "o"}, model_namespace="n"
            ),
        ),
    )


def test_instances_are_named_after_group_and_number(normalised: Normalised) -> None:
    """Spec C-091, C-093, C-095, C-099."""
    gpus = (Gpu(0, 9.0), Gpu(1, 9.0))
    text = (
        'backend: "x" instance_group [ { kind: KIND_GPU count: 2 }, { name: "aux" kind: KIND_CPU passive: true '
        'host_policy: "p" rate_limiter { priority: 0 resources { name: "R" global: true count: 4 } } }, '
        "{ kind: KIND_MODEL } ]"
    )
    instances = spec_from_config(normalised(text + IO, gpus=gpus)).instances
    assert [(i.name, i.kind.value, i.device_id, i.host_policy) for i in instances] == [
        ("m_0_0", "GPU", 0, "gpu_0"),
        ("m_0_0", "GPU", 1, "gpu_1"),
        ("m_0_1", "GPU", 0, "gpu_0"),
        ("m_0_1", "GPU", 1, "gpu_1"),
        ("aux_0", "CPU", 0, "p"),
        ("m_2_0", "MODEL", 0, "model"),
    ]
    assert instances[4].passive
    assert instances[4].rate_priority == 1, "spec S-151: 0 is treated as 1"
    assert instances[4].resources == (spec.ResourceSpec(name="R", is_global=True, count=4),)


def test_specs_cross_a_process_as_messagepack(normalised: Normalised) -> None:
    found = spec_from_config(normalised('backend: "onnxruntime" max_batch_size: 2 dynamic_batching { }' + IO))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(found), type=spec.ModelSpec) == found


def test_importing_the_spec_does_not_import_protobuf() -> None:
    code = "import sys, forebay.engine.repository.model_spec; sys.exit('google.protobuf' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
