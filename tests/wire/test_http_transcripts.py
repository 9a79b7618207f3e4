"""Replays requests that a real Triton 2.51.0 answered, and compares status, content type and body, byte for byte.

``http_transcripts.md`` is the recording. Each run is replayed once against one server, in order, because rows that load
models or change settings matter for later ones; what rows that are not in the recording did is in ``BEFORE``. Rows that
we answer otherwise stand in ``ON_PURPOSE`` with our answer and the reason.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from forebay_server import ForebayServer
from http_wire import Answer, WireClient, get, post

RECORDING = Path(__file__).with_name("http_transcripts.md")
MODELS = Path(__file__).resolve().parents[1] / "data" / "transcript_models"

FIRST_SET = ["bad", "bf16", "boolm", "cached", "dec", "f16", "f32", "f64", "i64", "i8", "id_all", "ort_auto"]
FIRST_SET += ["q", "seq", "str", "u64"]
SECOND_SET = ["multi", "echo", "auto", "noexec", "initfail", "syntax", "ens"]
#: Versions of the models that have other than 1; their directories are empty, so a repository cannot hold them.
VERSIONS = {"cached": ("1", "3"), "ens": ("3",), "bad": ()}

_ROW = re.compile(r"^\| (E-\d+) \| `(.*?)` \| (\d+) \| (\S+) \| `(.*)` \|$")
_REQUEST = re.compile(
    r"(?:-H (?P<header>\S+: \S+) )?(?P<method>GET|POST) (?P<metrics>METRICS )?(?P<path>\S+)(?: -d (?P<body>.*))?"
)
#: Times, counts and what differs from run to run in the replies that hold any.
_VOLATILE = re.compile(r'("(?:ns|last_inference)"):\d+')


@dataclass(frozen=True)
class Row:
    """One request and what Triton answered."""

    id: str
    request: str
    status: int
    content_type: str
    body: str
    is_cut: bool

    @property
    def number(self) -> int:
        return int(self.id[2:])


def read_recording() -> list[Row]:
    rows: list[Row] = []
    for line in RECORDING.read_text().splitlines():
        if (found := _ROW.match(line)) is not None:
            body = "" if found[5] == "(empty)" else found[5]
            is_cut = body.endswith("...(cut)")
            body = body.removesuffix("...(cut)").rstrip(" ") if is_cut else body
            rows.append(Row(found[1], found[2], int(found[3]), found[4], re.sub(" ?<LF> ?", "\n", body), is_cut))
    return rows


ROWS = read_recording()


@dataclass(frozen=True)
class Ours:
    """Where we answer otherwise on purpose."""

    because: str
    status: int | None = None
    content_type: str | None = None
    body: str | None = None
    """A regular expression for the whole body."""


_REPLACED = "a dead instance is replaced, and answers come from the new one or, for a moment, say that there is none"
_PARAMETERS = "an answer from the cache is the whole answer; Triton's lack the response's parameters (H-100)"

ON_PURPOSE: dict[str, Ours] = {
    "E-001": Ours("our version", body=r'{"name":"triton","version":"[0-9.]+","extensions":\[.*\]}'),
    "E-023": Ours("H-278: the status is that of the error", status=500),
    "E-073": Ours(
        _PARAMETERS, body=r'{"model_name":"cached",.*"parameters":{"param0":.*"shape":\[1,2\],"data":\[1,2\]}\]}'
    ),
    "E-074": Ours(
        "Triton's cache takes tensors of different shapes for the same",
        body=r'{"model_name":"cached",.*"shape":\[2,1\],"data":\[1,2\]}\]}',
    ),
    "E-182": Ours(
        "responses have parameters in later versions",
        200,
        "application/json",
        r'.*"parameters":{"a":1,"b":"s","c":true}.*',
    ),
    "E-186": Ours(
        "some of the counted requests are not in the recording", body=r'{"model_stats":\[{"name":"ens",.*}\]}'
    ),
}

#: Rows about an instance that died: what we answer depends on how far its replacement is.
WHILE_REPLACED = dict.fromkeys(("E-189", "E-190", "E-191"), _REPLACED)


def copy_model(name: str, repository: Path) -> None:
    """Copy a model with its version directories."""
    shutil.copytree(MODELS / name, repository / name, dirs_exist_ok=True)
    for version in VERSIONS.get(name, ("1",)):
        (repository / name / version).mkdir(exist_ok=True)


class Replay:
    """One run."""

    def __init__(self, server: ForebayServer, repository: Path) -> None:
        self.server = server
        self.repository = repository
        self.answers: dict[str, Answer] = {}

    def send(self, request: str) -> Answer:
        found = _REQUEST.fullmatch(request)
        assert found is not None, request
        headers = [found["header"]] if found["header"] else []
        port = self.server.metrics_port if found["metrics"] else self.server.http_port
        if found["method"] == "GET":
            message = get(found["path"], *headers)
        else:
            message = post(found["path"], (found["body"] or "").encode(), *headers)
        with WireClient(port, timeout_s=20.0) as wire:
            try:
                return wire.send(message).answer()
            except TimeoutError:
                return Answer(0, body=b"no answer")

    def load(self, *names: str) -> None:
        for name in names:
            answer = self.send(f"POST /v2/repository/models/{name}/load")
            assert answer.status == 200, answer.body

    def repeat(self, row_id: str) -> None:
        """Send a row's request before it is its turn, so that a cache knows the answer."""
        self.send(next(row.request for row in ROWS if row.id == row_id))

    def rearm_tracing(self) -> None:
        """By now as many requests as asked for were traced (H-258)."""
        assert self.send('POST /v2/trace/setting -d {"trace_count":"2"}').status == 200

    def run(self, rows: list[Row], before: dict[str, Callable[[Replay], None]]) -> None:
        for row in rows:
            if row.id in before:
                before[row.id](self)
            self.answers[row.id] = self.send(row.request)


