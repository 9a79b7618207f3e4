"""A backend that misbehaves on request, to test what surrounds it. Needs FOREBAY_TEST_BACKENDS=1 in the environment.

The first element of the first input chooses what happens, unless the model parameter ``fault`` fixes it for every
request and ``load_fault`` for the load:

    delay     sleep ``delay_ms`` (default 100), then answer
    error     raise
    exit      end the process with ``os._exit(3)``
    segv      end it with SIGSEGV
    hang      never return
    shape     answer with one dimension too many
    datatype  answer with another datatype
    missing   answer without outputs
    leak      keep another 64 MiB, then answer
    poison    as if the GPU's context were lost

Any other element: answer with the input.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence

import numpy as np

from forebay.engine.backends.base import Array, Arrays, Backend, TensorInstance, parse_int
from forebay.engine.devices.base import DeviceBroken
from forebay.engine.devices.poisoning import DeviceGuard
from forebay.ipc.errors import BackendFailed, InvalidArgument, Unsupported
from forebay.ipc.worker_messages import InstanceSpec

#: Set to 1 to allow this backend.
ENVIRONMENT_VARIABLE = "FOREBAY_TEST_BACKENDS"

#: First element of a numeric input to what happens; a BYTES input names it.
FAULTS: dict[int, str] = {
    -1: "delay",
    -2: "error",
    -3: "exit",
    -4: "segv",
    -5: "hang",
    -6: "shape",
    -7: "datatype",
    -8: "missing",
    -9: "leak",
    -10: "poison",
}


class FaultInstance(TensorInstance):
    """Output i is input i, unless told otherwise."""

    def __init__(self, spec: InstanceSpec) -> None:
        self._fault = spec.parameters.get("fault", "")
        self._delay_s = parse_int(spec.parameters, "delay_ms", 100) / 1000
        self._inputs = [tensor.name for tensor in spec.inputs]
        self._sources = {
            output.name: self._inputs[min(index, len(self._inputs) - 1)] for index, output in enumerate(spec.outputs)
        }
        self._leaked: list[bytearray] = []

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Arrays:
        fault = self._fault or chosen_fault(inputs[self._inputs[0]])
        self._misbehave(fault)
        if fault == "missing":
            return {}
        answers = {name: inputs[self._sources[name]] for name in outputs}
        if fault == "shape":
            return {name: array[..., np.newaxis] for name, array in answers.items()}
        if fault == "datatype":
            return {
                name: array.astype(np.int16 if array.dtype != np.int16 else np.int8) for name, array in answers.items()
            }
        return answers

    def _misbehave(self, fault: str) -> None:
        match fault:
            case "delay":
                time.sleep(self._delay_s)
            case "error":
                raise BackendFailed("injected failure")
            case "exit":
                os._exit(3)
            case "segv":
                os.kill(os.getpid(), signal.SIGSEGV)
                signal.pause()
            case "hang":
                while True:
                    signal.pause()
            case "leak":
                self._leaked.append(bytearray(os.urandom(1)) * (64 << 20))
            case "poison":
                with DeviceGuard():
                    raise DeviceBroken("injected illegal address")
            case _:
                pass


def chosen_fault(first_input: Array) -> str:
    """Return what the first element asks for; empty: nothing."""
    if first_input.size == 0:
        return ""
    element = first_input.reshape(-1)[0]
    if isinstance(element, bytes):
        return element.decode(errors="replace")
    value = float(element)
    return FAULTS.get(int(value), "") if value.is_integer() else ""


class FaultBackend(Backend):
    """``backend: "forebay_fault"``."""

    def load(self, spec: InstanceSpec) -> FaultInstance:
        if os.environ.get(ENVIRONMENT_VARIABLE) != "1":
            raise Unsupported(f"backend 'forebay_fault' is for tests: set {ENVIRONMENT_VARIABLE}=1 to allow it")
        instance = FaultInstance(spec)
        match spec.parameters.get("load_fault", ""):
            case "error":
                raise InvalidArgument("injected load failure")
            case "exit":
                os._exit(3)
            case "hang":
                while True:
                    signal.pause()
            case "delay":
                time.sleep(parse_int(spec.parameters, "delay_ms", 100) / 1000)
            case _:
                pass
        return instance


BACKEND = FaultBackend
