"""Addresses and credentials of cloud repositories."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forebay.engine.repository.cloud_location import cache_name, is_cloud, parse_location
from forebay.ipc.errors import InvalidArgument


def test_only_known_clouds_are_clouds() -> None:
    assert [is_cloud(path) for path in ("s3://b/p", "gs://b", "as://a/c", "/models", "models", "file:///m")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip


def test_s3_address() -> None:
    """Spec R-122."""
    location = parse_location("s3://bucket/path/to//models/", {"AWS_DEFAULT_REGION": "eu-west-1"})
    assert (location.protocol, location.root) == ("s3", "bucket/path/to/models")
    assert location.options == {"client_kwargs": {"region_name": "eu-west-1"}}


def test_s3_address_with_a_server_of_its_own() -> None:
    location = parse_location("s3://http://minio:9000/bucket/models", {})
    assert location.root == "bucket/models"
    assert location.options == {"client_kwargs": {"endpoint_url": "http://minio:9000"}}


def test_azure_address() -> None:
    """Spec R-123."""
    location = parse_location("as://account/container/models", {"AZURE_STORAGE_KEY": "k"})
    assert (location.protocol, location.root) == ("abfs", "container/models")
    assert location.options == {"account_name": "account", "account_key": "k"}


def test_longest_prefix_of_the_credentials_wins(tmp_path: Path) -> None:
    """Spec R-124."""
    path = tmp_path / "credentials.json"
    path.write_text(
        json.dumps(
            {
                "s3": {
                    "": {"key_id": "any", "secret_key": "x"},
                    "s3://bucket": {"key_id": "bucket", "secret_key": "y"},
                    "s3://bucket/deep": {"key_id": "deep", "secret_key": "z", "region": "r", "session_token": "t"},
                },
                "gs": {"": "/keys/service.json"},
            }
        )
    )
    environ = {"TRITON_CLOUD_CREDENTIAL_PATH": str(path)}
    assert parse_location("s3://other/m", environ).options == {"key": "any", "secret": "x"}
    assert parse_location("s3://bucket/m", environ).options == {"key": "bucket", "secret": "y"}
    deep = parse_location("s3://bucket/deep/m", environ).options
    assert deep == {"key": "deep", "secret": "z", "token": "t", "client_kwargs": {"region_name": "r"}}
    assert parse_location("gs://bucket/m", environ).options == {"token": "/keys/service.json"}


@pytest.mark.parametrize("content", ["[]", "{", '{"s3": {"": ["key"]}}'])
def test_credentials_that_are_none_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "credentials.json"
    path.write_text(content)
    with pytest.raises(InvalidArgument, match="TRITON_CLOUD_CREDENTIAL_PATH"):
        parse_location("s3://bucket/m", {"TRITON_CLOUD_CREDENTIAL_PATH": str(path)})


def test_address_without_a_bucket_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="names no bucket"):
        parse_location("s3://", {})


def test_caches_of_different_places_have_different_names() -> None:
    urls = ("s3://b/m", "s3://http://h:1/b/m", "s3://b-m", "gs://b/m")
    assert len({cache_name(parse_location(url, {})) for url in urls}) == len(urls)
