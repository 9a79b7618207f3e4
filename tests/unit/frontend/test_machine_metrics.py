"""CPU and memory of the machine."""

from __future__ import annotations

from forebay.frontend.machine_metrics import Machine, MachineReading, read_machine
from forebay.ipc.clock import FakeClock


def test_the_machine_is_read_at_most_once_per_interval() -> None:
    """Spec M-005, M-050, M-051."""
    readings = iter([MachineReading(0, 0, 100, 40), MachineReading(30, 40, 100, 10), MachineReading(30, 80, 100, 120)])
    clock = FakeClock()
    machine = Machine(2000, read=lambda: next(readings), clock=clock)

    def values() -> list[int | float]:
        return [value for _, _, value in machine.gauges()]

    assert values() == [0.0, 100, 60]
    clock.advance(us=1_999_999)
    assert values() == [0.0, 100, 60]
    clock.advance(us=1)
    assert values() == [0.75, 100, 90]
    clock.advance(us=2_000_000)
    assert values() == [0.0, 100, 0]


def test_this_machine_can_be_read() -> None:
    gauges = {name: value for name, _, value in Machine(0, read=read_machine).gauges()}
    assert 0.0 <= gauges["nv_cpu_utilization"] <= 1.0
    assert 0 < gauges["nv_cpu_memory_used_bytes"] < gauges["nv_cpu_memory_total_bytes"]


def test_an_unreadable_proc_keeps_the_last_values() -> None:
    outcomes: list[MachineReading | OSError] = [MachineReading(1, 2, 100, 40), OSError("gone")]

    def read() -> MachineReading:
        outcome = outcomes.pop(0)
        if isinstance(outcome, OSError):
            raise outcome
        return outcome

    machine = Machine(0, read=read, clock=FakeClock())
    assert [value for _, _, value in machine.gauges()] == [0.0, 100, 60]
