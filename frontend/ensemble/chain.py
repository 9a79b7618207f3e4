"""Ensembles whose models follow one another in a line: a request keeps its rows from the first model to the last.

The slabs of the models overlap: the next one begins where the outputs of the one before begin, so those rows *are* its
input rows (spec L-030)::

    model A   | inputs of A | outputs of A |
    model B                 | inputs of B  | outputs of B |
    model C                                | inputs of C  | outputs of C |

Nothing is copied and no message describes a tensor: for workers and scheduler each step is a run of slab rows like any
other. It needs fixed shapes, and that a model's inputs are the last outputs of the model before, in their order. Models
on one GPU are no chain: what passes between them stays there (``device_pools.py``).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

from forebay.frontend.data_plane.owners import NO_PARAMETERS, OwnedSlab, RowOwner
from forebay.frontend.data_plane.route_client import RouteClient
from forebay.frontend.data_plane.slab_set import SlabSet
from forebay.frontend.ensemble.rows_route import EnsembleRows, sequence_changes
from forebay.frontend.ensemble.run import EnsembleModel
from forebay.ipc.catalog import EnsembleStep, ModelEntry
from forebay.ipc.ensemble.steps import StepTimes
from forebay.ipc.errors import Cancelled, ServingError
from forebay.ipc.messages import ParameterValue
from forebay.ipc.slabs import Slab, SlabLayout
from forebay.ipc.tensor import TensorSpec


class Link(NamedTuple):
    """One model of a chain."""

    step: EnsembleStep
    route: RouteClient
    tail: int
    """Index of the output of the model before that is this one's first input; 0 for the first model."""


class LinkSlab(Slab[RowOwner]):
    """One model's view of rows that a chain's slab has lent for the whole chain."""

    __slots__ = ()

    def release(self, first: int, rows: int) -> None:
        """The model is done with the rows; who asked the chain still has them."""
        self.live -= rows


class ChainSlab(Slab[RowOwner]):
    """Rows of a whole chain: inputs of the first model, outputs of the last one."""

    __slots__ = ("links",)

    def __init__(self, base: int, layout: SlabLayout) -> None:
        super().__init__(base, layout)
        self.links: tuple[LinkSlab, ...] = ()


def chain_of(ensemble: EnsembleModel) -> Chain | None:
    """Return how an ensemble's requests lie in rows of the latest versions of its models; None: they cannot."""
    route = ensemble.route
    find = route.engine.find_route
    targets = tuple(find(step.namespace, step.model, step.version) for step in route.entry.steps)
    devices = tuple(-1 if target is None else target.entry.device_id for target in targets)
    if (targets, devices) != ensemble.chain_targets:
        ensemble.chain_targets = (targets, devices)
        links = find_links(route)
        ensemble.chain = Chain(ensemble, links) if links else None
    return ensemble.chain


def find_links(route: RouteClient) -> tuple[Link, ...]:
    """Return the models of an ensemble in the order in which they run; empty: it is no chain, or cannot lie in rows."""
    entry, engine = route.entry, route.engine
    steps = _in_line(entry)
    links: list[Link] = []
    for step in steps:
        target = engine.find_route(step.namespace, step.model, step.version)
        if target is None or not _lies_in_rows(entry, step, target):
            return ()
        tail = _joint(links[-1], step, target.entry) if links else 0
        if tail < 0:
            return ()
        links.append(Link(step, target, tail))
    if len(links) < 2 or not _takes_all(entry, links[0]) or not _gives_all(entry, links[-1]):
        return ()
    return tuple(links)


def _in_line(entry: ModelEntry) -> list[EnsembleStep]:
    """Return the steps so that each reads something of the one before; empty: they are no line."""
    remaining, line = list(entry.steps), []
    known = {spec.name for spec in entry.inputs}
    while remaining:
        ready = [step for step in remaining if known.issuperset(step.inputs.values())]
        if len(ready) != 1:
            return []
        line.append(ready[0])
        remaining.remove(ready[0])
        known = set(ready[0].outputs.values())
    return line


def _lies_in_rows(ensemble: ModelEntry, step: EnsembleStep, target: RouteClient) -> bool:
    model = target.entry
    is_plain = not (model.is_ensemble or model.decoupled or model.response_cache or model.preserve_ordering)
    # What the ensemble leaves out is a choice of outputs that such a model could see.
    is_whole = not model.sees_requests or len(step.outputs) == len(model.outputs)
    is_batching = (ensemble.max_batch_size > 0) == (model.max_batch_size > 0)
    return target.uses_rows and is_plain and is_whole and is_batching


