"""Does everything come back when a model is unloaded?

    python -m bench.load_cycles [--cycles 200] [--model alpha_model] [--repository conf/models]

Loads the model, sends it requests, unloads it, and waits until its workers have ended; again and again. After each
cycle: the resident and proportional set size of the whole process tree, what lies in /dev/shm, and how many
descriptors all processes have open.

Target: after the last cycle each of them is where it was after cycle 10, within 2 %.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.hot_swap import post
from bench.kserve import get_json, infer_request
from bench.load.client import run_load
from bench.machine import describe_machine, machine_line, save_results
from bench.servers import EXAMPLE_REPOSITORY, Server, forebay
from bench.tables import markdown_table, number

#: The cycle that later ones are compared with: by then everything has been imported and allocated once.
REFERENCE_CYCLE = 10
REQUEST_CONNECTIONS = 8
#: How long the end of a worker may take, s.
END_TIMEOUT_S = 60.0


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(prog="python -m bench.load_cycles", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--model", default="alpha_model")
    parser.add_argument("--repository", type=Path, default=EXAMPLE_REPOSITORY)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.cycles <= REFERENCE_CYCLE:
        parser.error(f"--cycles must be above {REFERENCE_CYCLE}")

    seen: list[dict[str, int]] = []
    with forebay(options.repository, "--model-control-mode=explicit") as server:
        for cycle in range(1, options.cycles + 1):
            load_infer_unload(server, options.model)
            seen.append(look(server))
            if cycle % 10 == 0:
                figures = ", ".join(f"{name} {value:,}" for name, value in seen[-1].items())
                print(f"cycle {cycle}: {figures}", flush=True)
    reference, last = seen[REFERENCE_CYCLE - 1], seen[-1]
    lines = []
    for name in reference:
        ratio = last[name] / reference[name] if reference[name] else float(last[name] == 0) or float("inf")
        lines.append((name, f"{reference[name]:,}", f"{last[name]:,}", number(ratio), "0.98 to 1.02"))
    machine = describe_machine()
    print(f"\n{machine_line(machine)}\n{machine['command']}\n")
    columns = ["forebay", f"cycle {REFERENCE_CYCLE}", f"cycle {options.cycles}", "ratio", "target"]
    print(markdown_table(columns, lines))
    print(f"\nsaved: {save_results('load-cycles', machine, {'cycles': seen}, options.output)}")


def load_infer_unload(server: Server, model: str) -> None:
    """Go through one life of the model."""
    port = server.http_port
    expect_200(post(port, f"/v2/repository/models/{model}/load", b""))
    run_load(port, request_for(port, model), connections=REQUEST_CONNECTIONS, duration_s=0.2, warmup_s=0.0)
    expect_200(post(port, f"/v2/repository/models/{model}/unload", b""))
    end_s = time.monotonic() + END_TIMEOUT_S
    while any(memory.name.startswith("forebay: worker") for memory in server.processes.memory()):
        if time.monotonic() > end_s:
            raise RuntimeError(f"a worker of '{model}' did not end within {END_TIMEOUT_S:g} s")
        time.sleep(0.02)


def request_for(port: int, model: str) -> bytes:
    """Return a request of one row of random numbers, for any model of FP32 inputs."""
    metadata = get_json(port, f"/v2/models/{model}")
    random = np.random.default_rng(0)
    inputs = {
        tensor["name"]: random.standard_normal([max(int(dim), 1) for dim in tensor["shape"]]).astype(np.float32)
        for tensor in metadata["inputs"]
    }
    return infer_request(model, inputs, [tensor["name"] for tensor in metadata["outputs"]])


def look(server: Server) -> dict[str, int]:
    """Return what all processes of a server hold now."""
    memories = server.processes.memory()
    descriptors = resident = 0
    for memory in memories:
        try:
            descriptors += len(os.listdir(f"/proc/{memory.pid}/fd"))
            resident += int(Path(f"/proc/{memory.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            continue
    return {
        "processes": len(memories),
        "resident bytes": resident,
        "proportional bytes": sum(memory.pss_bytes for memory in memories),
        "descriptors": descriptors,
        "/dev/shm bytes": sum(entry.stat().st_size for entry in Path("/dev/shm").iterdir() if entry.is_file()),
    }


def expect_200(answer: tuple[int, Any]) -> None:
    status, body = answer
    if status != 200:
        raise RuntimeError(f"answered {status}: {body[:200]!r}")


if __name__ == "__main__":
    main()
