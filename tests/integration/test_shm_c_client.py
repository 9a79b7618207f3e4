"""The C client of ``frontend/client/c``: it builds without a warning and gives the same answers (issue 7)."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from forebay_server import PATIENCE_S, ForebayServer
from shm_models import serve, write_models

import forebay.client.shm

SOURCES = Path(__file__).resolve().parents[2] / "frontend" / "client" / "c"
COMPILER = next((name for name in ("gcc", "cc", "clang") if shutil.which(name)), "")

pytestmark = pytest.mark.skipif(not COMPILER, reason="there is no C compiler: apt install gcc")

#: What a client does wrong, and what it is told; run with the server's socket and prints one line per case.
_MISTAKES = r"""
#include "forebay_client.h"
#include <stdio.h>
static void show(int code) { printf("%d %s\n", code, forebay_error()); }
int main(int count, char **arguments) {
    forebay_client *client; forebay_model *model, *slow; forebay_request *request;
    (void)count;
    show(forebay_connect("/nowhere", 0, &client));
    show(forebay_connect(arguments[1], (uint64_t)1 << 60, &client));
    if (forebay_connect(arguments[1], 1 << 20, &client)) return 1;
    show(forebay_open(client, "nobody", 0, &model));
    show(forebay_open(client, "alpha_model", 9, &model));
    show(forebay_open(client, "echo", 0, &slow));
    if (forebay_open(client, "alpha_model", 1, &model)) return 1;
    printf("%d %d %d %s %d\n", (int)forebay_version(model), forebay_input_count(model), forebay_max_batch_size(model),
           forebay_input_at(model, 0)->name, (int)forebay_input_at(model, 0)->row_bytes);
    show(forebay_prepare(model, 65, &request));
    show(forebay_input(model, "nothing", 1) != NULL);
    show(forebay_infer(model, 1, -1));
    show(forebay_output(model, "prediction", NULL) != NULL);
    for (int rows = 0; !forebay_prepare(model, 64, &request); rows++) {}
    show(FOREBAY_NO_MEMORY);
    forebay_close(client);
    return 0;
}
"""

#: Runs 2000 requests, many at a time, each with its own number, and prints the answers.
_MANY = r"""
#include "forebay_client.h"
#include <stdio.h>
enum { ALL = 2000, AT_ONCE = 300 };
int main(int count, char **arguments) {
    forebay_client *client; forebay_model *model; static forebay_request *requests[ALL];
    (void)count;
    if (forebay_connect(arguments[1], 0, &client) || forebay_open(client, "alpha_model", 0, &model)) return 1;
    for (int i = 0, next = 0; i < ALL; i++) {
        for (; next < ALL && next < i + AT_ONCE; next++) {
            float *x;
            if (forebay_prepare(model, 1, &requests[next])) return 2;
            x = forebay_request_input(requests[next], 0);
            for (int k = 0; k < 50; k++) x[k] = (float)next / ALL;
            if (forebay_submit(requests[next])) return 3;
        }
        if (forebay_wait(requests[i], 60000000)) { fprintf(stderr, "%s\n", forebay_error()); return 4; }
        printf("%.9g\n", (double)*(const float *)forebay_request_output(requests[i], 0));
        forebay_release(requests[i]);
    }
    forebay_close(client);
    return 0;
}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForebayServer]:
    with serve(write_models(tmp_path_factory.mktemp("shm") / "models")) as running:
        yield running


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the Makefile makes; warnings are errors."""
    target = tmp_path_factory.mktemp("c")
    command = ["make", "-s", "-C", str(SOURCES), f"BUILD={target}", f"CC={COMPILER}", "CFLAGS=-O2 -Werror"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target


def compile_program(build: Path, name: str, source: str) -> Path:
    """Compile with the sanitizers that the compiler has."""
    (build / f"{name}.c").write_text(source)
    command = [COMPILER, "-std=c11", "-g", "-Wall", "-Wextra", f"-I{SOURCES}", "-o", str(build / name)]
    files = [str(build / f"{name}.c"), str(SOURCES / "forebay_client.c")]
    sanitized = [*command, "-fsanitize=address,undefined", "-fno-sanitize-recover=all", *files]
    if subprocess.run(sanitized, check=False, capture_output=True).returncode:
        subprocess.run([*command, *files], check=True)
    return build / name


def run(server: ForebayServer, *command: str | Path) -> list[str]:
    """Run a program and return its lines."""
    environment = {
        **os.environ,
        "FOREBAY_RUNTIME_DIRECTORY": str(server.runtime_base),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
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
    np.testing.assert_allclose(lines, answers(server, [0.5, *(k / 16 for k in range(16))]), atol=1e-5)


@pytest.mark.parametrize("wait", ["park", "spin"])
def test_latency_program(server: ForebayServer, build: Path, wait: str) -> None:
    lines = run(server, build / "latency", "alpha_model", "300", wait)
    assert len(lines) == 300
    assert all(int(line) > 0 for line in lines)


def test_many_in_flight(server: ForebayServer, build: Path) -> None:
    program = compile_program(build, "many", _MANY)
    lines = [float(line) for line in run(server, program, str(server.runtime_base))]
    np.testing.assert_allclose(lines[::100], answers(server, [k / 2000 for k in range(0, 2000, 100)]), rtol=1e-5)


def test_mistakes_are_told(server: ForebayServer, build: Path) -> None:
    lines = run(server, compile_program(build, "mistakes", _MISTAKES), str(server.runtime_base))
    expected = [
        "100 no forebay server is running: there is no clients.sock of this user in /nowhere",
        "3 an arena may have ",
        "2 Request for unknown model: 'nobody' is not found",
        "2 Request for unknown model: 'alpha_model' version 9 is not found",
        "5 model 'echo' takes inputs of varying size, which this client does not",
        "1 1 64 features 200",
        "3 model 'alpha_model' takes 1 to 64 rows at a time, not 65",
        "0 model 'alpha_model' has no input 'nothing'",
        "3 no input of 1 rows of model 'alpha_model' was filled",
        "0 model 'alpha_model' has no answer with 'prediction'",
        "103 no room for ",
    ]
    assert len(lines) == len(expected)
    assert [line for line, start in zip(lines, expected, strict=True) if not line.startswith(start)] == []
