"""Server metadata, model metadata, model configuration (spec H-035..H-045)."""

from __future__ import annotations

from forebay.frontend.catalog_view import parse_version
from forebay.frontend.codec.rapid_json import dump_json
from forebay.frontend.handlers.context import Call, ControlContext, Reply
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.tensor import TensorSpec

#: The Triton release whose interface we offer. Clients and load tools read it, so it is Triton's number, not ours.
TRITON_VERSION = "2.74.0"

#: In Triton's order (spec H-035).
EXTENSIONS = (
    "classification",
    "sequence",
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "model_configuration",
    "system_shared_memory",
    "cuda_shared_memory",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "trace",
    "logging",
)


async def server_metadata(context: ControlContext, call: Call) -> Reply:
    """Answer ``GET /v2``."""
    return Reply(dump_json({"name": context.settings.server_id, "version": TRITON_VERSION, "extensions": EXTENSIONS}))


async def model_metadata(context: ControlContext, call: Call) -> Reply:
    """Answer ``GET /v2/models/M[/versions/V]``."""
    name, version = call.groups["model"], parse_version(call.groups["version"])
    view = context.control.catalog
    entry = view.find(name, version)
    versions = view.ready_versions(name) if version is None else (entry,)
    return Reply(dump_json(describe_model(entry, [other.version for other in versions])))


def describe_model(entry: ModelEntry, versions: list[int]) -> dict[str, object]:
    """Return the metadata of a model; shapes include the batch dimension, a reshape is not shown (spec H-037)."""

    def describe(tensor: TensorSpec) -> dict[str, object]:
        batch = (-1,) if entry.max_batch_size > 0 else ()
        return {"name": tensor.name, "datatype": tensor.datatype, "shape": [*batch, *tensor.dims]}

    return {
        "name": entry.name,
        "versions": [str(version) for version in versions],
        "platform": entry.platform,
        "inputs": [describe(tensor) for tensor in entry.inputs],
        "outputs": [describe(tensor) for tensor in entry.outputs],
    }


async def model_config(context: ControlContext, call: Call) -> Reply:
    """Answer ``GET .../config`` with the effective configuration that the repository rendered (spec H-043)."""
    entry = context.control.catalog.find(call.groups["model"], parse_version(call.groups["version"]))
    return Reply(entry.config_json)
