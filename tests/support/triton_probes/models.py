"""The models that probes ask, on both servers."""

from __future__ import annotations

import shutil
from pathlib import Path

TRANSCRIPT_MODELS = Path(__file__).resolve().parents[2] / "data" / "transcript_models"

#: Versions of the models that have other than 1; their directories are empty, so a repository cannot hold them.
VERSIONS = {"cached": ("1", "3"), "ens": ("3",), "bad": ()}

#: What stands in for the identity backend: INPUTn comes back as OUTPUTn.
IDENTITY_MODEL = """import triton_python_backend_utils as pb_utils

def identity(tensor):
    name = "OUTPUT" + tensor.name().removeprefix("INPUT")
    try:
        return pb_utils.Tensor(name, tensor.as_numpy())
    except Exception:  # BF16, which numpy does not know
        return pb_utils.Tensor.from_dlpack(name, tensor.to_dlpack())


class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse([identity(tensor) for tensor in request.inputs()]) for request in requests]
"""

#: Shows what a request looks like from inside.
ECHO_MODEL = """import json

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            parameters = json.loads(request.parameters())
            seen = {
                "id": request.request_id(),
                "correlation_id": request.correlation_id(),
                "flags": request.flags(),
                "timeout": request.timeout(),
                "priority": request.priority() if hasattr(request, "priority") else None,
                "parameters": dict(sorted(parameters.items())),
                "outputs": sorted(request.requested_output_names()),
                "inputs": {tensor.name(): list(tensor.shape()) for tensor in request.inputs()},
            }
            text = np.array([json.dumps(seen)], dtype=np.object_)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("SEEN", text)]))
        return responses
"""

ECHO_CONFIG = """backend: "python"
input [ { name: "A" data_type: TYPE_INT32 dims: [ -1, -1 ] },
        { name: "B" data_type: TYPE_STRING dims: [ 1 ] optional: true },
        { name: "C" data_type: TYPE_FP32 dims: [ 2, 2 ] optional: true } ]
output [ { name: "SEEN" data_type: TYPE_STRING dims: [ 1 ] } ]
"""


def make_repository(repository: Path) -> None:
    """Write the models that both servers can serve."""
    for source in sorted(TRANSCRIPT_MODELS.iterdir()):
        if source.name == "ort_auto" or not ((source / "config.pbtxt").exists() or (source / "1").exists()):
            continue
        model = repository / source.name
        shutil.copytree(source, model)
        for version in VERSIONS.get(source.name, ("1",)):
            (model / version).mkdir(exist_ok=True)
        config = model / "config.pbtxt"
        if config.exists() and 'backend: "identity"' in config.read_text() and source.name != "bad":
            config.write_text(config.read_text().replace('backend: "identity"', 'backend: "python"'))
            for version in VERSIONS.get(source.name, ("1",)):
                (model / version / "model.py").write_text(IDENTITY_MODEL)
    (repository / "empty").mkdir()
    (repository / "seen" / "1").mkdir(parents=True)
    (repository / "seen" / "config.pbtxt").write_text(ECHO_CONFIG)
    (repository / "seen" / "1" / "model.py").write_text(ECHO_MODEL)
