"""Models that use installed Python packages: which ones, and model files that lie inside of them.

Two parameters of a configuration, ours:

- ``forebay_packages``: requirements as pip takes them, separated by spaces, for example ``magika>=1.0``. A model whose
  packages are not installed is UNAVAILABLE, and its reason says how to install them.
- ``forebay_model_file``: ``<package>:<path>``, a model file that a package ships, for example
  ``magika:magika/models/standard_v3_3/model.onnx``; the path starts where the package is installed.
"""

from __future__ import annotations

import importlib.metadata
import os
import re

from forebay.engine.repository.model_config_schema import ModelConfig
from forebay.ipc.errors import InvalidArgument, NotFound

PACKAGES = "forebay_packages"
MODEL_FILE = "forebay_model_file"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def missing_packages(config: ModelConfig) -> str | None:
    """Return which packages a model lacks and the command that mends it, or None if it lacks none.

    Raises:
        InvalidArgument: the parameter is not a list of requirements.
    """
    missing: list[str] = []
    for requirement in _parameter(config, PACKAGES).split():
        name = _NAME.match(requirement)
        if name is None:
            raise InvalidArgument(f"parameter '{PACKAGES}' must list packages, got '{requirement}'")
        if not _is_installed(name.group()):
            missing.append(requirement)
    if not missing:
        return None
    names = " and ".join(f"the package '{requirement}'" for requirement in missing)
    verb = "is" if len(missing) == 1 else "are"
    command = " ".join(f"'{requirement}'" for requirement in missing)
    return f"model '{config.name}' needs {names}, which {verb} not installed; install with: pip install {command}"


def packaged_model_file(config: ModelConfig) -> str:
    """Return the path of the model file that a package ships; empty if the configuration names none.

    Raises:
        InvalidArgument: the parameter is no package and path.
        NotFound: there is no such package or file.
    """
    reference = _parameter(config, MODEL_FILE)
    if not reference:
        return ""
    package, separator, path = reference.partition(":")
    if not separator or not _NAME.fullmatch(package) or not path:
        raise InvalidArgument(f"parameter '{MODEL_FILE}' must be '<package>:<path>', got '{reference}'")
    try:
        root = os.path.realpath(str(importlib.metadata.distribution(package).locate_file("")))
    except importlib.metadata.PackageNotFoundError:
        raise NotFound(f"parameter '{MODEL_FILE}' names the package '{package}', which is not installed") from None
    found = os.path.realpath(os.path.join(root, path))
    if not found.startswith(root + os.sep) or not os.path.isfile(found):
        raise NotFound(f"package '{package}' has no file '{path}'")
    return found


def _parameter(config: ModelConfig, name: str) -> str:
    parameters = config.message.parameters
    return str(parameters[name].string_value) if name in parameters else ""


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
