"""The model repositories on disk: which models there are, their configurations, versions and fingerprints.

Pure file code. The supervisor calls it from a thread when it starts, when it polls and when a load is asked for; what
to do with the answer (load, keep, complain) is the supervisor's business. Files are only opened through
:mod:`forebay.engine.repository.beneath`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from forebay.engine.repository.batching_library import batching_library_problems
from forebay.engine.repository.beneath import (
    Beneath,
    Entry,
    Refused,
    check_model_name,
    check_name,
    check_relative,
)
from forebay.engine.repository.cloud_location import is_cloud
from forebay.engine.repository.config import MAX_CONFIG_BYTES, parse_config_bytes, parse_config_json
from forebay.engine.repository.config_problem import ConfigError, Problem
from forebay.engine.repository.fingerprint import fingerprint_of
from forebay.engine.repository.found_model import FoundModel, listed_repositories, mark_duplicates, unusable_model
from forebay.engine.repository.model_config_schema import ModelConfig
from forebay.engine.repository.model_files import file_problems
from forebay.engine.repository.normalise import detect_backend, normalise_defaults
from forebay.engine.repository.repository_agents import RepositoryAgents
from forebay.engine.repository.validate import directory_name_problem, poll_problems
from forebay.engine.repository.versions import FoundVersions, find_versions
from forebay.engine.settings import Settings
from forebay.ipc.errors import AlreadyExists, Code, InvalidArgument, NotFound, ServingError

if TYPE_CHECKING:
    from forebay.engine.repository.cloud_mirror import CloudMirror

CONFIG_FILE = "config.pbtxt"


FILE_PREFIX = "file:"


class Mount(msgspec.Struct, frozen=True):
    """A model directory outside of the repositories (spec H-300)."""

    url: str
    directory: str
    owner: str
    """The name of the model that it was mounted for."""


class ModelRepository:
    """All repositories that the server was started with.

    Holds nothing between calls but the copies of cloud repositories; calls may come from any thread.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        namespacing: bool = False,
        model_config_name: str = "",
        auto_complete: bool = True,
    ) -> None:
        """Remember the paths and check that they can be read (spec R-011, R-012).

        Args:
            paths: directories, or addresses of cloud repositories (spec R-121..R-123), in the order of the flags.
            namespacing: the same model name may be in several repositories.
            model_config_name: use ``configs/<this>.pbtxt`` where a model has it (spec R-016).
            auto_complete: configurations may be missing or partial.

        Raises:
            InvalidArgument: no path, a path that is no readable directory, or an impossible config name.
            Unavailable: the package for a cloud is not installed.
        """
        if not paths:
            raise InvalidArgument("--model-repository must be specified")
        if model_config_name:
            check_name(model_config_name, "model config name")
        cloud = [path for path in dict.fromkeys(paths) if is_cloud(path)]
        #: Copies of cloud repositories, by the path of the copy.
        self._mirrors = {mirror.path: mirror for mirror in (_open_mirrors(cloud) if cloud else {}).values()}
        local = {mirror.location.url: mirror.path for mirror in self._mirrors.values()}
        self.paths = tuple(dict.fromkeys(local.get(path, path) for path in paths))
        for path in self.paths:
            _check_root(path)
        self._is_partial = False
        self.namespacing = namespacing
        self.model_config_name = model_config_name
        self.auto_complete = auto_complete
        self._agents = RepositoryAgents()
        #: Models that lie elsewhere, by name; see :meth:`mount`.
        self._mounts: dict[str, Mount] = {}

    def mount(self, name: str, url: str) -> None:
        """Let the model in directory ``url`` be loaded as ``name``, and what else is in there by its own names.

        Args:
            url: a local directory whose only directory, or whose ensemble, is the model (spec H-300).

        Raises:
            AlreadyExists: the name is taken by another mount.
            InvalidArgument: there is no such directory, or which model is meant cannot be told.
        """
        check_model_name(name)
        if name in self._mounts:
            raise AlreadyExists(f"model '{name}' is already mapped")
        _check_root(url)
        with _open_root(url) as root:
            directories = [item.name for item in root.entries() if item.is_directory]
            chosen = (
                directories if len(directories) == 1 else [each for each in directories if _is_ensemble(root, each)]
            )
        if len(chosen) != 1:
            raise InvalidArgument(
                "More than one model detected in archive. If you intend to use an ensemble, it must hold exactly one"
                if directories
                else "No model detected in archive"
            )
        for directory in directories:
            known_as = name if directory == chosen[0] else directory
            self._mounts.setdefault(known_as, Mount(url, directory, owner=name))

    def unmount(self, name: str) -> None:
        """Take a mount back; unknown ones are no error."""
        self._mounts = {known_as: mount for known_as, mount in self._mounts.items() if mount.owner != name}

    def mounts(self) -> dict[str, str]:
        """Return name to directory of what was mounted."""
        return {name: mount.url for name, mount in self._mounts.items() if mount.owner == name}

    def scan(self, *, is_selective: bool = False) -> list[FoundModel]:
        """Return every model directory, sorted by name and then by repository.

        A model that cannot be used is in the list with its problems; plain files and names with a dot before them are
        not (spec R-013).

        Args:
            is_selective: only some models will be loaded: of models in a cloud, fetch the configurations only. Those
                that :meth:`is_partial` says are such must be polled before they are loaded.

        Raises:
            ServingError: a repository has become unreadable.
        """
        self._is_partial = is_selective
        for mirror in self._mirrors.values():
            if is_selective:
                mirror.sync_configs()
            else:
                mirror.sync()
        found: list[FoundModel] = []
        for repository in self.paths:
            is_partial = is_selective and repository in self._mirrors
            with _open_root(repository) as root:
                entries, refused = root.listed()
                found += [
                    self._examine(root, repository, item.name, is_partial=is_partial)
                    for item in entries
                    if _may_be_model(item)
                ]
                found += [
                    unusable_model(name, repository, Problem(reason))
                    for name, reason in refused.items()
                    if not _is_hidden(name)
                ]
        if not self.namespacing:
            found = mark_duplicates(found)
        return sorted(found, key=lambda model: (model.name, self.paths.index(model.repository)))

    def is_partial(self, found: FoundModel) -> bool:
        """Whether only the configuration of a model of the last scan has been fetched."""
        return self._is_partial and found.repository in self._mirrors

    def _namespace(self, repository: str) -> str:
        """Return what models of a repository are told apart by; empty without namespacing."""
        if not self.namespacing:
            return ""
        mirror = self._mirrors.get(repository)
        return repository if mirror is None else mirror.location.url

    def names(self) -> list[str]:
        """Return the names of all model directories, sorted, without reading any of them."""
        names: set[str] = set()
        for repository in self.paths:
            with _open_root(repository) as root:
                names.update(item.name for item in root.entries() if _may_be_model(item))
        return sorted(names)

    def poll_model(self, name: str, *, namespace: str = "") -> FoundModel:
        """Look at one model now.

        Args:
            name: as a client or a flag gave it; any text.
            namespace: a repository's path, to choose among equal names.

        Raises:
            Refused: the name is no model name (spec H-223).
            NotFound: no repository has it.
        """
        check_model_name(name)
        found: list[FoundModel] = []
        for repository in self.paths:
            if namespace and self._namespace(repository) != namespace:
                continue
            if repository in self._mirrors:
                self._mirrors[repository].sync_model(name)
            with _open_root(repository) as root:
                item = root.entry((name,))
                if item is not None and _may_be_model(item):
                    found.append(self._examine(root, repository, name))
        if (mount := self._mounts.get(name)) is not None:
            with _open_root(mount.url) as root:
                found.append(self._examine(root, mount.url, name, directory=mount.directory))
        if not found:
            raise NotFound(f"failed to poll model '{name}': not found in any model repository")
        if len(found) > 1:
            if self.namespacing:
                raise InvalidArgument(f"ambiguity for model '{name}': found in namespaces {listed_repositories(found)}")
            return mark_duplicates(found)[0]
        return found[0]

    def override_model(
        self,
        name: str,
        config_json: str | None,
        files: Mapping[str, bytes] | None = None,
        *,
        workspace: str | None = None,
    ) -> FoundModel:
        """Make a model from a load request's parameters (spec H-215, H-216).

        Without files the model directory of the repository is used with the other configuration. With files the
        repository is not used at all: they are written into a new temporary directory that the returned model owns.

        Args:
            config_json: the ``config`` parameter, a JSON ModelConfig that replaces the file's completely.
            files: path below the model directory (with or without ``file:``) to content.
            workspace: where temporary directories are made; default: the system's.

        Raises:
            Refused: a name or a path that is none.
            ConfigError: files without a configuration, or a configuration that is none.
            NotFound: no files, and no repository has the model.
        """
        check_model_name(name)
        if config_json is None:
            raise ConfigError([Problem("Load parameter 'config' must be specified for model file override")])
        try:
            config = parse_config_json(config_json)
        except ConfigError as error:
            first = msgspec.structs.replace(error.problems[0], text=f"Invalid config override: {error.text}")
            raise ConfigError([first, *error.problems[1:]]) from None
        if files:
            return self._override_with_files(name, config, config_json, files, workspace)
        model = self.poll_model(name)
        with _open_root(model.repository) as root:
            return self._assemble(root, model.repository, (name,), name, config, config_json, is_override=True)

    def _override_with_files(
        self, name: str, config: ModelConfig, config_json: str, files: Mapping[str, bytes], workspace: str | None
    ) -> FoundModel:
        checked = {check_relative(path.removeprefix(FILE_PREFIX)): content for path, content in files.items()}
        directory = tempfile.mkdtemp(prefix="override-", dir=workspace)
        try:
            for names, content in checked.items():
                target = os.path.join(directory, name, *names)
                os.makedirs(os.path.dirname(target), exist_ok=True)
                with open(target, "xb") as file:
                    file.write(content)
            with Beneath(directory) as root:
                found = self._assemble(root, directory, (name,), name, config, config_json, is_override=True)
        except OSError as error:
            shutil.rmtree(directory, ignore_errors=True)
            raise InvalidArgument(f"failed to write the files of model '{name}': {_reason(error)}") from None
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        # It lies in no repository, and so in no namespace.
        return msgspec.structs.replace(found, temporary_directory=directory, namespace="")

    def _examine(
        self, root: Beneath, repository: str, name: str, *, directory: str = "", is_partial: bool = False
    ) -> FoundModel:
        """Read one model directory; whatever goes wrong becomes a problem of the model.

        Args:
            directory: what it is called, if not as the model.
            is_partial: it holds the configuration only, so far.
        """
        config_file = ""
        try:
            check_model_name(name)
            directory = directory or name
            config_file = self._config_file(root, directory)
            if not config_file:
                config, text = ModelConfig(), ""
                if not self.auto_complete:
                    raise NotFound(f"model configuration is not provided for model '{name}'")
            else:
                data = root.read((directory, *config_file.split("/")), MAX_CONFIG_BYTES)
                text = data.decode(errors="replace")
                config = parse_config_bytes(data, f"{directory}/{config_file}")
                if directory != name:
                    config.message.name = name
            return self._assemble(
                root, repository, (directory,), name, config, text, config_file=config_file, is_partial=is_partial
            )
        except ConfigError as error:
            return unusable_model(
                name, repository, *error.problems, config_file=config_file, namespace=self._namespace(repository)
            )
        except (ServingError, OSError) as error:
            code = error.code if isinstance(error, ServingError) else Code.INTERNAL
            problem = Problem(_reason(error), code=code)
            return unusable_model(
                name, repository, problem, config_file=config_file, namespace=self._namespace(repository)
            )

    def _assemble(
        self,
        root: Beneath,
        repository: str,
        path: tuple[str, ...],
        name: str,
        config: ModelConfig,
        text: str,
        *,
        config_file: str = "",
        is_override: bool = False,
        is_partial: bool = False,
    ) -> FoundModel:
        """Normalise and judge a configuration together with the directory that it is for."""
        entries, refused = root.listed(path)
        versions = find_versions(item.name for item in entries if item.is_directory)
        # Agents look at files, and at the configuration as it was written.
        problems = [] if is_partial else self._agents.problems(config, root, path)
        # A version that may not be read is not gone: an older one must not take its place unnoticed.
        problems += [Problem(refused[str(number)]) for number in find_versions(refused).numbers]
        usable: ModelConfig | None = config
        try:
            detect_backend(config, name, _first_version_files(root, path, versions))
        except ConfigError as error:
            problems += error.problems
            usable = None
        if usable is not None:
            normalise_defaults(config)
            problems += poll_problems(config, auto_complete=self.auto_complete)
            wrong_name = directory_name_problem(config, name)
            if wrong_name is not None:
                problems.append(wrong_name)
        problems += file_problems(config)
        problems += batching_library_problems(config, root, path, versions.numbers)
        return FoundModel(
            name=name,
            repository=repository,
            path=root.real_path(path),
            namespace=self._namespace(repository),
            config=usable,
            config_text=text,
            config_file=config_file,
            versions=versions,
            fingerprint=fingerprint_of(root, path, entries, text if is_override else "", config_file, versions),
            problems=tuple(problems),
            is_override=is_override,
        )

    def _config_file(self, root: Beneath, name: str) -> str:
        """Return the configuration file to use, relative to the model directory; empty if there is none."""
        if self.model_config_name:
            custom = f"configs/{self.model_config_name}.pbtxt"
            if root.is_file((name, *custom.split("/"))):
                return custom
        item = root.entry((name, CONFIG_FILE))
        if item is not None and not item.is_file:
            raise Refused(f"'{CONFIG_FILE}' of model '{name}' is not a file")
        return CONFIG_FILE if item is not None else ""


