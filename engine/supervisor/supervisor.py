"""The supervisor: starts all other processes, keeps them running, and ends them in order.

Order of a start-up: everything that takes long is begun at once and in parallel (zygotes import their libraries,
scheduler and frontends start) while the repository is read here; the models are loaded; then the sockets listen (spec
H-032). Order of an end: stop accepting, answer what was accepted, unload the models, then scheduler, zygotes and
metrics. If this process is killed, the kernel kills its children and the janitor removes the runtime directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import itertools
import os
import signal
import time
from collections.abc import Awaitable
from typing import Any

import msgspec

from forebay.engine.command_line import version as own_version
from forebay.engine.console import Console
from forebay.engine.settings import Settings
from forebay.engine.supervisor.client_memories import ClientMemories
from forebay.engine.supervisor.core_pool import CorePool, usable_cores
from forebay.engine.supervisor.core_wakeups import check_wakeup_latency
from forebay.engine.supervisor.device_pools import DevicePools
from forebay.engine.supervisor.file_threads import FileThreads
from forebay.engine.supervisor.host_policies import HostPolicies
from forebay.engine.supervisor.likely_families import likely_families
from forebay.engine.supervisor.listeners import Listener
from forebay.engine.supervisor.log_settings import LogSettings
from forebay.engine.supervisor.memory import settle_memory
from forebay.engine.supervisor.mps import Mps
from forebay.engine.supervisor.page_locking import may_be_page_locked
from forebay.engine.supervisor.plant import Plant
from forebay.engine.supervisor.processes import FrontendRole, Role, SchedulerRole
from forebay.engine.supervisor.quiet_frontend import QuietFrontend
from forebay.engine.supervisor.rate_limits import limits_of
from forebay.engine.supervisor.ready_checks import ReadyChecks
from forebay.engine.supervisor.regions import RegionRegistry
from forebay.engine.supervisor.runtime_directory import RuntimeDirectory
from forebay.engine.supervisor.start_display import StartDisplay
from forebay.engine.supervisor.switchboard import Switchboard
from forebay.engine.supervisor.zygotes import Zygotes
from forebay.ipc.catalog import Catalog
from forebay.ipc.client_wire import RUNTIME_DIRECTORY_VARIABLE
from forebay.ipc.counters import CACHE_WORDS, COUNTERS_BYTES, CountersFile
from forebay.ipc.errors import Internal, NotFound, ServingError
from forebay.ipc.log import ENVIRONMENT_VARIABLE, log
from forebay.ipc.messages import LogChanged
from forebay.ipc.scheduler_messages import Explain, SchedulerStart
from forebay.ipc.trace import TraceRecord
from forebay.ipc.worker_messages import ModelMetrics

#: How long processes get to end after everything they had to do is done, s.
_STOP_TIMEOUT_S = 5.0

#: How long a frontend may take to be ready to serve once the models are loaded, s.
_START_TIMEOUT_S = 60.0

#: Threads that read files.
_FILE_THREADS = 2

#: Connections that may wait to be accepted.
_BACKLOG = 4096

#: Names the counters of all shared-memory clients together.
_CLIENTS_SLOT = "clients"

#: Arena of the metrics frontend, which places no tensors; one page.
_NO_ARENA_BYTES = 4096

#: Frontends of which there is one, by the protocol of their listener.
_SINGLE_FRONTENDS = {
    "grpc": "forebay.frontend.grpc_main",
    "sagemaker": "forebay.frontend.cloud.sagemaker_main",
    "vertex_ai": "forebay.frontend.cloud.vertex_ai_main",
}


class StartFailed(Internal):
    """The server cannot start; the text is the reason."""


class Supervisor:
    """One server. ``run`` once."""

    def __init__(
        self, settings: Settings, runtime: RuntimeDirectory, listeners: dict[str, Listener], console: Console
    ) -> None:
        """Create nothing that needs an event loop.

        Args:
            runtime: its directory; removed by the caller after ``run``.
            listeners: bound sockets by protocol (``http``, ``grpc``, ``sagemaker``, ``vertex_ai``, ``metrics``); closed
                here when the server stops.
        """
        self.settings = settings
        self._runtime = runtime
        self._listeners = listeners
        self._console = console
        self._display = StartDisplay(console)
        self._began_s = time.monotonic()
        self._signals = 0
        self._stop_requested = asyncio.Event()
        self._tasks: list[asyncio.Task[Any]] = []
        self._quiet: QuietFrontend | None = None
        self._client_catalog: Catalog | None = None
        self._mps = Mps(settings.gpu.mps, runtime.path)
        #: By worker, what its model's own metrics were last.
        self._model_metrics: dict[int, ModelMetrics] = {}

    async def run(self) -> int:
        """Serve until a signal; return the exit code."""
        try:
            policies = HostPolicies(self.settings.process.host_policies)
            check_wakeup_latency(self.settings.process.cpu_wakeup_latency_us)
            self._mps.enter()
        except ServingError as error:
            log.error(f"error: creating server: {error.code.label} - {error.text}")
            return 1
        self._watch_signals()
        self._runtime.janitor.watch()
        asyncio.get_running_loop().set_default_executor(FileThreads(_FILE_THREADS))
        os.environ[ENVIRONMENT_VARIABLE] = msgspec.json.encode(log.options).decode()
        # Models that call other models, or that use the shared-memory client, find their own server.
        os.environ[RUNTIME_DIRECTORY_VARIABLE] = self._runtime.path
        counters = CountersFile()
        scheduling = SchedulerStart(
            epoch=0,
            runtime_directory="",
            is_rate_limited=self.settings.rate_limit.mode != "off",
            resources=limits_of(self.settings.rate_limit),
            hold_back_requests=self.settings.scheduler.delay_request_count,
        )
        self._switchboard = Switchboard(self._runtime.path, counters.fd, COUNTERS_BYTES, scheduling)
        self._zygotes = Zygotes()
        self._start_likely_zygotes()
        self._scheduler = SchedulerRole(self._switchboard)
        self._scheduler.start()
        #: Of producers: frontends' runs and shared-memory clients.
        self._numbers = itertools.count(1)
        self._cache_counter_offsets: tuple[int, ...] = ()
        self._regions = RegionRegistry()
        self._pools = DevicePools(self.settings.gpu)
        self._client_memories = ClientMemories(self.settings.gpu)
        self._frontends = self._create_frontends(counters)
        #: Those that no request waits for; started last, so that they delay nobody.
        self._watchers = [frontend for frontend in self._frontends if not frontend.submits]
        #: Those that there are from the beginning.
        self._first_frontends = [role for role in self._frontends if role.submits and not role.is_quiet]
        for frontend in self._first_frontends:
            frontend.start()
        self._roles: list[Role[Any]] = [*self._frontends, self._scheduler]
        self._console.announce(f"forebay {own_version()}, models from {', '.join(self.settings.repository.paths)}")
        # Only now, while the children import their libraries, what takes us long to import (protobuf, ZeroMQ).
        from forebay.engine.supervisor.client_door import ClientDoor
        from forebay.engine.supervisor.control import ControlServer
        from forebay.engine.supervisor.couriers import Couriers
        from forebay.engine.supervisor.gpus import find_gpus

        plant = Plant(
            settings=self.settings,
            switchboard=self._switchboard,
            zygotes=self._zygotes,
            counters=counters,
            cores=CorePool(usable_cores()),
            gpus=find_gpus(cpu_only=self.settings.gpu.cpu_only),
            host_policies=policies,
            cache_counter_offsets=self._cache_counter_offsets,
            on_model_metrics=self._pass_on_metrics,
        )
        for frontend in self._frontends:
            frontend.on_crowded = plant.core_shares.note_crowds
        self._couriers = Couriers(plant)
        self._regions.use_devices(self._couriers, (gpu.device_id for gpu in plant.gpus))
        if plant.gpus:
            self._pools.use_maker(self._couriers)
            self._client_memories.use_maker(self._couriers, (gpu.device_id for gpu in plant.gpus))
            self._couriers.on_changed = self._courier_changed
        self._control = ControlServer(self._runtime.path, self._catalog_for)
        self._door = ClientDoor(
            self._runtime.path,
            self._switchboard,
            numbers=self._numbers,
            catalog=self._catalog_for_clients,
            counters=counters,
            memories=self._client_memories,
            arena_bytes_max=self.settings.memory.arena_byte_size,
            keeps_pages=functools.partial(may_be_page_locked, self.settings),
        )
        plant.side_door = self._door.side_door
        try:
            self._create_traces()
            self._create_lifecycle(plant)
            self._tasks.append(asyncio.create_task(self._control.run()))
            self._tasks.append(asyncio.create_task(plant.watchdog.run()))
            starting = asyncio.create_task(self._start())
            stopping = asyncio.create_task(self._stop_requested.wait())
            self._tasks += [starting, stopping]
            await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                await starting
                await stopping
            else:
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
            return await self._drain()
        except StartFailed as error:
            log.error(f"error: creating server: {error.code.label} - {error.text}")
            return 1
        finally:
            await self._end()

    def _create_traces(self) -> None:
        from forebay.engine.supervisor.traces import Traces

        try:
            self._traces = Traces(self.settings.trace, self._control.publish_trace_rules)
        except ServingError as error:
            raise StartFailed(error.text) from None
        self._control.trace_rules = self._traces.rules
        self._control.on_traces = self._take_traces

    def _create_lifecycle(self, plant: Plant) -> None:
        from forebay.engine.repository.repository import open_repository
        from forebay.engine.supervisor.lifecycle import ModelLifecycle
        from forebay.engine.supervisor.repository_commands import RepositoryCommands

        try:
            repository = open_repository(self.settings)
        except ServingError as error:
            raise StartFailed(error.text) from None
        self._lifecycle = ModelLifecycle(
            plant,
            repository,
            announce=self._announce_catalog,
            wait_seen=self._control.wait_seen,
            progress=self._display.show_progress,
        )
        commands = RepositoryCommands(self._lifecycle)
        log_settings = LogSettings(self._tell_of_log)
        self._control.handlers.update(
            index=commands.index,
            load=commands.load,
            unload=commands.unload,
            trace_get=self._traces.get,
            trace_set=self._traces.set,
            log_get=log_settings.get,
            log_set=log_settings.set,
            explain=self._explain,
            model_ready=ReadyChecks(self._lifecycle).ask,
            mount=commands.mount,
            unmount=commands.unmount,
            mounts=commands.mounts,
            region_register=self._regions.register,
            region_status=self._regions.status,
            region_unregister=self._regions.unregister,
        )

    # --- start ---

    @property
    def _wanted_models(self) -> tuple[str, ...] | None:
        """What is loaded at the start; None: everything."""
        repository = self.settings.repository
        if repository.control_mode != "explicit" or repository.load_models == ("*",):
            return None
        return repository.load_models

    def _start_likely_zygotes(self) -> None:
        for family in likely_families(self.settings.repository.paths, self._wanted_models):
            self._zygotes.start(family)

    def _create_frontends(self, counters: CountersFile) -> list[FrontendRole]:
        settings: dict[str, Any] = msgspec.to_builtins(self.settings)
        http_count = max(1, self.settings.http.frontends) if "http" in self._listeners else 0
        single = {name: module for name, module in _SINGLE_FRONTENDS.items() if name in self._listeners}
        share_bytes = self._share_cache(counters, http_count + len(single))
        self._pools.share_count = max(http_count + len(single), 1)
        cache_offsets = iter(self._cache_counter_offsets)

        def create(
            name: str, module: str, protocol: str, *, submits: bool = True, is_quiet: bool = False
        ) -> FrontendRole:
            return FrontendRole(
                name,
                module,
                self._switchboard,
                numbers=self._numbers,
                arena_bytes=self.settings.memory.arena_byte_size if submits else _NO_ARENA_BYTES,
                settings=settings,
                listeners=() if is_quiet else (self._listeners[protocol],),
                on_gone=self._forget_frontend,
                regions=self._regions,
                pools=self._pools,
                submits=submits,
                cache_bytes=share_bytes if submits else 0,
                cache_counter_offset=next(cache_offsets, 0) if submits else 0,
                keeps_pages=functools.partial(may_be_page_locked, self.settings),
                is_quiet=is_quiet,
            )

        frontends: list[FrontendRole] = []
        if "http" in self._listeners:
            names = [f"http {index}" for index in range(http_count)]
            others = [create(name, "forebay.frontend.http_main", "http") for name in names]
            frontends += others
            if self.settings.http.quiet_frontend and not share_bytes:
                self._quiet = QuietFrontend(
                    create("http quiet", "forebay.frontend.http_main", "http", is_quiet=True),
                    others,
                    # Whatever it knows when it comes up for the first time; others wait for what follows.
                    wait_ready=lambda number: self._control.wait_seen_by(number, self._lifecycle.generation),
                )
                frontends.append(self._quiet.role)
        frontends += [create(protocol, module, protocol) for protocol, module in single.items()]
        if "metrics" in self._listeners:
            frontends.append(create("metrics", "forebay.frontend.metrics_main", "metrics", submits=False))
            frontends[-1].greetings = self._model_metrics.values
        return frontends

    def _share_cache(self, counters: CountersFile, frontend_count: int) -> int:
        """Return the bytes of the response cache that each frontend keeps."""
        size_bytes = self.settings.cache.size_bytes
        if not size_bytes or not frontend_count:
            return 0
        self._cache_counter_offsets = tuple(counters.allocate(CACHE_WORDS) for _ in range(frontend_count))
        return size_bytes // frontend_count

    async def _start(self) -> None:
        """Bring everything up.

        Raises:
            StartFailed: a process or, with ``--exit-on-error``, a model cannot be started.
        """
        needed: list[Role[Any]] = [*self._first_frontends, self._scheduler]
        ready = asyncio.gather(*(role.ready for role in needed))
        ticking = asyncio.create_task(self._display.run())
        try:
            if await self._lifecycle.load_at_start(self._wanted_models) and self.settings.repository.exit_on_error:
                self._display.show_models(self._lifecycle.models)
                raise StartFailed("failed to load all models")
            await asyncio.wait_for(ready, _START_TIMEOUT_S)
        except TimeoutError:
            late = [role.name for role in needed if not role.is_up]
            raise StartFailed(f"{' and '.join(late)} did not start within {_START_TIMEOUT_S:g} s") from None
        except StartFailed:
            raise
        except ServingError as error:
            raise StartFailed(error.text) from None
        finally:
            ready.cancel()
            ticking.cancel()
            await asyncio.gather(ready, ticking, return_exceptions=True)
        self._display.show_models(self._lifecycle.models)
        settle_memory()
        self._lifecycle.is_initialised = True
        generation = self._lifecycle.touch()
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                numbers = [role.number for role in self._first_frontends]
                await asyncio.gather(*(self._control.wait_seen_by(number, generation) for number in numbers))
        except TimeoutError:
            log.warning("a frontend has not taken in the list of models yet")
        self._door.open()
        self._listen()
        if self.settings.repository.control_mode == "poll":
            from forebay.engine.supervisor.poller import RepositoryPoller

            poller = RepositoryPoller(self._lifecycle, float(self.settings.repository.poll_secs))
            self._tasks.append(asyncio.create_task(poller.run()))

    def _listen(self) -> None:
        for listener in self._listeners.values():
            listener.allow_restart()
            try:
                listener.sock.listen(_BACKLOG)
            except OSError as error:
                address, port = listener.address
                raise StartFailed(
                    f"failed to start {listener.kind} service: Unavailable - Socket '{address}:{port}' already in use"
                    if error.errno == errno.EADDRINUSE
                    else f"failed to start {listener.kind} service: {error.strerror}"
                ) from None
        for frontend in self._frontends:
            frontend.serve()
        for listener in self._listeners.values():
            address, port = listener.address
            log.info(f"Started {listener.service} at {address}:{port}")
        self._display.show_endpoints(self._listeners, self._lifecycle.models)
        for watcher in self._watchers:
            # Whoever asks before it is up waits in the backlog of its socket.
            watcher.ready.add_done_callback(functools.partial(_note_failed_start, watcher.name))
            watcher.start()

    # --- while serving ---

    def _catalog_for(self, producer: int) -> Catalog:
        slot = next((role.name for role in self._frontends if role.number == producer), "")
        return self._lifecycle.catalog(slot, self._slots)

    @property
    def _slots(self) -> tuple[str, ...]:
        """Who has counters of its own: every frontend that submits, and the shared-memory clients together."""
        return (*(role.name for role in self._frontends if role.submits), _CLIENTS_SLOT)

    async def _announce_catalog(self) -> None:
        await self._control.publish()
        self._door.catalog_changed()
        if self._lifecycle.plant.gpus:
            self._pools.follow(self._catalog_for_clients().models)

    def _courier_changed(self) -> None:
        self._pools.settle()
        self._client_memories.note_couriers()

    def _catalog_for_clients(self) -> Catalog:
        # Clients ask once per model; the catalog is built anew only when something has changed.
        if self._client_catalog is None or self._client_catalog.generation != self._lifecycle.generation:
            self._client_catalog = self._lifecycle.catalog(_CLIENTS_SLOT, self._slots)
        return self._client_catalog

    def _forget_frontend(self, number: int) -> None:
        task = asyncio.create_task(self._control.forget(number))
        self._tasks.append(task)
        task.add_done_callback(self._tasks.remove)

    def _pass_on_metrics(self, message: ModelMetrics) -> None:
        """Models' own metrics: to the metrics process, and to the next one if it is replaced."""
        if message.families:
            self._model_metrics[message.instance] = message
        elif self._model_metrics.pop(message.instance, None) is None:
            return
        for role in self._frontends:
            if not role.submits and role.child is not None:
                role.child.send(message)

    def _take_traces(self, records: tuple[TraceRecord, ...]) -> None:
        if self._traces.take(records):
            # Somebody has had all of its traces: no frontend shall make more.
            task = asyncio.create_task(self._control.publish_trace_rules())
            self._tasks.append(task)
            task.add_done_callback(self._tasks.remove)

    def _tell_of_log(self, changed: LogChanged) -> None:
        for child in (self._scheduler.child, *(frontend.child for frontend in self._frontends)):
            if child is not None:
                child.send(changed)
        self._lifecycle.plant.change_log(changed)

    async def _explain(self, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the last batches of a version as the scheduler remembers them."""
        model = self._lifecycle.models.get(str(arguments.get("model")))
        version = arguments.get("version")
        served = model.serving.get(version) if model is not None and isinstance(version, int) else None
        if served is None:
            raise NotFound(f"Request for unknown model: '{arguments.get('model')}' is not found")
        child = self._scheduler.child
        number, answer = self._scheduler.expect_explanation()
        if child is None or not child.send(Explain(route=served.route, request=number)):
            answer.cancel()
            raise Internal("the scheduler is being restarted, try again")
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            return await answer

    # --- stop ---

    def _watch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN or number != signal.SIGHUP:
                loop.add_signal_handler(number, self._take_signal, number)

    def _take_signal(self, number: int) -> None:
        self._signals += 1
        with contextlib.suppress(OSError, ValueError), self._console.paused():
            print(f"Signal ({number}) received.", flush=True)
        if self._signals > 1:
            # Children first: nothing may be left behind even by an impatient user.
            self._kill_all()
            self._runtime.remove()
            os._exit(1)
        self._stop_requested.set()

    async def _drain(self) -> int:
        """Finish what was accepted and unload everything (spec R-110..R-113); return the exit code."""
        timeout_s = float(self.settings.server.exit_timeout_secs)
        self._lifecycle.is_live = False
        self._client_catalog = None
        self._door.stop_accepting()
        log.info("Waiting for in-flight requests to complete.")
        counting = asyncio.create_task(self._count_down(timeout_s))
        try:
            async with asyncio.timeout(timeout_s):
                await self._finish(timeout_s)
        except TimeoutError:
            log.error("failed to stop server: Internal - Exit timeout expired. Exiting immediately.")
            return 1
        finally:
            counting.cancel()
        return 0

    async def _finish(self, timeout_s: float) -> None:
        submitting = [role for role in self._frontends if role.submits]
        watching = [role for role in self._frontends if not role.submits]
        # A longer timeout than that of the whole stop, so that it is the latter which ends them.
        stopping = [asyncio.create_task(role.stop(timeout_s + _STOP_TIMEOUT_S)) for role in submitting]
        for protocol, listener in self._listeners.items():
            if protocol != "metrics":
                listener.close()
        await asyncio.gather(*stopping)
        await self._lifecycle.unload_all()
        self._pools.stop()
        self._client_memories.stop()
        await self._couriers.stop()
        ends: list[Awaitable[Any]] = [role.stop(_STOP_TIMEOUT_S) for role in watching]
        await asyncio.gather(self._scheduler.stop(_STOP_TIMEOUT_S), self._zygotes.stop(_STOP_TIMEOUT_S), *ends)

    async def _count_down(self, timeout_s: float) -> None:
        left = int(timeout_s)
        while left > 0:
            await asyncio.sleep(1)
            left -= 1
            log.info(
                f"Timeout {left}: Found {self._lifecycle.live_count} live models and {self._control.command_count} "
                "in-flight non-inference requests"
            )

    def _kill_all(self) -> None:
        if lifecycle := getattr(self, "_lifecycle", None):
            lifecycle.kill_all()
            self._couriers.kill()
        for role in self._roles:
            role.kill()
        self._zygotes.kill()

    async def _end(self) -> None:
        """Leave nothing behind, whatever happened before."""
        self._runtime.janitor.unwatch()
        if self._quiet is not None:
            self._quiet.close()
        self._kill_all()
        for task in list(self._tasks):
            task.cancel()
        if lifecycle := getattr(self, "_lifecycle", None):
            await lifecycle.close()
        children = [role.child for role in self._roles if role.child is not None]
        await asyncio.gather(*(child.exited.wait() for child in children), *list(self._tasks), return_exceptions=True)
        await self._zygotes.wait_ended()
        # Nobody needs the loop any more, and the threads may hang in a file system.
        self._mps.leave()
        await self._control.close()
        if traces := getattr(self, "_traces", None):
            traces.close()
        self._door.close()
        for listener in self._listeners.values():
            listener.close()
        self._regions.close()
        self._switchboard.close()


def _note_failed_start(name: str, ready: asyncio.Future[None]) -> None:
    if not ready.cancelled() and (error := ready.exception()) is not None:
        log.error(f"{name} could not be started: {error}")
