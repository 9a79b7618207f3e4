"""The install puts one name on the path, with the metadata's version; a wheel carries all that a server needs."""

import importlib.metadata
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TREES = ("engine", "frontend", "ipc", "conf")


def test_install_adds_no_generic_name():
    names = (*TREES, "tests", "bench")
    code = f"import importlib.util as u; print([n for n in {names} if u.find_spec(n)])"
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert out.stdout.strip() == "[]"


def test_version_comes_from_metadata():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert importlib.metadata.version("forebay") == declared


@pytest.mark.parametrize("tree", ["engine", "frontend", "ipc"])
def test_packages_are_marked_as_typed(tree):
    assert (files(f"forebay.{tree}") / "py.typed").is_file()


@pytest.mark.parametrize("tree", TREES)
def test_every_folder_with_modules_is_a_package(tree):
    """A folder without __init__.py imports from a checkout, but would be missing from a wheel."""
    folders = {module.parent for module in (ROOT / tree).rglob("*.py") if "models" not in module.parts}
    assert sorted(folder for folder in folders if not (folder / "__init__.py").is_file()) == []


def test_example_repository_and_settings_file_are_readable_as_data():
    conf = files("forebay.conf")
    assert "[server]" in (conf / "forebay.toml").read_text()
    assert (conf / "models" / "alpha_model" / "config.pbtxt").is_file()


def test_dependencies_leave_room_for_what_tritonclient_pins():
    """tritonclient[grpc] asks for protobuf below 7: a lower bound above that would make both uninstallable together."""
    requirements = importlib.metadata.requires("forebay") or []
    protobuf = next(text for text in requirements if text.startswith("protobuf"))
    assert protobuf.replace(" ", "") == "protobuf>=5.29"


def test_extras_are_the_documented_ones():
    extras = importlib.metadata.metadata("forebay").get_all("Provides-Extra")
    assert {"gpu", "torch", "tensorrt", "tensorflow", "test"} <= set(extras or [])


def test_a_wheel_carries_models_settings_and_type_markers(tmp_path):
    """Collects files as a build of the wheel does, without an isolated build that would need the network."""
    command = [sys.executable, "-W", "ignore", "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    shipped = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {
        "forebay/engine/py.typed",
        "forebay/engine/settings.py",
        "forebay/conf/forebay.toml",
        "forebay/conf/models/alpha_model/config.pbtxt",
        "forebay/conf/models/alpha_model/1/model.onnx",
    } <= shipped
    assert not [name for name in shipped if name.endswith(".pyc")]
