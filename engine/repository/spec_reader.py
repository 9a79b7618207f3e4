"""Turn a normalised and checked configuration into a :class:`~forebay.engine.repository.model_spec.ModelSpec`."""

from __future__ import annotations

from typing import Any

from forebay.engine.repository import model_spec as spec
from forebay.engine.repository.model_config_schema import ModelConfig, enum_name

_CONTROL_DATATYPES = {"int32_false_true": "INT32", "fp32_false_true": "FP32", "bool_false_true": "BOOL"}
_WARMUP_SOURCES = {"zero_data": "zero", "random_data": "random", "input_data_file": "file"}


def spec_from_config(config: ModelConfig) -> spec.ModelSpec:
    """Return the plain view of a configuration.

    Args:
        config: completed, with instance groups normalised and ``validate.load_problems`` empty.
    """
    message = config.message
    return spec.ModelSpec(
        name=message.name,
        backend=message.backend,
        platform=message.platform,
        runtime=message.runtime,
        max_batch_size=message.max_batch_size,
        inputs=tuple(_input(tensor) for tensor in message.input),
        outputs=tuple(_output(tensor) for tensor in message.output),
        batch_inputs=tuple(_batch_input(item) for item in message.batch_input),
        batch_outputs=tuple(_batch_output(item) for item in message.batch_output),
        scheduling=_scheduling(message),
        instances=tuple(instance for group in message.instance_group for instance in _instances(group)),
        default_model_filename=message.default_model_filename,
        cc_model_filenames=dict(message.cc_model_filenames),
        op_libraries=tuple(message.model_operations.op_library_filename),
        parameters={key: message.parameters[key].string_value for key in sorted(message.parameters)},
        metric_tags={key: message.metric_tags[key] for key in sorted(message.metric_tags)},
        decoupled=message.model_transaction_policy.decoupled,
        response_cache=message.response_cache.enable,
        optimization=_optimization(message.optimization),
        warmup=tuple(_warmup(sample) for sample in message.model_warmup),
        histograms=tuple(
            spec.HistogramSpec(
                family=control.metric_identifier.family, buckets=tuple(control.histogram_options.buckets)
            )
            for control in message.model_metrics.metric_control
        ),
        agents=tuple(
            spec.AgentSpec(name=agent.name, parameters=dict(agent.parameters))
            for agent in message.model_repository_agents.agents
        ),
        version_policy=_version_policy(message.version_policy),
    )


def protocol_datatype(number: int) -> str:
    """Return the protocol's name of a config datatype: 11 is ``FP32``, 13 (TYPE_STRING) is ``BYTES``."""
    name = enum_name("DataType", number).removeprefix("TYPE_")
    return "BYTES" if name == "STRING" else name


def _version_policy(policy: Any) -> str:
    choice = policy.WhichOneof("policy_choice")
    if choice == "latest":
        return f"latest {policy.latest.num_versions}"
    if choice == "specific":
        return " ".join(["specific", *(str(version) for version in policy.specific.versions)])
    return "all"


def _reshape(tensor: Any) -> tuple[int, ...] | None:
    return tuple(tensor.reshape.shape) if tensor.HasField("reshape") else None


def _input(tensor: Any) -> spec.InputSpec:
    return spec.InputSpec(
        name=tensor.name,
        datatype=protocol_datatype(tensor.data_type),
        dims=tuple(tensor.dims),
        reshape=_reshape(tensor),
        optional=tensor.optional,
        allow_ragged_batch=tensor.allow_ragged_batch,
        is_shape_tensor=tensor.is_shape_tensor,
        is_non_linear_format_io=tensor.is_non_linear_format_io,
        format=enum_name("ModelInput.Format", tensor.format).removeprefix("FORMAT_"),
    )


def _output(tensor: Any) -> spec.OutputSpec:
    return spec.OutputSpec(
        name=tensor.name,
        datatype=protocol_datatype(tensor.data_type),
        dims=tuple(tensor.dims),
        reshape=_reshape(tensor),
        label_filename=tensor.label_filename,
        is_shape_tensor=tensor.is_shape_tensor,
        is_non_linear_format_io=tensor.is_non_linear_format_io,
    )


