"""settings.py, the table of flags, the settings file and the pages made from them say the same."""

import re
from importlib.resources import files
from pathlib import Path

import msgspec
import pytest

from forebay.engine.flag_reference import markdown_reference, settings_file
from forebay.engine.flags import FLAGS, FLAGS_BY_PATH, SECTION_TITLES, Status, explanation, field_explanations
from forebay.engine.settings import BackendSettings, ConfigEntry, MetricsSettings, Settings
from forebay.engine.settings_file import MAX_FILE_BYTES, load_settings_file

PATHS = [
    f"{section}.{field}"
    for section in Settings.__struct_fields__
    for field in getattr(Settings(), section).__struct_fields__
]

#: Set by words that are no flags, and by `--trace-config mode=`.
WITHOUT_FLAG = {"repository.functions", "trace.mode"}


def write(tmp_path, text):
    path = tmp_path / "settings.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("path", PATHS)
def test_every_setting_is_explained(path):
    assert len(field_explanations()[path]) > 5


def test_every_setting_has_a_flag():
    assert set(PATHS) - set(FLAGS_BY_PATH) == WITHOUT_FLAG


def test_every_flag_sets_a_setting_that_exists():
    assert {flag.path for flag in FLAGS if flag.path} <= set(PATHS)
    assert all(flag.section in SECTION_TITLES and explanation(flag) for flag in FLAGS)
    assert len({flag.name for flag in FLAGS}) == len(FLAGS)


def test_a_flag_without_effect_says_why():
    assert [flag.name for flag in FLAGS if flag.status is Status.ACCEPTED and not flag.note] == []


def test_settings_are_frozen_and_cross_a_process():
    settings = Settings()
    with pytest.raises(AttributeError):
        settings.http.port = 1  # type: ignore[misc]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(settings), type=Settings) == settings


def test_backend_options_of_one_backend_win_over_those_for_all():
    """B-001."""
    backend = BackendSettings(
        config=(
            ConfigEntry("onnxruntime", "default-max-batch-size", "8"),
            ConfigEntry("", "default-max-batch-size", "2"),
            ConfigEntry("", "x", "1"),
        )
    )
    assert backend.options("onnxruntime") == {"default-max-batch-size": "8", "x": "1"}
    assert backend.options("python") == {"default-max-batch-size": "2", "x": "1"}


def test_last_metrics_option_counts():
    metrics = MetricsSettings(config=(ConfigEntry("", "a", "1"), ConfigEntry("", "a", "2")))
    assert metrics.option("a") == "2"
    assert metrics.option("b") is None


def test_shipped_settings_file_is_made_from_the_table():
    """When this fails: make reference"""
    assert (files("forebay.conf") / "forebay.toml").read_text() == settings_file()


def test_shipped_settings_file_with_everything_uncommented_is_the_defaults(tmp_path):
    text = re.sub(r"^# (\w+ = )", r"\1", settings_file(), flags=re.MULTILINE)
    texts = load_settings_file(write(tmp_path, text))
    unset = {"grpc.max_connection_age", "grpc.max_connection_age_grace", "cloud.sagemaker_safe_port_range"}
    assert {flag.path for flag in texts} == set(FLAGS_BY_PATH) - unset


def test_reference_page_is_made_from_the_table():
    """When this fails: make reference"""
    page = (Path(__file__).resolve().parents[3] / "docs" / "flags.md").read_text()
    assert page == markdown_reference()
    assert [flag.name for flag in FLAGS if f"`--{flag.name}" not in page] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[http]\nprot = 1", r"unknown setting http\.prot; did you mean port\?"),
        ("[htp]\nport = 1", r"unknown section \[htp\]; did you mean http\?"),
        ("[http]\nexit_on_error = true", r"did you mean repository\.exit_on_error\?"),
        ("http = 3", r"http is a section"),
        ("[http]\nport = true", r"http\.port: expected a whole number, got True"),
        ("[http]\nport = 1.5", r"http\.port: expected a whole number, got 1\.5"),
        ("[http]\nallow = 1", r"http\.allow: expected true or false, got 1"),
        ("[http]\naddress = 1", r"http\.address: expected a string, got 1"),
        ("[backend]\nconfig = 'a=b'", r"backend\.config: expected an array of strings"),
        ("[backend]\nconfig = [1]", r"backend\.config: expected an array of strings"),
        ("[http", r"is not valid TOML"),
    ],
)
def test_wrong_settings_file_is_refused_with_a_hint(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_settings_file(write(tmp_path, text))


def test_unreadable_settings_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the settings file .*: No such file or directory"):
        load_settings_file(str(tmp_path / "none.toml"))


def test_settings_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "settings.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not valid TOML"):
        load_settings_file(str(path))


def test_huge_settings_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is larger than"):
        load_settings_file(write(tmp_path, "#" * (MAX_FILE_BYTES + 1)))
