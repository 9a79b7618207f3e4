"""Backend detection, defaults and instance groups."""

from __future__ import annotations

import json
from typing import Any, Protocol

import pytest

from forebay.engine.repository.config import config_json, parse_config_text
from forebay.engine.repository.config_problem import ConfigError
from forebay.engine.repository.model_config_schema import ModelConfig
from forebay.engine.repository.normalise import (
    Gpu,
    detect_backend,
    normalise_defaults,
    normalise_instance_groups,
    usable_gpus,
)

GPUS = (Gpu(0, 9.0), Gpu(1, 8.0))


class Normalised(Protocol):
    def __call__(
        self, text: str, name: str = "m", files: dict[str, bool] | None = None, gpus: tuple[Gpu, ...] = ()
    ) -> ModelConfig: ...


def detected(text: str, files: dict[str, bool] | None, name: str = "m") -> tuple[str, str, str]:
    config = parse_config_text(text)
    detect_backend(config, name, files)
    return config.backend, config.platform, config.default_model_filename


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"model.onnx": False}, ("onnxruntime", "onnxruntime_onnx", "model.onnx")),
        ({"model.onnx": True}, ("onnxruntime", "onnxruntime_onnx", "model.onnx")),
        ({"model.pt": False}, ("pytorch", "pytorch_libtorch", "model.pt")),
        ({"model.pt2": False}, ("pytorch", "torch_aoti", "model.pt2")),
        ({"model.plan": False}, ("tensorrt", "tensorrt_plan", "model.plan")),
        ({"model.xml": False}, ("openvino", "", "model.xml")),
        ({"model.py": False}, ("python", "", "model.py")),
        ({"model.savedmodel": True}, ("tensorflow", "tensorflow_savedmodel", "model.savedmodel")),
        ({"model.graphdef": False}, ("tensorflow", "tensorflow_graphdef", "model.graphdef")),
        ({"model.onnx": False, "model.py": False}, ("onnxruntime", "onnxruntime_onnx", "model.onnx")),
        ({"model.plan": False, "model.onnx": False}, ("tensorrt", "tensorrt_plan", "model.plan")),
        ({"model.pt": False, "model.py": False}, ("pytorch", "pytorch_libtorch", "model.pt")),
        ({"model.plan": True, "model.py": False}, ("python", "", "model.py")),
    ],
)
def test_files_tell_the_backend_in_tritons_order(files: dict[str, bool], expected: tuple[str, str, str]) -> None:
    """Spec R-030..R-041."""
    assert detected("", files) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('platform: "onnxruntime_onnx"', ("onnxruntime", "onnxruntime_onnx", "model.onnx")),
        ('backend: "onnxruntime"', ("onnxruntime", "onnxruntime_onnx", "model.onnx")),
        ('platform: "pytorch_libtorch"', ("pytorch", "pytorch_libtorch", "model.pt")),
        ('backend: "pytorch"', ("pytorch", "pytorch_libtorch", "model.pt")),
        ('platform: "torch_aoti"', ("pytorch", "torch_aoti", "model.pt2")),
        ('backend: "pytorch" runtime: "model.py"', ("pytorch", "pytorch_libtorch", "model.pt")),
        ('platform: "tensorrt_plan"', ("tensorrt", "tensorrt_plan", "model.plan")),
        ('platform: "tensorflow_savedmodel"', ("tensorflow", "tensorflow_savedmodel", "model.savedmodel")),
        ('backend: "tensorflow" default_model_filename: "model.graphdef"',
         ("tensorflow", "tensorflow_graphdef", "model.graphdef")),
        ('backend: "python"', ("python", "", "model.py")),
        ('backend: "identity"', ("identity", "", "")),
        ('default_model_filename: "model.py"', ("python", "", "model.py")),
        ('backend: "onnxruntime" default_model_filename: "net.onnx"',
         ("onnxruntime", "onnxruntime_onnx", "net.onnx")),
        ('platform: "ensemble"', ("", "ensemble", "")),
        ('platform: "odd"', ("", "odd", "")),
    ],
)  # fmt: skip
def test_what_is_given_is_kept_and_the_rest_follows(text: str, expected: tuple[str, str, str]) -> None:
    """Spec R-031..R-042; a file of another kind in the directory changes nothing."""
    assert detected(text, {"other.bin": False}) == expected


def test_the_name_of_the_directory_may_name_a_custom_backend() -> None:
    """Spec R-040."""
    assert detected("", None, "net.mine") == ("mine", "", "model.mine")
    with pytest.raises(ConfigError) as caught:
        detected("", {}, "net")
    assert caught.value.text == (
        "Invalid model name: Could not determine backend for model 'net' with no backend in model configuration. "
        "Expected model name of the form 'model.<backend_name>'."
    )


