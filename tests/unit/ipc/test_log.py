"""Log lines in Triton's formats."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from forebay.ipc.log import ENVIRONMENT_VARIABLE, Log, LogOptions, options_from_environment


def written(tmp_path: Path, options: LogOptions, level: str = "info", text: str = "hello") -> str:
    path = tmp_path / "log"
    log = Log()
    log.configure(LogOptions(**{**{f: getattr(options, f) for f in options.__struct_fields__}, "file": str(path)}))
    getattr(log, level)(text)
    log.configure(LogOptions())
    return path.read_text()


def test_default_format(tmp_path: Path) -> None:
    """Spec O-040."""
    line = written(tmp_path, LogOptions())
    assert re.fullmatch(rf'I\d{{4}} \d\d:\d\d:\d\d\.\d{{6}} {os.getpid()} test_log\.py:\d+\] "hello"\n', line)


def test_iso_format(tmp_path: Path) -> None:
    """Spec O-041."""
    line = written(tmp_path, LogOptions(format="ISO8601"), "error")
    assert re.fullmatch(rf'\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\dZ E {os.getpid()} test_log\.py:\d+\] "hello"\n', line)


def test_message_cannot_forge_a_line(tmp_path: Path) -> None:
    """Spec O-040, O-045."""
    forged = 'a"\nE1122 forged'
    assert written(tmp_path, LogOptions(), text=forged).count("\n") == 1
    assert written(tmp_path, LogOptions(escape=False), text="plain").endswith("] plain\n")


def test_levels_can_be_switched_off(tmp_path: Path) -> None:
    """Spec O-042."""
    for level in ("info", "warning", "error"):
        assert written(tmp_path, LogOptions(**{level: False}), level) == ""
    assert written(tmp_path, LogOptions(info=False), "table") == ""


def test_verbose_lines_need_their_level_and_show_as_info(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = Log()
    log.configure(LogOptions(file=str(path), verbose=1))
    log.verbose(2, "two")
    log.verbose(1, "one")
    log.configure(LogOptions())
    assert path.read_text().startswith("I")
    assert "two" not in path.read_text()


def test_file_that_cannot_be_opened_leaves_the_former_options(tmp_path: Path) -> None:
    log = Log()
    with pytest.raises(OSError, match="No such file"):
        log.configure(LogOptions(file=str(tmp_path / "no" / "log"), verbose=3))
    assert log.options == LogOptions()


@pytest.mark.parametrize("options", [{"file": "/no/such/directory/log"}, {"verbose": "much"}, {"file": 1}])
def test_options_from_the_supervisor_that_cannot_be_used_leave_the_former_ones(options: dict[str, object]) -> None:
    log = Log()
    log.follow({"verbose": 2})
    log.follow(options)
    assert log.options == LogOptions(verbose=2)


def test_children_take_their_options_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, '{"verbose":2,"format":"ISO8601"}')
    assert options_from_environment() == LogOptions(verbose=2, format="ISO8601")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "nonsense")
    assert options_from_environment() == LogOptions()
