"""``forebay validate DIRECTORY ...``: every problem of every model at once, without serving anything.

With ``--load`` each model is also loaded, exactly as ``serve`` would load it, which compares its tensors with its
configuration. The exit code is 0 if every model can be served, else 1. Models whose framework is not installed here are
no error of the repository: they are noted.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from typing import TYPE_CHECKING, Any

import msgspec

from forebay.engine.backend_families import missing_library
from forebay.engine.command_line import Command
from forebay.engine.repository.check_repository import Machine, ModelReport, check_models
from forebay.engine.repository.config_problem import Problem
from forebay.engine.repository.found_model import FoundModel
from forebay.engine.repository.repository import ModelRepository, open_repository
from forebay.engine.settings import Settings
from forebay.engine.supervisor.gpus import find_gpus, gpus_of_backend
from forebay.ipc.errors import Code, ServingError
from forebay.ipc.log import LogOptions, log

if TYPE_CHECKING:
    from forebay.engine.supervisor.lifecycle import ModelLifecycle


class LoadOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one version that was loaded to see whether it can be."""

    version: int
    is_loaded: bool
    is_excused: bool = False
    """It lacks an optional framework."""
    reason: str = ""
    load_seconds: float = 0.0


class _Judged(msgspec.Struct, kw_only=True):
    found: FoundModel
    report: ModelReport
    outcomes: list[LoadOutcome] = []

    @property
    def is_valid(self) -> bool:
        return not self.report.problems

    @property
    def lacks_package(self) -> bool:
        """Nothing is wrong with it, and yet it cannot be served on this machine as it is."""
        excused = any(outcome.is_excused and not outcome.is_loaded for outcome in self.outcomes)
        return self.is_valid and (excused or bool(self.report.missing))


def run(command: Command) -> int:
    """Carry out the command; return the exit code."""
    settings = command.settings
    # What models and loading have to say is in the answer.
    log.configure(LogOptions(info=False, warning=False, error=False))
    try:
        repository = open_repository(settings)
        found = repository.scan()
    except ServingError as error:
        print(f"error: {error.text}", file=sys.stderr)
        if command.output_format == "json":
            print(json.dumps({"valid": False, "error": error.text, "models": []}, indent=2))
        return 1
    reports = check_models(found, _machine(settings, found))
    by_identity = {model.identity: model for model in found}
    judged = [_Judged(found=by_identity[report.identity], report=report) for report in reports]
    for item in judged:
        if item.report.backend and (missing := missing_library(item.report.backend)) is not None:
            item.report.missing.append(missing)
    if command.is_loading:
        asyncio.run(_load(settings, repository, judged))
    is_valid = all(item.is_valid for item in judged)
    if command.output_format == "json":
        print(json.dumps({"valid": is_valid, "models": [_as_json(item) for item in judged]}, indent=2))
    else:
        print(_as_text(judged, shutil.get_terminal_size().columns))
    return 0 if is_valid else 1


def _machine(settings: Settings, found: list[FoundModel]) -> Machine:
    gpus = find_gpus(cpu_only=settings.gpu.cpu_only)
    return Machine(
        gpus_of={
            model.config.backend: gpus_of_backend(gpus, model.config) for model in found if model.config is not None
        },
        min_compute_capability=settings.gpu.min_supported_compute_capability,
        gpu_fallback=settings.gpu.fallback == "cpu",
    )


# --- loading


async def _load(settings: Settings, repository: ModelRepository, judged: list[_Judged]) -> None:
    """Load every model that is not known to be wrong; add what came of it."""
    from forebay.engine.supervisor.core_pool import CorePool, usable_cores
    from forebay.engine.supervisor.lifecycle import ModelLifecycle
    from forebay.engine.supervisor.plant import Plant
    from forebay.engine.supervisor.runtime_directory import RuntimeDirectory
    from forebay.engine.supervisor.switchboard import Switchboard
    from forebay.engine.supervisor.zygotes import Zygotes
    from forebay.ipc.counters import COUNTERS_BYTES, CountersFile

    async def announce() -> None:
        """Nobody listens."""

    async def wait_seen(_generation: int, _timeout_s: float) -> bool:
        return True

    def progress(_model: str, _version: int, _phase: str, _ready: int, _count: int, _reason: str) -> None:
        """Nobody watches."""

    runtime = RuntimeDirectory(settings.process.runtime_directory)
    counters = CountersFile()
    switchboard = Switchboard(runtime.path, counters.fd, COUNTERS_BYTES)
    zygotes = Zygotes()
    plant = Plant(
        settings=settings,
        switchboard=switchboard,
        zygotes=zygotes,
        counters=counters,
        cores=CorePool(usable_cores()),
        gpus=find_gpus(cpu_only=settings.gpu.cpu_only),
    )
    lifecycle = ModelLifecycle(plant, repository, announce=announce, wait_seen=wait_seen, progress=progress)
    try:
        await lifecycle.load_at_start([item.report.identity for item in judged if item.is_valid])
        for item in judged:
            if item.is_valid:
                await _note_outcome(lifecycle, item)
    finally:
        lifecycle.kill_all()
        zygotes.kill()
        await zygotes.wait_ended()
        await lifecycle.close()
        switchboard.close()
        runtime.remove()


