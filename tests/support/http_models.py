"""Small models for tests of the HTTP frontend, and the state that every test must leave behind."""

from __future__ import annotations

import re
import shutil
import urllib.request
from pathlib import Path

from forebay_server import CONF_MODELS, PATIENCE_S, ForebayServer

_TENSOR = '{{ name: "{}" data_type: {} dims: [ {} ] }}'


def write_identity(
    repository: Path, name: str, tensors: list[tuple[str, str]], *, batch: int = 0, delay_ms: int = 0, extra: str = ""
) -> None:
    """Write a model whose outputs are its inputs; ``tensors``: (``TYPE_*``, dims) each."""
    directory = repository / name
    (directory / "1").mkdir(parents=True)
    inputs = ", ".join(_TENSOR.format(f"INPUT{i}", kind, dims) for i, (kind, dims) in enumerate(tensors))
    outputs = ", ".join(_TENSOR.format(f"OUTPUT{i}", kind, dims) for i, (kind, dims) in enumerate(tensors))
    (directory / "config.pbtxt").write_text(
        f'backend: "identity"\nmax_batch_size: {batch}\ninput [ {inputs} ]\noutput [ {outputs} ]\n'
        f'parameters {{ key: "execute_delay_ms" value: {{ string_value: "{delay_ms}" }} }}\n{extra}\n'
    )


def write_models(repository: Path) -> Path:
    """Write the models that these tests use."""
    repository.mkdir(parents=True, exist_ok=True)
    shutil.copytree(CONF_MODELS / "alpha_model", repository / "alpha_model")
    write_identity(repository, "echo", [("TYPE_FP32", "-1")])
    write_identity(repository, "pair", [("TYPE_FP32", "-1"), ("TYPE_STRING", "-1")], batch=4)
    write_identity(repository, "strings", [("TYPE_STRING", "-1")])
    write_identity(repository, "slow", [("TYPE_FP32", "-1")], delay_ms=600)
    return repository


_IN_USE = re.compile(r"^(forebay_slab_rows_in_use|forebay_arena_block_bytes_in_use)\{[^}]*\} (\d+)$", re.MULTILINE)
_COPIED = re.compile(r'^forebay_copied_bytes_total\{model="([^"]*)",stage="([^"]*)",version="[^"]*"\} (\d+)$', re.M)


def metrics_page(server: ForebayServer) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=PATIENCE_S) as reply:
        return str(reply.read().decode())


def copied_bytes(server: ForebayServer, model: str, stage: str) -> int:
    """Return a model's ``forebay_copied_bytes_total``, all versions together."""
    page = metrics_page(server)
    return sum(int(count) for name, where, count in _COPIED.findall(page) if (name, where) == (model, stage))


def wait_nothing_in_use(server: ForebayServer) -> None:
    """Wait until no request holds shared memory any more."""

    def nothing() -> bool:
        found = _IN_USE.findall(metrics_page(server))
        return bool(found) and all(count == "0" for _, count in found)

    server.wait_for(nothing, "all rows and blocks to be given back")
