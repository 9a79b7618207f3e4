"""The frontend process of SageMaker's endpoint: ``python -m forebay.frontend.cloud.sagemaker_main --lifeline-fd N``."""

from __future__ import annotations

import os
import sys

from forebay.frontend.cloud.cloud_routes import SAGEMAKER_ROUTES
from forebay.frontend.cloud.sagemaker_heads import SageMakerHeads
from forebay.frontend.frontend_process import FrontendProcess, Served, run_frontend
from forebay.frontend.http.settings import HttpView
from forebay.frontend.http_main import serve_http


async def open_servers(process: FrontendProcess) -> Served:
    """Listen on the sockets that came with FrontendStart."""
    settings = HttpView.from_groups(process.start.settings)
    return await serve_http(process, SageMakerHeads(os.environ, settings.inference_keys), SAGEMAKER_ROUTES)


def main() -> int:
    """Entry of the process."""
    return run_frontend("sagemaker", open_servers)


if __name__ == "__main__":
    sys.exit(main())
