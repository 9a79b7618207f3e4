"""Scanning repositories, looking at one model, overrides, fingerprints."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable

import pytest

from forebay.engine.repository.beneath import Refused
from forebay.engine.repository.config import changed_fields, parse_config_text
from forebay.engine.repository.config_problem import ConfigError
from forebay.engine.repository.found_model import FoundModel
from forebay.engine.repository.model_files import read_labels, read_model_file, resolve_model_file
from forebay.engine.repository.repository import ModelRepository
from forebay.ipc.errors import Internal, InvalidArgument, NotFound

MakeRepository = Callable[[dict[str, str | bytes | None]], pathlib.Path]

GOOD = (
    'backend: "identity" input { name: "INPUT0" data_type: TYPE_FP32 dims: 1 } '
    'output { name: "OUTPUT0" data_type: TYPE_FP32 dims: 1 }'
)


def by_name(found: list[FoundModel]) -> dict[str, FoundModel]:
    return {model.name: model for model in found}


def test_every_directory_is_a_model_and_files_are_not(make_repository: MakeRepository) -> None:
    """Spec R-001, R-013, R-039, R-040."""
    root = make_repository(
        {
            "good/config.pbtxt": GOOD,
            "good/1": None,
            "good/3/weights": b"x",
            "good/labels.txt": "a\nb\n",
            "onnx/1/model.onnx": b"",
            "ens/config.pbtxt": 'platform: "ensemble" ensemble_scheduling { step { model_name: "good" '
            'input_map { key: "INPUT0" value: "I" } output_map { key: "OUTPUT0" value: "O" } } } '
            'input { name: "I" data_type: TYPE_FP32 dims: 1 } output { name: "O" data_type: TYPE_FP32 dims: 1 }',
            "ens/1": None,
            ".git/HEAD": "x",
            "lost+found": None,
            "empty": None,
            "README": "x",
        }
    )
    found = ModelRepository([str(root)]).scan()
    models = by_name(found)
    assert list(models) == ["empty", "ens", "good", "onnx"]
    assert models["good"].versions.numbers == (1, 3)
    assert models["good"].chosen_versions().numbers == (3,)
    assert models["good"].path == str(root.resolve() / "good")
    assert models["good"].version_path(3) == str(root.resolve() / "good" / "3")
    assert models["good"].config_file == "config.pbtxt"
    assert models["good"].config_text == GOOD
    assert models["onnx"].config_file == ""
    assert models["onnx"].usable_config.backend == "onnxruntime"
    assert models["ens"].problems == ()
    with pytest.raises(ConfigError, match="Could not determine backend for model 'empty'"):
        models["empty"].chosen_versions()
    with pytest.raises(NotFound):
        ModelRepository([str(root)]).poll_model(".git")


def test_broken_models_keep_their_problems_and_spoil_no_other(make_repository: MakeRepository) -> None:
    """Spec C-121, R-009, L-017."""
    root = make_repository(
        {
            "good/config.pbtxt": GOOD,
            "negative/config.pbtxt": 'backend: "identity"\nmax_batch_size: -1\n',
            "syntax/config.pbtxt": "max_batchsize: 1\nplatfrom: 3",
            "renamed/config.pbtxt": 'name: "other" ' + GOOD,
            "nothing/1": None,
            "binary/config.pbtxt": b"\xff\xfe",
            "folder/config.pbtxt/x": b"",
        }
    )
    models = by_name(ModelRepository([str(root)]).scan())
    assert models["good"].problems == ()
    texts = {name: model.problems[0].text for name, model in models.items() if model.problems}
    assert texts["negative"] == "'max_batch_size' must be non-negative value for negative"
    assert models["negative"].problems[0].place == "negative/config.pbtxt:2:17"
    assert [problem.suggestion for problem in models["syntax"].problems] == ["max_batch_size", "platform"]
    assert texts["renamed"] == (
        "unexpected directory name 'renamed' for model 'other', directory name must equal model name"
    )
    assert texts["nothing"].startswith("Invalid model name: Could not determine backend for model 'nothing'")
    assert texts["binary"] == "model configuration is not UTF-8 text"
    assert texts["folder"] == "'config.pbtxt' of model 'folder' is not a file"
    with pytest.raises(ConfigError):
        _ = models["syntax"].usable_config


def test_a_model_may_have_no_version_until_it_is_loaded(make_repository: MakeRepository) -> None:
    """Spec R-008."""
    root = make_repository({"m/config.pbtxt": GOOD})
    (model,) = ModelRepository([str(root)]).scan()
    assert model.problems == ()
    with pytest.raises(
        ConfigError, match="at least one version must be available under the version policy of model 'm'"
    ):
        model.chosen_versions()


def test_a_missing_config_needs_auto_complete(make_repository: MakeRepository) -> None:
    """Spec R-060, R-061."""
    root = make_repository({"m/1/model.onnx": b""})
    assert ModelRepository([str(root)]).poll_model("m").problems == ()
    (problem,) = ModelRepository([str(root)], auto_complete=False).poll_model("m").problems
    assert problem.text == "model configuration is not provided for model 'm'"


def test_a_name_in_two_repositories_is_unusable(make_repository: MakeRepository, tmp_path: pathlib.Path) -> None:
    """Spec R-010, H-213."""
    first = make_repository({"same/config.pbtxt": GOOD, "one/config.pbtxt": GOOD})
    second = tmp_path / "second"
    (second / "same").mkdir(parents=True)
    (second / "same" / "config.pbtxt").write_text(GOOD)
    repository = ModelRepository([str(first), str(second)])
    models = by_name(repository.scan())
    assert models["one"].problems == ()
    assert models["same"].problems[0].text == "model appears in two or more repositories"
    assert repository.poll_model("same").problems[0].text == "model appears in two or more repositories"


def test_namespaces_tell_equal_names_apart(make_repository: MakeRepository, tmp_path: pathlib.Path) -> None:
    """Spec R-015."""
    first = make_repository({"same/config.pbtxt": GOOD})
    second = tmp_path / "second"
    (second / "same").mkdir(parents=True)
    (second / "same" / "config.pbtxt").write_text(GOOD)
    repository = ModelRepository([str(first), str(second)], namespacing=True)
    assert [model.identity for model in repository.scan()] == [f"{first}::same", f"{second}::same"]
    with pytest.raises(InvalidArgument, match="ambiguity for model 'same'"):
        repository.poll_model("same")
    assert repository.poll_model("same", namespace=str(second)).path == str(second.resolve() / "same")


def test_repositories_must_exist(tmp_path: pathlib.Path) -> None:
    """Spec R-011, R-012."""
    with pytest.raises(InvalidArgument, match="--model-repository must be specified"):
        ModelRepository([])
    with pytest.raises(InvalidArgument, match=r"failed to stat file .*: does not exist"):
        ModelRepository([str(tmp_path / "nothing")])
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgument, match="is not a directory"):
        ModelRepository([str(tmp_path / "file")])
    with pytest.raises(InvalidArgument):
        ModelRepository(["a\0b"])
    repository = tmp_path / "r"
    repository.mkdir()
    known = ModelRepository([str(repository)])
    repository.rmdir()
    with pytest.raises(InvalidArgument, match="does not exist"):
        known.scan()


def test_a_custom_config_is_used_where_there_is_one(make_repository: MakeRepository) -> None:
    """Spec R-016."""
    root = make_repository(
        {
            "m/config.pbtxt": "max_batch_size: 1 " + GOOD,
            "m/configs/h100.pbtxt": "max_batch_size: 64 " + GOOD,
            "n/config.pbtxt": "max_batch_size: 2 " + GOOD,
        }
    )
    repository = ModelRepository([str(root)], model_config_name="h100")
    models = by_name(repository.scan())
    assert (models["m"].usable_config.max_batch_size, models["m"].config_file) == (64, "configs/h100.pbtxt")
    assert (models["n"].usable_config.max_batch_size, models["n"].config_file) == (2, "config.pbtxt")
    with pytest.raises(Refused):
        ModelRepository([str(root)], model_config_name="../m/config")


def test_an_unknown_model_is_not_found(make_repository: MakeRepository) -> None:
    repository = ModelRepository([str(make_repository({"file": ""}))])
    for name in ("nope", "file"):
        with pytest.raises(NotFound):
            repository.poll_model(name)


@pytest.mark.parametrize("name", ["..", "", "../models", "a/b", "\0", "x" * 300, "/"])
def test_names_of_models_are_checked_before_anything_is_opened(make_repository: MakeRepository, name: str) -> None:
    """Spec H-223."""
    repository = ModelRepository([str(make_repository({}))])
    with pytest.raises(Refused, match="invalid model name"):
        repository.poll_model(name)
    with pytest.raises(Refused, match="invalid model name"):
        repository.override_model(name, "{}")


def test_links_of_models_are_followed_inside_and_refused_outside(
    make_repository: MakeRepository, tmp_path: pathlib.Path
) -> None:
    """Spec R-014."""
    root = make_repository({"m/config.pbtxt": GOOD, "m/1": None})
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "config.pbtxt").write_text(GOOD)
    (root / "alias").symlink_to("m")
    (root / "out").symlink_to(outside)
    (root / "leak").mkdir()
    (root / "leak" / "config.pbtxt").symlink_to(outside / "config.pbtxt")
    models = by_name(ModelRepository([str(root)]).scan())
    assert models["alias"].problems == ()
    assert models["alias"].versions.numbers == (1,)
    for name in ("out", "leak"):
        assert "symbolic link out of the model repository" in models[name].problems[0].text
        assert str(tmp_path) not in models[name].problems[0].text


def test_a_version_that_cannot_be_read_is_not_gone(make_repository: MakeRepository, tmp_path: pathlib.Path) -> None:
    """Else an older one would take its place, and nobody would know."""
    root = make_repository({"m/config.pbtxt": GOOD, "m/1": None, "well/config.pbtxt": GOOD, "well/1": None})
    (root / "m" / "2").symlink_to(tmp_path)
    (root / "well" / "notes").symlink_to(tmp_path)
    (root / ".snapshot").symlink_to(tmp_path)
    models = by_name(ModelRepository([str(root)]).scan())
    assert set(models) == {"m", "well"}
    assert "'m/2' is a symbolic link out of the model repository" in models["m"].problems[0].text
    assert models["well"].problems == ()


@pytest.mark.parametrize(
    "text",
    [
        'default_model_filename: "../../secret"',
        'default_model_filename: "/etc/passwd"',
        'cc_model_filenames { key: "8.0" value: "../x" }',
        'model_operations { op_library_filename: "../evil.so" }',
        'output { name: "p" data_type: TYPE_FP32 dims: 1 label_filename: "../labels.txt" }',
        'model_warmup { name: "w" inputs { key: "i" value { input_data_file: "../x" } } }',
        'sequence_batching { state { initial_state { data_file: "a/../../x" } } }',
    ],
)
def test_file_names_in_a_config_stay_inside_the_model(make_repository: MakeRepository, text: str) -> None:
    """Spec C-039, B-017."""
    root = make_repository({"m/config.pbtxt": f"{GOOD}\n{text}"})
    (model,) = ModelRepository([str(root)]).scan()
    assert model.problems[-1].text.startswith("invalid ")
    assert model.problems[-1].line == 2


def test_names_on_disk_that_are_no_text_are_reported(make_repository: MakeRepository) -> None:
    """Everything that is found can be printed and sent as JSON."""
    root = make_repository({"m/config.pbtxt": GOOD, "m/1": None})
    os.mkdir(os.fsencode(root) + b"/\xff")
    os.mkdir(os.fsencode(root) + b"/m/\xfe")
    models = by_name(ModelRepository([str(root)]).scan())
    assert models["m"].problems == ()
    assert models["m"].versions.warnings == (
        "ignore version directory '\\udcfe' which fails to convert to integral number",
    )
    assert models["\\udcff"].problems[0].text.startswith("invalid model name '\\xdcff'")


def test_a_read_error_is_a_problem_of_that_model_only(
    make_repository: MakeRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_repository({"m/config.pbtxt": GOOD, "n/config.pbtxt": GOOD + " "})
    real_read = os.read

    def read(fd: int, length: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{fd}").endswith("/m/config.pbtxt"):
            raise OSError(5, "Input/output error", "/secret/path")
        return real_read(fd, length)

    monkeypatch.setattr(os, "read", read)
    models = by_name(ModelRepository([str(root)]).scan())
    assert models["m"].problems[0].text == "Input/output error"
    assert models["n"].problems == ()


# ---- overrides -------------------------------------------------------------------------------------------------------


def test_a_config_override_replaces_the_file(make_repository: MakeRepository) -> None:
    """Spec H-215, R-092."""
    root = make_repository({"m/config.pbtxt": 'parameters { key: "a" value { } } ' + GOOD, "m/1": None})
    repository = ModelRepository([str(root)])
    model = repository.override_model("m", '{"backend":"identity","max_batch_size":9}')
    assert model.is_override
    assert (model.usable_config.max_batch_size, dict(model.usable_config.message.parameters)) == (9, {})
    assert model.versions.numbers == (1,)
    assert model.path == str(root.resolve() / "m")
    assert model.temporary_directory == ""
    original = repository.poll_model("m")
    assert model.fingerprint is not None
    assert original.fingerprint is not None
    assert model.fingerprint.config != original.fingerprint.config
    assert model.fingerprint.versions == original.fingerprint.versions


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ('{"backend":"identity","bogus":1}', "Invalid config override: bogus: Cannot find field."),
        ("{", "Invalid config override: JSON: Expecting property name enclosed in double quotes"),
        (None, "Load parameter 'config' must be specified for model file override"),
    ],
)
def test_a_bad_override_is_refused(make_repository: MakeRepository, config: str | None, expected: str) -> None:
    """Spec H-215, H-216; the reason is given (L-014)."""
    repository = ModelRepository([str(make_repository({"m/config.pbtxt": GOOD}))])
    with pytest.raises(ConfigError) as caught:
        repository.override_model("m", config, {"file:1/x": b""})
    assert caught.value.text == expected


def test_an_override_is_judged_like_a_file(make_repository: MakeRepository) -> None:
    repository = ModelRepository([str(make_repository({"m/config.pbtxt": GOOD}))])
    model = repository.override_model("m", '{"backend":"identity","max_batch_size":-1}')
    assert model.problems[0].text == "'max_batch_size' must be non-negative value for m"
    with pytest.raises(NotFound):
        repository.override_model("nope", '{"backend":"identity"}')


def test_files_of_an_override_make_a_model_of_their_own(
    make_repository: MakeRepository, tmp_path: pathlib.Path
) -> None:
    """Spec H-216: the repository's directory is not used at all."""
    root = make_repository({"m/config.pbtxt": GOOD, "m/7/old": b""})
    workspace = tmp_path / "work"
    workspace.mkdir()
    repository = ModelRepository([str(root)])
    model = repository.override_model(
        "m", "{}", {"file:1/model.onnx": b"net", "2/sub/x": b"y"}, workspace=str(workspace)
    )
    assert model.usable_config.backend == "onnxruntime"
    assert model.versions.numbers == (1, 2)
    assert (pathlib.Path(model.version_path(1)) / "model.onnx").read_bytes() == b"net"
    assert pathlib.Path(model.path).is_relative_to(workspace.resolve())
    model.discard()
    assert list(workspace.iterdir()) == []
    model.discard()


