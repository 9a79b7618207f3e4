"""PyTorch: TorchScript files, AOTInductor packages and plain modules (spec 8.3, FACTS 4).

All three kinds end as one flat call, tensors in and tensors out; what differs is how configured names map to positions.
Inputs are tensors over the slab's memory, outputs are copied into it once. TorchScript and ``model.py`` are code: load
only what you trust.
"""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec

from forebay.engine.backends.base import Backend, DescribedModel, TensorInstance
from forebay.engine.backends.priming import prime
from forebay.engine.backends.shared_models import shared
from forebay.engine.backends.torch_describe import describe_script
from forebay.engine.backends.torch_device import TorchDeviceInstance
from forebay.engine.backends.torch_instance import TorchInstance
from forebay.engine.backends.torch_library import LoadedModule
from forebay.engine.backends.torch_modules import prepare_module
from forebay.engine.backends.torch_packages import prepare_package
from forebay.engine.backends.torch_scripts import prepare_script
from forebay.engine.backends.watched_instance import WatchedInstance
from forebay.engine.devices.opening import open_device
from forebay.engine.devices.staging import stream_priority
from forebay.ipc.errors import Unsupported
from forebay.ipc.worker_messages import InstanceSpec

#: TorchScript looks at two calls before it compiles in the third.
_PRIMING_CALLS = 3


def _runtime(spec: InstanceSpec) -> str:
    config: dict[str, Any] = msgspec.json.decode(spec.config_json or b"{}")
    return str(config.get("runtime", ""))


class TorchBackend(Backend):
    """``backend: "pytorch"``, platforms pytorch_libtorch and torch_aoti, ``runtime: "model.py"``."""

    def describe(self, spec: InstanceSpec) -> DescribedModel:
        if _runtime(spec) == "model.py" or _is_package(spec):
            raise Unsupported(
                f"model configuration is not provided for model '{spec.model}': only TorchScript files can be "
                "auto-completed"
            )
        return describe_script(spec)

    def load(self, spec: InstanceSpec) -> TensorInstance:
        device = open_device("cuda", spec.device_id) if _lives_on_gpu(spec) else None
        loaded = _prepare(spec)
        instance: TensorInstance = (
            TorchInstance(spec, loaded)
            if device is None
            else TorchDeviceInstance(spec, loaded, device, device.make_stream(stream_priority(spec)))
        )
        if not loaded.keeps_state:
            prime(spec, instance, _PRIMING_CALLS)
        if device is None and loaded.device.type == "cuda":
            # Without CuPy it runs, too, and nobody looks.
            with contextlib.suppress(Unsupported):
                return WatchedInstance(instance, open_device("cuda", loaded.device.index or 0))
        return instance


def _lives_on_gpu(spec: InstanceSpec) -> bool:
    """Whether all tensors of an instance can lie on its GPU: strings cannot."""
    return spec.kind == "GPU" and all(tensor.datatype != "BYTES" for tensor in (*spec.inputs, *spec.outputs))


def _prepare(spec: InstanceSpec) -> LoadedModule:
    if _runtime(spec) == "model.py":
        return prepare_module(spec)
    if _is_package(spec):
        return prepare_package(spec)
    # A script that keeps no state may run in several threads at a time.
    return shared(
        ("pytorch", spec.version_path, spec.kind, spec.device_id),
        lambda: prepare_script(spec),
        may_share=lambda loaded: not loaded.keeps_state,
    )


def _is_package(spec: InstanceSpec) -> bool:
    return spec.platform == "torch_aoti" or spec.model_file.endswith(".pt2")


BACKEND = TorchBackend
