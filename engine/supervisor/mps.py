"""CUDA's Multi-Process Service: lets workers on one GPU run at the same time instead of taking turns.

``--mps auto`` changes nothing: CUDA uses a daemon that runs already. ``on`` starts one of our own if none does, and
ends it with the server; ``off`` hides one that runs. Everything is set in the environment that children inherit, so it
must be called before any of them is started. A daemon of ours ends with the supervisor, however that ends.

A daemon of our own has our workers as its only clients. Memory that other processes share by CUDA IPC is not known to
reach such workers, so ``on`` and clients' CUDA shared memory belong together only with a daemon that both use.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import time

from forebay.engine.settings import MpsMode
from forebay.ipc.errors import Unavailable
from forebay.ipc.log import log
from forebay.ipc.process import die_with_parent

#: Makes CUDA number devices as nvidia-smi does, and not by speed.
_DEVICE_ORDER_VARIABLE, _DEVICE_ORDER = "CUDA_DEVICE_ORDER", "PCI_BUS_ID"

#: Applied by the daemon it would hide devices, and renumber those that are left, before clients apply it again.
_VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"

PIPE_VARIABLE = "CUDA_MPS_PIPE_DIRECTORY"
LOG_VARIABLE = "CUDA_MPS_LOG_DIRECTORY"
_PROGRAM = "nvidia-cuda-mps-control"

#: How long the daemon may take to answer, to start and to end, s.
_ANSWER_TIMEOUT_S = 5.0
_START_TIMEOUT_S = 10.0
_RETRY_S = 0.05


class Mps:
    """What the server does about MPS. ``enter`` once, before any child is started, ``leave`` at the end."""

    def __init__(self, mode: MpsMode, runtime_directory: str) -> None:
        """Do nothing yet.

        Args:
            runtime_directory: private to this server; a daemon's pipes and logs go below it.
        """
        self._mode = mode
        self._directory = os.path.join(runtime_directory, "mps")
        self._daemon: subprocess.Popen[bytes] | None = None

    def enter(self) -> None:
        """Set up the environment of children, with a daemon if one is wanted.

        Raises:
            Unavailable: a daemon is wanted, none runs and none can be started; the text says why.
        """
        os.environ.setdefault(_DEVICE_ORDER_VARIABLE, _DEVICE_ORDER)
        if self._mode == "off":
            # A directory in which no daemon listens.
            self._use_own_directory()
        elif self._mode == "on":
            program = shutil.which(_PROGRAM)
            if program is None:
                raise Unavailable(f"--mps on needs {_PROGRAM}, which is not installed; it comes with the driver")
            if _answers(program):
                log.info("CUDA MPS: using the daemon that runs already")
            else:
                self._use_own_directory()
                self._start(program)

    def _use_own_directory(self) -> None:
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        os.environ[PIPE_VARIABLE] = os.environ[LOG_VARIABLE] = self._directory

    def _start(self, program: str) -> None:
        self._daemon = subprocess.Popen(
            [program, "-f"],
            env={name: value for name, value in os.environ.items() if name != _VISIBLE_VARIABLE},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=functools.partial(die_with_parent, os.getpid()),
        )
        end_s = time.monotonic() + _START_TIMEOUT_S
        while not _answers(program):
            if self._daemon.poll() is not None or time.monotonic() > end_s:
                code = self._daemon.poll()
                self.leave()
                how = "did not answer" if code is None else f"ended with exit code {code}"
                raise Unavailable(f"--mps on: {_PROGRAM} was started and {how}")
            time.sleep(_RETRY_S)
        log.info("CUDA MPS: started a daemon for this server's workers")

    def leave(self) -> None:
        """End a daemon of ours; its clients have ended."""
        daemon, self._daemon = self._daemon, None
        if daemon is None:
            return
        program = shutil.which(_PROGRAM)
        if program is not None and daemon.poll() is None:
            _tell(program, "quit")
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.wait(_ANSWER_TIMEOUT_S)
            return
        log.warning("the CUDA MPS daemon did not end when told to, and was killed")
        daemon.kill()
        daemon.wait()


def _answers(program: str) -> bool:
    """Whether a daemon listens in the directory that the environment names."""
    return _tell(program, "get_server_list")


def _tell(program: str, command: str) -> bool:
    try:
        done = subprocess.run(
            [program], input=f"{command}\n".encode(), capture_output=True, timeout=_ANSWER_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
