"""A slot that always tries to have a worker."""

from __future__ import annotations

import asyncio
import errno
import os
from types import SimpleNamespace
from typing import Any

import pytest

from forebay.engine.supervisor.instance import Instance, InstanceEvents
from forebay.ipc.counters import CountersFile
from forebay.ipc.worker_messages import InstanceSpec

SPEC = InstanceSpec(
    model="m",
    version=1,
    route=1,
    instance=0,
    instance_name="m_0",
    backend="identity",
    model_path="",
    version_path="",
    model_file="",
    kind="CPU",
)


def test_a_worker_that_lacks_descriptors_for_the_moment_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    plant: Any = SimpleNamespace(counters=CountersFile())
    processes: Any = None
    reasons: list[str] = []
    failures = iter([OSError(errno.EMFILE, os.strerror(errno.EMFILE))])

    async def exit_code() -> int:
        return 1

    async def scenario() -> None:
        events = InstanceEvents(changed=lambda: reasons.append(instance.reason), phase=lambda _text: None)
        instance = Instance(plant, SPEC, 0, events, processes)

        async def start(**_how: Any) -> None:
            for failure in failures:
                raise failure
            instance._is_serving = True

        monkeypatch.setattr(instance, "start", start)
        died: Any = SimpleNamespace(is_hung=False, wait_exit_code=exit_code)
        await instance._keep_restarting(died)
        assert instance.restart_count == 1

    asyncio.run(scenario())
    assert "worker m:1 #0 could not be started again: Too many open files; starting it again" in reasons