def _batch_input(item: Any) -> spec.BatchInputSpec:
    return spec.BatchInputSpec(
        kind=enum_name("BatchInput.Kind", item.kind),
        target_names=tuple(item.target_name),
        datatype=protocol_datatype(item.data_type),
        source_inputs=tuple(item.source_input),
    )


def _batch_output(item: Any) -> spec.BatchOutputSpec:
    return spec.BatchOutputSpec(
        kind=enum_name("BatchOutput.Kind", item.kind),
        target_names=tuple(item.target_name),
        source_inputs=tuple(item.source_input),
    )


def _scheduling(message: Any) -> spec.Scheduling:
    choice = message.WhichOneof("scheduling_choice")
    if choice == "dynamic_batching":
        return _dynamic(message.dynamic_batching)
    if choice == "sequence_batching":
        return _sequence(message.sequence_batching, message.max_batch_size)
    if choice == "ensemble_scheduling":
        return _ensemble(message.ensemble_scheduling)
    return spec.DefaultSchedulingSpec()


def _queue_policy(policy: Any) -> spec.QueuePolicySpec:
    return spec.QueuePolicySpec(
        timeout_action=spec.TimeoutAction(enum_name("ModelQueuePolicy.TimeoutAction", policy.timeout_action)),
        default_timeout_us=policy.default_timeout_microseconds,
        allow_timeout_override=policy.allow_timeout_override,
        max_queue_size=policy.max_queue_size,
    )


def _dynamic(batching: Any) -> spec.DynamicBatchingSpec:
    return spec.DynamicBatchingSpec(
        preferred_batch_sizes=tuple(sorted(set(batching.preferred_batch_size))),
        max_queue_delay_us=batching.max_queue_delay_microseconds,
        preserve_ordering=batching.preserve_ordering,
        priority_levels=batching.priority_levels,
        default_priority_level=batching.default_priority_level,
        default_queue_policy=_queue_policy(batching.default_queue_policy),
        priority_queue_policies={
            level: _queue_policy(batching.priority_queue_policy[level])
            for level in sorted(batching.priority_queue_policy)
        },
    )


def _sequence(batching: Any, max_batch_size: int) -> spec.SequenceBatchingSpec:
    strategy: spec.DirectStrategy | spec.OldestStrategy
    if batching.HasField("oldest"):
        strategy = spec.OldestStrategy(
            # 0 is "not written"; with no candidate at all every sequence would wait for ever.
            max_candidate_sequences=batching.oldest.max_candidate_sequences or max(max_batch_size, 1),
            preferred_batch_sizes=tuple(sorted(set(batching.oldest.preferred_batch_size))),
            max_queue_delay_us=batching.oldest.max_queue_delay_microseconds,
            preserve_ordering=batching.oldest.preserve_ordering,
        )
    else:
        strategy = spec.DirectStrategy(
            max_queue_delay_us=batching.direct.max_queue_delay_microseconds,
            minimum_slot_utilization=batching.direct.minimum_slot_utilization,
        )
    return spec.SequenceBatchingSpec(
        max_sequence_idle_us=batching.max_sequence_idle_microseconds,
        strategy=strategy,
        controls=tuple(_control(given.name, control) for given in batching.control_input for control in given.control),
        states=tuple(_state(state) for state in batching.state),
        iterative_sequence=batching.iterative_sequence,
    )


def _control(name: str, control: Any) -> spec.ControlSpec:
    kind = enum_name("ModelSequenceBatching.Control.Kind", control.kind).removeprefix("CONTROL_SEQUENCE_")
    for field, datatype in _CONTROL_DATATYPES.items():
        values = getattr(control, field)
        if len(values):
            return spec.ControlSpec(
                name=name,
                kind=kind,
                datatype=datatype,
                false_value=float(values[0]),
                true_value=float(values[1]),
            )
    return spec.ControlSpec(name=name, kind=kind, datatype=protocol_datatype(control.data_type))