def open_repository(settings: Settings) -> ModelRepository:
    """Return the repositories that the server's settings name.

    Raises:
        ServingError: one of them cannot be used.
    """
    chosen = settings.repository
    return ModelRepository(
        chosen.paths,
        namespacing=chosen.namespacing,
        model_config_name=chosen.config_name,
        auto_complete=not chosen.disable_auto_complete_config,
    )


# --- helpers


def _may_be_model(item: Entry) -> bool:
    """Whether something in a repository is a model; files are not, nor what tools and file systems keep there."""
    return item.is_directory and not _is_hidden(item.name)


def _is_hidden(name: str) -> bool:
    # ``.git``, ``..data``; the other is in the root of every ext4 volume, where only root may read it.
    return name.startswith(".") or name == "lost+found"


def _check_root(path: str) -> None:
    try:
        if not os.path.isdir(path):
            state = "is not a directory" if os.path.exists(path) else "does not exist"
            raise InvalidArgument(f"failed to stat file {path}: {state}")
    except ValueError:
        raise InvalidArgument("failed to stat file: a model repository path contains a NUL character") from None


def _is_ensemble(root: Beneath, directory: str) -> bool:
    """Whether a model's configuration is an ensemble's."""
    try:
        data = root.read((directory, CONFIG_FILE), MAX_CONFIG_BYTES)
        return bool(parse_config_bytes(data, CONFIG_FILE).message.platform == "ensemble")
    except (ServingError, OSError):
        return False


def _reason(error: ServingError | OSError) -> str:
    """Return what went wrong, without a path of this machine."""
    if isinstance(error, ServingError):
        return error.text
    return os.strerror(error.errno) if error.errno else "unknown error"


def _open_mirrors(urls: Sequence[str]) -> dict[str, CloudMirror]:
    # Only who has such a repository pays for the import.
    from forebay.engine.repository.cloud_mirror import open_mirrors

    return open_mirrors(urls)


def _open_root(repository: str) -> Beneath:
    _check_root(repository)
    return Beneath(repository)


def _first_version_files(root: Beneath, path: tuple[str, ...], versions: FoundVersions) -> dict[str, bool] | None:
    """Return what the lexicographically first version directory holds (spec R-041)."""
    if not versions.numbers:
        return None
    first = min(str(number) for number in versions.numbers)
    return {item.name: item.is_directory for item in root.entries((*path, first))}
