"""A try before the first request: what a framework compiles at a first call is compiled while the model loads."""

from __future__ import annotations

import numpy as np

from forebay.engine.backends.base import Arrays, TensorInstance
from forebay.ipc.errors import ServingError
from forebay.ipc.log import log
from forebay.ipc.tensor import DATATYPES
from forebay.ipc.worker_messages import InstanceSpec


def prime(spec: InstanceSpec, instance: TensorInstance, calls: int) -> None:
    """Run a row of zeros so many times; nothing if a model's sizes vary, or it takes strings."""
    if not all(tensor.is_fixed for tensor in spec.inputs):
        return
    rows = (1,) if spec.max_batch_size > 0 else ()
    inputs: Arrays = {
        tensor.name: np.zeros((*rows, *tensor.backend_dims), DATATYPES[tensor.datatype].numpy_dtype)
        for tensor in spec.inputs
    }
    try:
        for _ in range(calls):
            instance.run(inputs, tuple(tensor.name for tensor in spec.outputs))
    except ServingError as error:
        # Zeros may be no input that the model accepts; its own requests will tell.
        log.verbose(1, f"model '{spec.model}' was not primed: {error}")
