"""Ensembles that only give a model's tensors other names: their requests lie in the model's own slab.

So an ensemble of one step costs what its model costs, and a few counters.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

from forebay.frontend.data_plane.owners import NO_PARAMETERS, OwnedSlab, RowOwner
from forebay.frontend.data_plane.route_client import RouteClient
from forebay.frontend.ensemble.rows_route import EnsembleRows, sequence_changes
from forebay.frontend.ensemble.run import EnsembleModel, ensemble_of
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.errors import ServingError
from forebay.ipc.messages import ParameterValue
from forebay.ipc.tensor import TensorSpec


class OneStep(NamedTuple):
    """How an ensemble names the tensors of its only model."""

    ensemble: EnsembleModel
    route: RouteClient
    """Of the model."""
    inputs: dict[str, str]
    """The ensemble's name to the model's."""
    outputs: dict[str, str]
    """The model's name to the ensemble's."""


def one_step_of(route: RouteClient) -> OneStep | None:
    """Return how to run an ensemble's requests as those of its only step; None: it needs an ``EnsembleRun``."""
    entry = route.entry
    if len(entry.steps) != 1:
        return None
    step = entry.steps[0]
    target = route.engine.find_route(step.namespace, step.model, step.version)
    if target is None:
        return None
    inputs = {tensor: name for name, tensor in step.inputs.items()}
    outputs = {name: tensor for name, tensor in step.outputs.items() if entry.output_named(tensor) is not None}
    if len(inputs) != len(step.inputs) or len(outputs) != len(entry.outputs) or not _only_renames(entry, target.entry):
        return None
    model = target.entry
    if not all(_fits(entry.input_named(tensor), model.input_named(name)) for tensor, name in inputs.items()):
        return None
    if not all(_fits(entry.output_named(tensor), model.output_named(name)) for name, tensor in outputs.items()):
        return None
    return OneStep(ensemble_of(route), target, inputs, outputs)


def _only_renames(ensemble: ModelEntry, model: ModelEntry) -> bool:
    if model.is_ensemble or model.decoupled or model.response_cache:
        return False
    return (ensemble.max_batch_size > 0) == (model.max_batch_size > 0)


def _fits(ours: TensorSpec | None, theirs: TensorSpec | None) -> bool:
    """Whether a tensor of the ensemble can be the model's as it is."""
    if ours is None or theirs is None:
        return False
    return len(ours.dims) == len(theirs.dims) and (theirs.optional or not ours.optional)


class OneStepRoute(EnsembleRows):
    """Rows in the model's slab for requests of equal form to the ensemble: what a plan needs of a route."""

    __slots__ = ("_one", "first_model", "input_indices", "output_indices", "output_specs", "sees_requests")

    def __init__(self, one: OneStep) -> None:
        super().__init__(one.ensemble)
        self._one = one
        #: Whom requests go to first.
        self.first_model = one.route
        model = one.route.entry
        #: Whether the model looks at what a request carries besides tensors.
        self.sees_requests = model.sees_requests
        self.output_specs = model.outputs
        #: The ensemble's name to the index of the tensor in the model.
        self.input_indices = {
            tensor: index
            for index, spec in enumerate(model.inputs)
            for tensor, name in one.inputs.items()
            if name == spec.name
        }
        self.output_indices = {
            one.outputs[spec.name]: index for index, spec in enumerate(model.outputs) if spec.name in one.outputs
        }

    def loan(self, rows: int) -> tuple[OwnedSlab, int]:
        """Return a slab of the model and the first of ``rows`` free rows in it.

        Raises:
            ArenaFull: there is no room.
        """
        return self._one.route.loan(rows)

    def release(self, slab: OwnedSlab, first: int, rows: int) -> None:
        """Give rows back that were not published."""
        self._one.route.release(slab, first, rows)

    def publish(
        self, slab: OwnedSlab, first: int, rows: int, owner: RowOwner,
        priority: int = 0, timeout_us: int = 0, deadline_ns: int = 0,
    ) -> None:  # fmt: skip
        """Hand filled rows over."""
        route = self._one.route
        counted = _CountedRows(self._one, owner, time.monotonic_ns())
        route.publish(slab, first, rows, counted, priority, timeout_us, deadline_ns)

    def cancel_rows(self, slab: OwnedSlab, first: int, owner: RowOwner) -> None:
        """Nobody waits any more for the request of ``owner`` at ``first``; the owner still hears once of its end."""
        counted = slab.owners[first]
        if isinstance(counted, _CountedRows) and counted.owner is owner:
            self._one.route.cancel_rows(slab, first, counted)


class _CountedRows:
    """Stands between the engine and a call: counts its request for the ensemble."""

    __slots__ = ("_began_ns", "_one", "owner")

    def __init__(self, one: OneStep, owner: RowOwner, began_ns: int) -> None:
        self._one = one
        self.owner = owner
        self._began_ns = began_ns

    @property
    def rows(self) -> int:
        return self.owner.rows

    def rows_done(self, slab: OwnedSlab, first: int, parameters: Mapping[str, ParameterValue] = NO_PARAMETERS) -> None:
        owner = self.owner
        owner.rows_done(slab, first, sequence_changes(parameters) if parameters else parameters)
        self._one.ensemble.outcomes.ran(owner.rows, self._began_ns)

    def rows_failed(self, slab: OwnedSlab, first: int, error: ServingError, *, ran: bool) -> None:
        owner = self.owner
        failed = self._one.ensemble.prefixed(error)
        owner.rows_failed(slab, first, failed, ran=True)
        self._one.ensemble.outcomes.failed(self._began_ns, failed, ran=ran)
