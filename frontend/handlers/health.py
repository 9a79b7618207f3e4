"""Liveness and readiness: empty bodies, 200 or 400 (spec H-030..H-034)."""

from __future__ import annotations

from forebay.frontend.catalog_view import parse_version
from forebay.frontend.errors import error_body
from forebay.frontend.handlers.context import TEXT_TYPE, Call, ControlContext, Reply
from forebay.frontend.model_readiness import why_not_ready

_YES = Reply(content_type=TEXT_TYPE)
_NO = Reply(status=400, content_type=TEXT_TYPE)


async def server_health(context: ControlContext, call: Call) -> Reply:
    """Answer ``/v2/health/live`` and ``/v2/health/ready``; what is ready the supervisor decides (spec H-031)."""
    catalog = context.control.catalog.catalog
    return _YES if (catalog.live if call.groups["probe"] == "live" else catalog.ready) else _NO


async def model_ready(context: ControlContext, call: Call) -> Reply:
    """Answer ``/v2/models/M[/versions/V]/ready``; an unknown model is not ready, as in Triton 2.51 (E-011)."""
    version = parse_version(call.groups["version"])
    reason = await why_not_ready(context.control, call.groups["model"], version)
    return Reply(error_body(reason), status=400, content_type=TEXT_TYPE) if reason else _YES
