"""Statistics of models (spec H-230..H-240), and what made the last batches of one (ours)."""

from __future__ import annotations

import orjson

from forebay.frontend.catalog_view import parse_version
from forebay.frontend.codec.rapid_json import dump_json
from forebay.frontend.handlers.context import Call, ControlContext, Reply
from forebay.frontend.statistics import model_statistics
from forebay.ipc.errors import InvalidArgument


async def statistics(context: ControlContext, call: Call) -> Reply:
    """Answer ``GET /v2/models/stats`` and ``GET /v2/models/M[/versions/V]/stats``."""
    name, version = call.groups.get("model", ""), parse_version(call.groups.get("version", ""))
    view = context.control.catalog
    entries = view.ready_versions(name) if name else view.ready_models
    if name and not entries:
        raise InvalidArgument(f"requested model '{name}' is not available")
    if version is not None:
        entries = tuple(entry for entry in entries if entry.version == version)
        if not entries:
            raise InvalidArgument(f"requested model version is not available for model '{name}'")
    # orjson, because a hundred models with large batches make tens of thousands of numbers.
    return Reply(orjson.dumps({"model_stats": [model_statistics(context.words, entry) for entry in entries]}))


async def explain(context: ControlContext, call: Call) -> Reply:
    """Answer ``GET /forebay/explain/MODEL[/versions/V]``: the scheduler's ring of the model's last batches."""
    entry = context.control.catalog.find(call.groups["model"], parse_version(call.groups["version"]))
    batches = await context.control.command("explain", {"model": entry.name, "version": entry.version})
    return Reply(dump_json({"model": entry.name, "version": str(entry.version), "batches": batches}))
