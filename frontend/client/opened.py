"""One model as a connection knows it: its signature, its slabs, and the workers that it may ring itself."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import numpy as np

from forebay.client.counting import RequestCounts
from forebay.client.door import OpenedModel, Signature
from forebay.client.pending import Array, Pending
from forebay.ipc.ensemble.output_sizes import OutputSizes
from forebay.ipc.ensemble.run import Ensemble
from forebay.ipc.slabs import Area, Slab, SlabLayout
from forebay.ipc.tensor import DATATYPES, TensorSpec

#: Tensors by name.
Arrays = dict[str, Array]

#: Bytes of a model's first slab, if it is to have more than a few rows.
_SLAB_BYTES_FIRST = 1024 * 1024
_SLAB_ROWS_FIRST = 64


class Grant:
    """The right to ring one worker, with one request at a time."""

    __slots__ = ("instance", "model", "outstanding", "ring", "ticket")

    def __init__(self, model: Opened, instance: int, ticket: int, ring: socket.socket) -> None:
        self.model = model
        self.instance = instance
        self.ticket = ticket
        self.ring = ring
        #: What the worker runs now; None: it is idle.
        self.outstanding: Pending | None = None


class Opened:
    """One model name and version, as asked for. The route behind it changes when the server loads it anew."""

    def __init__(self, key: tuple[str, int, str], found: OpenedModel) -> None:
        """Describe what the door answered to ``key``: name, version (0: the newest) and namespace (empty: any)."""
        self.key = key
        self.name = key[0]
        self._take(found)
        #: Counts changes of the signature: slots made for an earlier one are worth nothing.
        self.edition = 0
        self.rings = dict(found.rings)
        self.grants: list[Grant] = []
        #: Counts its requests; None: there was no room.
        self.counts: RequestCounts | None = None
        self.slabs: list[Slab[Pending]] = []
        #: By a slab's base.
        self._arrays: dict[int, tuple[Arrays, Arrays]] = {}
        #: Bytes that answers of unknown size took so far, at most.
        self.reply_guess_bytes = 4096
        #: Of outputs that stay on its GPU.
        self.output_sizes = OutputSizes()

    def _take(self, found: OpenedModel) -> None:
        self.route = found.route
        self.version = found.version
        self.signature: Signature = found.signature
        self.row_bytes = _row_bytes(found.signature)
        outputs = found.signature.outputs
        #: Bytes per row of every output; None: not all have a fixed size.
        self.reply_row_bytes = [spec.row_bytes for spec in outputs] if all(spec.is_fixed for spec in outputs) else None
        self.has_fixed_inputs = all(spec.is_fixed for spec in found.signature.inputs)
        #: As a catalog describes it.
        self.entry = found.entry(self.name)
        #: What all requests of an ensemble share.
        self.ensemble = Ensemble(self.entry) if found.signature.is_ensemble else None

    @property
    def rows_max(self) -> int:
        return max(self.signature.max_batch_size, 1)

    def idle_grant(self) -> Grant | None:
        for grant in self.grants:
            if grant.outstanding is None:
                return grant
        return None

    def next_layout(self, rows: int) -> SlabLayout:
        """Return the layout of the next slab: each twice the last."""
        if self.slabs:
            capacity = self.slabs[-1].capacity * 2
        else:
            capacity = min(max(_SLAB_ROWS_FIRST, 4 * self.rows_max), _SLAB_BYTES_FIRST // max(self.row_bytes, 1))
        return SlabLayout(self.signature.inputs, self.signature.outputs, max(capacity, rows, 1))

    def slab_arrays(self, view: memoryview, slab: Slab[Pending]) -> tuple[Arrays, Arrays]:
        """Return the inputs and outputs of a slab by name: [capacity, *dims] each, made once.

        Args:
            view: uint8 [arena bytes]
        """
        arrays = self._arrays.get(slab.base)
        if arrays is None:
            layout = slab.layout
            arrays = self._arrays[slab.base] = (
                _area_arrays(view, slab, self.signature.inputs, layout.inputs),
                _area_arrays(view, slab, self.signature.outputs, layout.outputs),
            )
        return arrays

    def replace(self, found: OpenedModel) -> list[Slab[Pending]]:
        """The server has loaded it anew.

        Returns:
            The slabs that are of no use any more, because the signature is another one.
        """
        self.close_rings()
        is_same = found.signature == self.signature
        self._take(found)
        self.rings = dict(found.rings)
        if is_same:
            return []
        self.edition += 1
        retired, self.slabs = self.slabs, []
        self._arrays.clear()
        return retired

    def close(self) -> None:
        """Let go of rings and views."""
        self.close_rings()
        self._arrays.clear()

    def close_rings(self) -> None:
        for ring in self.rings.values():
            ring.close()
        self.rings.clear()


def _area_arrays(view: memoryview, slab: Slab[Pending], specs: Sequence[TensorSpec], areas: Sequence[Area]) -> Arrays:
    arrays: Arrays = {}
    for spec, area in zip(specs, areas, strict=True):
        begin = slab.base + area.offset
        raw = view[begin : begin + area.row_bytes * slab.capacity]
        arrays[spec.name] = np.frombuffer(raw, DATATYPES[spec.datatype].numpy_dtype).reshape(slab.capacity, *spec.dims)
    return arrays


def _row_bytes(signature: Signature) -> int:
    if not signature.allows_rows:
        return 0
    return sum(spec.row_bytes for spec in (*signature.inputs, *signature.outputs))
