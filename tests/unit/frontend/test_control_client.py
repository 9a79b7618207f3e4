"""The client of the control socket, against a ROUTER on a real ipc socket, under both event loops."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop
import zmq
import zmq.asyncio
from fake_frontend import entry

from forebay.frontend import control_client
from forebay.frontend.catalog_view import CatalogView
from forebay.frontend.control_client import ControlClient
from forebay.ipc.catalog import Catalog
from forebay.ipc.channel import TypedCodec, control_address
from forebay.ipc.errors import Code, NotFound, Unavailable
from forebay.ipc.frontend_messages import CatalogPush, CatalogSeen, Command, CommandReply, FrontendToControl, Hello
from forebay.ipc.messages import Message

PRODUCER = 7


class Supervisor:
    """The other end: a ROUTER that says what the test tells it."""

    def __init__(self, directory: Path) -> None:
        self._codec: TypedCodec[Hello | CatalogSeen | Command] = TypedCodec(FrontendToControl)
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.bind(control_address(str(directory)))
        self._peer = b""

    async def receive(self) -> Hello | CatalogSeen | Command:
        self._peer, data = await asyncio.wait_for(self._socket.recv_multipart(), 20)
        return self._codec.decode(data)

    async def expect_hello(self) -> None:
        assert await self.receive() == Hello(producer=PRODUCER)

    async def expect_command(self) -> Command:
        message = await self.receive()
        assert isinstance(message, Command)
        return message

    async def send(self, message: Message) -> None:
        await self._socket.send_multipart([self._peer, self._codec.encode(message)])

    async def send_raw(self, data: bytes) -> None:
        await self._socket.send_multipart([self._peer, data])

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()


Scenario = Callable[[Supervisor, ControlClient], Coroutine[Any, Any, None]]
RunScenario = Callable[[Scenario], None]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def play(request: pytest.FixtureRequest, tmp_path: Path) -> RunScenario:
    """Run a scenario with both ends connected."""

    async def run(scenario: Scenario) -> None:
        supervisor = Supervisor(tmp_path)
        client = ControlClient(asyncio.get_running_loop(), str(tmp_path), PRODUCER)
        try:
            await supervisor.expect_hello()
            await asyncio.wait_for(scenario(supervisor, client), 30)
        finally:
            client.close()
            supervisor.close()

    def play(scenario: Scenario) -> None:
        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(run(scenario))

    return play


def test_listeners_run_before_the_catalog_is_acknowledged(play: RunScenario) -> None:
    async def scenario(supervisor: Supervisor, client: ControlClient) -> None:
        seen: list[CatalogView] = []
        client.add_listener(seen.append)
        assert client.catalog.ready_models == ()
        for generation in (1, 2, 3):
            models = (entry("m", generation),)
            await supervisor.send(CatalogPush(catalog=Catalog(generation=generation, models=models, ready=True)))
            assert await supervisor.receive() == CatalogSeen(producer=PRODUCER, generation=generation)
            assert seen[-1] is client.catalog
            assert client.catalog.find("m").version == generation
        assert await client.wait_catalog() is client.catalog

    play(scenario)


def test_a_failing_listener_stops_neither_the_others_nor_the_acknowledgement(
    play: RunScenario, capfd: pytest.CaptureFixture[str]
) -> None:
    async def scenario(supervisor: Supervisor, client: ControlClient) -> None:
        seen: list[CatalogView] = []

        def fail(view: CatalogView) -> None:
            raise RuntimeError("listener broke")

        client.add_listener(fail)
        client.add_listener(seen.append)
        await supervisor.send(CatalogPush(catalog=Catalog(generation=1)))
        assert await supervisor.receive() == CatalogSeen(producer=PRODUCER, generation=1)
        assert len(seen) == 1

    play(scenario)
    assert "listener broke" in capfd.readouterr().err


def test_commands_are_answered_by_number_not_by_order(play: RunScenario) -> None:
    async def scenario(supervisor: Supervisor, client: ControlClient) -> None:
        calls = [asyncio.create_task(client.command(verb, {"verb": verb})) for verb in ("index", "load", "log_get")]
        commands = [await supervisor.expect_command() for _ in calls]
        assert [command.arguments for command in commands] == [{"verb": command.verb} for command in commands]
        for command in reversed(commands):
            await supervisor.send(CommandReply(request=command.request, result=[command.verb]))
        assert await asyncio.gather(*calls) == [["index"], ["load"], ["log_get"]]

    play(scenario)


def test_an_error_keeps_code_and_text(play: RunScenario) -> None:
    async def scenario(supervisor: Supervisor, client: ControlClient) -> None:
        call = asyncio.create_task(client.command("load", {"name": "m"}))
        command = await supervisor.expect_command()
        await supervisor.send(CommandReply(request=command.request, code=Code.NOT_FOUND, text="no m"))
        with pytest.raises(NotFound, match=r"^no m$"):
            await call

    play(scenario)


def test_nonsense_and_late_replies_are_dropped(play: RunScenario, capfd: pytest.CaptureFixture[str]) -> None:
    async def scenario(supervisor: Supervisor, client: ControlClient) -> None:
        await supervisor.send_raw(b"\xc1 nonsense")
        await supervisor.send(CommandReply(request=99, result="late"))
        call = asyncio.create_task(client.command("index"))
        command = await supervisor.expect_command()
        await supervisor.send(CommandReply(request=command.request, result=1))
        assert await call == 1

    play(scenario)
    assert "cannot be read" in capfd.readouterr().err


def test_a_supervisor_socket_made_anew_is_greeted_and_open_calls_fail(play: RunScenario, tmp_path: Path) -> None:
    async def scenario(supervisor: Supervisor, client: ControlClient) -> None:
        call = asyncio.create_task(client.command("load", {"name": "m"}))
        await supervisor.expect_command()
        supervisor.close()
        with pytest.raises(Unavailable, match="whether it took effect is unknown"):
            await call
        with contextlib.closing(Supervisor(tmp_path)) as second:
            await second.expect_hello()
            call = asyncio.create_task(client.command("index"))
            command = await second.expect_command()
            await second.send(CommandReply(request=command.request, result="second"))
            assert await call == "second"

    play(scenario)


def test_an_ordinary_command_times_out_and_a_load_does_not(play: RunScenario, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_client, "COMMAND_TIMEOUT_SECS", 0.05)

    async def scenario(supervisor: Supervisor, client: ControlClient) -> None:
        load = asyncio.create_task(client.command("load"))
        with pytest.raises(Unavailable, match="did not carry out 'index'"):
            await client.command("index")
        await asyncio.sleep(0.1)
        assert not load.done()
        load.cancel()
        with pytest.raises(asyncio.CancelledError):
            await load

    play(scenario)


def test_the_number_of_open_commands_is_bounded(play: RunScenario, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_client, "PENDING_COMMANDS_MAX", 2)

    async def scenario(supervisor: Supervisor, client: ControlClient) -> None:
        calls = [asyncio.create_task(client.command("load")) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="try again later"):
            await client.command("load")
        for _ in calls:
            command = await supervisor.expect_command()
            await supervisor.send(CommandReply(request=command.request))
        assert await asyncio.gather(*calls) == [None, None]

    play(scenario)


def test_closing_fails_what_is_open(play: RunScenario) -> None:
    async def scenario(supervisor: Supervisor, client: ControlClient) -> None:
        call = asyncio.create_task(client.command("load"))
        await supervisor.expect_command()
        client.close()
        with pytest.raises(Unavailable, match="Server exiting"):
            await call
        with pytest.raises(Unavailable, match="Server exiting"):
            await client.command("index")

    play(scenario)
