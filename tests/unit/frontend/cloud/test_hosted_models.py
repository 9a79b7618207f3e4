"""Models that SageMaker has the server load."""

from __future__ import annotations

import asyncio
import json

import pytest
from fake_frontend import FakeControl, make_context

from forebay.frontend.cloud.hosted_models import load_model
from forebay.frontend.handlers.context import Call


def load(url: str) -> tuple[int, list[str]]:
    """Ask for a model; return the status and the commands that the supervisor got."""
    context = make_context()
    assert isinstance(context.control, FakeControl)
    body = json.dumps({"model_name": "m", "url": url}).encode()
    reply = asyncio.run(load_model(context, Call("POST", {}, body)))
    return reply.status, [verb for verb, _arguments in context.control.commands]


@pytest.mark.parametrize("url", ["/dev/shm/x", "dev/shm/x", "//dev/shm/x", "///proc/1/cwd/x", "/a/../sys/x", ""])
def test_directories_in_which_no_model_can_be_are_refused(url: str) -> None:
    """H-300."""
    assert load(url) == (400, [])


def test_other_directories_are_mounted_and_their_model_loaded() -> None:
    assert load("/opt/ml/models/m/model") == (200, ["mount", "load"])
