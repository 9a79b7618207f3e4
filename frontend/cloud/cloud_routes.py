"""What the control server behind a cloud's endpoint serves; paths are translated ones (see ``translated_heads``)."""

from __future__ import annotations

import re

from forebay.frontend.app import ROUTES, Route
from forebay.frontend.cloud import hosted_models
from forebay.frontend.cloud.translated_heads import BAD_REQUEST_PATH, METHOD_NOT_ALLOWED_PATH
from forebay.frontend.handlers.context import Call, ControlContext, Handler, Reply
from forebay.frontend.metrics import CONTENT_TYPE, MetricsPage


async def _bad_request(context: ControlContext, call: Call) -> Reply:
    return Reply(status=400)


async def _method_not_allowed(context: ControlContext, call: Call) -> Reply:
    return Reply(status=405)


def _route(pattern: str, methods: dict[str, Handler], api: str = "metadata") -> Route:
    return Route(re.compile(pattern), api, methods)


_REFUSALS = (
    _route(re.escape(BAD_REQUEST_PATH), {"GET": _bad_request}, ""),
    _route(re.escape(METHOD_NOT_ALLOWED_PATH), {"GET": _method_not_allowed}, ""),
)

SAGEMAKER_ROUTES = (
    _route(
        r"/models/?",
        {"GET": hosted_models.list_models, "POST": hosted_models.load_model},
        "model-repository",
    ),
    _route(
        r"/models/(?P<model>[^/]+)",
        {"GET": hosted_models.get_model, "DELETE": hosted_models.unload_model},
        "model-repository",
    ),
    *_REFUSALS,
    *ROUTES,
)


def vertex_ai_routes(page: MetricsPage) -> tuple[Route, ...]:
    """Return the routes behind Vertex AI's endpoint; redirected predictions may ask for the metrics too."""

    async def metrics(context: ControlContext, call: Call) -> Reply:
        return Reply(page.render(), content_type=CONTENT_TYPE)

    return (_route(r"/metrics", {"GET": metrics}, ""), *_REFUSALS, *ROUTES)
