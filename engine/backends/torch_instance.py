"""One loaded PyTorch model in host memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from forebay.engine.backends.base import Array, Arrays, TensorInstance, parse_bool
from forebay.engine.backends.torch_library import LoadedModule, torch
from forebay.engine.backends.torch_tensors import execution_error, to_array, to_strings, to_tensor, unexpected_output
from forebay.ipc.errors import BackendFailed, InvalidArgument
from forebay.ipc.worker_messages import InstanceSpec


class TorchCall:
    """A loaded model, called under one inference guard that is entered once for the life of the worker."""

    def __init__(self, spec: InstanceSpec, loaded: LoadedModule) -> None:
        self.signature = loaded.signature
        self._call = loaded.call
        wants_inference_mode = parse_bool(spec.parameters, "INFERENCE_MODE", True)
        # Entering a guard costs about as much as a small layer, so it is not done per batch (FACTS 4).
        self._guard: Any = torch.inference_mode() if wants_inference_mode else torch.no_grad()
        self._guard.__enter__()

    def run(self, arguments: list[Any]) -> list[Any]:
        """Call the model.

        Raises:
            BackendFailed: with Triton's text.
        """
        try:
            return self._call(arguments)
        except BackendFailed:
            raise
        except Exception as error:  # TorchScript raises RuntimeError, torch.jit.Error; a module whatever it likes
            raise execution_error(error) from None

    def pick(self, results: list[Any], name: str) -> Any:
        """Return a configured output of the results.

        Raises:
            BackendFailed: there are not so many.
        """
        position = self.signature.outputs[name]
        if position >= len(results):
            raise BackendFailed(
                f"The output {name} in the model configuration refers to an output index which doesn't exist. "
                f"This model has {len(results)} outputs"
            )
        return results[position]

    def close(self) -> None:
        self._guard.__exit__(None, None, None)


class TorchInstance(TensorInstance):
    """One loaded model whose tensors come from host memory."""

    def __init__(self, spec: InstanceSpec, loaded: LoadedModule) -> None:
        self._call = TorchCall(spec, loaded)
        self._signature = loaded.signature
        self._device = loaded.device
        self._datatypes = {tensor.name: tensor.datatype for tensor in (*spec.inputs, *spec.outputs)}
        self._rank_one_outputs = {tensor.name for tensor in spec.outputs if len(tensor.backend_dims) == 1}
        self._batches = spec.max_batch_size > 0
        self._cleans_cache = parse_bool(spec.parameters, "ENABLE_CACHE_CLEANING", False)

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Arrays:
        arguments: list[Any] = []
        for name in self._signature.inputs:
            array = inputs.get(name)
            if array is None:
                raise InvalidArgument(f"input '{name}' is missing")
            if self._datatypes[name] == "BYTES":
                arguments.append(to_strings(array, name))
            else:
                arguments.append(to_tensor(array, self._datatypes[name]).to(self._device))
        rows = next(iter(inputs.values())).shape[0] if self._batches and inputs else 0
        results = self._execute(arguments)
        answers: Arrays = {}
        for name in outputs:
            value = self._call.pick(results, name)
            if isinstance(value, torch.Tensor):
                if value.dim() == 0:
                    raise InvalidArgument(f"output '{name}' is a scalar which is not supported.")
                answers[name] = to_array(value)
            else:
                strings = np.empty(len(value), dtype=np.object_)
                strings[:] = [text.encode() for text in value]
                per_row = rows > 0 and name in self._rank_one_outputs and len(value) % rows == 0
                answers[name] = strings.reshape(rows, -1) if per_row else strings
        return answers

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        if any(self._datatypes[name] == "BYTES" for name in (*inputs, *outputs)):
            return super().bind(inputs, outputs)
        missing = [name for name in self._signature.inputs if name not in inputs]
        if missing:
            raise InvalidArgument(f"input '{missing[0]}' is missing")
        sources = [to_tensor(inputs[name], self._datatypes[name]) for name in self._signature.inputs]
        targets = [
            (name, self._signature.outputs[name], to_tensor(array, self._datatypes[name]))
            for name, array in outputs.items()
        ]
        on_host = self._device.type == "cpu"

        def run_in_place() -> None:
            results = self._execute(sources if on_host else [source.to(self._device) for source in sources])
            for name, position, target in targets:
                value = results[position] if position < len(results) else self._call.pick(results, name)
                if not isinstance(value, torch.Tensor) or value.shape != target.shape or value.dtype != target.dtype:
                    raise unexpected_output(name, value, target)
                target.copy_(value)

        return run_in_place

    def _execute(self, arguments: list[Any]) -> list[Any]:
        try:
            return self._call.run(arguments)
        finally:
            if self._cleans_cache and self._device.type == "cuda":
                torch.cuda.empty_cache()

    def close(self) -> None:
        self._call.close()
