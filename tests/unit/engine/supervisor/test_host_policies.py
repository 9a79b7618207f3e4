"""Host policies: from flags to cores."""

from __future__ import annotations

import pytest

from forebay.engine.settings import ConfigEntry
from forebay.engine.supervisor.host_policies import HostPolicies, parse_cores
from forebay.ipc.errors import InvalidArgument


def policies(*entries: tuple[str, str, str]) -> HostPolicies:
    return HostPolicies(
        (ConfigEntry(*entry) for entry in entries),
        usable=range(8),
        node_cores=lambda node: f"{4 * node}-{4 * node + 3}",
    )


def test_kernel_lists_of_cores_are_read() -> None:
    assert parse_cores("0-2,5,7-7\n") == {0, 1, 2, 5, 7}
    assert parse_cores("\n") == set()


def test_range_of_cores_includes_its_end() -> None:
    """Spec F-155."""
    assert policies(("cpu", "cpu-cores", "2-4")).cores("cpu") == (2, 3, 4)


def test_numa_node_means_its_cores() -> None:
    assert policies(("gpu_0", "numa-node", "1")).cores("gpu_0") == (4, 5, 6, 7)


def test_cores_count_more_than_the_node() -> None:
    assert policies(("a", "numa-node", "1"), ("a", "cpu-cores", "0-1")).cores("a") == (0, 1)


def test_policy_without_settings_binds_to_nothing() -> None:
    assert policies(("a", "cpu-cores", "0-1")).cores("b") == ()


def test_cores_that_the_server_may_not_use_are_left_out() -> None:
    assert policies(("a", "cpu-cores", "6-11")).cores("a") == (6, 7)


def test_policy_without_a_usable_core_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="--host-policy 'a' has no CPU core that this server may use: 8-11"):
        policies(("a", "cpu-cores", "8-11"))


def test_node_that_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="names NUMA node 4096"):
        HostPolicies([ConfigEntry("a", "numa-node", "4096")])
