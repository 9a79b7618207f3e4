"""One copy of a model's weights for all its instances (FACTS 3).

ONNX Runtime keeps weights in private memory and repacks them for the CPU, so that n instances of a model hold them n
times. Here the first instance writes an optimised copy of the model whose weights, already repacked, lie in a file of
their own; every instance maps that file, and the kernel keeps one copy of its pages. The copy depends on the CPU and on
ONNX Runtime's version and is kept in a cache:

    <cache>/<key>/model.onnx      the optimised graph
    <cache>/<key>/weights.bin     its weights, original and repacked
    <cache>/<key>.lock            held (flock) by the process that makes the copy

Whatever goes wrong, the model is loaded in the plain way. Runs in worker processes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any, NamedTuple

import onnxruntime as ort

from forebay.engine.backends.base import parse_bool, parse_int
from forebay.engine.backends.cache_directory import default_cache_directory, make_private_directory
from forebay.ipc.log import log
from forebay.ipc.process import die_with_parent
from forebay.ipc.worker_messages import InstanceSpec

#: Smaller models are loaded plainly: what could be shared is less than what an instance needs anyway. Bytes.
MIN_BYTES_DEFAULT = 16 << 20

#: The cache may hold this much; the copies that were not used for longest go first. Bytes.
CACHE_BYTES_DEFAULT = 32 << 30

#: Weights below this stay in the graph file; ONNX Runtime's own default. Bytes.
_EXTERNAL_MIN_BYTES = 1024

#: The copy holds weights twice, as they were and repacked.
_COPY_FACTOR = 2

_MODEL_FILE = "model.onnx"
_WEIGHTS_FILE = "weights.bin"

#: Files beside the model that are looked at to notice a change; no real model has more.
_FILES_MAX = 10_000


class SharingSettings(NamedTuple):
    """When and where weights are shared; from ``--backend-config=onnxruntime,<key>=<value>``."""

    enabled: bool
    """``share-weights``, or the model parameter ``share_weights``; Triton's ``share_session_between_instances`` (which
    shares a whole session between the threads of one process) asks for the same saving and turns it on too."""
    directory: str
    """``weights-cache-directory``"""
    min_bytes: int
    """``share-weights-min-bytes``"""
    cache_bytes: int
    """``weights-cache-bytes``"""


def sharing_settings(spec: InstanceSpec) -> SharingSettings:
    """Read the settings; without any, weights are shared if the model has several instances.

    Raises:
        InvalidArgument: a value is not what it should be.
    """
    config = spec.backend_config
    enabled = parse_bool(config, "share-weights", instance_count(spec) > 1)
    enabled = parse_bool(spec.parameters, "share_session_between_instances", enabled) or enabled
    enabled = parse_bool(spec.parameters, "share_weights", enabled)
    return SharingSettings(
        enabled=enabled,
        directory=config.get("weights-cache-directory") or default_cache_directory("onnx"),
        min_bytes=max(parse_int(config, "share-weights-min-bytes", MIN_BYTES_DEFAULT), 0),
        cache_bytes=max(parse_int(config, "weights-cache-bytes", CACHE_BYTES_DEFAULT), 0),
    )


def instance_count(spec: InstanceSpec) -> int:
    """Return how many instances on the CPU the model has."""
    config: dict[str, Any] = json.loads(spec.config_json or b"{}")
    groups: list[dict[str, Any]] = config.get("instance_group", [])
    return sum(int(group.get("count", 1)) for group in groups if group.get("kind", "KIND_CPU") != "KIND_GPU")


def find_shared_copy(spec: InstanceSpec, model_file: str, make_options: Callable[[], ort.SessionOptions]) -> str | None:
    """Return the path of the optimised copy of a model, made now if need be, or None if there is none.

    Blocks while another process makes the copy.

    Args:
        make_options: returns fresh options as the model's configuration wants them.

    Raises:
        InvalidArgument: a setting is wrong.
    """
    settings = sharing_settings(spec)
    if not settings.enabled:
        return None
    try:
        files = _list_files(os.path.dirname(model_file))
        model_bytes = sum(size for _name, size, _mtime_ns in files)
        if model_bytes < settings.min_bytes:
            return None
        key = _cache_key(spec, model_file, files)
        return _find_or_make(spec, settings, key, model_file, model_bytes, make_options)
    except OSError as error:
        log.warning(f"model '{spec.model}': weights are not shared between instances: {error}")
        return None


def _find_or_make(
    spec: InstanceSpec,
    settings: SharingSettings,
    key: str,
    model_file: str,
    model_bytes: int,
    make_options: Callable[[], ort.SessionOptions],
) -> str | None:
    make_private_directory(settings.directory)
    target = os.path.join(settings.directory, key)
    if (found := _use(target)) is not None:
        return found
    with _locked(f"{target}.lock"):
        # The lock may have been another instance's, which has made the copy meanwhile.
        if (found := _use(target)) is not None:
            return found
        needed = _COPY_FACTOR * model_bytes
        free = shutil.disk_usage(settings.directory).free
        if needed > min(free, settings.cache_bytes):
            log.warning(
                f"model '{spec.model}': weights are not shared between instances: the cache {settings.directory} has "
                f"no room for {needed} bytes"
            )
            return None
        _make_room(settings, key, needed)
        start_ns = time.monotonic_ns()
        if not _make(target, model_file, make_options):
            log.warning(f"model '{spec.model}': weights are not shared between instances: ONNX Runtime made no copy")
            return None
        elapsed_ms = (time.monotonic_ns() - start_ns) // 1_000_000
        log.info(f"model '{spec.model}': made a copy with shareable weights in {elapsed_ms} ms: {target}")
        return _use(target)


def _use(target: str) -> str | None:
    """Return the copy's graph file if the copy is there, and note that it was used."""
    path = os.path.join(target, _MODEL_FILE)
    if not os.path.isfile(path):
        return None
    # For _make_room, which removes what was not used for longest.
    with contextlib.suppress(OSError):
        os.utime(target)
    return path


