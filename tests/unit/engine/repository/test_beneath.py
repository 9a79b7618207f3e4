"""Nothing outside the repository's root is ever opened."""

from __future__ import annotations

import os
import pathlib
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.engine.repository.beneath import (
    MAX_COMPONENTS,
    Beneath,
    Refused,
    check_model_name,
    check_name,
    check_relative,
)
from forebay.ipc.errors import Code, NotFound, ServingError

SECRET = b"outside"

#: What a client may try in any field that names a model or a file.
TRAVERSAL = [
    "",
    ".",
    "..",
    "../secret",
    "a/../../secret",
    "/etc/passwd",
    "//etc/passwd",
    "a/b/../../../secret",
    "a\0b",
    "\0",
    "x" * 256,
    "a/" * 5000,
    "a/" * (MAX_COMPONENTS + 1) + "b",
    "\ud800",
    "a/\udfff/b",
]


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    """A repository with a model ``m``, and a secret beside the repository."""
    (tmp_path / "secret").write_bytes(SECRET)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_bytes(SECRET)
    root = tmp_path / "models"
    (root / "m" / "1").mkdir(parents=True)
    (root / "m" / "config.pbtxt").write_bytes(b"inside")
    (root / "m" / "1" / "model").write_bytes(b"weights")
    return root


@pytest.mark.parametrize("name", [*TRAVERSAL[:5], "/etc/passwd", "a\0b", "x" * 256, "\ud800"])
def test_model_names_that_are_no_names_are_refused(name: str) -> None:
    """Spec H-223."""
    with pytest.raises(Refused) as caught:
        check_model_name(name)
    assert caught.value.code is Code.INVALID_ARG
    assert caught.value.text.startswith("invalid model name '")
    assert caught.value.text.isprintable()


def test_the_text_of_a_refused_model_name_is_tritons() -> None:
    """Spec H-223."""
    with pytest.raises(Refused) as caught:
        check_model_name("../x")
    assert caught.value.text == ("invalid model name '../x', model name must not contain path traversal characters")


@pytest.mark.parametrize(
    "name", ["m", "model.onnx", "..data", "a..b", "...", "größe", "a b", "x" * 255, "-1", "%2e%2e"]
)
def test_ordinary_and_odd_names_are_fine(name: str) -> None:
    assert check_model_name(name) == name
    assert check_name(name) == name
    assert check_relative(name) == (name,)


@pytest.mark.parametrize("path", TRAVERSAL)
def test_paths_that_could_lead_out_are_refused(path: str) -> None:
    with pytest.raises(Refused):
        check_relative(path)


def test_relative_paths_are_split() -> None:
    assert check_relative("1//./model.onnx") == ("1", "model.onnx")


def test_files_inside_are_read(root: pathlib.Path) -> None:
    with Beneath(str(root)) as tree:
        assert tree.read(("m", "config.pbtxt"), 100) == b"inside"
        assert tree.is_directory(("m", "1"))
        assert tree.is_file(("m", "1", "model"))
        assert tree.entry(("m", "nothing")) is None
        assert tree.entry(("m", "config.pbtxt", "below-a-file")) is None
        assert [item.name for item in tree.entries(("m",))] == ["1", "config.pbtxt"]
        assert tree.real_path(("m", "1", "model")) == str(root.resolve() / "m" / "1" / "model")
        found = tree.entry(("m", "1", "model"))
        assert found is not None
        assert found.size_bytes == len(b"weights")
        assert tree.entry(()) is not None


