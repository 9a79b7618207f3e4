"""Custom batching strategies, which are not to be had: a model that has one is refused (spec S-034).

Triton loads such a library into its own process and asks it about each request, through the C interface to its objects.
Here the scheduler decides about runs of requests, of which it knows the number and the rows, in a process of its own.
Who has a strategy needs it, mostly to keep batches within a GPU's memory: to go on without it would not do.
"""

from __future__ import annotations

from collections.abc import Iterable

from forebay.engine.repository.beneath import Beneath
from forebay.engine.repository.config_problem import Problem
from forebay.engine.repository.model_config_schema import FieldPath, ModelConfig
from forebay.ipc.errors import Code

PARAMETER = "TRITON_BATCH_STRATEGY_PATH"
LIBRARY = "batchstrategy.so"


def batching_library_problems(
    config: ModelConfig, root: Beneath, model: tuple[str, ...], versions: Iterable[int]
) -> list[Problem]:
    """Return why a model may not be loaded; empty if it has no strategy, or none that would ever be asked.

    Args:
        model: its directory below ``root``.
    """
    message = config.message
    scheduling = message.WhichOneof("scheduling_choice")
    field: FieldPath = ("parameters", PARAMETER)
    if scheduling == "sequence_batching" and PARAMETER in message.parameters:
        text = f"{PARAMETER} cannot be specified with sequence batcher, using default batching strategy"
        return [Problem(text, field).located(config.source)]
    if scheduling != "dynamic_batching":
        return []
    if PARAMETER in message.parameters:
        path = message.parameters[PARAMETER].string_value
    else:
        field = ()
        directories = [*((*model, str(version)) for version in versions), model]
        found = next((directory for directory in directories if root.is_file((*directory, LIBRARY))), None)
        if found is None:
            return []
        path = "/".join((*found, LIBRARY))
    return [
        Problem(
            f"custom batching strategy '{path}' cannot be loaded: strategies are libraries for Triton's own process",
            field,
            code=Code.UNSUPPORTED,
            hint="Take it out, and say with max_batch_size or preferred_batch_size how large batches may be.",
        ).located(config.source)
    ]