async def _note_outcome(lifecycle: ModelLifecycle, item: _Judged) -> None:
    """Add what became of a model's versions."""
    from forebay.engine.supervisor.models import UNLOADED
    from forebay.engine.supervisor.preparation import contradictions

    model = lifecycle.models[item.report.identity]
    for version, status in sorted(model.status.items()):
        served = model.serving.get(version)
        outcome = LoadOutcome(
            version=version,
            is_loaded=served is not None,
            is_excused=status.is_excused,
            reason=status.reason,
            load_seconds=round(served.load_ns / 1e9, 3) if served is not None else 0.0,
        )
        item.outcomes.append(outcome)
        if not outcome.is_loaded and not outcome.is_excused and outcome.reason != UNLOADED:
            item.report.problems += await contradictions(lifecycle.plant, item.found, version) or [
                Problem(f"version {version} cannot be loaded: {outcome.reason}")
            ]
    if not model.status and model.problem:
        item.report.problems.append(Problem(model.problem, code=Code.INTERNAL))


# --- printing


def _as_json(item: _Judged) -> dict[str, Any]:
    report = item.report
    return {
        "name": report.name,
        **({"namespace": report.namespace} if report.namespace else {}),
        "backend": report.backend,
        "versions": list(report.versions),
        "valid": item.is_valid,
        "problems": [_problem_as_json(problem) for problem in report.problems],
        "notes": report.notes,
        "missing": report.missing,
        **({"loaded": [msgspec.to_builtins(outcome) for outcome in item.outcomes]} if item.outcomes else {}),
    }


def _problem_as_json(problem: Problem) -> dict[str, Any]:
    fields = {
        "text": problem.text,
        "code": problem.code.label,
        "file": problem.source,
        "line": problem.line,
        "column": problem.column,
        "field": problem.field,
        "written": problem.written,
        "possible": list(problem.possible),
        "suggestion": problem.suggestion,
        "hint": problem.hint,
    }
    return {name: value for name, value in fields.items() if value}


def _as_text(judged: list[_Judged], width: int) -> str:
    """Return a table of models; below each what is wrong with it, and what is worth knowing."""
    titles = ("Model", "Versions", "Backend", "Result")
    rows = [_row(item) for item in judged]
    widths = [max(len(row[column]) for row in (titles, *rows)) for column in range(3)]

    def line(cells: tuple[str, ...]) -> str:
        padded = [cell.ljust(size) for cell, size in zip(cells, widths, strict=False)]
        return "  ".join((*padded, cells[3]))

    lines = [line(titles), "─" * min(width, max(len(line(row)) for row in (titles, *rows)))]
    for item, row in zip(judged, rows, strict=True):
        lines.append(line(row))
        for problem in item.report.problems:
            lines += [f"    {text}" for text in _describe(problem)]
        lines += [f"    note: {note}" for note in (*item.report.notes, *item.report.missing)]
        lines += [
            f"    note: version {outcome.version} was not loaded: {outcome.reason}"
            for outcome in item.outcomes
            if outcome.is_excused and not outcome.is_loaded
        ]
    lines += ["", _summary(judged)]
    return os.linesep.join(lines)


def _summary(judged: list[_Judged]) -> str:
    wrong = sum(not item.is_valid for item in judged)
    lacking = sum(item.lacks_package for item in judged)
    parts = [f"{len(judged)} model{'s' * (len(judged) != 1)}"]
    if wrong:
        parts.append(f"{wrong} cannot be served")
    if lacking:
        parts.append(f"{lacking} can be served once what {'they lack' if lacking > 1 else 'it lacks'} is installed")
    if not wrong and not lacking:
        parts.append("all can be served")
    return ", ".join(parts)


def _row(item: _Judged) -> tuple[str, str, str, str]:
    report = item.report
    versions = ", ".join(str(version) for version in report.versions)
    if report.problems:
        count = len(report.problems)
        result = f"✗ {count} problem{'s' * (count > 1)}"
    elif any(outcome.is_loaded for outcome in item.outcomes):
        result = f"✓ loaded in {max(outcome.load_seconds for outcome in item.outcomes):.2f} s"
    else:
        result = "- not installed" if item.lacks_package else "✓"
    return report.identity, versions or "-", report.backend or "-", result


def _describe(problem: Problem) -> list[str]:
    """Return a problem's lines; without a place where nothing is known of it."""
    if problem.line or problem.path:
        return problem.describe().splitlines()
    return [problem.text, *([f"  {problem.hint}"] if problem.hint else [])]
