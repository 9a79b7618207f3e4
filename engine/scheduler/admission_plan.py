"""The batches in which what waits will run, as far as one can tell: who comes late is seen when it comes. Pure.

A batch is planned for the instance that ends it first, after what that one runs now and is to run before. It ends early
enough for the first of its requests to be in time, which limits its size. Where much is asked for, a batch that could
only be small is not begun: it would cost nearly as much as a large one of requests that come a little later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from forebay.engine.scheduler.cost_model import CostModel
from forebay.engine.scheduler.waiting import Waiting


class AdmissionPlan:
    """Batches for what waits, from one moment's view of the instances."""

    def __init__(
        self,
        costs: Mapping[int, CostModel],
        free_ns: dict[int, int],
        max_rows: int,
        due_ns: Callable[[Waiting], int],
        useful_rows: Callable[[CostModel], int],
    ) -> None:
        """Plan nothing yet.

        Args:
            costs: of each instance.
            free_ns: when each is expected to be free; kept up to date by the plan.
            due_ns: by when an item's answers are to be there.
            useful_rows: how many rows a further batch must have room for.
        """
        self._costs = costs
        self._free_ns = free_ns
        self._max = max_rows
        self._due_ns = due_ns
        self._useful_rows = useful_rows
        #: The last batch: its instance, its rows, and how many it may have.
        self._instance = 0
        self._rows = 0
        self._limit = 0

    def seat(self, items: Iterable[Waiting]) -> None:
        """Plan for what waits already; what has become hopeless will be taken out when its turn comes."""
        for item in items:
            self._place(item, item.requests, useful=False)

    def admit(self, item: Waiting, at_least: int) -> tuple[int, int]:
        """Plan for what comes behind all that waits.

        Args:
            at_least: of its requests that are let in in any case.

        Returns:
            How many of its requests are let in, and when the next of them would have been answered (ns), if not all.
        """
        if at_least:
            instance, free_ns = self._next_instance(item.rows_each)
            self._begin(instance, free_ns, self._due_ns(item))
            self._rows = at_least * item.rows_each
        placed, answer_ns = self._place(item, item.requests - at_least, useful=True)
        return at_least + placed, answer_ns

    def _place(self, item: Waiting, requests: int, *, useful: bool) -> tuple[int, int]:
        """Plan for requests of an item.

        Args:
            useful: they begin a batch only if it has room for as many rows as make it useful.

        Returns:
            For how many there is time, and when the next one would be answered.
        """
        due_ns = self._due_ns(item)
        left = requests
        while left:
            taken = min(self._room(item, due_ns), left)
            if taken <= 0:
                instance, free_ns = self._next_instance(item.rows_each)
                cost = self._costs[instance]
                rows = max(item.rows_each, self._useful_rows(cost)) if useful else item.rows_each
                answer_ns = free_ns + cost.ceiling_ns(rows)
                if answer_ns > due_ns:
                    return requests - left, answer_ns
                self._begin(instance, free_ns, due_ns)
                taken = min(max(self._limit // item.rows_each, 1), left)
            self._rows += taken * item.rows_each
            left -= taken
        return requests, 0

    def _room(self, item: Waiting, due_ns: int) -> int:
        """Return how many requests of an item may join the last batch, and let it end in time for them."""
        if not self._rows:
            return 0
        cost = self._costs[self._instance]
        limit = min(self._limit, cost.rows_within(due_ns - self._free_ns[self._instance]))
        room = (limit - self._rows) // item.rows_each
        if room > 0:
            self._limit = limit
        return room

    def _next_instance(self, rows: int) -> tuple[int, int]:
        """Return the instance that would end a further batch first, and when it can start it."""
        free_ns = self._free_ns
        if self._rows:
            end_ns = free_ns[self._instance] + max(self._costs[self._instance].expected_ns(self._rows), 1)
            free_ns = free_ns | {self._instance: end_ns}
        instance = min(free_ns, key=lambda which: free_ns[which] + self._costs[which].ceiling_ns(rows))
        return instance, free_ns[instance]

    def _begin(self, instance: int, free_ns: int, due_ns: int) -> None:
        """Close the last batch and begin another one."""
        if self._rows:
            self._free_ns[self._instance] += max(self._costs[self._instance].expected_ns(self._rows), 1)
        self._instance, self._rows = instance, 0
        self._limit = min(self._max, self._costs[instance].rows_within(due_ns - free_ns))
