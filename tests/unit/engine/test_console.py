"""What a person sees of a start-up, on a terminal and in a log file."""

import ast
import io
import itertools
import subprocess
import sys

import pytest

from forebay.engine.console import (
    Console,
    Endpoint,
    ExampleTensor,
    ModelProgress,
    ModelRow,
    client_snippet,
    format_seconds,
    printable,
    render_endpoints,
    render_live_line,
    render_table,
)

ROWS = [
    ModelRow("alpha_model", "2", "onnxruntime", 2, "CPU 0,1", "READY", "", 0.341),
    ModelRow("risk_model", "1", "pytorch", 0, "CPU", "UNAVAILABLE", "torch is missing: pip install 'forebay[torch]'"),
]

PHASES = ["queued", "loading config", "starting worker", "loading", "warming", "ready"]


class FakeClock:
    """Seconds that pass when the test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)


def console(stream, clock, is_terminal=False, width=100):
    return Console(stream, is_terminal=is_terminal, width=width, clock=clock)


class Screen(io.StringIO):
    """What a terminal would show: understands the return to the line's start, its erasure, and drops colours."""

    def lines(self):
        shown = []
        for line in self.getvalue().split("\n"):
            last = line.rpartition("\r\x1b[K")[2]
            for code in ("\x1b[32m", "\x1b[31m", "\x1b[33m", "\x1b[1m", "\x1b[0m"):
                last = last.replace(code, "")
            shown.append(last)
        return shown


# --- progress


def test_log_file_gets_one_plain_line_per_model(clock):
    stream = io.StringIO()
    writer = console(stream, clock)
    for phase in PHASES:
        writer.show_progress(ModelProgress("alpha_model", 2, phase, instance_count=2))
        writer.tick()
        clock.now += 0.1
    assert stream.getvalue() == "  ✓ alpha_model 2: ready in 0.50 s (2 instances)\n"


def test_log_file_hears_once_of_each_phase_that_takes_long(clock):
    stream = io.StringIO()
    writer = console(stream, clock)
    for phase in ("loading", "warming"):
        for ready in range(3):
            writer.show_progress(ModelProgress("m", 1, phase, ready, 3))
            clock.now += 1.5
            writer.tick()
    writer.show_progress(ModelProgress("m", 1, "ready", 3, 3))
    assert stream.getvalue().splitlines() == [
        "  m 1: loading ...",
        "  m 1: warming ...",
        "  ✓ m 1: ready in 9.0 s (3 instances)",
    ]


def test_terminal_repaints_one_line_and_keeps_what_is_done(clock):
    screen = Screen()
    writer = console(screen, clock, is_terminal=True)
    writer.show_progress(ModelProgress("slow", 1, "loading"))
    for phase in PHASES:
        clock.now += 0.1
        writer.show_progress(ModelProgress("alpha_model", 2, phase))
    lines = screen.lines()
    assert lines[0] == "  ✓ alpha_model 2: ready in 0.50 s"
    assert lines[1].endswith("1/2 models  0.60 s  slow 1: loading")
    assert len(lines) == 2


def test_terminal_is_clean_when_the_last_model_is_done(clock):
    screen = Screen()
    writer = console(screen, clock, is_terminal=True)
    writer.show_progress(ModelProgress("m", 1, "loading"))
    writer.show_progress(ModelProgress("m", 1, "ready"))
    assert screen.lines()[-1] == ""


def test_repaints_are_limited_but_a_new_phase_shows_at_once(clock):
    screen = Screen()
    writer = console(screen, clock, is_terminal=True)
    writer.show_progress(ModelProgress("m", 1, "loading", 0, 100))
    painted = screen.getvalue().count("\r")
    for ready in range(1, 100):
        writer.show_progress(ModelProgress("m", 1, "loading", ready, 100))
    assert screen.getvalue().count("\r") == painted
    writer.show_progress(ModelProgress("m", 1, "warming", 100, 100))
    assert screen.lines()[-1].endswith("m 1: warming 100/100")
    clock.now += 1
    writer.tick()
    assert "1.0 s" in screen.lines()[-1]


