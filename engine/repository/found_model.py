"""One model directory as it was found, with its configuration or with what is wrong with it."""

from __future__ import annotations

import os
import shutil

import msgspec

from forebay.engine.repository.config_problem import ConfigError, Problem
from forebay.engine.repository.fingerprint import Fingerprint
from forebay.engine.repository.model_config_schema import ModelConfig
from forebay.engine.repository.versions import ChosenVersions, FoundVersions, choose_versions

#: Reason in the index for a name that two repositories have (spec R-010).
DUPLICATE_TEXT = "model appears in two or more repositories"


class FoundModel(msgspec.Struct, frozen=True):
    """One model directory as it was at one moment."""

    name: str
    repository: str
    """The repository's directory: as it was given, or the copy of one in a cloud."""
    path: str
    """Absolute path of the model directory without links; empty if it cannot be used."""
    namespace: str = ""
    config: ModelConfig | None = None
    """Backend detected and defaults filled in; None if there is a problem that prevents it."""
    config_text: str = ""
    """What was read: text format, or JSON if ``is_override``; empty if there is no configuration file."""
    config_file: str = ""
    """``config.pbtxt`` or ``configs/<name>.pbtxt``; empty if there is none."""
    versions: FoundVersions = FoundVersions(())
    fingerprint: Fingerprint | None = None
    problems: tuple[Problem, ...] = ()
    """Why the model cannot be polled; empty if it can be loaded."""
    is_override: bool = False
    """Made from a load request's ``config`` parameter."""
    temporary_directory: str = ""
    """Owned by whoever holds this: delete it with :meth:`discard` when the model is unloaded or was not loaded."""

    @property
    def identity(self) -> str:
        """``name``, or ``namespace::name`` (spec R-015)."""
        return f"{self.namespace}::{self.name}" if self.namespace else self.name

    @property
    def usable_config(self) -> ModelConfig:
        """The configuration.

        Raises:
            ConfigError: with all problems.
        """
        if self.problems or self.config is None:
            raise ConfigError(self.problems or (Problem(f"model '{self.name}' has no configuration"),))
        return self.config

    def chosen_versions(self) -> ChosenVersions:
        """Apply the version policy.

        Raises:
            ConfigError: the model has problems.
            NoVersionAvailable: no version satisfies the policy.
        """
        return choose_versions(self.usable_config, self.versions.numbers)

    def version_path(self, version: int) -> str:
        """Return the directory of a version; it may not exist for an override."""
        return os.path.join(self.path, str(version))

    def without_paths(self, text: str) -> str:
        """Return a text that clients may read: files are named from the model's directory on."""
        for directory in (self.path, os.path.join(self.repository, self.name)):
            if len(directory) > 1:
                text = text.replace(f"{directory}/", "").replace(directory, self.name)
        return text

    def discard(self) -> None:
        """Delete the temporary directory, if there is one."""
        if self.temporary_directory:
            shutil.rmtree(self.temporary_directory, ignore_errors=True)


def unusable_model(
    name: str, repository: str, *problems: Problem, config_file: str = "", namespace: str = ""
) -> FoundModel:
    return FoundModel(
        name=name.encode(errors="backslashreplace").decode(),  # a name on disk need not be UTF-8
        repository=repository,
        path="",
        namespace=namespace,
        config_file=config_file,
        problems=problems,
    )


def mark_duplicates(found: list[FoundModel]) -> list[FoundModel]:
    """Keep one entry per name; a name that two repositories have is unusable (spec R-010)."""
    by_name: dict[str, list[FoundModel]] = {}
    for model in found:
        by_name.setdefault(model.name, []).append(model)
    kept: list[FoundModel] = []
    for name, models in by_name.items():
        if len(models) == 1:
            kept += models
        else:
            # Where they are is for the log and `validate` only: clients are told of no path.
            problem = Problem(
                DUPLICATE_TEXT,
                written=listed_repositories(models),
                hint="Rename one, or start with --model-namespacing=true.",
            )
            kept.append(unusable_model(name, models[0].repository, problem))
    return kept


def listed_repositories(models: list[FoundModel]) -> str:
    return " and ".join(f"'{model.repository}'" for model in models)
