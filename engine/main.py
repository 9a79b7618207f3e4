"""The ``forebay`` command. Imports little: ``serve`` has its children starting before it reads anything large."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forebay.engine.command_line import Command, CommandLineExit
    from forebay.engine.settings import Settings
    from forebay.engine.supervisor.listeners import Listener
    from forebay.engine.supervisor.runtime_directory import RuntimeDirectory

#: Commands besides ``serve``: modules with ``run(command) -> exit code``, imported when asked for.
_COMMAND_MODULES = {
    "validate": "forebay.engine.validate_command",
    "explain": "forebay.engine.explain_command",
    "demo": "forebay.engine.demo",
}

#: Exit code after Ctrl-C, as shells give it: 128 and the signal's number.
_INTERRUPTED = 130

#: Descriptors without which no model at all could be served.
_DESCRIPTORS_MIN = 64

#: The shell's limits behind errors of the system.
_LIMITS = {errno.EMFILE: " (ulimit -n)", errno.EAGAIN: " (ulimit -u)", errno.ENOMEM: " (ulimit -v, or memory)"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    _open_missing_streams()
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        # Before the server watches for signals, or in a command that does not: no traceback for Ctrl-C.
        return _INTERRUPTED


def _open_missing_streams() -> None:
    """Give closed standard descriptors to /dev/null; else the first socket would be taken for standard error."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    # Python has no stream where it found no descriptor.
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def _run(arguments: Sequence[str] | None) -> int:
    from forebay.engine.command_line import CommandLineExit, parse_command_line, version

    try:
        command = parse_command_line(sys.argv[1:] if arguments is None else arguments, os.environ)
    except CommandLineExit as answer:
        _print_answer(answer)
        return answer.exit_code
    for warning in command.warnings:
        print(warning, file=sys.stderr)
    if command.name == "serve":
        return serve(command.settings)
    if command.name == "version":
        print(f"forebay {version()}")
        return 0
    run: Callable[[Command], int] = importlib.import_module(_COMMAND_MODULES[command.name]).run
    return run(command)


def _print_answer(answer: CommandLineExit) -> None:
    stream = sys.stdout if answer.is_answer else sys.stderr
    try:
        print(answer.text.rstrip("\n"), file=stream, flush=True)
    except BrokenPipeError:
        # `forebay --help | head`: the reader has seen enough. The interpreter must not find the pipe again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def serve(settings: Settings) -> int:
    """Serve until a signal; return the exit code (spec F-175)."""
    from forebay.ipc.errors import ServingError
    from forebay.ipc.log import LogOptions, log

    chosen = settings.log
    try:
        log.configure(
            LogOptions(
                verbose=chosen.verbose,
                info=chosen.info,
                warning=chosen.warning,
                error=chosen.error,
                format=chosen.format,
                file=chosen.file,
                escape=chosen.escape,
            )
        )
    except OSError as error:
        print(f"error: cannot open the log file '{chosen.file}': {error.strerror}", file=sys.stderr)
        return 1
    if not settings.repository.paths and not settings.repository.functions:
        print("error: creating server: Invalid argument - --model-repository must be specified", file=sys.stderr)
        return 1

    from forebay.engine.supervisor.runtime_directory import RuntimeDirectory
    from forebay.ipc.process import allow_descriptors

    # One per connection, and some for each instance.
    count = allow_descriptors()
    if count < _DESCRIPTORS_MIN:
        print(
            f"error: creating server: Internal - {count} files may be open at a time (ulimit -n), "
            f"at least {_DESCRIPTORS_MIN} are needed",
            file=sys.stderr,
        )
        return 1
    try:
        # Before anything else: a port in use is one clear line, and there is nothing to clean up yet.
        listeners = bind_endpoints(settings)
        runtime = RuntimeDirectory(settings.process.runtime_directory)
    except ServingError as error:
        print(f"error: creating server: {error.code.label} - {error.text}", file=sys.stderr)
        return 1
    try:
        try:
            settings = _add_functions(settings, runtime)
        except ServingError as error:
            print(f"error: creating server: {error.code.label} - {error.text}", file=sys.stderr)
            return 1
        return _supervise(settings, runtime, listeners)
    except (OSError, MemoryError) as error:
        # The machine has too little of something: descriptors, memory, processes, room on a disk.
        log.verbose(1, traceback.format_exc())
        print(f"error: creating server: Internal - {_lacking(error)}", file=sys.stderr)
        return 1
    finally:
        runtime.remove()


