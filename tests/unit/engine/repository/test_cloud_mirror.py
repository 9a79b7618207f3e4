"""The local copy of a cloud repository, from a file system in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from forebay.engine.repository.cloud_location import CloudLocation
from forebay.engine.repository.cloud_mirror import CloudMirror
from forebay.ipc.errors import InvalidArgument, Unavailable


class FakeFiles:
    """What the mirror uses of an fsspec file system; counts what is fetched."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects = objects
        self.markers: set[str] = set()
        self.fetched: list[str] = []
        self.failing = ""

    def invalidate_cache(self) -> None:
        """There is none."""

    def find(self, top: str, *, withdirs: bool, detail: bool) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {
            path: {"type": "file", "size": len(data), "ETag": f"{data!r}"}
            for path, data in self.objects.items()
            if path == top or path.startswith(f"{top}/")
        }
        found |= {path: {"type": "directory", "size": 0} for path in self.markers if path.startswith(f"{top}/")}
        if not found:
            raise FileNotFoundError(top)
        return found

    def get_file(self, path: str, target: str) -> None:
        if path == self.failing:
            raise OSError("connection reset")
        self.fetched.append(path)
        Path(target).write_bytes(self.objects[path])


LOCATION = CloudLocation(url="s3://bucket/models", protocol="s3", root="bucket/models", options={}, package="s3fs")


@pytest.fixture
def files() -> FakeFiles:
    return FakeFiles(
        {
            "bucket/models/a/config.pbtxt": b"a",
            "bucket/models/a/1/model.onnx": b"first",
            "bucket/models/b/config.pbtxt": b"b",
            "bucket/models/b/1/model.onnx": b"other",
        }
    )


@pytest.fixture
def mirror(files: FakeFiles, tmp_path: Path) -> CloudMirror:
    return CloudMirror(LOCATION, cache_directory=str(tmp_path / "cache"), file_system=files)


def tree(mirror: CloudMirror) -> dict[str, bytes]:
    root = Path(mirror.path)
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_everything_is_copied_once(mirror: CloudMirror, files: FakeFiles) -> None:
    mirror.sync()
    assert tree(mirror) == {
        "a/1/model.onnx": b"first", "a/config.pbtxt": b"a", "b/1/model.onnx": b"other", "b/config.pbtxt": b"b",
    }  # fmt: skip
    files.fetched.clear()
    mirror.sync()
    assert files.fetched == []


def test_only_what_changed_is_fetched_and_what_is_gone_is_removed(mirror: CloudMirror, files: FakeFiles) -> None:
    mirror.sync()
    files.fetched.clear()
    files.objects["bucket/models/a/1/model.onnx"] = b"second"
    del files.objects["bucket/models/b/config.pbtxt"], files.objects["bucket/models/b/1/model.onnx"]
    mirror.sync()
    assert files.fetched == ["bucket/models/a/1/model.onnx"]
    assert tree(mirror) == {"a/1/model.onnx": b"second", "a/config.pbtxt": b"a"}
    assert os.listdir(mirror.path) == ["a"]


def test_one_model_is_fetched_by_itself(mirror: CloudMirror, files: FakeFiles) -> None:
    mirror.sync_model("a")
    assert set(tree(mirror)) == {"a/1/model.onnx", "a/config.pbtxt"}
    del files.objects["bucket/models/a/config.pbtxt"], files.objects["bucket/models/a/1/model.onnx"]
    mirror.sync_model("a")
    assert os.listdir(mirror.path) == []


def test_configurations_make_models_known(mirror: CloudMirror, files: FakeFiles) -> None:
    files.objects["bucket/models/c/1/model.onnx"] = b"without a configuration"
    mirror.sync_configs()
    assert sorted(os.listdir(mirror.path)) == ["a", "b", "c"]
    assert set(tree(mirror)) == {"a/config.pbtxt", "b/config.pbtxt"}


def test_directory_markers_become_directories(mirror: CloudMirror, files: FakeFiles) -> None:
    """An ensemble's version directory holds nothing."""
    files.objects["bucket/models/e/config.pbtxt"] = b"e"
    files.markers.add("bucket/models/e/1")
    mirror.sync()
    assert (Path(mirror.path) / "e" / "1").is_dir()


def test_server_that_starts_again_fetches_nothing(files: FakeFiles, tmp_path: Path) -> None:
    first = CloudMirror(LOCATION, cache_directory=str(tmp_path), file_system=files)
    first.sync()
    path = first.path
    del first
    files.fetched.clear()
    second = CloudMirror(LOCATION, cache_directory=str(tmp_path), file_system=files)
    second.sync()
    assert second.path == path
    assert files.fetched == []


def test_two_servers_do_not_share_a_copy(files: FakeFiles, tmp_path: Path) -> None:
    first = CloudMirror(LOCATION, cache_directory=str(tmp_path), file_system=files)
    second = CloudMirror(LOCATION, cache_directory=str(tmp_path), file_system=files)
    assert first.path != second.path
    path = second.path
    del second
    assert not os.path.exists(path)


@pytest.mark.parametrize("key", ["../outside", "a/../../outside", "a/\0"])
def test_keys_that_lead_out_are_ignored(mirror: CloudMirror, files: FakeFiles, tmp_path: Path, key: str) -> None:
    files.objects[f"bucket/models/{key}"] = b"evil"
    mirror.sync()
    assert b"evil" not in tree(mirror).values()
    assert not list(tmp_path.rglob("outside"))


def test_failed_fetch_keeps_what_was_there(mirror: CloudMirror, files: FakeFiles) -> None:
    mirror.sync()
    files.objects["bucket/models/a/1/model.onnx"] = b"second"
    files.failing = "bucket/models/a/1/model.onnx"
    with pytest.raises(Unavailable, match=r"'a/1/model\.onnx' cannot be fetched from model repository 's3:"):
        mirror.sync()
    assert tree(mirror)["a/1/model.onnx"] == b"first"
    files.failing = ""
    mirror.sync()
    assert tree(mirror)["a/1/model.onnx"] == b"second"


def test_location_without_objects_does_not_exist(tmp_path: Path) -> None:
    mirror = CloudMirror(LOCATION, cache_directory=str(tmp_path), file_system=FakeFiles({}))
    with pytest.raises(InvalidArgument, match="failed to stat file s3://bucket/models: does not exist"):
        mirror.sync()
