"""A local copy of a cloud repository: what changed there is fetched, what is gone there is removed.

Models are loaded from the copy, so a serving model never waits for a network, and a server that starts again fetches
only what is new. The copy lies in ``<cache>/<location>/models``; beside it, ``manifest.json`` says which object each
file came from. One server uses a cache at a time; another of the same location gets a directory of its own, removed at
its end.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from forebay.engine.repository.beneath import Refused, check_relative
from forebay.engine.repository.cloud_location import CloudLocation, cache_name, parse_location
from forebay.ipc.errors import InvalidArgument, ServingError, Unavailable

#: Objects of one repository at most.
OBJECTS_MAX = 1_000_000

#: Objects fetched at the same time.
_FETCH_COUNT = 8

#: What tells one content of an object from another, by file system.
_TOKENS = ("ETag", "etag", "generation", "md5Hash", "content_md5", "LastModified", "last_modified", "mtime", "updated")

#: Files that say what a model is; fetched of all models, so that ensembles are known by what they need.
_CONFIG = "config.pbtxt"
_CONFIGS = "configs"

_MOUNT_VARIABLES = {
    "s3": "TRITON_AWS_MOUNT_DIRECTORY",
    "gs": "TRITON_GCS_MOUNT_DIRECTORY",
    "abfs": "TRITON_AZURE_MOUNT_DIRECTORY",
}


class RemoteFile(msgspec.Struct, frozen=True):
    """One object as it was last seen."""

    byte_size: int
    token: str


class CloudMirror:
    """The copy of one location. Thread-safe: one synchronisation at a time."""

    def __init__(self, location: CloudLocation, *, cache_directory: str = "", file_system: Any = None) -> None:
        """Prepare the cache; nothing is fetched yet.

        Args:
            cache_directory: where caches lie; default: as Triton's variables say, else below the user's cache.
            file_system: an fsspec file system; default: of the location's kind.

        Raises:
            Unavailable: the package for such locations is not installed.
        """
        self.location = location
        self._files = file_system if file_system is not None else _open_file_system(location)
        self._lock = threading.Lock()
        self._directory = self._claim(cache_directory or _default_cache(location.protocol))
        #: The local repository.
        self.path = os.path.join(self._directory, "models")
        os.makedirs(self.path, mode=0o700, exist_ok=True)
        self._manifest_path = os.path.join(self._directory, "manifest.json")
        self._manifest = self._read_manifest()

    def _claim(self, cache: str) -> str:
        directory = os.path.join(cache, cache_name(self.location))
        try:
            os.makedirs(directory, mode=0o700, exist_ok=True)
            self._lock_fd = os.open(os.path.join(directory, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise Unavailable(f"the cache of cloud repositories cannot be used: {error.strerror}") from None
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            directory = tempfile.mkdtemp(prefix=f"{cache_name(self.location)}-", dir=cache)
            weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
        weakref.finalize(self, os.close, self._lock_fd)
        return directory

    # --- synchronising ---

    def sync(self) -> None:
        """Make the copy the same as the repository.

        Raises:
            ServingError: it cannot be read; the copy keeps what it had.
        """
        with self._lock:
            self._apply(self._list(), within=None)

    def sync_configs(self) -> None:
        """Make every model known by its configuration; files of models that were fetched before stay as they are.

        Raises:
            ServingError: the repository cannot be read.
        """
        with self._lock:
            remote, directories = self._list()
            models = {name.partition("/")[0] for name in (*remote, *directories)}
            for gone in set(os.listdir(self.path)) - models:
                self._remove_tree(gone)
            for name in models:
                os.makedirs(os.path.join(self.path, name), exist_ok=True)
            wanted = {name: seen for name, seen in remote.items() if _is_config(name)}
            self._fetch(wanted)
            self._write_manifest()

    def sync_model(self, name: str) -> None:
        """Make one model's copy the same as in the repository; it is removed if it is not there any more.

        Raises:
            ServingError: it cannot be read.
        """
        with self._lock:
            self._apply(self._list(name), within=name)

    def _apply(self, listed: tuple[dict[str, RemoteFile], set[str]], *, within: str | None) -> None:
        remote, directories = listed
        self._fetch(remote)
        known = [name for name in self._manifest if within is None or name.partition("/")[0] == within]
        for name in known:
            if name not in remote:
                del self._manifest[name]
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(self.path, name))
        for name in directories:
            os.makedirs(os.path.join(self.path, name), exist_ok=True)
        self._prune({*remote, *directories}, within)
        self._write_manifest()

    def _prune(self, names: Iterable[str], within: str | None) -> None:
        """Remove directories that hold nothing any more."""
        needed = {within} if within is not None and names else set[str]()
        for name in names:
            parts = name.split("/")
            needed.update("/".join(parts[:depth]) for depth in range(1, len(parts) + 1))
        top = os.path.join(self.path, within) if within is not None else self.path
        for folder, _folders, _names in os.walk(top, topdown=False):
            relative = os.path.relpath(folder, self.path)
            if relative not in needed and relative != ".":
                with contextlib.suppress(OSError):
                    os.rmdir(folder)

    def _list(self, model: str = "") -> tuple[dict[str, RemoteFile], set[str]]:
        """Return objects and directory markers by their names below the root."""
        top = f"{self.location.root}/{model}".rstrip("/")
        try:
            self._files.invalidate_cache()
            found: dict[str, dict[str, Any]] = self._files.find(top, withdirs=True, detail=True)
        except FileNotFoundError:
            if not model:
                raise InvalidArgument(f"failed to stat file {self.location.url}: does not exist") from None
            found = {}
        except Exception as error:  # each library has errors of its own
            raise Unavailable(f"model repository '{self.location.url}' cannot be read: {_reason(error)}") from None
        if len(found) > OBJECTS_MAX:
            raise InvalidArgument(f"model repository '{self.location.url}' has more than {OBJECTS_MAX} objects")
        remote: dict[str, RemoteFile] = {}
        directories: set[str] = set()
        for path, info in found.items():
            relative = path.removeprefix(self.location.root).strip("/")
            try:
                name = "/".join(check_relative(relative))
            except Refused:
                continue  # A key that is no path, or leads out of the repository.
            if info.get("type") == "directory" or path.endswith("/"):
                directories.add(name)
            else:
                token = next((str(info[key]) for key in _TOKENS if info.get(key)), "")
                remote[name] = RemoteFile(int(info.get("size") or 0), token)
        return {name: seen for name, seen in remote.items() if name not in directories}, directories

    def _fetch(self, wanted: dict[str, RemoteFile]) -> None:
        """Fetch what is new or differs, each file complete before it has its name."""
        missing = [
            name
            for name, seen in wanted.items()
            if self._manifest.get(name) != seen or not os.path.isfile(os.path.join(self.path, name))
        ]
        if not missing:
            return
        with ThreadPoolExecutor(_FETCH_COUNT, "fetch") as pool:
            try:
                for name in pool.map(self._fetch_one, missing):
                    self._manifest[name] = wanted[name]
            except ServingError:
                self._write_manifest()
                raise

    def _fetch_one(self, name: str) -> str:
        target = os.path.join(self.path, name)
        staged = os.path.join(self._directory, f"fetching-{threading.get_ident()}")
        try:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            self._files.get_file(f"{self.location.root}/{name}", staged)
            os.replace(staged, target)
        except Exception as error:  # each library has errors of its own
            with contextlib.suppress(OSError):
                os.unlink(staged)
            text = f"'{name}' cannot be fetched from model repository '{self.location.url}': {_reason(error)}"
            raise Unavailable(text) from None
        return name

    def _remove_tree(self, model: str) -> None:
        shutil.rmtree(os.path.join(self.path, model), ignore_errors=True)
        for name in [name for name in self._manifest if name.partition("/")[0] == model]:
            del self._manifest[name]

    # --- manifest ---

    def _read_manifest(self) -> dict[str, RemoteFile]:
        try:
            with open(self._manifest_path, "rb") as file:
                return msgspec.json.decode(file.read(), type=dict[str, RemoteFile])
        except (OSError, msgspec.DecodeError):
            # Nothing is known of what lies there.
            shutil.rmtree(self.path, ignore_errors=True)
            os.makedirs(self.path, mode=0o700)
            return {}

    def _write_manifest(self) -> None:
        staged = f"{self._manifest_path}.new"
        with open(staged, "wb") as file:
            file.write(msgspec.json.encode(self._manifest))
        os.replace(staged, self._manifest_path)


def _is_config(name: str) -> bool:
    parts = name.split("/")
    return parts[1:] == [_CONFIG] or (len(parts) == 3 and parts[1] == _CONFIGS)


def _open_file_system(location: CloudLocation) -> Any:
    """Return fsspec's file system of a location.

    Raises:
        Unavailable: the package for it is not installed.
    """
    try:
        return importlib.import_module("fsspec").filesystem(location.protocol, **location.options)
    except ImportError:
        raise Unavailable(
            f"model repository '{location.url}' needs {location.package}, which is not installed; install it with: "
            "pip install 'forebay[cloud]'"
        ) from None
    except Exception as error:  # each library has errors of its own
        raise Unavailable(f"model repository '{location.url}' cannot be opened: {_reason(error)}") from None


def _default_cache(protocol: str) -> str:
    mount = os.environ.get(_MOUNT_VARIABLES.get(protocol, ""))
    if mount:
        return mount
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "forebay", "repositories")


def _reason(error: BaseException) -> str:
    """Return what a library said, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def open_mirrors(urls: Collection[str], *, cache_directory: str = "") -> dict[str, CloudMirror]:
    """Return the copies of cloud repositories, by address.

    Raises:
        ServingError: an address is none, or its package is missing.
    """
    return {url: CloudMirror(parse_location(url), cache_directory=cache_directory) for url in urls}
