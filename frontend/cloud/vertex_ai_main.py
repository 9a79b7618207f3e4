"""The frontend process of Vertex AI's endpoint: ``python -m forebay.frontend.cloud.vertex_ai_main --lifeline-fd N``."""

from __future__ import annotations

import os
import sys

from forebay.frontend.cloud.cloud_routes import vertex_ai_routes
from forebay.frontend.cloud.vertex_ai_heads import VertexAiHeads
from forebay.frontend.frontend_process import FrontendProcess, Served, run_frontend
from forebay.frontend.http.settings import HttpView
from forebay.frontend.http_main import serve_http
from forebay.frontend.metrics import MetricsPage, MetricsSettings
from forebay.ipc.errors import InvalidArgument


def default_model(process: FrontendProcess) -> str:
    """Return the model that answers predictions: the one that the flag names, or the only one.

    Raises:
        InvalidArgument: there are several, or none (Triton's text).
    """
    named = process.start.settings.get("cloud", {}).get("vertex_ai_default_model") or ""
    if named:
        return str(named)
    ready = process.control.catalog.latest
    if len(ready) != 1:
        raise InvalidArgument(
            "Expect the model repository contains only a single model if default model is not specified"
        )
    return next(iter(ready))


async def open_servers(process: FrontendProcess) -> Served:
    """Listen on the sockets that came with FrontendStart."""
    settings = HttpView.from_groups(process.start.settings)
    heads = VertexAiHeads(os.environ, lambda: default_model(process), settings.inference_keys)
    page = MetricsPage(process.counters.words, MetricsSettings.from_groups(process.start.settings))
    page.take_catalog(process.control.catalog)
    process.control.add_listener(page.take_catalog)
    return await serve_http(process, heads, vertex_ai_routes(page))


def main() -> int:
    """Entry of the process."""
    return run_frontend("vertex_ai", open_servers)


if __name__ == "__main__":
    sys.exit(main())
