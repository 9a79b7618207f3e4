"""What a person sees of a start-up: models coming up one by one, then a table, the endpoints and a client to paste.

Runs in the supervisor. Knows nothing of it: events go in, text comes out on one stream. On a terminal one line at the
bottom is repainted while models load, and each model leaves a line when it is ready or has failed; anywhere else (a log
file, a pipe, CI) each change is one plain line. Nothing here waits, and nothing here is needed for serving.
"""

import contextlib
import json
import os
import shutil
import textwrap
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Literal, TextIO

Phase = Literal["queued", "loading config", "starting worker", "loading", "warming", "ready", "failed"]

#: The phases after which nothing more happens to a model version during start-up.
FINAL_PHASES: frozenset[Phase] = frozenset({"ready", "failed"})

#: The share of a model's way to readiness that lies behind it when it enters a phase; for the bar.
_PHASE_WEIGHT: dict[Phase, float] = {
    "queued": 0.0,
    "loading config": 0.05,
    "starting worker": 0.2,
    "loading": 0.4,
    "warming": 0.8,
    "ready": 1.0,
    "failed": 1.0,
}

#: The numpy type that a client fills an input of a datatype with; FP16 and the integers are named alike in numpy.
_NUMPY_TYPES = {"BOOL": "bool_", "FP16": "float16", "FP32": "float32", "FP64": "float64"} | {
    f"{sign.upper()}{bits}": f"{sign}{bits}" for sign in ("int", "uint") for bits in (8, 16, 32, 64)
}

_BAR_CELLS = 16
#: A column for reasons that is narrower than this reads badly; they then go below their rows.
_MIN_REASON_WIDTH = 30
_SECONDS_BETWEEN_REPAINTS = 0.05
#: How long a model may be in one phase before a log hears of it, s.
_SLOW_PHASE_SECS = 2.0