def _joint(before: Link, step: EnsembleStep, model: ModelEntry) -> int:
    """Return which output of the model before is the first input of this one; -1: its inputs are not all behind it."""
    made = [(before.step.outputs.get(spec.name), spec) for spec in before.route.entry.outputs]
    read = [(step.inputs.get(spec.name), spec) for spec in model.inputs]
    tail = len(made) - len(read)
    if tail < 0 or not read:
        return -1
    if before.route.entry.device_id >= 0 and _stays_on_device(before, model):
        return -1
    fits = all(
        tensor is not None and tensor == written and _are_equal(ours, theirs)
        for (tensor, ours), (written, theirs) in zip(read, made[tail:], strict=True)
    )
    return tail if fits else -1


def _stays_on_device(before: Link, model: ModelEntry) -> bool:
    """Whether the tensors between two models need not leave their GPU: rows are in host memory."""
    device_id = before.route.entry.device_id
    return device_id == model.device_id and before.route.engine.device_pools.expects(device_id)


def _are_equal(ours: TensorSpec, theirs: TensorSpec) -> bool:
    return ours.datatype == theirs.datatype and ours.dims == theirs.dims


def _takes_all(ensemble: ModelEntry, first: Link) -> bool:
    """Whether each input of the ensemble is one of the first model's, and each of the model's is given."""
    given = sorted(first.step.inputs.values())
    return given == sorted(spec.name for spec in ensemble.inputs) and all(
        _is_input(ensemble.input_named(first.step.inputs.get(spec.name, "")), spec) for spec in first.route.entry.inputs
    )


def _is_input(ours: TensorSpec | None, theirs: TensorSpec) -> bool:
    return ours is not None and not ours.optional and len(ours.dims) == len(theirs.dims)


def _gives_all(ensemble: ModelEntry, last: Link) -> bool:
    """Whether the ensemble's outputs are all the last model's."""
    made = {last.step.outputs[spec.name]: spec for spec in last.route.entry.outputs if spec.name in last.step.outputs}
    return all(spec.name in made and len(spec.dims) == len(made[spec.name].dims) for spec in ensemble.outputs)


class Chain:
    """One ensemble version over certain versions of its models: their slabs, and the requests in them."""

    def __init__(self, ensemble: EnsembleModel, links: tuple[Link, ...]) -> None:
        self.ensemble = ensemble
        self.links = links
        self.routes = tuple(link.route for link in links)
        #: Batch items of a request at most; 0: the ensemble does not batch.
        self.max_batch_size = min(route.entry.max_batch_size for route in self.routes)
        self._requests = 0
        tensors = [spec for route in self.routes for spec in (*route.entry.inputs, *route.entry.outputs)]
        row_bytes = sum(spec.row_bytes for spec in tensors)
        self.slabs = SlabSet(row_bytes, self.max_batch_size, self._make_slab, self._free_slab)
        ensemble.route.use_slabs(self.slabs)

    def _make_slab(self, capacity: int) -> ChainSlab:
        engine = self.ensemble.route.engine
        starts: list[int] = []
        layouts: list[SlabLayout] = []
        start = 0
        for link in self.links:
            if layouts:
                start += layouts[-1].outputs[link.tail].offset
            layout = SlabLayout(link.route.entry.inputs, link.route.entry.outputs, capacity)
            starts.append(start)
            layouts.append(layout)
        outputs = [area._replace(offset=start + area.offset) for area in layouts[-1].outputs]
        byte_size = start + layouts[-1].byte_size
        whole = SlabLayout.of_areas(layouts[0].inputs, outputs, capacity, byte_size)
        slab = ChainSlab(engine.allocate(byte_size), whole)
        slab.links = tuple(
            LinkSlab(slab.base + start, layout, slab) for start, layout in zip(starts, layouts, strict=True)
        )
        for route, link_slab in zip(self.routes, slab.links, strict=True):
            engine.slabs[link_slab.base] = (route, link_slab)
        return slab

    def _free_slab(self, slab: OwnedSlab) -> None:
        assert isinstance(slab, ChainSlab)
        engine = self.ensemble.route.engine
        for link_slab in slab.links:
            engine.slabs.pop(link_slab.base, None)
        engine.free(slab.base, slab.layout.byte_size)

    def began(self) -> None:
        """A request has begun: its models must stay loaded until it has ended (spec S-108)."""
        self._requests += 1
        if self._requests == 1:
            self._use_models(+1)

    def ended(self) -> None:
        self._requests -= 1
        if self._requests == 0:
            self._use_models(-1)
        self.slabs.free_idle()

    def _use_models(self, change: int) -> None:
        for route in self.routes:
            route.count_ensemble_use(change)


