"""The example ensemble of conf/models beside the package whose network it serves."""

from __future__ import annotations

import shutil
import sys
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as httpclient
from forebay_server import CONF_MODELS, ForebayServer

PARTS = ("file_type", "file_type_features", "file_type_scores", "file_type_label")


def copy_models(target: Path) -> Path:
    for name in PARTS:
        shutil.copytree(CONF_MODELS / name, target / name)
    return target


def zipped() -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("a.txt"), "hello " * 100)
    return buffer.getvalue()


def samples() -> list[bytes]:
    return [
        b"",
        b"abc",
        b"\xff\xfe\x00",
        b"   \n\t " * 50,
        Path(__file__).read_bytes(),
        b'{"name": "value", "list": [1, 2, 3], "nested": {"a": null, "b": true}}',
        b"<!DOCTYPE html><html><head><title>x</title></head><body><p>text</p></body></html>",
        Path(sys.executable).resolve().read_bytes()[:200_000],
        b"The quick brown fox jumps over the lazy dog, and does so again and again.\n" * 20,
        zipped(),
        bytes(np.random.default_rng(1).integers(0, 256, 5000, np.uint8)),
    ]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForebayServer]:
    pytest.importorskip("magika")
    with ForebayServer(copy_models(tmp_path_factory.mktemp("models"))) as running:
        yield running


def test_answers_as_the_package_itself_does(server: ForebayServer) -> None:
    """One batch of files of all kinds through Python, ONNX and Python, against magika's own client."""
    from magika import Magika

    files = samples()
    contents = np.array([[content] for content in files], object)
    with httpclient.InferenceServerClient(server.http_url) as client:
        given = httpclient.InferInput("content", list(contents.shape), "BYTES")
        given.set_data_from_numpy(contents)
        result = client.infer("file_type", [given])
    magika = Magika()
    expected = [magika.identify_bytes(content) for content in files]
    assert result.as_numpy("label").ravel().tolist() == [str(found.output.label).encode() for found in expected]
    assert result.as_numpy("mime_type").ravel().tolist() == [found.output.mime_type.encode() for found in expected]
    np.testing.assert_allclose(result.as_numpy("score").ravel(), [found.score for found in expected], rtol=1e-3)


def test_without_the_package_the_models_say_what_to_install(tmp_path: Path) -> None:
    """The server starts, is ready, and every model that lacks something names the command."""
    models = copy_models(tmp_path)
    for name in ("file_type_scores", "file_type_label"):
        config = models / name / "config.pbtxt"
        config.write_text(config.read_text().replace("magika>=1.0", "no-such-package>=1.0"))
    with ForebayServer(models) as server:
        assert server.get("/v2/health/ready")[0] == 200
        assert server.get("/v2/models/file_type/ready")[0] == 400
        index = server.post("/v2/repository/index")[1].decode()
        assert "install with: pip install 'no-such-package>=1.0'" in index
        assert "ensemble 'file_type' depends on 'file_type_scores' which has no loaded version" in index
