"""Is a model ready? By the catalog, and for a model that says so itself by its own word (spec H-033, P-012)."""

from __future__ import annotations

from forebay.frontend.control_client import CommandSender

#: Why a model is not ready that the catalog does not know, or not as READY.
NOT_READY_TEXT = "Model version not ready"


async def why_not_ready(control: CommandSender, name: str, version: int | None) -> str:
    """Return why requests for a version (None: the highest) should not be sent; an empty text: they may.

    Raises:
        ServingError: the supervisor cannot be asked.
    """
    catalog = control.catalog
    if not catalog.is_ready(name, version):
        return NOT_READY_TEXT
    entry = catalog.find(name, version)
    if not entry.has_ready_check:
        return ""
    answer = await control.command("model_ready", {"route": entry.route})
    return str(answer["reason"])
