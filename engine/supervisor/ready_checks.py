"""The verb model_ready: models that say themselves whether they are ready (spec P-012) are asked, all instances."""

from __future__ import annotations

import asyncio

from forebay.engine.supervisor.instance import Instance
from forebay.engine.supervisor.lifecycle import ModelLifecycle
from forebay.engine.supervisor.served_version import ServedVersion
from forebay.ipc.errors import InvalidArgument

#: How long an instance may take to answer, s (spec P-012).
TIMEOUT_S = 5.0


class ReadyChecks:
    """Used in the supervisor's event loop only."""

    def __init__(self, lifecycle: ModelLifecycle) -> None:
        self._lifecycle = lifecycle

    async def ask(self, arguments: dict[str, object]) -> dict[str, str]:
        """Return why a served version, named by its route, is not ready; an empty text: it is.

        Raises:
            InvalidArgument: the arguments name no route.
        """
        route = arguments.get("route")
        if not isinstance(route, int):
            raise InvalidArgument("'route' must be a number")
        served = self._served(route)
        if served is None:
            return {"reason": "Model version not ready"}
        reasons = await asyncio.gather(*(_ask(instance) for instance in served.instances if instance.is_serving))
        return {"reason": next(filter(None, reasons), "")}

    def _served(self, route: int) -> ServedVersion | None:
        for model in self._lifecycle.models.values():
            for served in model.serving.values():
                if served.route == route:
                    return served
        return None


async def _ask(instance: Instance) -> str:
    worker = instance.worker
    name = instance.spec.model
    if worker is None:
        return "Model version not ready"
    try:
        answer = await asyncio.wait_for(worker.ask_ready(), TIMEOUT_S)
    except TimeoutError:
        return f"Model '{name}' is not ready (user-defined check took more than {TIMEOUT_S:g} s)."
    if answer is None:
        return "Model version not ready"
    if answer.text:
        return f"Model '{name}' is not ready: {answer.text}"
    return "" if answer.is_ready else f"Model '{name}' is not ready (user-defined check failed)."