def test_version_that_becomes_known_replaces_the_line_without_one(clock):
    screen = Screen()
    writer = console(screen, clock, is_terminal=True)
    writer.show_progress(ModelProgress("m", 0, "loading config"))
    clock.now += 1
    writer.show_progress(ModelProgress("m", 3, "ready"))
    assert screen.lines()[0] == "  ✓ m 3: ready in 1.0 s"


def test_failure_says_why_in_wrapped_lines(clock):
    stream = io.StringIO()
    writer = console(stream, clock, width=40)
    writer.show_progress(ModelProgress("m", 1, "failed", reason="a reason that is far too long for one line of it"))
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("  ✗ m 1: failed: a reason")
    assert len(lines) == 2
    assert all(len(line) <= 40 for line in lines)


def test_log_line_is_not_written_into_the_live_line(clock):
    screen = Screen()
    writer = console(screen, clock, is_terminal=True)
    writer.show_progress(ModelProgress("m", 1, "loading"))
    with writer.paused():
        screen.write("I1122 a log line\n")
    lines = screen.lines()
    assert lines[0] == "I1122 a log line"
    assert lines[1].endswith("m 1: loading")


@pytest.mark.parametrize("width", [20, 40, 100, 200])
def test_live_line_fits_and_counts_what_does_not(width):
    progress = [ModelProgress(f"model_{index}", 1, "loading") for index in range(30)]
    line = render_live_line(progress, 1.0, width)
    assert len(line) <= width
    if width >= 100:
        assert line.endswith("more")


def test_bar_grows_with_each_phase():
    bars = [render_live_line([ModelProgress("m", 1, phase)], 0, 100, "#-").split()[0].count("#") for phase in PHASES]
    assert bars[0] == 0
    assert bars[-1] == 16
    assert all(before <= after for before, after in itertools.pairwise(bars))


def test_ascii_stream_gets_ascii(clock):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    writer = console(stream, clock, is_terminal=True)
    writer.show_progress(ModelProgress("modèle", 1, "loading"))
    writer.show_progress(ModelProgress("modèle", 1, "ready"))
    writer.show_models(ROWS)
    text = stream.buffer.getvalue().decode("ascii")
    assert "+\x1b[0m mod?le 1: ready" in text
    assert "-----" in text


def test_closed_stream_silences_the_console(clock):
    stream = io.StringIO()
    writer = console(stream, clock)
    stream.close()
    writer.announce("forebay")
    writer.show_models(ROWS)
    writer.show_endpoints([])


