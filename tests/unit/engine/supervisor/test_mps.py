"""The Multi-Process Service, with a program that stands in for nvidia-cuda-mps-control."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from forebay.engine.supervisor.mps import LOG_VARIABLE, PIPE_VARIABLE, Mps
from forebay.ipc.errors import Unavailable

#: ``-f`` serves until the file ``daemon`` in the pipe directory is gone; commands ask whether it is there.
_PROGRAM = f"""#!{sys.executable}
import os, pathlib, sys, time
directory = pathlib.Path(os.environ.get("{PIPE_VARIABLE}") or "@default@")
daemon, told = directory / "daemon", pathlib.Path("@told@")
if sys.argv[1:] == ["-f"]:
    if "FAKE_MPS_BROKEN" in os.environ:
        sys.exit(3)
    (directory / "visible").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
    daemon.write_text(str(os.getpid()))
    while daemon.exists():
        time.sleep(0.01)
    sys.exit(0)
command = sys.stdin.read().strip()
with told.open("a") as file:
    print(command, file=file)
if not daemon.exists():
    sys.exit("Cannot find MPS control daemon process")
if command == "quit" and "FAKE_MPS_DEAF" not in os.environ:
    daemon.unlink()
"""


class Machine:
    """A machine with the program installed, and perhaps a daemon in the default directory."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.default, self.runtime, self.told = directory / "default", directory / "run", directory / "told"
        programs = directory / "bin"
        for made in (self.default, self.runtime, programs):
            made.mkdir()
        text = _PROGRAM.replace("@default@", str(self.default)).replace("@told@", str(self.told))
        program = programs / "nvidia-cuda-mps-control"
        program.write_text(text)
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(programs))
        for name in (PIPE_VARIABLE, LOG_VARIABLE, "CUDA_DEVICE_ORDER"):
            # Set and removed, so that what the code under test sets does not outlive the test.
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)

    @property
    def own_directory(self) -> Path:
        return self.runtime / "mps"

    def commands(self) -> list[str]:
        return self.told.read_text().split() if self.told.exists() else []


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_auto_asks_nobody_and_leaves_the_environment(machine: Machine) -> None:
    mps = Mps("auto", str(machine.runtime))
    mps.enter()
    mps.leave()
    assert machine.commands() == []
    assert PIPE_VARIABLE not in os.environ
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_on_starts_a_daemon_of_its_own_and_ends_it(machine: Machine) -> None:
    mps = Mps("on", str(machine.runtime))
    mps.enter()
    assert os.environ[PIPE_VARIABLE] == os.environ[LOG_VARIABLE] == str(machine.own_directory)
    assert machine.own_directory.stat().st_mode & 0o777 == 0o700
    pid = int((machine.own_directory / "daemon").read_text())
    mps.leave()
    assert not Path(f"/proc/{pid}").exists()
    assert machine.commands()[-1] == "quit"
    mps.leave()


def test_a_daemon_of_our_own_sees_every_device(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """MPS renumbers what its daemon sees: with the same list for both, workers would look for device 1 among one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    mps = Mps("on", str(machine.runtime))
    mps.enter()
    assert (machine.own_directory / "visible").read_text() == "all"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    mps.leave()


def test_on_uses_a_daemon_that_runs_already_and_leaves_it_running(machine: Machine) -> None:
    (machine.default / "daemon").touch()
    mps = Mps("on", str(machine.runtime))
    mps.enter()
    mps.leave()
    assert machine.commands() == ["get_server_list"]
    assert PIPE_VARIABLE not in os.environ
    assert not machine.own_directory.exists()


def test_off_hides_a_daemon_that_runs(machine: Machine) -> None:
    (machine.default / "daemon").touch()
    Mps("off", str(machine.runtime)).enter()
    assert os.listdir(os.environ[PIPE_VARIABLE]) == []
    assert machine.commands() == []


def test_a_daemon_that_cannot_start_is_said_so(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_MPS_BROKEN", "1")
    with pytest.raises(Unavailable, match="nvidia-cuda-mps-control was started and ended with exit code 3"):
        Mps("on", str(machine.runtime)).enter()


def test_a_daemon_that_does_not_end_is_killed(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forebay.engine.supervisor.mps._ANSWER_TIMEOUT_S", 1.0)
    monkeypatch.setenv("FAKE_MPS_DEAF", "1")
    mps = Mps("on", str(machine.runtime))
    mps.enter()
    pid = int((machine.own_directory / "daemon").read_text())
    mps.leave()
    assert not Path(f"/proc/{pid}").exists()


def test_on_without_the_program_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match="needs nvidia-cuda-mps-control, which is not installed"):
        Mps("on", str(tmp_path)).enter()
