"""What a server costs is found in /proc, whatever its processes do to hide."""

from __future__ import annotations

import os
import subprocess
import sys

from bench.processes import MARK, ProcessGroup

#: Uses CPU time, then starts a child in a session of its own, says so and waits for the end of its input.
PARENT = """
import subprocess, sys, time
while time.process_time() < 0.05: pass
child = subprocess.Popen([sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"],
                         stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
print(child.pid, flush=True)
sys.stdin.read()
child.wait()
"""


def test_a_child_in_a_session_of_its_own_is_counted_and_totals_do_not_fall_when_it_ends() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {MARK: "here"},
        start_new_session=True,
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        child_pid = int(parent.stdout.readline())
        processes = ProcessGroup(parent.pid, "here")
        assert sorted(processes.pids()) == sorted([parent.pid, child_pid])
        while_running = processes.usage()
        assert while_running.cpu_ns >= 50_000_000
        assert while_running.voluntary_switches > 0
        memory = processes.memory()
        assert [process.pid for process in memory] == sorted([parent.pid, child_pid])
        assert all(0 < process.private_bytes <= process.pss_bytes for process in memory)
        parent.stdin.close()
        parent.wait()
        assert processes.pids() == []
        assert processes.usage().cpu_ns >= while_running.cpu_ns
