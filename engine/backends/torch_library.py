"""PyTorch as the modules of its backend import it, and how a model of any kind is handed from one to the other."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

# As Any: PyTorch's own annotations are incomplete, and a checkout without it must type-check too.
torch: Any = importlib.import_module("torch")
pytree: Any = importlib.import_module("torch.utils._pytree")
Tensor: TypeAlias = Any
Device: TypeAlias = Any

#: The whole of TorchScript is deprecated in PyTorch's eyes; Triton's ``model.pt`` is TorchScript all the same.
warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch(\..*)?$")
warnings.filterwarnings("ignore", message=r".*torch\.jit.*deprecated.*", category=DeprecationWarning)

Call = Callable[[list[Any]], list[Any]]


class Signature(NamedTuple):
    """How configured names map to the flat call."""

    inputs: tuple[str, ...]
    """Configured input names in the order of the call."""
    outputs: dict[str, int]
    """Configured output name to its position among the results."""


class LoadedModule(NamedTuple):
    """A model of any kind, ready to be called."""

    call: Call
    signature: Signature
    device: Device
    keeps_state: bool = True
    """False if the model is known to give the same answer however often it was called before."""
