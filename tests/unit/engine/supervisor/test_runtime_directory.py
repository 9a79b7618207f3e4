"""The directory of a server's sockets and its janitor."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from forebay_server import is_running, wait_until

from forebay.engine.supervisor.runtime_directory import RuntimeDirectory, remove_stale
from forebay.ipc.errors import Internal

#: The supervisor forks its janitor before it has any thread; pytest's process may have some.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Short: sockets' names must fit behind it.
    path = Path(f"/tmp/fb-test-{os.getpid()}")
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def test_directory_is_private_and_removed(base: Path) -> None:
    runtime = RuntimeDirectory(str(base))
    assert stat.S_IMODE(os.stat(runtime.path).st_mode) == 0o700
    janitor = runtime.janitor.pid
    runtime.remove()
    assert not os.path.exists(runtime.path)
    assert not is_running(janitor)


def test_a_stopped_janitor_holds_nobody_up(base: Path) -> None:
    runtime = RuntimeDirectory(str(base))
    janitor = runtime.janitor.pid
    os.kill(janitor, signal.SIGSTOP)
    runtime.remove()
    assert not os.path.exists(runtime.path)
    assert not is_running(janitor)


def test_a_full_disk_is_said_and_leaves_nothing_behind(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, operation: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fcntl, "flock", fail)
    before = list(base.iterdir())
    with pytest.raises(Internal, match=r"^cannot create the runtime directory '.*': No space left on device$"):
        RuntimeDirectory(str(base))
    assert list(base.iterdir()) == before


def test_live_directory_survives_another_server(base: Path) -> None:
    first, second = RuntimeDirectory(str(base)), RuntimeDirectory(str(base))
    assert first.path != second.path
    assert os.path.isdir(first.path)
    second.remove()
    assert os.path.isdir(first.path)
    first.remove()


def test_janitor_removes_the_directory_of_a_killed_owner(base: Path) -> None:
    program = (
        "import time; from forebay.engine.supervisor.runtime_directory import RuntimeDirectory\n"
        f"print(RuntimeDirectory({str(base)!r}).path, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-P", "-c", program], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        path = owner.stdout.readline().strip()
        assert os.path.isdir(path)
        owner.send_signal(signal.SIGKILL)
    wait_until(lambda: not os.path.exists(path), "the directory to be removed")


def test_directory_of_a_dead_server_is_stale(base: Path) -> None:
    dead = base / "999999999-abcdef"
    dead.mkdir()
    (dead / "lock").touch()
    unrelated = base / "notes"
    unrelated.mkdir(exist_ok=True)
    remove_stale(str(base))
    assert not dead.exists()
    assert unrelated.exists()


def test_path_too_long_for_sockets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Internal, match="too long for the sockets"):
        RuntimeDirectory(str(tmp_path / ("x" * 80)))


def test_directory_that_others_may_write_is_refused(tmp_path: Path) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(Internal, match="writable for others"):
        RuntimeDirectory(str(open_to_all))
