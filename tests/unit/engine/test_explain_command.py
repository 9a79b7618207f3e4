"""``forebay explain``: what it asks, what it prints."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from forebay.engine.command_line import Command
from forebay.engine.explain_command import Explanation, render, run
from forebay.engine.settings import HttpSettings, Settings


def batch(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "batch": number, "rows": 4, "requests": 4, "segments": 1, "oldest_wait_ns": 2_500_000, "reason": "delay",
        "instance": "m_0_0", "started_ns": number * 1_000_000, "run_ns": 750_000, **fields,
    }  # fmt: skip


#: What servers that are none of ours answer.
_STRANGERS = {
    "/forebay/explain/elsewhere": (404, b"\xff not ours"),
    "/forebay/explain/silent": (404, b""),
    "/forebay/explain/page": (200, b"<html>"),
    "/forebay/explain/object": (200, b"{}"),
}


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path in _STRANGERS:
            status, body = _STRANGERS[self.path]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)
            return
        known = self.path in ("/forebay/explain/m%20x", "/forebay/explain/m%20x/versions/3")
        body = json.dumps({"model": "m x", "version": "3", "batches": [batch(1)]} if known else {"error": "unknown"})
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *_arguments: Any) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    """A server that knows model ``m x``."""
    server = http.server.HTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def command(port: int, *models: str, **fields: Any) -> Command:
    settings = Settings(http=HttpSettings(port=port, address="0.0.0.0"))
    return Command(name="explain", settings=settings, arguments=models, sources={}, **fields)


def test_prints_a_table(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command(port, "m x", "m x:3")) == 0
    printed = capsys.readouterr().out
    assert printed.count("m x version 3: one batch") == 2
    assert "4.0 rows per batch, oldest request waited 2.50 ms, batch ran 0.75 ms (means)" in printed
    assert "100 %  delay: 4.0 rows" in printed


def test_prints_json(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command(port, "m x", output_format="json")) == 0
    assert json.loads(capsys.readouterr().out)["batches"][0]["reason"] == "delay"


def test_says_what_is_wrong(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command(port)) == 1
    assert "name a model" in capsys.readouterr().err
    assert run(command(port, "other")) == 1
    assert "unknown" in capsys.readouterr().err
    assert run(command(1, "m x")) == 1
    assert "no server answers at 127.0.0.1:1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("none", "none: unknown"),
        ("elsewhere", "elsewhere: \ufffd not ours"),
        ("silent", "silent: the server answers 404 Not Found"),
    ],
)
def test_says_what_the_server_says(port: int, capsys: pytest.CaptureFixture[str], model: str, text: str) -> None:
    """The text of an error reply, not its JSON; whatever else answers on that port is quoted."""
    assert run(command(port, model)) == 1
    assert capsys.readouterr().err == f"error: {text}\n"


@pytest.mark.parametrize("model", ["page", "object"])
def test_says_that_somebody_else_answers(port: int, capsys: pytest.CaptureFixture[str], model: str) -> None:
    assert run(command(port, model)) == 1
    text = f"error: what answers at 127.0.0.1:{port} is no forebay; give its --http-port\n"
    assert capsys.readouterr().err == text


def test_shows_the_last_batches_and_counts_all() -> None:
    batches = [batch(number, reason="full" if number % 4 else "delay", run_ns=number % 40) for number in range(100)]
    explanation = {"model": "m", "version": "1", "batches": batches}
    lines = render(msgspec.convert(explanation, Explanation))
    assert lines[0] == "m version 1: the last 100 batches"
    assert [line.split()[0] for line in lines[-20:]] == [str(number) for number in range(80, 100)]
    assert any("75 %  full" in line for line in lines)
    assert "running" in lines[-20]


def test_says_so_when_there_is_nothing() -> None:
    assert "nothing has been asked" in render(Explanation("m", "1", ()))[1]
