"""Requests that live outside slab rows and whose JSON has been seen before: parsed and checked once.

Their shapes are part of the JSON, so what is true of one is true of all: only the tensors' bytes differ. Strings are
not among them, because their bytes decide whether a request is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from forebay.frontend.codec.infer_request import BinaryData, ParsedInfer, RegionData
from forebay.frontend.http.head import Head
from forebay.frontend.inference import InputTensor
from forebay.ipc.catalog import ModelEntry

#: JSON headers remembered for one head; at the limit all are dropped.
PLANS_PER_HEAD_MAX = 1024
#: JSON headers longer than this are parsed every time.
PLAN_JSON_BYTES_MAX = 4096


class KnownRequest(NamedTuple):
    """What parsing and checking have found out."""

    entry: ModelEntry
    request: ParsedInfer
    batch_size: int
    """As validated; 0 for a model that does not batch."""
    inputs: Sequence[InputTensor]
    """As they are placed, but for those in regions: which memory a name means is found out each time."""
    is_bare: bool
    """It carries nothing but tensors."""


def find_plan(head: Head, body: memoryview) -> object:
    """Return what is remembered of requests with this head and the JSON that ``body`` begins with; None: nothing."""
    size = _json_bytes(head, body)
    if not head.plans or not 0 < size <= PLAN_JSON_BYTES_MAX:
        return None
    return head.plans.get(bytes(body[:size]))


def _json_bytes(head: Head, body: memoryview) -> int:
    """Return how much of the body is JSON: all of it, if nothing else is said."""
    return len(body) if head.json_bytes < 0 else head.json_bytes


def remember(head: Head, body: memoryview, plan: object) -> None:
    """Keep what is known of requests with this head and the JSON that ``body`` begins with."""
    size = _json_bytes(head, body)
    if size > PLAN_JSON_BYTES_MAX:
        return
    if len(head.plans) >= PLANS_PER_HEAD_MAX:
        head.plans.clear()
    head.plans[bytes(body[:size])] = plan


def is_repeatable(head: Head, request: ParsedInfer) -> bool:
    """Tell whether equal JSON means an equal request but for the bytes of its tensors."""
    # Without its length the JSON is the whole body, and there is nothing of the tensors in it.
    sources = RegionData if head.json_bytes < 0 else BinaryData | RegionData
    return (
        head.is_plain
        and head.json_bytes != 0
        and head.json_bytes <= PLAN_JSON_BYTES_MAX
        and not request.is_raw
        and all(isinstance(tensor.source, sources) and tensor.datatype != "BYTES" for tensor in request.inputs)
    )


def uses_regions(request: ParsedInfer) -> bool:
    """Tell whether any tensor lies, or shall lie, in a region."""
    return any(isinstance(tensor.source, RegionData) for tensor in request.inputs) or any(
        output.region is not None for output in request.outputs
    )
