"""TensorRT plans (``tensorrt_plan``, ``model.plan``) and ONNX files that are built into plans at load (spec B-070)."""

from __future__ import annotations

from forebay.engine.backends.base import Backend, DescribedModel, TensorInstance
from forebay.engine.backends.priming import prime
from forebay.engine.backends.shared_models import shared
from forebay.engine.backends.tensorrt_engines import find_model_file, is_onnx, load_engine, with_a_library
from forebay.engine.backends.tensorrt_instance import TensorRtInstance
from forebay.engine.backends.tensorrt_plans import describe_onnx
from forebay.engine.backends.tensorrt_tensors import check_config, describe_engine
from forebay.engine.devices.base import Device
from forebay.engine.devices.opening import open_device
from forebay.engine.devices.staging import stream_priority
from forebay.ipc.errors import InvalidArgument, Unsupported
from forebay.ipc.worker_messages import InstanceSpec


class TensorRtBackend(Backend):
    """``backend: "tensorrt"``."""

    def describe(self, spec: InstanceSpec) -> DescribedModel:
        device = _open_gpu(spec)
        path = find_model_file(spec, device.compute_capability)
        if is_onnx(path):
            # Building a plan takes long, and what to build for is not complete yet.
            return with_a_library(spec, path, lambda trt: describe_onnx(trt, spec, path))
        owner = load_engine(spec, device)
        return describe_engine(spec, owner.trt, owner.engine)

    def load(self, spec: InstanceSpec) -> TensorInstance:
        device = _open_gpu(spec)
        if spec.kind != "GPU":
            raise InvalidArgument(f"unable to load model '{spec.model}', TensorRT backend supports only GPU device")
        # An engine is for all threads, a context for one.
        key = ("tensorrt", spec.version_path, spec.device_id)
        owner = shared(key, lambda: load_engine(spec, device))
        check_config(spec, owner.trt, owner.engine)
        instance = TensorRtInstance(spec, owner, device, device.make_stream(stream_priority(spec)))
        if owner.kernels is not None:
            # TensorRT-RTX compiles for this GPU when it first runs.
            prime(spec, instance, calls=1)
        return instance


def _open_gpu(spec: InstanceSpec) -> Device:
    try:
        return open_device("cuda", spec.device_id)
    except Unsupported as error:
        raise Unsupported(f"model '{spec.model}': TensorRT runs on GPUs only: {error.text}") from None


BACKEND = TensorRtBackend