@pytest.mark.parametrize(
    "path", ["file:../x", "file:/etc/x", "file:", "1/../../x", "1/\0", "a/" * 100 + "b", "file:" + "x" * 300, "\ud800"]
)
def test_file_overrides_never_leave_their_directory(
    make_repository: MakeRepository, tmp_path: pathlib.Path, path: str
) -> None:
    workspace = tmp_path / "work"
    workspace.mkdir()
    repository = ModelRepository([str(make_repository({}))])
    with pytest.raises(Refused):
        repository.override_model("m", "{}", {"1/ok": b"", path: b"x"}, workspace=str(workspace))
    assert list(workspace.iterdir()) == []


def test_conflicting_file_overrides_leave_nothing_behind(
    make_repository: MakeRepository, tmp_path: pathlib.Path
) -> None:
    workspace = tmp_path / "work"
    workspace.mkdir()
    repository = ModelRepository([str(make_repository({}))])
    with pytest.raises(InvalidArgument, match="failed to write the files of model 'm'"):
        repository.override_model("m", "{}", {"1/a": b"", "1/a/b": b""}, workspace=str(workspace))
    assert list(workspace.iterdir()) == []


# ---- change ----------------------------------------------------------------------------------------------------------


def test_fingerprints_follow_config_files_and_versions(make_repository: MakeRepository) -> None:
    """Spec R-089, R-091."""
    files: dict[str, str | bytes | None] = {
        "m/config.pbtxt": GOOD,
        "m/labels.txt": "a",
        "m/1/w": b"1",
        "m/2/sub/w": b"2",
    }
    root = make_repository(files)
    repository = ModelRepository([str(root)])

    def fingerprint() -> tuple[str, str, dict[int, str]]:
        found = repository.poll_model("m").fingerprint
        assert found is not None
        return found.config, found.shared, found.versions

    first = fingerprint()
    assert fingerprint() == first

    os.utime(root / "m" / "config.pbtxt", ns=(1, 1))
    touched = fingerprint()
    assert touched[0] != first[0]
    assert touched[1:] == first[1:]

    (root / "m" / "2" / "sub" / "w").write_bytes(b"22")
    changed = fingerprint()
    assert changed[2][1] == first[2][1]
    assert changed[2][2] != first[2][2]

    (root / "m" / "labels.txt").write_text("ab")
    assert fingerprint()[1] != first[1]

    (root / "m" / "1" / "__pycache__").mkdir()
    (root / "m" / "1" / "__pycache__" / "model.pyc").write_bytes(b"")
    assert fingerprint()[2] == changed[2], "Python's own files are no change"


