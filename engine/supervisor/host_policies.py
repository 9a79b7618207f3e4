"""Host policies: which CPU cores instances of a policy run on (``--host-policy``, spec F-155, C-099).

An instance group names its policy; without a name it is ``cpu``, ``gpu_0``, ``gpu_1`` and so on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from forebay.engine.settings import ConfigEntry
from forebay.ipc.errors import InvalidArgument

_NODES = Path("/sys/devices/system/node")


def read_node_cores(node: int) -> str:
    """Return the kernel's list of a NUMA node's cores, for example ``0-3,8-11``.

    Raises:
        InvalidArgument: there is no such node.
    """
    try:
        return (_NODES / f"node{node}" / "cpulist").read_text()
    except OSError:
        raise InvalidArgument(f"--host-policy names NUMA node {node}, which this machine does not have") from None


class HostPolicies:
    """The cores of each policy."""

    def __init__(
        self,
        entries: Iterable[ConfigEntry],
        *,
        usable: Iterable[int] | None = None,
        node_cores: Callable[[int], str] = read_node_cores,
    ) -> None:
        """Read the settings. Of two for one policy, cores count more than a node.

        Args:
            usable: cores that this process may use; default: its affinity.

        Raises:
            InvalidArgument: a policy has no core that may be used, or names a node that is not there.
        """
        allowed = set(os.sched_getaffinity(0) if usable is None else usable)
        wanted: dict[str, dict[str, str]] = {}
        for entry in entries:
            wanted.setdefault(entry.name, {})[entry.setting] = entry.value
        self._cores: dict[str, tuple[int, ...]] = {}
        for name, settings in wanted.items():
            cores = settings.get("cpu-cores")
            text = cores if cores is not None else node_cores(int(settings["numa-node"]))
            found = tuple(sorted(parse_cores(text) & allowed))
            if not found:
                raise InvalidArgument(
                    f"--host-policy '{name}' has no CPU core that this server may use: {text.strip()}"
                )
            self._cores[name] = found

    def cores(self, name: str) -> tuple[int, ...]:
        """Return the cores of a policy; empty if it binds to none."""
        return self._cores.get(name, ())


def parse_cores(text: str) -> set[int]:
    """Read a list of cores as the kernel writes it: ``0-3,8``."""
    cores: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return cores
