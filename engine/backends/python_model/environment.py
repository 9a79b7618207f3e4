"""``EXECUTION_ENV_PATH``: a model's own packages, from a folder, a virtual environment or an archive (spec P-130).

The worker keeps its interpreter and puts the environment's packages before its own, so the environment must be for the
same minor version of Python.
"""

from __future__ import annotations

import glob
import lzma
import os
import shutil
import site
import sys
import tarfile
import tempfile
import zipfile
import zlib

from forebay.ipc.errors import InvalidArgument
from forebay.ipc.worker_messages import InstanceSpec

PARAMETER = "EXECUTION_ENV_PATH"
_MODEL_DIRECTORY = "$$TRITON_MODEL_DIRECTORY"


def activate(spec: InstanceSpec) -> None:
    """Put the packages of the model's environment on ``sys.path``, if it names one.

    Raises:
        InvalidArgument: the environment does not exist, cannot be unpacked or is for another Python.
    """
    value = spec.parameters.get(PARAMETER, "")
    if not value:
        return
    path = value.replace(_MODEL_DIRECTORY, spec.model_path)
    if os.path.isfile(path):
        path = _unpack(path, value)
    if not os.path.isdir(path):
        raise InvalidArgument(f"{PARAMETER} of model '{spec.model}' names '{value}', which does not exist")
    packages = _find_packages(path)
    if packages is None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        found = sorted(os.path.basename(match) for match in glob.glob(os.path.join(path, "lib", "python3.*")))
        raise InvalidArgument(
            f"{PARAMETER} of model '{spec.model}' names '{value}', which has no packages for Python {version}"
            + (f", only for {', '.join(found)}" if found else "")
            + f"; make it with: python{version} -m venv"
        )
    before = list(sys.path)
    site.addsitedir(packages)
    added = [entry for entry in sys.path if entry not in before]
    sys.path[:] = [*added, *before]


def _find_packages(path: str) -> str | None:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    # A virtual or conda environment, or a plain folder made with `pip install --target`.
    candidate = os.path.join(path, "lib", version, "site-packages")
    if os.path.isdir(candidate):
        return candidate
    return None if os.path.isdir(os.path.join(path, "lib")) or os.path.isdir(os.path.join(path, "bin")) else path


def _unpack(archive: str, shown: str) -> str:
    # One folder per archive and change of it; a second instance finds it unpacked.
    status = os.stat(archive)
    target = os.path.join(
        tempfile.gettempdir(), f"forebay-env-{os.getuid()}-{status.st_dev}-{status.st_ino}-{status.st_mtime_ns}"
    )
    if os.path.isdir(target) and os.stat(target).st_uid == os.getuid():
        return target
    partial = tempfile.mkdtemp(prefix="forebay-env-")
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as packed:
                packed.extractall(partial)
        else:
            with tarfile.open(archive) as packed_tar:
                packed_tar.extractall(partial, filter="tar")
        os.rename(partial, target)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise InvalidArgument(f"{PARAMETER} '{shown}' is not an archive that can be unpacked: {error}") from None
    except OSError as error:
        if not os.path.isdir(target):
            reason = error.strerror or error
            raise InvalidArgument(f"{PARAMETER} '{shown}' cannot be unpacked: {reason}") from None
    finally:
        # Another instance may have been faster.
        shutil.rmtree(partial, ignore_errors=True)
    return target