def test_changed_versions_are_named(make_repository: MakeRepository) -> None:
    root = make_repository({"m/config.pbtxt": GOOD, "m/1/w": b"1", "m/2/w": b"2"})
    repository = ModelRepository([str(root)])
    before = repository.poll_model("m").fingerprint
    (root / "m" / "2" / "w").write_bytes(b"22")
    (root / "m" / "3").mkdir()
    after = repository.poll_model("m").fingerprint
    assert before is not None
    assert after is not None
    assert after.changed_versions(before) == {2, 3}


def test_changed_fields_are_named() -> None:
    """Spec R-090, L-015."""
    base = parse_config_text(GOOD)
    grown = parse_config_text(GOOD + "instance_group { count: 2 } version_policy { all { } }")
    assert changed_fields(base, grown) == {"instance_group", "version_policy"}
    delayed = parse_config_text(GOOD + "dynamic_batching { }")
    assert changed_fields(base, delayed) == {"dynamic_batching"}
    assert changed_fields(base, base.copy()) == frozenset()


# ---- files of a model ------------------------------------------------------------------------------------------------


def test_labels_are_lines(make_repository: MakeRepository) -> None:
    """Spec H-173."""
    root = make_repository({"m/labels.txt": "cat\r\ndog\n\nzebra\n", "m/last.txt": "a\nb"})
    assert read_labels(str(root / "m"), str(root), "labels.txt") == ("cat", "dog", "", "zebra")
    assert read_labels(str(root / "m"), str(root), "last.txt") == ("a", "b")
    with pytest.raises(Internal, match=r"failed to open text file for read .*none\.txt: No such file or directory"):
        read_labels(str(root / "m"), str(root), "none.txt")
    with pytest.raises(Refused):
        read_labels(str(root / "m"), str(root), "../m/labels.txt")


def test_model_files_are_read_and_resolved_below_the_model(make_repository: MakeRepository) -> None:
    root = make_repository({"m/1/net.onnx": b"net", "m/warmup/raw": b"raw"})
    (root / "m" / "1" / "model.onnx").symlink_to("net.onnx")
    model = str(root / "m")
    assert read_model_file(model, str(root), "warmup/raw", 10) == b"raw"
    assert resolve_model_file(model, str(root), "1/model.onnx") == str(root.resolve() / "m" / "1" / "net.onnx")
    assert resolve_model_file(model, str(root), "1/none") is None
    for name in ("../x", "/etc/passwd", "a\0"):
        with pytest.raises(Refused):
            resolve_model_file(model, str(root), name)
    with pytest.raises(Refused):
        read_model_file("/etc", str(root), "passwd")
