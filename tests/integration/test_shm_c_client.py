"""The C client of ``frontend/client/c``: it builds without a warning and gives the same answers (issue 7)."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from forebay_server import PATIENCE_S, ForebayServer
from shm_models import serve, write_models

import forebay.client.shm

SOURCES = Path(__file__).resolve().parents[2] / "frontend" / "client" / "c"
PROGRAMS = Path(__file__).resolve().parents[1] / "support" / "c_client"
PYTHON_MODELS = Path(__file__).resolve().parents[1] / "data" / "python_models"
ROWS_CONFIG = """
backend: "python"
max_batch_size: 8
input { name: "IN" data_type: TYPE_FP32 dims: [ 4 ] }
output { name: "OUT" data_type: TYPE_FP32 dims: [ 4 ] }
output { name: "ABOUT" data_type: TYPE_INT32 dims: [ 3 ] }
dynamic_batching { }
"""
COMPILER = next((name for name in ("gcc", "cc", "clang") if shutil.which(name)), "")

pytestmark = pytest.mark.skipif(not COMPILER, reason="there is no C compiler: apt install gcc")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForebayServer]:
    models = write_models(tmp_path_factory.mktemp("shm") / "models")
    shutil.copytree(PYTHON_MODELS / "rows", models / "rows")
    (models / "rows" / "config.pbtxt").write_text(ROWS_CONFIG)
    with serve(models) as running:
        yield running


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the Makefile makes; warnings are errors."""
    target = tmp_path_factory.mktemp("c")
    command = ["make", "-s", "-C", str(SOURCES), f"BUILD={target}", f"CC={COMPILER}", "CFLAGS=-O2 -Werror"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target


def compile_program(build: Path, name: str, *, includes_library: bool = False) -> Path:
    """Compile with the sanitizers that the compiler has."""
    command = [COMPILER, "-std=c11", "-g", "-Wall", "-Wextra", f"-I{SOURCES}", "-o", str(build / name)]
    files = [str(PROGRAMS / f"{name}.c")] + ([] if includes_library else [str(SOURCES / "forebay_client.c")])
    sanitized = [*command, "-fsanitize=address,undefined", "-fno-sanitize-recover=all", *files]
    if subprocess.run(sanitized, check=False, capture_output=True).returncode:
        subprocess.run([*command, *files], check=True)
    return build / name


def run(server: ForebayServer, *command: str | Path) -> list[str]:
    """Run a program and return its lines."""
    environment = {**os.environ, "FOREBAY_RUNTIME_DIRECTORY": str(server.runtime_base)}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def answers(server: ForebayServer, values: list[float]) -> list[float]:
    """Return what the Python client gets for inputs that are all one number."""
    with forebay.client.shm.connect(server.runtime_base) as engine:
        model = engine.model("alpha_model")
        results = []
        for value in values:
            model.input("features", rows=1)[:] = value
            results.append(float(model.infer()[0, 0]))
        return results


def test_example(server: ForebayServer, build: Path) -> None:
    lines = [float(line) for line in run(server, build / "example")]
    np.testing.assert_allclose(lines, answers(server, [0.5, *(k / 16 for k in range(16)), 0.5]), atol=1e-5)


@pytest.mark.parametrize("wait", ["park", "spin"])
def test_latency_program(server: ForebayServer, build: Path, wait: str) -> None:
    lines = run(server, build / "latency", "alpha_model", "300", wait)
    assert len(lines) == 300
    assert all(int(line) > 0 for line in lines)


def test_many_in_flight(server: ForebayServer, build: Path) -> None:
    program = compile_program(build, "many")
    lines = [float(line) for line in run(server, program, str(server.runtime_base))]
    np.testing.assert_allclose(lines[::100], answers(server, [k / 2000 for k in range(0, 2000, 100)]), rtol=1e-5)


def test_mistakes_are_told(server: ForebayServer, build: Path) -> None:
    lines = run(server, compile_program(build, "mistakes"), str(server.runtime_base))
    expected = [
        "100 no forebay server is running: there is no clients.sock of this user in /nowhere",
        "3 an arena may have ",
        "2 Request for unknown model: 'nobody' is not found",
        "2 Request for unknown model: 'alpha_model' version 9 is not found",
        "1 1 64 features 200",
        "3 model 'alpha_model' takes 1 to 64 rows at a time, not 65",
        "0 model 'alpha_model' has no input 'nothing'",
        "3 no input of 1 rows of model 'alpha_model' was filled",
        "0 model 'alpha_model' has no answer with 'prediction'",
        "5 a request in rows carries a timeout and a priority only: use forebay_prepare_parcel",
        "0 input 'features' of model 'alpha_model' cannot have this shape",
        "3 input 'features' takes numbers, not strings",
        "3 the request was not submitted",
        "3 1 requests have not been released",
        "0 input 'INPUT0' varies in size: use forebay_shape_input",
        "3 model 'echo' needs input 'INPUT0', which was not filled",
        "0 input 'INPUT0' of model 'echo' cannot have this shape",
        "0 no room for 4194304 bytes of tensors in an arena of 1048576",
        "103 no room for ",
    ]
    assert len(lines) == len(expected)
    assert [line for line, start in zip(lines, expected, strict=True) if not line.startswith(start)] == []


def test_inputs_of_varying_shapes(server: ForebayServer, build: Path) -> None:
    lines = run(server, compile_program(build, "shapes"), str(server.runtime_base))
    sizes = [1, 10, 91, 820, 7381, 66430]
    assert lines == [f"OUTPUT0 11 1 {size} {4 * size} {size - 1}" for size in sizes]


def test_some_of_a_batch_fail(server: ForebayServer, build: Path) -> None:
    lines = run(server, compile_program(build, "remarks"), str(server.runtime_base))
    assert lines == [(str(2 * i), "2 not this one", str(i))[i % 3] for i in range(30)]


def test_strings(server: ForebayServer, build: Path) -> None:
    lines = run(server, compile_program(build, "strings"), str(server.runtime_base))
    assert lines == [f"3 {ord('e')}", "0 0", f"12 {ord('e')}", f"1 {ord('x')}", "2 2"]


def test_any_number_of_responses(server: ForebayServer, build: Path) -> None:
    lines = run(server, compile_program(build, "responses"), str(server.runtime_base))
    end = "104 there is no further response"
    assert lines == ["2 0", "20000 1", "2 2", "20000 3", "2 4", end, end]


def test_waiting_cancelling_and_deadlines(server: ForebayServer, build: Path) -> None:
    lines = run(server, compile_program(build, "limits"), str(server.runtime_base))
    assert lines == [
        "102 the deadline passed before the answer came",
        "0 ",
        "7 request was cancelled",
        "0 ",
        "3",
        "0 ",
        "0 ",
        "7 request was cancelled: its deadline passed while it waited",
        "0 ",
        "0 ",
        "0 ",
    ]


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose sockets have names that are short enough, which those below tmp_path need not be."""
    with tempfile.TemporaryDirectory(prefix="forebay-") as directory:
        yield Path(directory)


def test_reconnecting_to_the_next_server(tmp_path: Path, short_path: Path, build: Path) -> None:
    models = write_models(tmp_path / "models")
    environment = {"FOREBAY_RUNTIME_DIRECTORY": str(short_path)}
    program = compile_program(build, "reconnect")
    gone = "101 the engine is gone: the server has ended"
    with ForebayServer(models, protocols=("metrics",), environment=environment) as first:
        process = subprocess.Popen([program, short_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        first.process.kill()
    with ForebayServer(models, protocols=("metrics",), environment=environment):
        out, _ = process.communicate("go on\n", timeout=PATIENCE_S)
    assert process.returncode == 0, out
    lines = out.splitlines()
    assert lines[0].startswith(gone.partition(":")[0])
    assert [line.partition(" ")[0] for line in lines[:5]] == ["101", "101", "3", "0", "0"]
    assert np.isfinite(float(lines[5]))


def test_replies_are_checked(server: ForebayServer, build: Path) -> None:
    """The server is trusted, and may still have a bug: nothing is read from outside a message or the arena."""
    assert run(server, compile_program(build, "fuzz_replies", includes_library=True)) == ["1 1"]


def test_shape_tensors_have_no_batch_dimension(build: Path) -> None:
    """Spec D-018, S-011: and only requests of equal values share a batch."""
    program = compile_program(build, "shape_tensors", includes_library=True)
    assert subprocess.run([program], check=True, capture_output=True, text=True).stdout == "1 1 0\n"