def _make(target: str, model_file: str, make_options: Callable[[], ort.SessionOptions]) -> bool:
    """Write a copy under a temporary name and move it into place; True if it is there.

    A child process does it: this one keeps a small heap, and survives whatever optimising brings.
    """
    parent, key = os.path.split(target)
    for name in os.listdir(parent):
        if name.startswith(f"{key}.tmp-"):  # of a process that died
            shutil.rmtree(os.path.join(parent, name), ignore_errors=True)
    directory = tempfile.mkdtemp(prefix=f"{key}.tmp-", dir=parent)
    try:
        own_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                die_with_parent(own_pid)
                _save_optimised(directory, model_file, make_options())
                status = 0
            except BaseException as error:
                log.warning(f"ONNX Runtime cannot save an optimised copy: {error}")
            finally:
                os._exit(status)
        _pid, wait_status = os.waitpid(pid, 0)
        if wait_status != 0 or not os.path.isfile(os.path.join(directory, _MODEL_FILE)):
            return False
        with contextlib.suppress(FileExistsError):
            os.rename(directory, target)
        return True
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _save_optimised(directory: str, model_file: str, options: ort.SessionOptions) -> None:
    options.optimized_model_filepath = os.path.join(directory, _MODEL_FILE)
    for key, value in (
        ("session.save_external_prepacked_constant_initializers", "1"),
        ("session.optimized_model_external_initializers_file_name", _WEIGHTS_FILE),
        ("session.optimized_model_external_initializers_min_size_in_bytes", str(_EXTERNAL_MIN_BYTES)),
    ):
        options.add_session_config_entry(key, value)
    ort.InferenceSession(model_file, options, providers=["CPUExecutionProvider"])
    # Written back now, the pages count as clean from the first mapping on.
    for name in os.listdir(directory):
        fd = os.open(os.path.join(directory, name), os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _make_room(settings: SharingSettings, key: str, needed: int) -> None:
    """Remove the copies of the model's former states, and then those that were not used for longest.

    A model that runs from a copy keeps it: the files are mapped.
    """
    model = key.partition("-")[0]
    copies: list[tuple[float, int, str]] = []
    for entry in list(os.scandir(settings.directory)):
        if not entry.is_dir(follow_symlinks=False) or ".tmp-" in entry.name:
            continue
        if entry.name.startswith(f"{model}-"):
            _remove(entry.path)
            continue
        with contextlib.suppress(OSError):
            size = sum(item.stat().st_size for item in os.scandir(entry.path))
            copies.append((entry.stat().st_mtime, size, entry.path))
    total = needed + sum(size for _used, size, _path in copies)
    for _used, size, path in sorted(copies):
        if total <= settings.cache_bytes:
            return
        _remove(path)
        total -= size


def _remove(path: str) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.unlink(f"{path}.lock")


@contextlib.contextmanager
def _locked(path: str) -> Generator[None]:
    """Hold an exclusive lock on a file; the kernel releases it when the holder dies."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _list_files(directory: str) -> list[tuple[str, int, int]]:
    """Return (path, bytes, mtime in ns) of the files beside the model: any may be its external data."""
    files: list[tuple[str, int, int]] = []
    for root, _directories, names in os.walk(directory):
        for name in names:
            path = os.path.join(root, name)
            status = os.stat(path)
            files.append((path, status.st_size, status.st_mtime_ns))
            if len(files) > _FILES_MAX:
                raise OSError(f"more than {_FILES_MAX} files beside the model")
    return sorted(files)


def _cache_key(spec: InstanceSpec, model_file: str, files: list[tuple[str, int, int]]) -> str:
    """Return ``<which model, for which machine>-<which state of its files>``."""
    model = (
        ort.__version__,
        platform.machine(),
        _cpu_flags(),
        str(spec.optimization.get("graph_level")),
        os.path.realpath(model_file),
    )
    state = (f"{os.path.realpath(path)} {size} {mtime_ns}" for path, size, mtime_ns in files)
    return f"{_digest(model)}-{_digest(state)}"


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()[:24]


def _cpu_flags() -> str:
    """Return what the CPU can do: repacked weights have the layout that its instructions want."""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith(("flags", "Features")):
                return line.partition(":")[2].strip()
    return platform.processor()