def test_links_inside_are_followed(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Spec R-014; also how Kubernetes mounts a ConfigMap."""
    (root / "shared").mkdir()
    (root / "shared" / "weights").write_bytes(b"shared")
    (root / "m" / "relative").symlink_to("../shared/weights")
    (root / "m" / "absolute").symlink_to(root.resolve() / "shared" / "weights")
    (root / "m" / "directory").symlink_to("1")
    (root / "m" / "..2024").mkdir()
    (root / "m" / "..2024" / "f").write_bytes(b"mounted")
    (root / "m" / "..data").symlink_to("..2024")
    (root / "m" / "f").symlink_to("..data/f")
    (root / "alias").symlink_to("m")
    (tmp_path / "alias-of-root").symlink_to(root)
    (root / "m" / "through-alias").symlink_to(tmp_path / "alias-of-root" / "shared" / "weights")
    with Beneath(str(tmp_path / "alias-of-root")) as tree:
        for name in ("relative", "absolute", "through-alias"):
            assert tree.read(("m", name), 100) == b"shared"
            assert tree.real_path(("m", name)) == str(root.resolve() / "shared" / "weights")
        assert tree.read(("alias", "directory", "model"), 100) == b"weights"
        assert tree.read(("m", "f"), 100) == b"mounted"


@pytest.mark.parametrize("target", ["../../secret", "/etc/passwd", "../../elsewhere", "../../../../../../etc/passwd"])
def test_links_out_are_refused_without_naming_where_they_lead(root: pathlib.Path, target: str) -> None:
    (root / "m" / "out").symlink_to(target)
    (root / "m" / "chain").symlink_to("out")
    with Beneath(str(root)) as tree:
        for name in ("out", "chain"):
            with pytest.raises(Refused) as caught:
                tree.read(("m", name), 100)
            assert f"'m/{name}'" in caught.value.text
            assert "passwd" not in caught.value.text
            assert str(root) not in caught.value.text
        assert [item.name for item in tree.entries(("m",))] == ["1", "config.pbtxt"]
        assert set(tree.listed(("m",))[1]) == {"out", "chain"}


def test_a_link_whose_prefix_only_looks_like_the_root_leads_out(root: pathlib.Path) -> None:
    evil = root.with_name("models-evil")
    evil.mkdir()
    (evil / "f").write_bytes(SECRET)
    (root / "m" / "out").symlink_to(evil / "f")
    with Beneath(str(root)) as tree, pytest.raises(Refused):
        tree.read(("m", "out"), 100)


def test_dots_behind_a_link_count_from_its_target(root: pathlib.Path) -> None:
    (root / "deep" / "a").mkdir(parents=True)
    (root / "deep" / "f").write_bytes(b"deep")
    (root / "m" / "a").symlink_to("../deep/a")
    (root / "m" / "up").symlink_to("a/../f")
    with Beneath(str(root)) as tree:
        assert tree.read(("m", "up"), 100) == b"deep", "as the kernel resolves it, not by cutting text"


def test_loops_of_links_end(root: pathlib.Path) -> None:
    (root / "m" / "a").symlink_to("b")
    (root / "m" / "b").symlink_to("a")
    with Beneath(str(root)) as tree, pytest.raises(Refused, match="more than 40 symbolic links"):
        tree.read(("m", "a"), 100)


def test_dangling_links_are_absent(root: pathlib.Path) -> None:
    (root / "m" / "gone").symlink_to("nothing")
    with Beneath(str(root)) as tree:
        assert tree.entry(("m", "gone")) is None
        assert tree.listed(("m",))[1] == {}


def test_devices_and_pipes_are_not_opened(root: pathlib.Path) -> None:
    os.mkfifo(root / "m" / "pipe")
    with Beneath(str(root)) as tree, pytest.raises(NotFound, match="neither a file nor a directory"):
        tree.read(("m", "pipe"), 100)


def test_reading_is_bounded(root: pathlib.Path) -> None:
    with Beneath(str(root)) as tree:
        assert tree.read(("m", "config.pbtxt"), 6) == b"inside"
        with pytest.raises(Refused, match="has 6 bytes, at most 5 are read"):
            tree.read(("m", "config.pbtxt"), 5)
        with pytest.raises(NotFound, match="is not a regular file"):
            tree.read(("m", "1"), 5)


def test_a_directory_swapped_for_a_link_is_not_followed_out(
    root: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between looking and opening, somebody replaces a directory by a link to the outside."""
    real_stat = os.stat

    def swap(name: str, *, dir_fd: int | None = None, follow_symlinks: bool = True) -> os.stat_result:
        status = real_stat(name, dir_fd=dir_fd, follow_symlinks=follow_symlinks)
        if name == "1" and (root / "m" / "1").is_dir() and not (root / "m" / "1").is_symlink():
            (root / "m" / "1").rename(root / "m" / "moved")
            (root / "m" / "1").symlink_to(root.parent / "elsewhere")
        return status

    monkeypatch.setattr(os, "stat", swap)
    with Beneath(str(root)) as tree, pytest.raises(ServingError):
        tree.read(("m", "1", "file"), 100)


def test_no_descriptor_is_left_open(root: pathlib.Path) -> None:
    (root / "m" / "out").symlink_to("../../secret")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with Beneath(str(root)) as tree:
            tree.entries(("m",))
            tree.read(("m", "config.pbtxt"), 100)
            with pytest.raises(Refused):
                tree.read(("m", "out"), 100)
    tree.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_missing_root_is_not_found(tmp_path: pathlib.Path) -> None:
    with pytest.raises(NotFound):
        Beneath(str(tmp_path / "nothing"))
    with pytest.raises(ServingError):
        Beneath("a\0b")


_NAMES = st.sampled_from(["a", "b", "..", ".", "...", "secret", "models", "", "\0", "/"]) | st.text(max_size=5)


@given(
    path=st.lists(_NAMES, max_size=6),
    links=st.lists(st.tuples(st.sampled_from(["a", "b"]), st.lists(_NAMES, min_size=1, max_size=5)), max_size=2),
)
def test_no_path_and_no_link_reads_the_secret(path: list[str], links: list[tuple[str, list[str]]]) -> None:
    """Whatever is asked for and however links point, the answer is a file of the root or an error."""
    with tempfile.TemporaryDirectory() as directory:
        outside = pathlib.Path(directory)
        (outside / "secret").write_bytes(SECRET)
        root = outside / "models"
        (root / "a").mkdir(parents=True)
        (root / "b").write_bytes(b"inside")
        for name, target in links:
            link = root / "a" / name
            text = "/".join(target)
            if text and "\0" not in text and not link.exists() and not link.is_symlink():
                try:
                    link.symlink_to(text)
                except (OSError, UnicodeEncodeError):
                    continue
        with Beneath(str(root)) as tree:
            try:
                names = check_relative("/".join(path))
                assert tree.read(names, 100) != SECRET
                assert tree.real_path(names).startswith(str(root.resolve()))
            except ServingError:
                pass