def test_no_colour_where_it_is_unwanted(clock, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    stream = io.StringIO()
    console(stream, clock, is_terminal=True).show_models(ROWS)
    assert "\x1b[3" not in stream.getvalue()


# --- table


def test_table_has_a_row_per_model_with_the_reason_beside_it():
    lines = render_table(ROWS, 140)
    assert lines[0].split() == ["Model", "Version", "Backend", "Instances", "Device", "State", "Load", "time", "Reason"]
    assert lines[2].split() == ["alpha_model", "2", "onnxruntime", "2", "CPU", "0,1", "READY", "0.34", "s"]
    assert lines[3].endswith("UNAVAILABLE  -          torch is missing: pip install 'forebay[torch]'")
    assert len(lines) == 4


def test_long_reason_is_wrapped_in_its_column():
    lines = render_table([ROWS[0], ModelRow("m", "1", "b", 0, "CPU", "UNAVAILABLE", "word " * 40)], 120)
    assert all(len(line) <= 120 for line in lines)
    column = lines[0].index("Reason")
    assert len(lines) > 4
    assert all(line[:column].strip() == "" and line[column] != " " for line in lines[4:])


def test_narrow_terminal_puts_reasons_below_their_rows():
    lines = render_table(ROWS, 80)
    assert "Reason" not in lines[0]
    assert lines[4] == "    torch is missing: pip install 'forebay[torch]'"
    assert all(len(line) <= 80 for line in lines)


def test_table_without_reasons_has_no_such_column():
    assert "Reason" not in render_table([ROWS[0]], 140)[0]


def test_table_of_no_models_says_so():
    assert render_table([], 80) == ["No models."]


def test_colours_do_not_shift_columns(clock):
    screen = Screen()
    console(screen, clock, is_terminal=True, width=140).show_models(ROWS)
    assert screen.lines()[1:5] == render_table(ROWS, 140)


def test_names_cannot_control_the_terminal():
    assert printable("a\x1b[2J\r\nb\tc") == "a [2J b c"
    row = ModelRow("m\x1b]0;x\x07", "1", "b", 0, "CPU", "UNAVAILABLE", "\x1b[2J")
    assert not any("\x1b" in line for line in render_table([row], 200))


# --- endpoints and client


def test_endpoints_are_aligned():
    endpoints = [Endpoint("HTTP", "http://localhost:8000", "KServe v2"), Endpoint("Metrics", "http://localhost:8002")]
    assert render_endpoints(endpoints) == [
        "  HTTP     http://localhost:8000  KServe v2",
        "  Metrics  http://localhost:8002",
    ]
    assert render_endpoints([]) == []


def test_start_up_time_is_told(clock):
    stream = io.StringIO()
    writer = console(stream, clock)
    clock.now += 1.25
    writer.show_endpoints([])
    assert "Ready in 1.2 s." in stream.getvalue()


def test_client_program_can_be_pasted(clock):
    stream = io.StringIO()
    lines = client_snippet(
        "localhost:8000",
        "alpha_model",
        [
            ExampleTensor("features", "FP32", (50,)),
            ExampleTensor("n", "INT64", (-1, 2)),
            ExampleTensor("t", "BYTES", (1,)),
        ],
        [ExampleTensor("prediction", "FP32", (1,))],
        has_batch=True,
    )
    ast.parse("\n".join(lines))
    assert lines[:4] == [
        "import numpy as np",
        "import tritonclient.http as httpclient",
        "",
        'client = httpclient.InferenceServerClient(url="localhost:8000")',
    ]
    assert '    httpclient.InferInput("features", [1, 50], "FP32"),' in lines
    assert "inputs[0].set_data_from_numpy(np.random.randn(1, 50).astype(np.float32))" in lines
    assert "inputs[1].set_data_from_numpy(np.ones((1, 1, 2), dtype=np.int64))" in lines
    assert 'inputs[2].set_data_from_numpy(np.full((1, 1), b"text", dtype=np.object_))' in lines
    assert lines[-1] == 'print(result.as_numpy("prediction"))'
    console(stream, clock).show_client(lines)
    assert "\nimport numpy as np\n" in stream.getvalue()


def test_client_program_fills_every_datatype_as_tritonclient_wants_it():
    """Runs the program up to the call, which needs no server, with tritonclient's own checks."""
    datatypes = ["BOOL", "FP16", "FP32", "FP64", "BF16", "BYTES"]
    datatypes += [f"{sign}{bits}" for sign in ("INT", "UINT") for bits in (8, 16, 32, 64)]
    tensors = [ExampleTensor(datatype, datatype, (3, -1)) for datatype in datatypes]
    lines = client_snippet("localhost:8000", "m", tensors, [])
    assert lines.pop().startswith("result = client.infer")
    program = "\n".join([*lines, "print([tensor.shape() for tensor in inputs])"])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.strip() == str([[3, 1]] * len(datatypes))


def test_hostile_names_stay_inside_their_string():
    lines = client_snippet("h:1", 'm")\nimport os #', [ExampleTensor('x"', "FP32", (1,))], [])
    assert ast.parse("\n".join(lines)).body[-1].value.func.attr == "infer"
    assert "import os" not in [line.strip() for line in lines]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0123, "12 ms"), (0.341, "0.34 s"), (5.24, "5.2 s"), (125, "2 min 05 s")]
)
def test_durations_have_sensible_digits(seconds, text):
    assert format_seconds(seconds) == text
