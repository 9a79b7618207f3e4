"""The verbs load, unload and index as clients send them (spec H-210..H-224)."""

from __future__ import annotations

import asyncio

import msgspec

from forebay.engine.repository.config_problem import ConfigError
from forebay.engine.supervisor.lifecycle import ModelLifecycle
from forebay.engine.supervisor.models import PollFailed
from forebay.ipc.errors import InvalidArgument, ServingError, Unavailable
from forebay.ipc.log import log


class RepositoryCommands:
    """The verbs load, unload and index (spec H-210..H-224), and SageMaker's mount."""

    def __init__(self, lifecycle: ModelLifecycle) -> None:
        self._lifecycle = lifecycle

    async def index(self, arguments: dict[str, object]) -> list[dict[str, str]]:
        return self._lifecycle.view.index(ready_only=arguments.get("ready") is True)

    async def load(self, arguments: dict[str, object]) -> None:
        """Load a model by name, with an optional configuration and files in place of the repository's.

        Raises:
            ServingError: Triton's text and code for what went wrong.
        """
        self._require_explicit()
        lifecycle = self._lifecycle
        name = _text(arguments, "name")
        config = arguments.get("config")
        try:
            files = msgspec.convert(arguments.get("files") or {}, dict[str, bytes])
        except msgspec.ValidationError:
            raise InvalidArgument("load parameter 'files' must map paths to bytes") from None
        try:
            if config is not None or files:
                text = config if isinstance(config, str) else None
                found = await asyncio.to_thread(lifecycle.repository.override_model, name, text, files)
            else:
                found = await asyncio.to_thread(lifecycle.repository.poll_model, name)
        except ServingError as error:
            for line in (error.describe() if isinstance(error, ConfigError) else error.text).splitlines():
                log.error(line)
            if (model := lifecycle.models.get(name)) is not None:
                model.problem = f"{error.code.label}: {error.text}"
                lifecycle.touch()
            raise PollFailed(f"failed to load '{name}', failed to poll from model repository") from None
        await lifecycle.load(found.identity, found)
        lifecycle.models[found.identity].is_implicit = False

    async def unload(self, arguments: dict[str, object]) -> None:
        """Unload a model by name, with ``unload_dependents`` also what only it needs (spec R-095)."""
        self._require_explicit()
        lifecycle = self._lifecycle
        names = [self._identity(_text(arguments, "name"))]
        for name in names:  # grows while it is walked: ensembles may contain ensembles
            model = lifecycle.models.get(name)
            if model is not None and arguments.get("unload_dependents") is True:
                names += lifecycle.ensembles.dependents_to_unload(model)
            await lifecycle.unload(name)

    async def mount(self, arguments: dict[str, object]) -> None:
        """Let a model that lies in a directory of its own be loaded by name (spec H-300)."""
        self._require_explicit()
        repository = self._lifecycle.repository
        await asyncio.to_thread(repository.mount, _text(arguments, "name"), _text(arguments, "url"))

    async def unmount(self, arguments: dict[str, object]) -> None:
        """Take a mount back."""
        self._lifecycle.repository.unmount(_text(arguments, "name"))

    async def mounts(self, arguments: dict[str, object]) -> dict[str, str]:
        """Return name to directory of what is mounted."""
        return self._lifecycle.repository.mounts()

    def _identity(self, name: str) -> str:
        """Return what a model is called among all models: with namespacing a client need not say which it means.

        Raises:
            InvalidArgument: there are several (spec R-015).
        """
        models = self._lifecycle.models
        found = [identity for identity, model in models.items() if model.name == name]
        if name in models or not found:
            return name
        if len(found) > 1:
            raise InvalidArgument(f"ambiguity for model '{name}': {' and '.join(sorted(found))}")
        return found[0]

    def _require_explicit(self) -> None:
        if self._lifecycle.plant.settings.repository.control_mode != "explicit":
            raise Unavailable("explicit model load / unload is not allowed if polling is enabled")


def _text(arguments: dict[str, object], name: str) -> str:
    value = arguments.get(name)
    if not isinstance(value, str):
        raise InvalidArgument(f"control argument '{name}' must be a string")
    return value
