"""``forebay explain MODEL``: why a running server batched a model's requests as it did, from its last batches."""

from __future__ import annotations

import http.client
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from urllib.parse import quote

import msgspec

from forebay.engine.command_line import Command

#: Batches shown one by one, the last ones; the summary is over all.
_SHOWN_COUNT = 20

_TIMEOUT_S = 10.0


class Batch(msgspec.Struct, frozen=True):
    """One batch, as ``GET /forebay/explain/MODEL`` tells."""

    batch: int
    rows: int
    requests: int
    segments: int
    oldest_wait_ns: int
    reason: str
    instance: str
    started_ns: int
    run_ns: int


class Explanation(msgspec.Struct, frozen=True):
    """The last batches of one version, oldest first."""

    model: str
    version: str
    batches: tuple[Batch, ...]


class _NoAnswer(Exception):
    """The server cannot be asked, or does not know the model."""


def run(command: Command) -> int:
    """Print the explanation of each model; return the exit code."""
    settings = command.settings.http
    address = "127.0.0.1" if settings.address in ("", "0.0.0.0") else settings.address
    if not command.arguments:
        print("error: name a model, as in: forebay explain alpha_model", file=sys.stderr)
        return 1
    try:
        answers = [fetch(address, settings.port, model) for model in command.arguments]
    except _NoAnswer as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for body, explanation in answers:
        print(body.decode() if command.output_format == "json" else "\n".join(render(explanation)))
    return 0


def fetch(address: str, port: int, model: str) -> tuple[bytes, Explanation]:
    """Ask a server for a model, or for one version of it as ``MODEL:VERSION``; return the JSON and what it says.

    Raises:
        _NoAnswer: with a line that says what to do.
    """
    name, _, version = model.partition(":")
    path = f"/forebay/explain/{quote(name, safe='')}" + (f"/versions/{quote(version, safe='')}" if version else "")
    connection = http.client.HTTPConnection(address, port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", path)
        reply = connection.getresponse()
        body = reply.read()
    except (OSError, http.client.HTTPException) as error:
        raise _NoAnswer(f"no server answers at {address}:{port} ({error}); give its --http-port") from None
    finally:
        connection.close()
    if reply.status != 200:
        raise _NoAnswer(f"{model}: {_error_text(body) or f'the server answers {reply.status} {reply.reason}'}")
    try:
        return body, msgspec.json.decode(body, type=Explanation)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise _NoAnswer(f"what answers at {address}:{port} is no forebay; give its --http-port") from None


def _error_text(body: bytes) -> str:
    """Return what the server says in an error reply, or the reply itself if it is no server of ours."""
    try:
        return msgspec.json.decode(body, type=dict[str, str])["error"]
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError):
        return body.decode(errors="replace")


def render(explanation: Explanation) -> list[str]:
    """Return the explanation as lines for people."""
    batches = explanation.batches
    lines = [f"{explanation.model} version {explanation.version}: {_plural(len(batches), 'batch', 'batches')}"]
    if not batches:
        return [
            *lines,
            "  nothing has been asked of it yet, or all of it under grants, which the scheduler does not see",
        ]
    lines += summary(batches)
    header = ("batch", "started", "requests", "rows", "segments", "waited", "ran", "closed because", "instance")
    rows = [header, *(_cells(batch, batches[-1].started_ns) for batch in batches[-_SHOWN_COUNT:])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    left = {header.index("closed because"), header.index("instance")}
    lines.append("")
    lines += [
        "  "
        + "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return lines


def summary(batches: Sequence[Batch]) -> list[str]:
    """Return the averages, and how many batches were closed for each reason."""
    rows = statistics.fmean(batch.rows for batch in batches)
    wait_ms = statistics.fmean(batch.oldest_wait_ns for batch in batches) / 1e6
    ran = [batch.run_ns for batch in batches if batch.run_ns]
    run_ms = statistics.fmean(ran) / 1e6 if ran else 0.0
    lines = [f"  {rows:.1f} rows per batch, oldest request waited {wait_ms:.2f} ms, batch ran {run_ms:.2f} ms (means)"]
    for reason, count in Counter(batch.reason for batch in batches).most_common():
        sizes = [batch.rows for batch in batches if batch.reason == reason]
        lines.append(f"  {100 * count / len(batches):3.0f} %  {reason}: {statistics.fmean(sizes):.1f} rows")
    return lines


def _cells(batch: Batch, last_ns: int) -> tuple[str, ...]:
    return (
        str(batch.batch),
        f"{(batch.started_ns - last_ns) / 1e6:.1f} ms",
        str(batch.requests),
        str(batch.rows),
        str(batch.segments),
        f"{batch.oldest_wait_ns / 1e6:.2f} ms",
        f"{batch.run_ns / 1e6:.2f} ms" if batch.run_ns else "running",
        batch.reason,
        batch.instance,
    )


def _plural(count: int, one: str, many: str) -> str:
    return f"the last {count} {many}" if count != 1 else f"one {one}"
