"""Counts the requests of ensembles: themselves like any model's, the time of their steps as an instance would."""

from __future__ import annotations

import time
from array import array

from forebay.frontend.data_plane.route_client import RouteClient
from forebay.ipc.counters import InstanceCounter as Count
from forebay.ipc.counters import counted_batch
from forebay.ipc.counting import count_answered, count_failure
from forebay.ipc.ensemble.steps import StepTimes
from forebay.ipc.errors import ServingError

# Plain integers: looking up a member of an enum costs as much as the addition.
_SUCCESS, _INFERENCES, _EXECUTIONS = int(Count.SUCCESS), int(Count.INFERENCES), int(Count.EXECUTIONS)
_QUEUE_NS, _INPUT_NS = int(Count.QUEUE_NS), int(Count.INPUT_NS)
_INFER_NS, _OUTPUT_NS = int(Count.INFER_NS), int(Count.OUTPUT_NS)
_LAST_INFERENCE_MS, _BATCH_SIZES = int(Count.LAST_INFERENCE_MS), int(Count.BATCH_SIZES)
_HEAD_WORDS = _LAST_INFERENCE_MS + 1


class Outcomes:
    """What the requests of one ensemble came to in this event-loop turn; in the counters at its end.

    A turn may end a whole batch of requests, and a word in shared memory costs more than an attribute.
    """

    __slots__ = (
        "_by_rows",
        "_infer_ns",
        "_input_ns",
        "_is_due",
        "_output_ns",
        "_queue_ns",
        "_ran",
        "_route",
        "_rows",
        "_succeeded",
        "_succeeded_ns",
    )

    def __init__(self, route: RouteClient) -> None:
        self._route = route
        self._is_due = False
        #: Rows and begin of requests that the execution at hand has answered.
        self._ran: list[tuple[int, int]] = []
        self._reset()

    def _reset(self) -> None:
        self._succeeded = self._succeeded_ns = self._rows = 0
        self._queue_ns = self._input_ns = self._infer_ns = self._output_ns = 0
        #: Rows of a request to how many there were, and what they took: input, infer, output ns.
        self._by_rows: dict[int, list[int]] = {}

    def succeeded(self, rows: int, began_ns: int, times: StepTimes) -> None:
        """Count a request that was answered.

        Args:
            rows: batch items, at least 1.
            began_ns: monotonic time of the request.
            times: sums over the steps (spec S-112).
        """
        queue_ns, input_ns, infer_ns, output_ns = times
        self._succeeded += 1
        self._succeeded_ns += time.monotonic_ns() - began_ns
        self._rows += rows
        self._queue_ns += queue_ns
        self._input_ns += input_ns
        self._infer_ns += infer_ns
        self._output_ns += output_ns
        found = self._by_rows.get(rows)
        if found is None:
            self._by_rows[rows] = [1, input_ns, infer_ns, output_ns]
        else:
            found[0] += 1
            found[1] += input_ns
            found[2] += infer_ns
            found[3] += output_ns
        if not self._is_due:
            self._is_due = True
            self._route.engine.call_soon(self._write)

    def ran(self, rows: int, began_ns: int) -> None:
        """Count a request that is being answered by the execution whose completion is being handled; as above."""
        self._ran.append((rows, began_ns))
        if not self._is_due:
            self._is_due = True
            self._route.engine.call_soon(self._write)

    def _add_ran(self) -> None:
        count, began_sum_ns = len(self._ran), sum(began_ns for _rows, began_ns in self._ran)
        self._succeeded += count
        self._succeeded_ns += count * time.monotonic_ns() - began_sum_ns
        mean = StepTimes.since(began_sum_ns // count, self._route.engine.reply_times())
        self._queue_ns += count * mean.queue_ns
        self._input_ns += count * mean.input_ns
        self._infer_ns += count * mean.infer_ns
        self._output_ns += count * mean.output_ns
        for rows, _began_ns in self._ran:
            self._rows += rows
            found = self._by_rows.setdefault(rows, [0, 0, 0, 0])
            found[0] += 1
            found[1] += mean.input_ns
            found[2] += mean.infer_ns
            found[3] += mean.output_ns
        self._ran.clear()

    def failed(self, began_ns: int, error: ServingError, *, ran: bool) -> None:
        """Count a request that was not, once and by the reason of the step that failed (better than L-029)."""
        elapsed_ns = max(time.monotonic_ns() - began_ns, 0)
        count_failure(self._route.counters, error, 1, elapsed_ns, ran=ran)

    def _write(self) -> None:
        self._is_due = False
        if self._ran:
            self._add_ran()
        route = self._route
        counters, steps = route.counters, route.step_counters
        count_answered(counters, self._succeeded, self._succeeded_ns)
        if route.details is not None:
            route.details.answered(self._succeeded, self._succeeded_ns // self._succeeded)
        route.write_counters()
        # One read and one write of the block's head, as the workers do it.
        words = steps[:_HEAD_WORDS].tolist()
        words[_SUCCESS] += self._succeeded
        words[_INFERENCES] += self._rows
        words[_EXECUTIONS] += self._succeeded
        words[_QUEUE_NS] += self._queue_ns
        words[_INPUT_NS] += self._input_ns
        words[_INFER_NS] += self._infer_ns
        words[_OUTPUT_NS] += self._output_ns
        words[_LAST_INFERENCE_MS] = time.time_ns() // 1_000_000
        steps[:_HEAD_WORDS] = array("Q", words)
        for rows, found in self._by_rows.items():
            if rows <= max(route.entry.max_batch_size, 1):
                word = _BATCH_SIZES + 4 * (counted_batch(rows) - 1)
                for index, amount in enumerate(found):
                    steps[word + index] += amount
        self._reset()
