"""The client of event loops, without a server."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace
from typing import Any

from forebay.client.shm_asyncio import AsyncEngine


def test_who_waits_to_submit_is_woken_when_the_connection_is_closed() -> None:
    async def scenario() -> None:
        ours, theirs = socket.socketpair()
        completions = SimpleNamespace(fileno=ours.fileno, read_nowait=lambda: None)
        connection = SimpleNamespace(is_crowded=True, completions=completions)
        engine: Any = SimpleNamespace(connection=connection, close=lambda: None)
        client = AsyncEngine(engine)
        waiting = asyncio.ensure_future(client.make_way())
        await asyncio.sleep(0)
        client.close()
        await asyncio.wait_for(waiting, 20)
        ours.close()
        theirs.close()

    asyncio.run(scenario())