def _lacking(error: OSError | MemoryError) -> str:
    """Say what there was too little of, and which limit that is."""
    if not isinstance(error, OSError) or not error.errno:
        return str(error) or "out of memory"
    where = f": '{error.filename}'" if error.filename else ""
    return f"{os.strerror(error.errno)}{where}{_LIMITS.get(error.errno, '')}"


def _add_functions(settings: Settings, runtime: RuntimeDirectory) -> Settings:
    """Return the settings with one more repository, of the Python functions that were named.

    Raises:
        InvalidArgument: two functions have the same name.
    """
    if not settings.repository.functions:
        return settings
    import msgspec

    from forebay.engine.function_repository import write_function_repository

    path = os.path.join(runtime.path, "functions")
    write_function_repository(path, settings.repository.functions, os.getcwd())
    repository = msgspec.structs.replace(settings.repository, paths=(*settings.repository.paths, path))
    return msgspec.structs.replace(settings, repository=repository)


def bind_endpoints(settings: Settings) -> dict[str, Listener]:
    """Bind the sockets of all endpoints that are switched on, by protocol.

    Raises:
        Unavailable: a port is in use (spec H-021); none stays bound.
    """
    from forebay.engine.supervisor.listeners import bind
    from forebay.ipc.log import log

    http, grpc, metrics, cloud = settings.http, settings.grpc, settings.metrics, settings.cloud
    listeners: dict[str, Listener] = {}
    try:
        if http.allow:
            listeners["http"] = bind("HTTPService", "HTTP", http.address, http.port, reuse_port=http.reuse_port)
        if grpc.allow:
            if importlib.util.find_spec("forebay.frontend.grpc_main") is None:
                log.warning("gRPC is not served by this version of forebay; --allow-grpc=false silences this line")
            else:
                listeners["grpc"] = bind(
                    "GRPCInferenceService", "GRPC", grpc.address, grpc.port, reuse_port=grpc.reuse_port
                )
        if cloud.allow_sagemaker:
            listeners["sagemaker"] = bind("Sagemaker HTTPService", "SageMaker", http.address, cloud.sagemaker_port)
        if cloud.allow_vertex_ai:
            _check_vertex_ai_routes()
            listeners["vertex_ai"] = bind("Vertex AI HTTPService", "Vertex AI", http.address, cloud.vertex_ai_port)
        if metrics.allow:
            listeners["metrics"] = bind("Metrics Service", "metrics", metrics.address or http.address, metrics.port)
    except BaseException:
        for listener in listeners.values():
            listener.close()
        raise
    return listeners


def _check_vertex_ai_routes() -> None:
    """Raise Unavailable unless Vertex AI has said where it asks, with Triton's text (it misspells the first)."""
    from forebay.ipc.errors import Unavailable

    for variable, called in (("AIP_PREDICT_ROUTE", "API_PREDICT_ROUTE"), ("AIP_HEALTH_ROUTE", "AIP_HEALTH_ROUTE")):
        if not os.environ.get(variable):
            text = f"{called} is not defined for Vertex AI endpoint"
            raise Unavailable(f"failed to start Vertex AI service: Invalid argument - {text}")


def _supervise(settings: Settings, runtime: RuntimeDirectory, listeners: dict[str, Listener]) -> int:
    # numpy comes with the messages; this process computes nothing.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    import asyncio

    from forebay.engine.console import Console
    from forebay.engine.supervisor.supervisor import Supervisor
    from forebay.ipc.log import log
    from forebay.ipc.process import set_name

    set_name("supervisor")
    console = Console(sys.stdout)
    if sys.stdout.isatty() and not settings.log.file:
        log.interrupting = console.paused

    async def run() -> int:
        return await Supervisor(settings, runtime, listeners, console).run()

    return asyncio.run(run())


if __name__ == "__main__":
    sys.exit(main())