def add_identity_models(replay: Replay) -> None:
    """The models that did not load are mended, and the others are put into the repository."""
    for name in FIRST_SET:
        copy_model(name, replay.repository)
    replay.load("id_all", "seq", "cached")


#: What happened before some rows, by requests that are not in the recording.
BEFORE: dict[str, Callable[[Replay], None]] = {
    "E-027": add_identity_models,
    "E-073": lambda replay: replay.repeat("E-073"),
    "E-081": lambda replay: replay.load("f32"),
    "E-134": lambda replay: replay.rearm_tracing(),
    "E-095": lambda replay: replay.load("i8", "bf16"),
}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replay]:
    directory = tmp_path_factory.mktemp("transcripts")
    repository = directory / "models"
    for name in ("bad", "dec", "ort_auto", "id_all", "seq"):
        copy_model(name, repository)
    # As it was when the recording began.
    config = repository / "id_all" / "config.pbtxt"
    config.write_text(config.read_text() + 'output [ { name: "OUTPUT5" data_type: TYPE_INT8 dims: [ -1 ] } ]\n')
    config = repository / "seq" / "config.pbtxt"
    config.write_text(config.read_text().replace("INPUT0", "IN"))
    flags = (
        "--model-control-mode=explicit",
        "--load-model=*",
        "--exit-on-error=false",
        "--strict-readiness=false",
        "--http-restricted-api=logging:lk=lv",
        "--http-header-forward-pattern=X-Fwd.*",
        "--allow-client-shm=true",
        "--cache-config=local,size=1048576",
        "--metrics-config=summary_latencies=true",
        "--metrics-config=histogram_latencies=true",
        "--trace-config=mode=triton",
        f"--trace-config=triton,file={directory}/trace.json",
        "--trace-config=level=TIMESTAMPS",
        "--trace-config=rate=1",
        "--trace-config=count=2",
    )
    with ForebayServer(repository, *flags) as server:
        replay = Replay(server, repository)
        replay.run([row for row in ROWS if row.number < 160], BEFORE)
        yield replay


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replay]:
    repository = tmp_path_factory.mktemp("transcripts") / "models"
    for name in SECOND_SET:
        copy_model(name, repository)
    (repository / "empty").mkdir()
    with ForebayServer(repository, "--exit-on-error=false", "--strict-readiness=false") as server:
        replay = Replay(server, repository)
        replay.run([row for row in ROWS if row.number >= 160], {})
        yield replay


def comparable(body: str) -> str:
    """Return a body without what differs from run to run."""
    # Directories of the server are nobody's business: we name files from the model's directory on.
    body = re.sub(r'("trace_file":")[^"]*/', r"\1", body.replace("MODELS/", ""))
    return _VOLATILE.sub(r"\1:0", body)


def check(row: Row, replay: Replay) -> None:
    answer = replay.answers[row.id]
    if row.id in WHILE_REPLACED:
        assert answer.status in (200, 400, 404, 500, 503)
        return
    ours = ON_PURPOSE.get(row.id, Ours(""))
    body = comparable(answer.body.decode()).rstrip("\n")
    assert answer.status == (row.status if ours.status is None else ours.status), body
    content_type = answer.headers.get("content-type", "").partition(";")[0]
    expected_type = row.content_type if ours.content_type is None else ours.content_type
    if body or expected_type not in ("text/plain", "application/octet-stream"):
        assert content_type == expected_type
    if ours.body is not None:
        assert re.fullmatch(ours.body, body, re.DOTALL), body
    elif row.is_cut:
        expected = comparable(row.body)
        assert body[: len(expected)] == expected
    else:
        assert body == comparable(row.body).rstrip("\n")


def with_ids(rows: list[Row]) -> list[object]:
    return [pytest.param(row, id=f"{row.id} {row.request[:60]}") for row in rows]


@pytest.mark.parametrize("row", with_ids([row for row in ROWS if row.number < 160]))
def test_first_run(first: Replay, row: Row) -> None:
    check(row, first)


@pytest.mark.parametrize("row", with_ids([row for row in ROWS if row.number >= 160]))
def test_second_run(second: Replay, row: Row) -> None:
    check(row, second)


def test_the_recording_was_read_whole() -> None:
    assert len(ROWS) == RECORDING.read_text().count("\n| E-")
    assert set(ON_PURPOSE) <= {row.id for row in ROWS}
    assert json.loads(ROWS[0].body)["name"] == "triton"