def test_defaults_are_filled_in_once(normalised: Normalised) -> None:
    """Spec H-045; a second pass changes nothing."""
    config = normalised('backend: "identity"')
    document: dict[str, Any] = json.loads(config_json(config))
    assert document["version_policy"] == {"latest": {"num_versions": 1}}
    assert document["optimization"] == {
        "priority": "PRIORITY_DEFAULT",
        "input_pinned_memory": {"enable": True},
        "output_pinned_memory": {"enable": True},
        "gather_kernel_buffer_threshold": 0,
        "eager_batching": False,
    }
    assert document["instance_group"] == [
        {
            "name": "m",
            "kind": "KIND_CPU",
            "count": 1,
            "gpus": [],
            "secondary_devices": [],
            "profile": [],
            "passive": False,
            "host_policy": "",
        }
    ]
    before = config_json(config)
    normalise_defaults(config)
    normalise_instance_groups(config)
    assert config_json(config) == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max_batch_size: 8 dynamic_batching { }", [8]),
        ("max_batch_size: 8 dynamic_batching { preferred_batch_size: [ 2, 4 ] }", [2, 4]),
        ("dynamic_batching { }", []),
    ],
)
def test_the_preferred_batch_size_defaults_to_the_maximum(
    normalised: Normalised, text: str, expected: list[int]
) -> None:
    """Spec S-014, C-070."""
    config = normalised('backend: "identity" ' + text)
    assert list(config.message.dynamic_batching.preferred_batch_size) == expected


def test_sequence_batching_has_its_defaults(normalised: Normalised) -> None:
    """Spec C-077, C-078: no strategy is written in, one second of idling is."""
    document = json.loads(config_json(normalised('backend: "identity" max_batch_size: 2 sequence_batching { }')))
    assert document["sequence_batching"] == {
        "max_sequence_idle_microseconds": 1000000,
        "control_input": [],
        "state": [],
        "iterative_sequence": False,
    }
    oldest = normalised('backend: "identity" max_batch_size: 2 sequence_batching { oldest { } }')
    assert list(oldest.message.sequence_batching.oldest.preferred_batch_size) == [2]


def test_ensembles_get_neither_instances_nor_optimization(normalised: Normalised) -> None:
    config = normalised('platform: "ensemble" ensemble_scheduling { }')
    assert not config.message.instance_group
    assert not config.message.HasField("optimization")


@pytest.mark.parametrize(
    ("backend", "group", "expected"),
    [
        ("onnxruntime", "", [("m", "KIND_CPU", 2)]),
        ("tensorflow", "", [("m", "KIND_CPU", 2)]),
        ("python", "", [("m", "KIND_CPU", 1)]),
        ("onnxruntime", "instance_group { kind: KIND_CPU }", [("m_0", "KIND_CPU", 2)]),
        ("onnxruntime", "instance_group { count: 3 }", [("m_0", "KIND_CPU", 3)]),
        (
            "python",
            'instance_group [ { count: 2 }, { name: "x" kind: KIND_MODEL }, { } ]',
            [("m_0", "KIND_CPU", 2), ("x", "KIND_MODEL", 1), ("m_2", "KIND_CPU", 1)],
        ),
    ],
)
def test_groups_get_name_kind_and_count(
    normalised: Normalised, backend: str, group: str, expected: list[tuple[str, str, int]]
) -> None:
    """Spec C-090..C-093, B-019."""
    platform = 'platform: "tensorflow_savedmodel" ' if backend == "tensorflow" else ""
    document = json.loads(config_json(normalised(f'{platform}backend: "{backend}" {group}')))
    assert [(g["name"], g["kind"], g["count"]) for g in document["instance_group"]] == expected


@pytest.mark.parametrize(
    ("group", "kind", "gpus", "count"),
    [
        ("", "KIND_GPU", [0, 1], 1),
        ("instance_group { }", "KIND_GPU", [0, 1], 1),
        ("instance_group { gpus: [ 1 ] }", "KIND_GPU", [1], 1),
        ("instance_group { gpus: [ 7 ] }", "KIND_CPU", [7], 2),
        ("instance_group { kind: KIND_GPU gpus: [ 0 ] count: 3 }", "KIND_GPU", [0], 3),
        ("instance_group { kind: KIND_CPU }", "KIND_CPU", [], 2),
    ],
)
def test_groups_use_the_gpus_that_are_there(
    normalised: Normalised, group: str, kind: str, gpus: list[int], count: int
) -> None:
    """Spec C-092, C-094."""
    config = normalised(f'backend: "onnxruntime" {group}', gpus=GPUS)
    (found,) = json.loads(config_json(config))["instance_group"]
    assert (found["kind"], found["gpus"], found["count"]) == (kind, gpus, count)


def test_old_gpus_do_not_count() -> None:
    """Flag --min-supported-compute-capability."""
    assert usable_gpus((Gpu(1, 5.2), Gpu(0, 7.0))) == [0]
    assert usable_gpus((Gpu(1, 5.2), Gpu(0, 7.0)), 5.0) == [0, 1]


def test_missing_gpus_fall_back_to_the_cpu_if_asked_for() -> None:
    """Flag --gpu-fallback cpu."""
    config = parse_config_text('name: "m" backend: "x" instance_group { kind: KIND_GPU gpus: [ 0 ] }')
    notes = normalise_instance_groups(config, gpu_fallback=True)
    assert notes == [
        "instance group m_0 of model m asks for GPUs that are not available; it runs on the CPU instead "
        "(--gpu-fallback cpu)"
    ]
    (found,) = json.loads(config_json(config))["instance_group"]
    assert (found["kind"], found["gpus"], found["count"]) == ("KIND_CPU", [], 1)
