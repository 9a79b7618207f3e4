"""What TensorRT-RTX compiles while a model runs, kept for the next time: its plans are portable, their kernels are not.

The library itself checks that a cache fits this GPU, driver and version; one that does not is made anew.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

from forebay.engine.backends.cache_directory import default_cache_directory, make_private_directory, replace_file
from forebay.ipc.log import log
from forebay.ipc.worker_messages import InstanceSpec


class RuntimeCache:
    """One engine's."""

    def __init__(self, trt: Any, spec: InstanceSpec, config: Any, plan: bytes, device_name: str) -> None:
        """Give an engine's configuration a cache, with what was kept for its plan.

        Args:
            config: an ``IRuntimeConfig``.
        """
        facts = "\0".join((trt.__name__, trt.__version__, device_name))
        digest = hashlib.sha256(facts.encode() + plan).hexdigest()[:32]
        self._directory = spec.backend_config.get("plan-cache-directory") or default_cache_directory("tensorrt")
        self._path = os.path.join(self._directory, f"{digest}.kernels")
        self._model = spec.model
        self._cache: Any = config.create_runtime_cache()
        #: What is in the file.
        self._kept = self._read()
        if self._kept and not self._cache.deserialize(self._kept):
            log.info(f"model '{spec.model}': the kernels that were kept are of another GPU, driver or version")
            self._kept = b""
        config.set_runtime_cache(self._cache)

    def _read(self) -> bytes:
        try:
            make_private_directory(self._directory)
            with open(self._path, "rb") as file:
                return file.read()
        except OSError:
            return b""

    def save(self) -> None:
        """Keep what has been compiled so far, if there is more than before."""
        serialized = self._cache.serialize()
        if serialized is None or (found := bytes(serialized)) == self._kept:
            return
        try:
            make_private_directory(self._directory)
            replace_file(self._path, found)
        except OSError as error:
            log.warning(f"model '{self._model}': its compiled kernels are not kept: {error}")
        else:
            self._kept = found
