"""The sequence batcher: every sequence has a slot of one instance until it ends. Pure: data in, data out.

A sequence lives as: backlog -> slot -> gone. It goes at once into a slot if one is free, the lowest number first and
balanced over instances; else it waits whole, in the order of arrival. It leaves its slot when its END request is taken
for execution (direct) or has been answered (oldest), when nothing has come for ``max_sequence_idle_microseconds``, when
one of its waiting requests is cancelled, or when its instance dies (appendix C, S-050..S-072).

Differences from Triton, on purpose: a sequence whose request still runs is not idle, however long it runs; idle
sequences are freed at their time and not when a reaper looks; a request of a sequence that died with its instance is
told so (Triton asks for the START flag).
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from forebay.engine.repository.model_spec import DirectStrategy, OldestStrategy, SequenceBatchingSpec
from forebay.engine.scheduler.batch_messages import count_fitting
from forebay.engine.scheduler.batcher import Batcher, Decision, Reason
from forebay.engine.scheduler.line import DEADLINE_TEXT, NO_CHOICE, Choice, Refusal
from forebay.engine.scheduler.waiting import Waiting, WaitingParcel
from forebay.ipc.errors import Cancelled, InvalidArgument, ServingError, Unavailable, Unsupported, WorkerDied
from forebay.ipc.scheduler_messages import BatchingPolicy
from forebay.ipc.wire import SLOT_END, SLOT_START, Slot

#: Characters of a string correlation id at most (spec S-059).
CORRELATION_CHARACTERS_MAX = 128

#: Text for those who waited too long for a slot (spec S-068).
BACKLOG_TIMEOUT_TEXT = "timeout of the corresponding sequence has been expired"

#: How long a sequence that died with its instance is remembered, ns.
_LOST_MEMORY_NS = 600 * 1_000_000_000

#: Time between two warnings of one model, ns.
_WARNING_INTERVAL_NS = 1_000_000_000

#: Correlation ids that we assign (iterative sequences) begin here, out of the way of those that clients choose.
_FIRST_ASSIGNED_ID = 1 << 62


class _Sequence:
    """One sequence. In a slot, or in the backlog (``instance`` 0)."""

    __slots__ = ("expiry_ns", "has_end", "id", "instance", "is_assigned", "last_ns", "queue", "running", "slot")

    def __init__(self, correlation_id: int | str, *, is_assigned: bool) -> None:
        self.id = correlation_id
        #: True if the id is ours, and the request's head has none.
        self.is_assigned = is_assigned
        self.instance = 0
        self.slot = 0
        self.queue: deque[WaitingParcel] = deque()
        #: Requests handed to the worker and not answered; the oldest strategy has one at most.
        self.running = 0
        #: The END request has arrived: no request can follow.
        self.has_end = False
        self.last_ns = 0
        #: When waiting in the backlog ends; 0: never.
        self.expiry_ns = 0


class SequenceLine:
    """The sequences of one model version."""

    is_bound = True

    def __init__(
        self, model: str, policy: SequenceBatchingSpec, batching: BatchingPolicy, warn: Callable[[str], None]
    ) -> None:
        """Know no sequences yet.

        Args:
            warn: told of clients that do not end their sequences.
        """
        self._model = model
        self._warn = warn
        #: When we warned last.
        self._warned_ns = 0
        self._policy = policy
        self._idle_ns = policy.max_sequence_idle_us * 1000
        self._strategy = policy.strategy
        max_batch = max(batching.max_batch_size, 1)
        if isinstance(self._strategy, OldestStrategy):
            self._slots_each = max(self._strategy.max_candidate_sequences, 1)
            self._batcher = Batcher(
                BatchingPolicy(
                    max_batch_size=max_batch,
                    dynamic=True,
                    preferred_batch_sizes=self._strategy.preferred_batch_sizes,
                    max_queue_delay_us=self._strategy.max_queue_delay_us,
                )
            )
        else:
            self._slots_each = max_batch
        #: By instance: who is in each slot.
        self._slots: dict[int, list[_Sequence | None]] = {}
        #: Heap of (slot, order of the instance, instance).
        self._free: list[tuple[int, int, int]] = []
        self._orders: dict[int, int] = {}
        self._next_order = itertools.count()
        #: Instances that get no further sequences.
        self._draining: set[int] = set()
        #: Sequences that may get further requests.
        self._by_id: dict[int | str, _Sequence] = {}
        #: In the order in which they get slots.
        self._backlog: deque[_Sequence] = deque()
        #: Requests handed to workers: key to sequence.
        self._running: dict[tuple[int, int], _Sequence] = {}
        #: Sequences that died with their instance: id to when we forget them.
        self._lost: dict[int | str, int] = {}
        self._assigned_ids = itertools.count(_FIRST_ASSIGNED_ID)
        #: Nothing expires before; 0: nothing ever does.
        self._look_ns = 0
        self.request_count = 0

    @property
    def is_empty(self) -> bool:
        return not self.request_count and not self._running

    def __iter__(self) -> Iterator[Waiting]:
        for sequence in self._sequences():
            yield from sequence.queue

    # --- arrival ---

    def append(self, item: Waiting, now_ns: int) -> None:
        assert isinstance(item, WaitingParcel)
        if item.rows_each != 1:
            raise InvalidArgument(
                f"inference request to model '{self._model}' must specify batch-size 1 due to requirements of sequence "
                "batcher"
            )
        correlation_id, is_assigned = item.correlation_id, False
        if isinstance(correlation_id, str) and len(correlation_id) > CORRELATION_CHARACTERS_MAX:
            # UNSUPPORTED is Triton's choice.
            raise Unsupported(f"string correlation ID cannot be longer than {CORRELATION_CHARACTERS_MAX} characters")
        if not correlation_id:
            if not self._policy.iterative_sequence:
                raise InvalidArgument(
                    f"inference request to model '{self._model}' must specify a non-zero or non-empty correlation ID"
                )
            correlation_id, is_assigned = next(self._assigned_ids), True
            item.sequence_start = True
        sequence = self._by_id.get(correlation_id)
        if sequence is None:
            if not item.sequence_start:
                raise self._unknown(correlation_id)
            self._lost.pop(correlation_id, None)
            sequence = _Sequence(correlation_id, is_assigned=is_assigned)
            self._by_id[correlation_id] = sequence
            self._backlog.append(sequence)
        elif item.sequence_start:
            self._note_conflict(correlation_id, now_ns)
        sequence.queue.append(item)
        sequence.last_ns = now_ns
        self.request_count += 1
        if item.sequence_end or is_assigned:
            # The id is free again; what follows with it is another sequence.
            sequence.has_end = True
            del self._by_id[correlation_id]
        self._look_at(item.deadline_ns)
        if sequence.instance == 0 and item.timeout_us:
            expiry_ns = item.enqueue_ns + item.timeout_us * 1000
            sequence.expiry_ns = min(sequence.expiry_ns or expiry_ns, expiry_ns)
            self._look_at(sequence.expiry_ns)
        self._look_at(now_ns + self._idle_ns)
        self._fill_slots()

    def _note_conflict(self, correlation_id: int | str, now_ns: int) -> None:
        """Warn of a sequence that begins twice (spec S-056), not more often than it can be read."""
        if now_ns - self._warned_ns >= _WARNING_INTERVAL_NS:
            self._warned_ns = now_ns
            self._warn(
                f"sequence {correlation_id} for model '{self._model}' has a conflict. The previous sequence did not "
                "end before this sequence start. Previous sequence will be terminated early."
            )

    def _unknown(self, correlation_id: int | str) -> ServingError:
        if correlation_id in self._lost:
            return Unavailable(
                f"sequence {correlation_id} to model '{self._model}' has ended because the model instance that held it "
                "exited unexpectedly; start the sequence again"
            )
        return InvalidArgument(
            f"inference request for sequence {correlation_id} to model '{self._model}' must specify the START flag on "
            "the first request of the sequence"
        )

    # --- slots ---

    def add_instance(self, instance: int) -> None:
        order = self._orders[instance] = next(self._next_order)
        self._slots[instance] = [None] * self._slots_each
        for slot in range(self._slots_each):
            heapq.heappush(self._free, (slot, order, instance))
        self._fill_slots()

    def drain_instance(self, instance: int) -> None:
        """Let the instance finish the sequences that it has, and give it no further ones (spec S-072)."""
        self._draining.add(instance)
        self._take_free_slots(instance)

    def holds_sequences(self, instance: int) -> bool:
        """Whether an instance has sequences that have not ended."""
        return any(sequence is not None for sequence in self._slots.get(instance, ()))

    def _take_free_slots(self, instance: int) -> None:
        self._free = [entry for entry in self._free if entry[2] != instance]
        heapq.heapify(self._free)

    def remove_instance(self, instance: int, now_ns: int) -> list[Refusal]:
        slots = self._slots.pop(instance, [])
        self._orders.pop(instance, None)
        self._draining.discard(instance)
        self._take_free_slots(instance)
        refusals: list[Refusal] = []
        gone = {id(sequence): sequence for sequence in slots if sequence is not None}
        # The direct strategy frees a slot while the END request still runs.
        gone.update((id(sequence), sequence) for sequence in self._running.values() if sequence.instance == instance)
        for sequence in gone.values():
            self._forget_id(sequence)
            self._lost[sequence.id] = now_ns + _LOST_MEMORY_NS
            refusals += [Refusal(item, self._unknown(sequence.id)) for item in sequence.queue]
            self.request_count -= len(sequence.queue)
            sequence.queue.clear()
        self._running = {key: sequence for key, sequence in self._running.items() if sequence.instance != instance}
        return refusals

    def lost_error(self, item: WaitingParcel) -> WorkerDied:
        """Return the error for a request that ran on an instance that died: it cannot be tried elsewhere."""
        return WorkerDied(
            f"the instance of model '{self._model}' that held sequence {item.correlation_id} exited unexpectedly while "
            "it ran the request; start the sequence again"
        )

    def _fill_slots(self) -> None:
        while self._backlog and self._free:
            sequence = self._backlog.popleft()
            slot, _order, instance = heapq.heappop(self._free)
            sequence.instance, sequence.slot = instance, slot
            sequence.expiry_ns = 0
            self._slots[instance][slot] = sequence

    def _free_slot(self, sequence: _Sequence) -> None:
        slots = self._slots.get(sequence.instance)
        if slots is None or slots[sequence.slot] is not sequence:
            return
        slots[sequence.slot] = None
        if sequence.instance not in self._draining:
            heapq.heappush(self._free, (sequence.slot, self._orders[sequence.instance], sequence.instance))
        self._fill_slots()

    def _forget_id(self, sequence: _Sequence) -> None:
        if self._by_id.get(sequence.id) is sequence:
            del self._by_id[sequence.id]

    # --- batches ---

    def choose(self, instance: int, now_ns: int) -> Choice:
        slots = self._slots.get(instance)
        if slots is None:
            return NO_CHOICE
        heads = [sequence for sequence in slots if sequence is not None and sequence.queue]
        if isinstance(self._strategy, OldestStrategy):
            return self._choose_oldest(heads, now_ns)
        return self._choose_direct(self._strategy, heads, now_ns)

    def _choose_oldest(self, heads: list[_Sequence], now_ns: int) -> Choice:
        ready = sorted((s for s in heads if not s.running), key=lambda sequence: sequence.queue[0].enqueue_ns)
        decision = self._batcher.decide((sequence.queue[0] for sequence in ready), now_ns)
        return self._take(decision, ready[: decision.requests])

    def _choose_direct(self, strategy: DirectStrategy, heads: list[_Sequence], now_ns: int) -> Choice:
        if not heads:
            return NO_CHOICE
        oldest_ns = min(sequence.queue[0].enqueue_ns for sequence in heads)
        delay_ns = strategy.max_queue_delay_us * 1000
        reason = Reason.IDLE
        if strategy.minimum_slot_utilization > 0 and delay_ns:
            reason = Reason.SLOTS
            if len(heads) / self._slots_each < strategy.minimum_slot_utilization:
                if now_ns - oldest_ns < delay_ns:
                    return Choice(Decision(0, Reason.WAIT, oldest_ns + delay_ns))
                reason = Reason.DELAY
        # Slots of another shape wait for the next execution (S-070); the oldest request decides whose turn it is.
        shape = next(s.queue[0].shape_key for s in heads if s.queue[0].enqueue_ns == oldest_ns)
        alike = [sequence for sequence in heads if sequence.queue[0].shape_key == shape]
        if len(alike) < len(heads):
            reason = Reason.SHAPE
        return self._take(Decision(len(alike), reason), alike)

    def _take(self, decision: Decision, chosen: Sequence[_Sequence]) -> Choice:
        if not chosen:
            return Choice(decision)
        fitting = count_fitting([sequence.queue[0] for sequence in chosen])
        if fitting < len(chosen):
            chosen = chosen[:fitting]
            decision = Decision(fitting, Reason.MESSAGE)
        items: list[WaitingParcel] = []
        slots: list[Slot] = []
        for sequence in chosen:
            item = sequence.queue.popleft()
            self.request_count -= 1
            sequence.running += 1
            self._running[item.key] = sequence
            flags = SLOT_START * item.sequence_start | SLOT_END * item.sequence_end
            slots.append(Slot(sequence.slot, flags, int(sequence.id) if sequence.is_assigned else 0))
            items.append(item)
            if isinstance(self._strategy, DirectStrategy) and sequence.has_end and not sequence.queue:
                self._free_after_end(sequence)
        return Choice(decision, items, slots)

    def _free_after_end(self, sequence: _Sequence) -> None:
        if not self._policy.iterative_sequence:
            self._free_slot(sequence)

    def answered(self, items: Iterable[Waiting], now_ns: int) -> None:
        for item in items:
            assert isinstance(item, WaitingParcel)
            sequence = self._running.pop(item.key, None)
            if sequence is None:
                continue
            sequence.running -= 1
            sequence.last_ns = now_ns
            if sequence.has_end and not sequence.queue and not sequence.running:
                self._free_slot(sequence)
        self._look_at(now_ns + self._idle_ns)

    def reschedule(self, item: WaitingParcel, now_ns: int) -> bool:
        """The model wants a request again (spec S-060); False if its sequence is gone."""
        sequence = self._running.pop(item.key, None)
        if sequence is None or sequence.instance not in self._slots:
            return False
        sequence.running -= 1
        sequence.last_ns = now_ns
        item.sequence_start = False
        item.enqueue_ns = now_ns
        sequence.queue.appendleft(item)
        self.request_count += 1
        return True

    # --- the end of waiting ---

    def _look_at(self, at_ns: int) -> None:
        if at_ns and (self._look_ns == 0 or at_ns < self._look_ns):
            self._look_ns = at_ns

    def next_expiry_ns(self) -> int:
        return self._look_ns

    def expire(self, now_ns: int) -> list[Refusal]:
        if not self._look_ns or self._look_ns > now_ns:
            return []
        self._look_ns = 0
        self._lost = {correlation_id: until_ns for correlation_id, until_ns in self._lost.items() if until_ns > now_ns}
        refusals: list[Refusal] = []
        for sequence in list(self._sequences()):
            if sequence.expiry_ns and sequence.expiry_ns <= now_ns:
                refusals += self._end(sequence, Unavailable(BACKLOG_TIMEOUT_TEXT))
            elif any(item.deadline_ns and item.deadline_ns <= now_ns for item in sequence.queue):
                refusals += self._end(sequence, Cancelled(DEADLINE_TEXT))
            elif not sequence.queue and not sequence.running:
                if sequence.last_ns + self._idle_ns <= now_ns:
                    self._end(sequence, Unavailable(""))
                else:
                    self._look_at(sequence.last_ns + self._idle_ns)
            else:
                self._look_at(sequence.expiry_ns)
                for item in sequence.queue:
                    self._look_at(item.deadline_ns)
        return refusals

    def _sequences(self) -> Iterator[_Sequence]:
        for slots in self._slots.values():
            yield from (sequence for sequence in slots if sequence is not None)
        yield from self._backlog

    def _end(self, sequence: _Sequence, error: ServingError) -> list[Refusal]:
        """Refuse everything that waits of a sequence, and free its slot unless something of it still runs."""
        refusals = [Refusal(item, error) for item in sequence.queue]
        self.request_count -= len(sequence.queue)
        sequence.queue.clear()
        sequence.has_end = True
        self._forget_id(sequence)
        if sequence.instance == 0:
            if sequence in self._backlog:
                self._backlog.remove(sequence)
        elif not sequence.running:
            self._free_slot(sequence)
        return refusals

    def remove_tokens(self, producer: int, tokens: Collection[int]) -> Sequence[Waiting]:
        return self._end_those_with(lambda item: item.producer == producer and item.token in tokens)

    def remove_rows(self, producer: int, base: int, firsts: Collection[int]) -> Sequence[Waiting]:
        return ()

    def remove_producer(self, producer: int) -> Sequence[Waiting]:
        ended = self._end_those_with(lambda item: item.producer == producer)
        return [item for item in ended if item.producer != producer]

    def _end_those_with(self, is_meant: Callable[[WaitingParcel], bool]) -> list[Waiting]:
        # One cancelled request leaves a hole that the rest of its sequence cannot be run over (S-069).
        removed: list[Waiting] = []
        for sequence in list(self._sequences()):
            if any(is_meant(item) for item in sequence.queue):
                removed += [refusal.item for refusal in self._end(sequence, Cancelled(""))]
        return removed

    def clear(self) -> list[Waiting]:
        return self._end_those_with(lambda _item: True)
