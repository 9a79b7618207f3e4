"""Vertex AI's endpoint: its health and prediction routes, and what they redirect to, in Triton's terms (spec H-301).

`vertex_ai_server.cc` of Triton's server.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from forebay.frontend.cloud.translated_heads import (
    BAD_REQUEST_PATH,
    METHOD_NOT_ALLOWED_PATH,
    RequestLine,
    TranslatedHeads,
)

_REDIRECT_HEADER = "x-vertex-ai-triton-redirect"

_MODEL = r"/v2/models/[^/]+(?:/versions/[0-9]+)?"
#: What a prediction may be redirected to, by the method that it has there; loading, unloading and registering shared
#: memory are not among it.
_REDIRECTS = {
    "GET": re.compile(
        rf"/metrics|/v2/models/stats|{_MODEL}(?:/(?:ready|config|stats))?|/v2|/v2/health/(?:live|ready)"
        r"|/v2/(?:system|cuda)sharedmemory(?:/region/[^/]+)?/status"
    ),
    "POST": re.compile(
        rf"{_MODEL}/infer|/v2/repository(?:/[^/]+)?/index"
        r"|/v2/(?:system|cuda)sharedmemory(?:/region/[^/]+)?/unregister"
    ),
}


class VertexAiHeads(TranslatedHeads):
    """Parses the heads of requests to Vertex AI's port."""

    binary_type = "application/vnd.vertex-ai-triton.binary+json;json-header-size="

    def __init__(
        self,
        environment: Mapping[str, str],
        default_model: Callable[[], str],
        restricted: Sequence[tuple[str, str]] = (),
    ) -> None:
        """
        Args:
            environment: names the routes; the server has seen to it that it does.
            default_model: returns the model that answers predictions.
            restricted: as for :class:`HeadParser`.

        """
        super().__init__("", restricted)
        self._predict = environment["AIP_PREDICT_ROUTE"]
        self._health = environment["AIP_HEALTH_ROUTE"]
        self._default_model = default_model

    def translate(self, request: RequestLine, headers: dict[str, str]) -> RequestLine:
        path = request.path.partition("?")[0]
        if path == self._health:
            return RequestLine(request.method, "/v2/health/ready")
        if path != self._predict:
            return RequestLine("GET", BAD_REQUEST_PATH)
        redirect = headers.get(_REDIRECT_HEADER)
        if redirect is None:
            return RequestLine(request.method, f"/v2/models/{self._default_model()}/infer")
        if request.method != "POST":
            return RequestLine("GET", METHOD_NOT_ALLOWED_PATH)
        for method, pattern in _REDIRECTS.items():
            if pattern.fullmatch(f"/{redirect}"):
                return RequestLine(method, f"/{redirect}")
        return RequestLine("GET", BAD_REQUEST_PATH)