def _state(state: Any) -> spec.StateSpec:
    initial = state.initial_state[0] if state.initial_state else None
    return spec.StateSpec(
        input_name=state.input_name,
        output_name=state.output_name,
        datatype=protocol_datatype(state.data_type),
        dims=tuple(state.dims),
        initial_dims=None if initial is None else tuple(initial.dims),
        initial_file="" if initial is None else initial.data_file,
        initial_name="" if initial is None else initial.name,
        use_same_buffer_for_input_output=state.use_same_buffer_for_input_output,
        use_growable_memory=state.use_growable_memory,
    )


def _ensemble(ensemble: Any) -> spec.EnsembleSpec:
    return spec.EnsembleSpec(
        steps=tuple(
            spec.EnsembleStepSpec(
                model_name=step.model_name,
                # 0 is what proto3 gives for "not written" and no version has it, so it can only mean the latest.
                model_version=step.model_version or -1,
                input_map=dict(step.input_map),
                output_map=dict(step.output_map),
                model_namespace=step.model_namespace,
            )
            for step in ensemble.step
        ),
        max_inflight_requests=ensemble.max_inflight_requests,
    )


def _instances(group: Any) -> list[spec.InstanceSpec]:
    """Resolve one group: ``count`` instances, on each of its GPUs if it has any (spec C-091, C-093)."""
    kind = spec.InstanceKind(enum_name("ModelInstanceGroup.Kind", group.kind).removeprefix("KIND_"))
    devices = list(group.gpus) if kind is spec.InstanceKind.GPU else [0]
    resources = tuple(
        spec.ResourceSpec(name=resource.name, is_global=getattr(resource, "global"), count=resource.count)
        for resource in group.rate_limiter.resources
    )
    default_policy = {spec.InstanceKind.CPU: "cpu", spec.InstanceKind.MODEL: "model"}
    return [
        spec.InstanceSpec(
            name=f"{group.name}_{number}",
            group=group.name,
            kind=kind,
            device_id=device,
            host_policy=group.host_policy or default_policy.get(kind, f"gpu_{device}"),
            passive=group.passive,
            profiles=tuple(group.profile),
            resources=resources,
            rate_priority=max(group.rate_limiter.priority, 1),
        )
        for number in range(group.count)
        for device in devices
    ]


def _optimization(optimization: Any) -> spec.OptimizationSpec:
    accelerators = optimization.execution_accelerators
    return spec.OptimizationSpec(
        graph_level=optimization.graph.level if optimization.HasField("graph") else None,
        priority=spec.ModelPriority(
            enum_name("ModelOptimizationPolicy.ModelPriority", optimization.priority).removeprefix("PRIORITY_")
        ),
        gpu_accelerators=tuple(_accelerator(item) for item in accelerators.gpu_execution_accelerator),
        cpu_accelerators=tuple(_accelerator(item) for item in accelerators.cpu_execution_accelerator),
        input_pinned_memory=optimization.input_pinned_memory.enable,
        output_pinned_memory=optimization.output_pinned_memory.enable,
        gather_kernel_buffer_threshold=optimization.gather_kernel_buffer_threshold,
        eager_batching=optimization.eager_batching,
        cuda_graphs=optimization.cuda.graphs,
        cuda_graph_batch_sizes=tuple(item.batch_size for item in optimization.cuda.graph_spec),
        cuda_busy_wait_events=optimization.cuda.busy_wait_events,
        cuda_output_copy_stream=optimization.cuda.output_copy_stream,
    )


def _accelerator(item: Any) -> spec.AcceleratorSpec:
    return spec.AcceleratorSpec(name=item.name, parameters=dict(item.parameters))


def _warmup(sample: Any) -> spec.WarmupSpec:
    return spec.WarmupSpec(
        name=sample.name,
        batch_size=sample.batch_size,
        count=max(sample.count, 1),
        inputs=tuple(_warmup_input(key, sample.inputs[key]) for key in sorted(sample.inputs)),
    )


def _warmup_input(name: str, given: Any) -> spec.WarmupInputSpec:
    return spec.WarmupInputSpec(
        name=name,
        datatype=protocol_datatype(given.data_type),
        dims=tuple(given.dims),
        source=_WARMUP_SOURCES[given.WhichOneof("input_data_type")],
        filename=given.input_data_file,
    )
