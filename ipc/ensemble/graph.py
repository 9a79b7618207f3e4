"""An ensemble's graph: who writes a tensor, who reads it, and what a request really needs.

Pure. One :class:`EnsembleGraph` per loaded version; the supervisor has checked the graph (spec S-102, C-123).
"""

from __future__ import annotations

from typing import NamedTuple

from forebay.ipc.catalog import EnsembleStep, ModelEntry

#: Sets of requested outputs that are remembered; at the limit all are dropped.
_PLANS_MAX = 64


class NeededStep(NamedTuple):
    """A step that must run for some request."""

    number: int
    step: EnsembleStep
    outputs: tuple[str, ...]
    """Outputs of the model, by the model's names, that somebody reads; the others are not computed."""


class GraphPlan(NamedTuple):
    """What of a graph must run for one set of requested outputs (spec S-105)."""

    outputs: tuple[str, ...]
    """Tensors that are answered, in the order of the configuration."""
    steps: tuple[NeededStep, ...]
    readers: dict[str, tuple[NeededStep, ...]]
    """Tensor to the steps that read it."""


class EnsembleGraph:
    """One ensemble's steps."""

    def __init__(self, entry: ModelEntry) -> None:
        self.steps = entry.steps
        self._outputs = tuple(spec.name for spec in entry.outputs)
        #: Tensor to the index of the step that writes it.
        self._writer = {tensor: index for index, step in enumerate(entry.steps) for tensor in step.outputs.values()}
        self._plans: dict[tuple[str, ...], GraphPlan] = {}

    def plan(self, requested: tuple[str, ...]) -> GraphPlan:
        """Return what must run for these outputs; empty: all outputs."""
        plan = self._plans.get(requested)
        if plan is None:
            if len(self._plans) >= _PLANS_MAX:
                self._plans.clear()
            plan = self._plans[requested] = self._prune(requested)
        return plan

    def origins(self, tensor: str, decoupled: frozenset[int]) -> frozenset[int]:
        """Return which of the ``decoupled`` steps are the last ones on the ways to a tensor."""
        writer = self._writer.get(tensor)
        if writer is None:
            return frozenset()
        if writer in decoupled:
            return frozenset((writer,))
        none: frozenset[int] = frozenset()
        return none.union(*(self.origins(name, decoupled) for name in self.steps[writer].inputs.values()))

    def _prune(self, requested: tuple[str, ...]) -> GraphPlan:
        outputs = tuple(name for name in self._outputs if not requested or name in requested)
        wanted = set(outputs)
        pending = list(outputs)
        needed: set[int] = set()
        while pending:
            writer = self._writer.get(pending.pop())
            if writer is None or writer in needed:
                continue
            needed.add(writer)
            for tensor in self.steps[writer].inputs.values():
                if tensor not in wanted:
                    wanted.add(tensor)
                    pending.append(tensor)
        steps = tuple(
            NeededStep(
                index,
                self.steps[index],
                tuple(name for name, tensor in self.steps[index].outputs.items() if tensor in wanted),
            )
            for index in sorted(needed)
        )
        readers: dict[str, tuple[NeededStep, ...]] = {}
        for step in steps:
            for tensor in dict.fromkeys(step.step.inputs.values()):
                readers[tensor] = (*readers.get(tensor, ()), step)
        return GraphPlan(outputs, steps, readers)
