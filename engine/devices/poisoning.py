"""What becomes of a worker whose device is broken: it ends, and another takes its place."""

from __future__ import annotations

import os
from typing import NoReturn

from forebay.engine.devices.base import Device, DeviceBroken, DeviceError, Stream
from forebay.ipc.errors import BackendFailed
from forebay.ipc.log import log

#: Exit code of a worker whose CUDA context is poisoned; its batch is tried once elsewhere.
POISONED_EXIT_CODE = 70


def end_poisoned_process(error: Exception) -> NoReturn:
    """End this worker: its CUDA context is lost, and with it every tensor on the device.

    The supervisor starts another one; the scheduler reports the batch as lost, so that it is tried once elsewhere.
    """
    log.error(f"the CUDA context is poisoned, the worker ends: {error}")
    os._exit(POISONED_EXIT_CODE)


class DeviceGuard:
    """Around work on a device: if that is broken the worker ends, other errors of the device fail the batch."""

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, DeviceBroken):
            end_poisoned_process(error)
        if isinstance(error, DeviceError):
            raise BackendFailed(error.text) from None


class DeviceBatch(DeviceGuard):
    """Around the work of one batch: also waits for the stream at its end, and counts what the device did."""

    def __init__(self, device: Device, stream: Stream) -> None:
        self._device = device
        self._stream = stream

    def __enter__(self) -> None:
        with DeviceGuard():
            self._stream.begin_timing()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _traceback: object) -> None:
        if error is None:
            with DeviceGuard():
                self._stream.end_timing()
        elif not isinstance(error, DeviceBroken):
            self._let_end()
        self._device.traffic.publish()
        super().__exit__(kind, error, _traceback)

    def _let_end(self) -> None:
        """Wait for what a failed batch has begun: its copies must not reach memory that others have by then."""
        try:
            self._stream.synchronize()
        except DeviceBroken as broken:
            end_poisoned_process(broken)
        except DeviceError as refused:
            log.verbose(1, f"after a failed batch: {refused}")
