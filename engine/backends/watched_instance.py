"""A model that computes on a GPU while its tensors stay in host memory: it has strings, or chose its place itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence

from forebay.engine.backends.base import Array, Arrays, TensorInstance
from forebay.engine.devices.base import Device
from forebay.engine.devices.poisoning import DeviceGuard
from forebay.ipc.errors import BackendFailed


class WatchedInstance(TensorInstance):
    """Passes everything on; where a run has failed, it looks whether the device has too: then the worker ends."""

    def __init__(self, instance: TensorInstance, device: Device) -> None:
        """Take ownership of ``instance``."""
        self._instance = instance
        self._stream = device.make_stream()

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Arrays:
        with self._watching():
            return self._instance.run(inputs, outputs)

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        run = self._instance.bind(inputs, outputs)

        def run_watched() -> None:
            with self._watching():
                run()

        return run_watched

    @contextlib.contextmanager
    def _watching(self) -> Generator[None]:
        try:
            yield
        except BackendFailed:
            with DeviceGuard():
                # Nothing was asked of this stream, but a lost context fails whatever is asked of it.
                self._stream.synchronize()
            raise

    def close(self) -> None:
        self._instance.close()
        self._stream.close()