class ChainRoute(EnsembleRows):
    """Rows of a chain, for requests of equal form to the ensemble: what a plan needs of a route."""

    __slots__ = ("_chain", "first_model", "input_indices", "output_indices", "output_specs", "sees_requests")

    def __init__(self, chain: Chain) -> None:
        super().__init__(chain.ensemble)
        self._chain = chain
        first, last = chain.links[0], chain.links[-1]
        #: Whom requests go to first.
        self.first_model = first.route
        #: Whether a model looks at what a request carries besides tensors.
        self.sees_requests = any(route.entry.sees_requests for route in chain.routes)
        #: The ensemble's name to the index of the tensor in the first model.
        self.input_indices = {
            first.step.inputs[spec.name]: index for index, spec in enumerate(first.route.entry.inputs)
        }
        #: The same of the last model.
        self.output_indices = {
            last.step.outputs[spec.name]: index
            for index, spec in enumerate(last.route.entry.outputs)
            if spec.name in last.step.outputs
        }
        self.output_specs = last.route.entry.outputs

    def loan(self, rows: int) -> tuple[OwnedSlab, int]:
        """Return a slab of the chain and the first of ``rows`` free rows in it.

        Raises:
            ArenaFull: there is no room.
        """
        return self._chain.slabs.loan(rows)

    def release(self, slab: OwnedSlab, first: int, rows: int) -> None:
        """Give rows back that were not published."""
        slab.release(first, rows)
        self._chain.slabs.free_idle()

    def publish(
        self, slab: OwnedSlab, first: int, rows: int, owner: RowOwner,
        priority: int = 0, timeout_us: int = 0, deadline_ns: int = 0,
    ) -> None:  # fmt: skip
        """Hand filled rows over to the first model."""
        assert isinstance(slab, ChainSlab)
        request = ChainedRequest(self._chain, slab, first, rows, owner, priority, timeout_us, deadline_ns)
        slab.owners[first] = request
        self._chain.began()
        request.start_step()

    def cancel_rows(self, slab: OwnedSlab, first: int, owner: RowOwner) -> None:
        """Nobody waits any more for the request of ``owner`` at ``first``; the owner still hears once of its end."""
        request = slab.owners[first]
        if isinstance(request, ChainedRequest) and request.owner is owner:
            request.cancel()


class ChainedRequest:
    """One request on its way through the models. Life: started -> done by each model -> answered; or failed by one."""

    __slots__ = (
        "_began_ns",
        "_chain",
        "_deadline_ns",
        "_first",
        "_is_cancelled",
        "_parameters",
        "_place",
        "_priority",
        "_sent_ns",
        "_slab",
        "_timeout_us",
        "_times",
        "owner",
        "rows",
    )

    def __init__(
        self,
        chain: Chain,
        slab: ChainSlab,
        first: int,
        rows: int,
        owner: RowOwner,
        priority: int,
        timeout_us: int,
        deadline_ns: int,
    ) -> None:
        self._chain = chain
        self._slab = slab
        self._first = first
        self.rows = rows
        self.owner = owner
        self._priority = priority
        self._timeout_us = timeout_us
        self._deadline_ns = deadline_ns
        #: Which model has it.
        self._place = 0
        self._began_ns = self._sent_ns = time.monotonic_ns()
        self._times = StepTimes()
        self._parameters = NO_PARAMETERS
        self._is_cancelled = False

    def start_step(self) -> None:
        """Hand the rows to the model whose turn it is."""
        link = self._slab.links[self._place]
        link.live += self.rows
        route = self._chain.routes[self._place]
        route.publish(link, self._first, self.rows, self, self._priority, self._timeout_us, self._deadline_ns)

    def cancel(self) -> None:
        """Take it out of the queue that it waits in; of a model that has begun with it, it goes on to no other."""
        self._is_cancelled = True
        self._chain.routes[self._place].cancel_rows(self._slab.links[self._place], self._first, self)

    # --- called by the engine client ---

    def rows_done(self, slab: OwnedSlab, first: int, parameters: Mapping[str, ParameterValue] = NO_PARAMETERS) -> None:
        engine = self._chain.ensemble.route.engine
        self._times = self._times.plus(StepTimes.since(self._sent_ns, engine.reply_times()))
        if parameters:
            self._parameters = {**self._parameters, **sequence_changes(parameters)}
        if self._is_cancelled:
            self.rows_failed(slab, first, Cancelled("request was cancelled"), ran=False)
            return
        if self._place + 1 < len(self._slab.links):
            self._place += 1
            self._sent_ns = time.monotonic_ns()
            self.start_step()
            return
        self.owner.rows_done(self._slab, first, self._parameters)
        self._end()
        self._chain.ensemble.outcomes.succeeded(self.rows, self._began_ns, self._times)

    def rows_failed(self, slab: OwnedSlab, first: int, error: ServingError, *, ran: bool) -> None:
        ensemble = self._chain.ensemble
        failed = ensemble.prefixed(error)
        self.owner.rows_failed(self._slab, first, failed, ran=True)
        self._end()
        ensemble.outcomes.failed(self._began_ns, failed, ran=ran)

    def _end(self) -> None:
        self._slab.owners[self._first] = None
        self._slab.release(self._first, self.rows)
        self._chain.ended()
