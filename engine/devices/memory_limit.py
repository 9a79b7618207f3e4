"""``--model-load-gpu-limit``: no model is loaded on a GPU that is fuller than it may be (spec F-156).

Used by workers; the supervisor takes the names from here.
"""

from __future__ import annotations

from forebay.engine.devices.opening import open_device
from forebay.ipc.errors import Unavailable
from forebay.ipc.worker_messages import InstanceSpec

#: In ``InstanceSpec.extra``: the fraction of its GPU's memory that may be in use when the instance is loaded.
LIMIT_KEY = "gpu_memory_limit"

#: Likewise: arenas of more bytes are not page-locked (``--pinned-memory-pool-byte-size``, spec F-150).
PINNED_KEY = "pinned_bytes_max"


def check_memory_limit(spec: InstanceSpec) -> None:
    """Refuse to load an instance on a GPU of which too much is in use, by whomever.

    Raises:
        Unavailable: with Triton's text.
        Unsupported: there is no such GPU.
    """
    limit = spec.extra.get(LIMIT_KEY)
    if limit is None or spec.kind != "GPU":
        return
    free_bytes, total_bytes = open_device("cuda", spec.device_id).memory_info()
    if total_bytes - free_bytes > int(total_bytes * limit):
        raise Unavailable(
            f"can not create model '{spec.instance_name}': memory limit set for {spec.kind} {spec.device_id} has "
            "exceeded, model loading is rejected."
        )