@dataclass(frozen=True, slots=True)
class ModelProgress:
    """A model version enters a phase.

    Attributes:
        model, version: which; version 0 while it is not known yet.
        phase: what begins.
        instances_ready, instance_count: how many of its instances are up; (0, 0) while unknown.
        reason: for `failed`, why.
    """

    model: str
    version: int
    phase: Phase
    instances_ready: int = 0
    instance_count: int = 0
    reason: str = ""

    @property
    def label(self) -> str:
        """The model's name, with its version where that is known."""
        return f"{self.model} {self.version}" if self.version else self.model


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A line of the table of models.

    Attributes:
        model: its name.
        version: as text, empty where a model has no version that could be loaded.
        backend: such as "onnxruntime".
        instances: how many are up.
        device: such as "CPU 0,1" or "GPU 0".
        state: READY, LOADING, UNLOADING or UNAVAILABLE.
        reason: why it is in that state, where that is not plain; any length.
        load_seconds: how long loading took; None where it did not get that far.
    """

    model: str
    version: str
    backend: str
    instances: int
    device: str
    state: str
    reason: str = ""
    load_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A protocol and where it listens: ("HTTP", "http://127.0.0.1:8000")."""

    name: str
    url: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class ExampleTensor:
    """An input or output of the model that the client snippet calls; dimensions below 1 are variable."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class Console:
    """Writes a start-up to one stream.

    Not thread-safe: call it from the supervisor's event loop. A stream that fails (a closed pipe, a full disk) silences
    the console; it never stops the server.

    Args:
        stream: where to, usually standard output; stays the caller's.
        is_terminal: whether lines can be repainted; None asks the stream.
        width: columns; None asks the terminal.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        stream: TextIO,
        is_terminal: bool | None = None,
        width: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty() if is_terminal is None else is_terminal
        self._has_colour = self._is_terminal and not os.environ.get("NO_COLOR")
        self._has_unicode = "utf" in (getattr(stream, "encoding", None) or "utf-8").lower()
        self._width = width
        self._clock = clock
        # Per start-up state.
        self._began = clock()
        self._progress: dict[tuple[str, int], ModelProgress] = {}
        self._model_began: dict[tuple[str, int], float] = {}
        #: Since when a model is in its phase; of those that a log has not heard of.
        self._phase_began: dict[tuple[str, int], float] = {}
        self._repainted = float("-inf")
        self._is_live_line_shown = False
        self._is_silent = False

    def announce(self, text: str) -> None:
        """Write a line of its own, such as the version and the repositories."""
        self._write_lines([printable(text)])

    def show_progress(self, event: ModelProgress) -> None:
        """Take in that a model version entered a phase, and show it."""
        key = (event.model, event.version)
        # A version that becomes known replaces the line without one.
        if event.version and (event.model, 0) in self._progress:
            del self._progress[event.model, 0]
            self._model_began.setdefault(key, self._model_began.pop((event.model, 0)))
            self._phase_began.pop((event.model, 0), None)
        previous = self._progress.get(key)
        self._progress[key] = event
        began = self._model_began.setdefault(key, self._clock())
        if previous == event:
            return
        is_new_phase = previous is None or previous.phase != event.phase
        if event.phase in FINAL_PHASES:
            self._phase_began.pop(key, None)
            self._write_lines(self._final_lines(event, self._clock() - began))
        elif is_new_phase:
            self._phase_began[key] = self._clock()
        if self._is_terminal:
            self._repaint(force=is_new_phase)

    def tick(self) -> None:
        """Show that time passes: repaint the live line of a terminal; tell a log what is slow, once."""
        if not self._is_terminal:
            self._tell_slow()
        elif self._progress:
            self._repaint(force=False)

    def _tell_slow(self) -> None:
        now = self._clock()
        for key, began in list(self._phase_began.items()):
            if now - began >= _SLOW_PHASE_SECS:
                del self._phase_began[key]
                event = self._progress[key]
                self._write_lines([f"  {printable(event.label)}: {event.phase} ..."])

    @contextlib.contextmanager
    def paused(self) -> Generator[None]:
        """Take the live line away while something else, such as the log, writes to the same terminal."""
        self._erase()
        try:
            yield
        finally:
            if self._is_terminal and any(event.phase not in FINAL_PHASES for event in self._progress.values()):
                self._repaint(force=True)

    def show_models(self, rows: Sequence[ModelRow]) -> None:
        """End the live display and write the table of models."""
        self._erase()
        self._progress.clear()
        self._model_began.clear()
        self._phase_began.clear()
        table = render_table(rows, self._columns(), self._colour_of_state if self._has_colour else None)
        self._write_lines(["", *table])

    def show_endpoints(self, endpoints: Sequence[Endpoint]) -> None:
        """Write where the server listens, and how long the start-up took."""
        ready = f"Ready in {format_seconds(self._clock() - self._began)}."
        self._write_lines(["", self._colour(ready, "1"), *render_endpoints(endpoints)])

    def show_client(self, lines: Sequence[str]) -> None:
        """Write a client program to paste, as `client_snippet` returns it."""
        # Not indented: Python's prompt refuses a pasted line that begins with spaces.
        self._write_lines(["", "Try it (pip install 'tritonclient[http]'):", "", *lines, ""])

    # --- the live line

    def _repaint(self, force: bool) -> None:
        now = self._clock()
        if not force and now - self._repainted < _SECONDS_BETWEEN_REPAINTS:
            return
        self._repainted = now
        waiting = [event for event in self._progress.values() if event.phase not in FINAL_PHASES]
        if not waiting:
            self._erase()
            return
        line = render_live_line(
            list(self._progress.values()), now - self._began, self._columns() - 1, "█░" if self._has_unicode else "#-"
        )
        self._write(f"\r\x1b[K{line}")
        self._is_live_line_shown = True

    def _erase(self) -> None:
        if self._is_live_line_shown:
            self._write("\r\x1b[K")
            self._is_live_line_shown = False

    def _final_lines(self, event: ModelProgress, seconds: float) -> list[str]:
        label = printable(event.label)
        if event.phase == "ready":
            mark = self._colour("✓" if self._has_unicode else "+", "32")
            instances = f" ({count_noun(event.instance_count, 'instance')})" if event.instance_count else ""
            return [f"  {mark} {label}: ready in {format_seconds(seconds)}{instances}"]
        mark = self._colour("✗" if self._has_unicode else "x", "31")
        text = f"{label}: failed" + (f": {printable(event.reason)}" if event.reason else "")
        first, *rest = wrap(text, max(self._columns() - 4, 20))
        return [f"  {mark} {first}", *[f"    {line}" for line in rest]]

    # --- the stream

    def _columns(self) -> int:
        return self._width or shutil.get_terminal_size((120, 24)).columns

    def _colour(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._has_colour else text

    def _colour_of_state(self, state: str) -> str:
        return self._colour(state, {"READY": "32", "UNAVAILABLE": "31"}.get(state.strip(), "33"))

    def _write_lines(self, lines: Sequence[str]) -> None:
        self._erase()
        self._write("".join(f"{line}\n" for line in lines))

    def _write(self, text: str) -> None:
        if self._is_silent:
            return
        if not self._has_unicode:
            text = text.replace("─", "-").encode("ascii", "replace").decode()
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            # Whoever read us is gone; serving goes on.
            self._is_silent = True


def render_live_line(progress: Sequence[ModelProgress], seconds: float, width: int, cells: str = "█░") -> str:
    """Return the line shown while models load: a bar, how many are done, and what each of the others is doing.

    Never longer than `width` columns: what does not fit is counted instead.
    """
    done = sum(event.phase in FINAL_PHASES for event in progress)
    share = sum(_PHASE_WEIGHT[event.phase] for event in progress) / len(progress)
    full = int(share * _BAR_CELLS)
    line = f"{cells[0] * full}{cells[1] * (_BAR_CELLS - full)} {done}/{len(progress)} models  {format_seconds(seconds)}"
    waiting = [event for event in progress if event.phase not in FINAL_PHASES]
    # What is furthest along is the most interesting; the queue is only counted when room runs out.
    waiting.sort(key=lambda event: -_PHASE_WEIGHT[event.phase])
    for index, event in enumerate(waiting):
        instances = f" {event.instances_ready}/{event.instance_count}" if event.instance_count > 1 else ""
        addition = f"  {printable(event.label)}: {event.phase}{instances}"
        more = f"  and {len(waiting) - index - 1} more" if index + 1 < len(waiting) else ""
        if len(line) + len(addition) + len(more) > width:
            line += f"  and {len(waiting) - index} more" if index else addition
            break
        line += addition
    return line[:width]


def render_table(rows: Sequence[ModelRow], width: int, paint_state: Callable[[str], str] | None = None) -> list[str]:
    """Return the table of models as lines of at most `width` columns, if the names leave room for that.

    Args:
        rows: in the order to show them.
        width: columns of the terminal.
        paint_state: wraps a padded state into colour codes, which take no columns.
    """
    if not rows:
        return ["No models."]
    heads = ("Model", "Version", "Backend", "Instances", "Device", "State", "Load time")
    cells = [
        (
            printable(row.model),
            printable(row.version) or "-",
            printable(row.backend) or "-",
            str(row.instances),
            printable(row.device) or "-",
            printable(row.state),
            "-" if row.load_seconds is None else format_seconds(row.load_seconds),
        )
        for row in rows
    ]
    reasons = [printable(row.reason) for row in rows]
    widths = [max(len(head), *(len(row[column]) for row in cells)) for column, head in enumerate(heads)]
    state_column = heads.index("State")

    def line(texts: Sequence[str], paint: Callable[[str], str] | None) -> str:
        padded = [text.ljust(columns) for text, columns in zip(texts, widths, strict=True)]
        if paint is not None:
            padded[state_column] = paint(padded[state_column])
        return "  ".join(padded)

    used = sum(widths) + 2 * len(widths)
    room = width - used
    is_beside = room >= _MIN_REASON_WIDTH
    has_reasons = any(reasons)
    lines = [(line(heads, None) + ("  Reason" if has_reasons and is_beside else "")).rstrip()]
    lines.append("─" * max(min(width, used + (max(map(len, reasons), default=0) if is_beside else 0)), used - 2))
    for texts, reason in zip(cells, reasons, strict=True):
        first = line(texts, paint_state)
        if not reason:
            lines.append(first.rstrip())
        elif is_beside:
            top, *below = wrap(reason, room)
            lines += [f"{first}  {top}", *[" " * used + text for text in below]]
        else:
            lines += [first.rstrip(), *[f"    {text}" for text in wrap(reason, max(width - 4, 20))]]
    return lines


def render_endpoints(endpoints: Sequence[Endpoint]) -> list[str]:
    """Return one aligned line per endpoint."""
    if not endpoints:
        return []
    name_width = max(len(endpoint.name) for endpoint in endpoints)
    url_width = max(len(endpoint.url) for endpoint in endpoints)
    return [
        f"  {endpoint.name.ljust(name_width)}  {endpoint.url.ljust(url_width)}  {endpoint.note}".rstrip()
        for endpoint in endpoints
    ]


def client_snippet(
    url: str, model: str, inputs: Sequence[ExampleTensor], outputs: Sequence[ExampleTensor], has_batch: bool = False
) -> list[str]:
    """Return the lines of a `tritonclient` program that calls a model with random or constant values.

    Args:
        url: host and port, without a scheme, as tritonclient wants it.
        model: its name.
        inputs, outputs: as in the model's metadata; a variable dimension is filled with 1.
        has_batch: whether a batch dimension, of 1, goes before each shape that does not show it.
    """
    lines = ["import numpy as np", "import tritonclient.http as httpclient", ""]
    if any(tensor.datatype == "BF16" for tensor in inputs):
        # numpy has no such type; tritonclient brings this package along.
        lines.insert(0, "import ml_dtypes")
    lines += [f"client = httpclient.InferenceServerClient(url={_quote(url)})", "inputs = ["]
    values: list[str] = []
    for tensor in inputs:
        shape = tuple(max(dimension, 1) for dimension in tensor.shape)
        shape = (1, *shape) if has_batch else shape
        lines.append(f"    httpclient.InferInput({_quote(tensor.name)}, {list(shape)}, {_quote(tensor.datatype)}),")
        values.append(_example_values(tensor.datatype, shape))
    lines.append("]")
    lines += [f"inputs[{index}].set_data_from_numpy({value})" for index, value in enumerate(values)]
    lines.append(f"result = client.infer({_quote(model)}, inputs)")
    lines += [f"print(result.as_numpy({_quote(tensor.name)}))" for tensor in outputs]
    return lines


def _example_values(datatype: str, shape: tuple[int, ...]) -> str:
    """Return an expression for an array that a client may send for an input."""
    if datatype == "BYTES":
        return f'np.full({shape}, b"text", dtype=np.object_)'
    if datatype in ("FP16", "FP32", "FP64"):
        return f"np.random.randn({', '.join(map(str, shape))}).astype(np.{_NUMPY_TYPES[datatype]})"
    if datatype == "BF16":
        return f"np.ones({shape}, dtype=ml_dtypes.bfloat16)"
    return f"np.ones({shape}, dtype=np.{_NUMPY_TYPES.get(datatype, 'float32')})"


def _quote(text: str) -> str:
    """Return a Python string literal in double quotes; JSON's escapes are Python's too."""
    return json.dumps(text)


def printable(text: str) -> str:
    """Return a text as one line without control characters, which could repaint or retitle the terminal."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def wrap(text: str, width: int) -> list[str]:
    """Break a text into lines of at most `width` columns, at least one; commands in it are not broken at dashes."""
    return textwrap.wrap(text, width, break_on_hyphens=False) or [""]


def format_seconds(seconds: float) -> str:
    """Return a duration with a sensible number of digits: 12 ms, 0.34 s, 5.2 s, 2 min 05 s."""
    if seconds < 0.1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def count_noun(count: int, noun: str) -> str:
    """Return "1 instance" or "2 instances"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
