"""Which versions a model has, and which of them its policy asks for (spec R-002..R-008)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from forebay.engine.repository.config_problem import ConfigError, Problem
from forebay.engine.repository.model_config_schema import ModelConfig

#: Directories of a model that are not versions.
RESERVED_DIRECTORIES = frozenset({"warmup", "initial_state", "configs"})

#: Version numbers are 64-bit in the protocol.
MAX_VERSION = 2**63 - 1


class FoundVersions(msgspec.Struct, frozen=True):
    """The version directories of one model."""

    numbers: tuple[int, ...]
    """Ascending."""
    warnings: tuple[str, ...] = ()
    """One sentence per ignored directory, as Triton logs it."""


class ChosenVersions(msgspec.Struct, frozen=True):
    """What a version policy selects."""

    numbers: tuple[int, ...]
    """Ascending; never empty."""
    errors: tuple[str, ...] = ()
    """One sentence per version that the policy names and the model lacks; logged, not fatal (spec R-007)."""


def find_versions(directories: Iterable[str]) -> FoundVersions:
    """Tell version directories from others by their names.

    A name that only begins with digits (``1abc``) is ignored with a warning: Triton takes it for version 1 and then
    does not find the directory ``1`` (spec R-003).
    """
    numbers: set[int] = set()
    warnings: list[str] = []
    for directory in sorted(directories):
        name = directory.encode(errors="backslashreplace").decode()  # a name on disk need not be UTF-8
        if name in RESERVED_DIRECTORIES:
            continue
        if len(name) > 1 and name[0] == "0":
            warnings.append(f"ignore version directory '{name}' which contains leading zeros in its directory name")
        elif not (name.isascii() and name.isdigit()) or len(name) > len(str(MAX_VERSION)) or int(name) > MAX_VERSION:
            warnings.append(f"ignore version directory '{name}' which fails to convert to integral number")
        else:
            numbers.add(int(name))
    return FoundVersions(tuple(sorted(numbers)), tuple(warnings))


class NoVersionAvailable(ConfigError):
    """The configuration can be used, but no version directory satisfies its policy (spec R-008)."""


def choose_versions(config: ModelConfig, available: Iterable[int]) -> ChosenVersions:
    """Apply a normalised config's version policy to the versions that exist.

    Raises:
        NoVersionAvailable: no version satisfies the policy.
    """
    policy: Any = config.message.version_policy
    present = sorted(set(available))
    errors: list[str] = []
    choice = policy.WhichOneof("policy_choice")
    if choice == "specific":
        wanted = sorted(set(policy.specific.versions))
        errors = [
            f"version {number} is specified for model '{config.name}', but the version directory is not present"
            for number in wanted
            if number not in present
        ]
        chosen = [number for number in wanted if number in present]
    elif choice == "latest":
        chosen = present[-policy.latest.num_versions :] if policy.latest.num_versions else []
    else:
        chosen = present
    if not chosen:
        hint = f"Make a directory '1' in '{config.name}' and put the model into it." if not present else ""
        problem = Problem(
            f"at least one version must be available under the version policy of model '{config.name}'",
            path=("version_policy",),
            possible=tuple(str(number) for number in present),
            hint=hint,
        )
        raise NoVersionAvailable([problem.located(config.source)])
    return ChosenVersions(tuple(chosen), tuple(errors))
