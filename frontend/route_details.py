"""How long requests and responses of one model version took, in this frontend's block of the counters file.

Kept only where somebody wants it: latencies with ``--metrics-config summary_latencies`` or ``histogram_latencies``
(spec M-030, M-031), responses for decoupled models (H-236). Rows are counted by the run, with the mean of its requests.
"""

from __future__ import annotations

from forebay.ipc.catalog import ModelEntry
from forebay.ipc.counters import (
    LATENCY_WORDS,
    RESPONSE_FIELDS,
    RESPONSE_WORDS,
    RESPONSES_MAX,
    STAGE_WORDS,
    Stage,
    fine_bucket,
)
from forebay.ipc.errors import Code
from forebay.ipc.messages import ReplyHead
from forebay.ipc.wire import Times

_FIELD = {name: 2 * index for index, name in enumerate(RESPONSE_FIELDS)}
_REQUEST, _FIRST = int(Stage.REQUEST), int(Stage.FIRST_RESPONSE)
_CACHE_HIT, _CACHE_MISS = int(Stage.CACHE_HIT), int(Stage.CACHE_MISS)
_EXECUTION = (int(Stage.QUEUE), int(Stage.INPUT), int(Stage.INFER), int(Stage.OUTPUT))


class RouteDetails:
    """The writer of one block; none but this frontend writes there."""

    __slots__ = ("_has_latencies", "_is_decoupled", "_responses", "_words")

    def __init__(self, entry: ModelEntry, words: memoryview) -> None:
        """
        Args:
            words: uint64 [detail_words(...)], writable.
        """
        self._words = words
        self._has_latencies = entry.has_latencies
        self._is_decoupled = entry.decoupled
        self._responses = LATENCY_WORDS if entry.has_latencies else 0

    def _observe(self, stage: int, ns: int, requests: int) -> None:
        us = max(ns, 0) // 1000
        first = stage * STAGE_WORDS
        words = self._words
        words[first] += us * requests
        words[first + 1 + fine_bucket(us)] += requests

    def answered(self, requests: int, elapsed_ns: int, enqueue_ns: int = 0, times: Times | None = None) -> None:
        """Count requests that have their answer.

        Args:
            elapsed_ns: mean of their durations.
            enqueue_ns: mean of the times at which they were handed over, monotonic.
            times: of their execution; None: they were not executed.
        """
        if not self._has_latencies:
            return
        self._observe(_REQUEST, elapsed_ns, requests)
        if times is not None and times.start_ns:
            start_ns, input_end_ns, output_start_ns, end_ns = times
            spans = (
                start_ns - enqueue_ns,
                input_end_ns - start_ns,
                output_start_ns - input_end_ns,
                end_ns - output_start_ns,
            )
            for stage, ns in zip(_EXECUTION, spans, strict=True):
                self._observe(stage, ns, requests)

    def looked_up(self, elapsed_ns: int, *, is_hit: bool) -> None:
        """Count a look-up in the response cache (spec M-032)."""
        if self._has_latencies:
            self._observe(_CACHE_HIT if is_hit else _CACHE_MISS, elapsed_ns, 1)

    def responded(self, reply: ReplyHead, times: Times, since_ns: int, enqueue_ns: int) -> None:
        """Count one response of a decoupled model.

        Args:
            times: of the response.
            since_ns: when the one before it was sent, monotonic; 0: it is the first.
            enqueue_ns: when the request was handed over.
        """
        index = reply.index
        # The bare end mark stands behind the responses, and is none.
        if not self._is_decoupled or index < 0:
            return
        if self._has_latencies and since_ns == 0:
            self._observe(_FIRST, times.end_ns - enqueue_ns, 1)
        infer_ns = max(times.output_start_ns - (since_ns or times.input_end_ns), 0)
        output_ns = max(times.end_ns - times.output_start_ns, 0)
        if reply.text:
            self._add(index, "cancel" if reply.code == Code.CANCELLED else "fail", infer_ns + output_ns)
        elif not (reply.outputs or reply.inline):
            self._add(index, "empty_response", infer_ns + output_ns)
        else:
            self._add(index, "compute_infer", infer_ns)
            self._add(index, "compute_output", output_ns)
            self._add(index, "success", infer_ns + output_ns)

    def _add(self, index: int, field: str, ns: int) -> None:
        if index < RESPONSES_MAX:
            word = self._responses + index * RESPONSE_WORDS + _FIELD[field]
            self._words[word] += 1
            self._words[word + 1] += max(ns, 0)
