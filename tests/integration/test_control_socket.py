"""Both ends of the control socket: the supervisor's server and a frontend's client."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import uvloop
from fake_frontend import entry

from forebay.engine.supervisor.control import ControlServer
from forebay.frontend.control_client import ControlClient
from forebay.ipc.catalog import Catalog
from forebay.ipc.errors import AlreadyExists, Internal, InvalidArgument


def test_catalogs_commands_and_errors_cross_both_ways(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    catalogs = [Catalog(generation=1, models=(entry("m"),), ready=True)]

    async def echo(arguments: dict[str, Any]) -> Any:
        return arguments

    async def refuse(arguments: dict[str, Any]) -> Any:
        raise AlreadyExists(f"shared memory region '{arguments['name']}' already in manager")

    async def fail(arguments: dict[str, Any]) -> Any:
        raise RuntimeError("secret")

    async def scenario() -> None:
        server = ControlServer(str(tmp_path), lambda producer: catalogs[-1])
        server.handlers.update(load=echo, region_register=refuse, index=fail)
        serving = asyncio.create_task(server.run())
        client = ControlClient(asyncio.get_running_loop(), str(tmp_path), 3)
        try:
            assert (await client.wait_catalog()).find("m").name == "m"
            await server.wait_seen_by(3, 1)
            catalogs.append(Catalog(generation=2))
            await server.publish()
            assert await server.wait_seen(2, 20)
            assert client.catalog.ready_models == ()
            arguments = {"name": "m", "config": None, "files": {"1/model.onnx": bytes(3_000_000)}}
            assert await client.command("load", arguments) == arguments
            with pytest.raises(AlreadyExists, match="shared memory region 'r' already in manager"):
                await client.command("region_register", {"name": "r"})
            with pytest.raises(Internal) as failure:
                await client.command("index")
            assert "secret" not in failure.value.text
            with pytest.raises(InvalidArgument, match="unknown control command"):
                await client.command("dance")
        finally:
            client.close()
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            await server.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(scenario(), 60))
    assert "secret" in capfd.readouterr().err
