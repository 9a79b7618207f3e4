"""Models served from a bucket of a local S3 server (spec R-122, R-125)."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forebay_server import CONF_MODELS, ForebayServer

moto_server = pytest.importorskip("moto.server")
fsspec = pytest.importorskip("fsspec")
pytest.importorskip("s3fs")

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries that are not ours


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    # What it holds belongs to this process, not to one server.
    with urllib.request.urlopen(f"{url}/moto-api/reset", data=b"") as reply:
        assert reply.status == 200
    yield url
    server.stop()


@pytest.fixture
def bucket(endpoint: str) -> Any:
    """The bucket's file system, with the example ONNX model below ``models``."""
    files = fsspec.filesystem(
        "s3", key="test", secret="test", client_kwargs={"endpoint_url": endpoint}, skip_instance_cache=True
    )
    files.mkdir("bucket")
    files.put(f"{CONF_MODELS}/alpha_model", "bucket/models/alpha_model", recursive=True)
    return files


def serve(endpoint: str, tmp_path: Path, *flags: str) -> ForebayServer:
    environment = {**KEYS, "TRITON_AWS_MOUNT_DIRECTORY": str(tmp_path / "cache")}
    return ForebayServer(f"s3://{endpoint}/bucket/models", *flags, environment=environment)


def infer(server: ForebayServer, model: str = "alpha_model") -> int:
    tensor = {"name": "features", "datatype": "FP32", "shape": [1, 50], "data": [0.5] * 50}
    return server.post(f"/v2/models/{model}/infer", json.dumps({"inputs": [tensor]}).encode())[0]


def test_bucket_is_served(endpoint: str, bucket: Any, tmp_path: Path) -> None:
    with serve(endpoint, tmp_path) as server:
        assert infer(server) == 200


def test_explicit_mode_fetches_what_is_loaded(endpoint: str, bucket: Any, tmp_path: Path) -> None:
    bucket.put(f"{CONF_MODELS}/alpha_model/1", "bucket/models/plain_model/1", recursive=True)
    with serve(endpoint, tmp_path, "--model-control-mode=explicit", "--load-model=alpha_model") as server:
        assert infer(server) == 200
        assert not list(tmp_path.rglob("plain_model/1/model.onnx"))
        assert server.post("/v2/repository/models/plain_model/load")[0] == 200
        assert infer(server, "plain_model") == 200
        # A new version, put beside the old ones.
        bucket.put(f"{CONF_MODELS}/alpha_model/2", "bucket/models/alpha_model/3", recursive=True)
        assert server.post("/v2/repository/models/alpha_model/load")[0] == 200
        assert server.get("/v2/models/alpha_model/versions/3/ready")[0] == 200
        # Gone there, gone here.
        bucket.rm("bucket/models/alpha_model/1", recursive=True)
        assert server.post("/v2/repository/models/alpha_model/load")[0] == 200
        assert server.get("/v2/models/alpha_model/versions/1/ready")[0] in (400, 404)


def test_poll_mode_follows_the_bucket(endpoint: str, bucket: Any, tmp_path: Path) -> None:
    with serve(endpoint, tmp_path, "--model-control-mode=poll", "--repository-poll-secs=1") as server:
        bucket.put(f"{CONF_MODELS}/alpha_model/1", "bucket/models/plain_model/1", recursive=True)
        server.wait_for(lambda: infer(server, "plain_model") == 200, "the new model")


def test_bucket_that_is_not_there_is_one_clear_line(endpoint: str, bucket: Any, tmp_path: Path) -> None:
    environment = {**KEYS, "TRITON_AWS_MOUNT_DIRECTORY": str(tmp_path / "cache")}
    server = ForebayServer(f"s3://{endpoint}/nothing/models", environment=environment)
    server.launch()
    assert server.process.wait(60) == 1
    assert "failed to stat file s3://" in server.stderr
    assert "test" not in os.linesep.join(line for line in server.stderr.splitlines() if "secret" in line)
