"""The response cache: answers to requests that are equal in everything that a model can see (spec 6.10, L-008, L-009).

One per frontend process; together they are as large as ``--cache-config local,size=`` says. Values lie in the
frontend's arena, so a hit is written to the client's socket, or read by an ensemble's next step, from where it is kept,
and costs no worker. The least recently used go first.

Not as in Triton: the key covers datatypes, shapes, requested outputs and parameters, with 128 bits of a cryptographic
hash; response parameters are kept; a reloaded model starts anew, since the key names the loaded version and not its
number; and equal requests that arrive while the first one runs wait for its answer (S-171, S-172, S-176, S-177).
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec

from forebay.frontend.data_plane.route_client import RouteClient
from forebay.frontend.engine_client import EngineClient
from forebay.frontend.inference import OutputView, RequestMeta
from forebay.ipc.arena import align
from forebay.ipc.counters import CacheCounter
from forebay.ipc.counters import ProducerCounter as Count
from forebay.ipc.counting import count_answered
from forebay.ipc.errors import ArenaFull
from forebay.ipc.log import log
from forebay.ipc.messages import ParameterValue

#: Bytes that an entry is reckoned with besides its tensors, so that empty answers are not for nothing.
ENTRY_BYTES = 512

_encode = msgspec.msgpack.Encoder().encode


class KeyInput(NamedTuple):
    """One input of a request, for its key."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: memoryview | bytes


def request_key(route: int, meta: RequestMeta, inputs: Iterable[KeyInput]) -> bytes:
    """Return 16 bytes that are equal for requests that a model cannot tell apart, but for their ids.

    Args:
        route: number of the loaded model version.
    """
    ordered = sorted(inputs, key=lambda tensor: tensor.name)
    described = [(tensor.name, tensor.datatype, tensor.shape, len(tensor.data)) for tensor in ordered]
    sequence = (meta.sequence_id, meta.sequence_start, meta.sequence_end)
    # The lengths stand in the head, so no two requests give the same bytes.
    head = _encode((route, sorted(set(meta.outputs)), sorted(meta.parameters.items()), sequence, described))
    digest = hashlib.blake2b(len(head).to_bytes(8, "little") + head, digest_size=16)
    for tensor in ordered:
        digest.update(tensor.data)
    return digest.digest()


class CachedOutput(NamedTuple):
    """One output in an entry's block."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    offset: int
    byte_size: int


class CacheEntry:
    """One answer. Its block is freed when it has been evicted and nobody reads it any more."""

    __slots__ = ("_engine", "_users", "block_bytes", "offset", "outputs", "parameters", "route")

    def __init__(
        self,
        route: RouteClient,
        outputs: Sequence[OutputView],
        parameters: Mapping[str, ParameterValue],
        block_bytes: int,
    ) -> None:
        """Copy an answer.

        Raises:
            ArenaFull: there is no room.
        """
        engine = route.engine
        self.route = route.route
        self.parameters = dict(parameters)
        self.block_bytes = block_bytes
        self.offset = offset = engine.allocate(block_bytes)
        self._engine = engine
        self._users = 1
        places: list[CachedOutput] = []
        for view in outputs:
            size = len(view.data)
            engine.view[offset : offset + size] = view.data
            places.append(CachedOutput(view.name, view.datatype, view.shape, offset, size))
            offset += align(size)
        self.outputs = tuple(places)

    def views(self) -> tuple[OutputView, ...]:
        """Return the outputs; valid while the entry is held."""
        memory = self._engine.view
        return tuple(
            OutputView(place.name, place.datatype, place.shape, memory[place.offset : place.offset + place.byte_size])
            for place in self.outputs
        )

    def hold(self) -> None:
        self._users += 1

    def release(self) -> None:
        self._users -= 1
        if self._users == 0:
            self._engine.free(self.offset, self.block_bytes)


class Waiter(Protocol):
    """A request that equals one that runs already."""

    def leader_answered(self, outputs: Sequence[OutputView], parameters: Mapping[str, ParameterValue]) -> None:
        """The answer; views are valid during the call only."""
        ...

    def leader_failed(self) -> None:
        """There is none: run by yourself."""
        ...


class ResponseCache:
    """All entries of one frontend. Used in its event loop only."""

    def __init__(self, engine: EngineClient, size_bytes: int, counters: memoryview) -> None:
        """Start empty.

        Args:
            size_bytes: of all entries at most.
            counters: uint64 [CACHE_WORDS], this frontend's block.
        """
        self.size_bytes = size_bytes
        self._engine = engine
        self._entries: OrderedDict[bytes, CacheEntry] = OrderedDict()
        self._used_bytes = 0
        #: Keys of requests that run, to those that wait for their answers.
        self._running: dict[bytes, list[Waiter]] = {}
        self._counters = counters
        counters[CacheCounter.SIZE_BYTES] = size_bytes
        counters[CacheCounter.ENTRIES] = counters[CacheCounter.USED_BYTES] = 0

    @property
    def entry_count(self) -> int:
        return len(self._entries)

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    # --- entries ---

    def find(self, key: bytes, route: RouteClient, began_ns: int) -> CacheEntry | None:
        """Return an entry, now the most recently used one, and count the look-up.

        Args:
            began_ns: when the key began to be computed.
        """
        entry = self._entries.get(key)
        elapsed_ns = time.monotonic_ns() - began_ns
        counters = self._counters
        counters[CacheCounter.LOOKUPS] += 1
        counters[CacheCounter.LOOKUP_NS] += elapsed_ns
        if entry is None:
            counters[CacheCounter.MISSES] += 1
            route.counters[Count.CACHE_MISSES] += 1
            route.counters[Count.CACHE_MISS_NS] += elapsed_ns
            if route.details is not None:
                route.details.looked_up(elapsed_ns, is_hit=False)
            return None
        self._entries.move_to_end(key)
        self.count_hit(route, elapsed_ns)
        return entry

    def count_hit(self, route: RouteClient, elapsed_ns: int) -> None:
        """Count a request that needed no execution; it is a success like any other (spec S-174, H-238)."""
        self._counters[CacheCounter.HITS] += 1
        counters = route.counters
        counters[Count.CACHE_HITS] += 1
        counters[Count.CACHE_HIT_NS] += elapsed_ns
        count_answered(counters, 1, elapsed_ns)
        if route.details is not None:
            route.details.answered(1, elapsed_ns)
            route.details.looked_up(elapsed_ns, is_hit=True)
        route.write_counters()

    def insert(
        self,
        key: bytes,
        route: RouteClient,
        outputs: Sequence[OutputView],
        parameters: Mapping[str, ParameterValue],
    ) -> None:
        """Keep an answer; one that is larger than the whole cache is not kept (spec S-173)."""
        began_ns = time.monotonic_ns()
        block_bytes = sum(align(len(view.data)) for view in outputs)
        needed_bytes = block_bytes + ENTRY_BYTES
        if needed_bytes > self.size_bytes:
            log.verbose(
                1,
                f"response of model '{route.entry.name}' is not cached: {needed_bytes} bytes are more than the cache's "
                f"{self.size_bytes}",
            )
            return
        if key in self._entries or route.is_retired:
            return
        while self._used_bytes + needed_bytes > self.size_bytes:
            self._evict(next(iter(self._entries)))
            self._counters[CacheCounter.EVICTIONS] += 1
        try:
            entry = CacheEntry(route, outputs, parameters, max(block_bytes, 1))
        except ArenaFull:
            return  # Requests in flight need the room more.
        route.copied_out_bytes += sum(len(view.data) for view in outputs)
        self._entries[key] = entry
        self._used_bytes += needed_bytes
        elapsed_ns = time.monotonic_ns() - began_ns
        self._counters[CacheCounter.INSERTION_NS] += elapsed_ns
        route.counters[Count.CACHE_MISS_NS] += elapsed_ns
        self._write_sizes()

    def _evict(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        self._used_bytes -= sum(align(place.byte_size) for place in entry.outputs) + ENTRY_BYTES
        entry.release()

    def forget_retired(self) -> None:
        """Drop the answers of model versions that are no longer loaded."""
        alive = self._engine.routes
        for key in [key for key, entry in self._entries.items() if entry.route not in alive]:
            self._evict(key)
        self._write_sizes()

    def _write_sizes(self) -> None:
        self._counters[CacheCounter.ENTRIES] = len(self._entries)
        self._counters[CacheCounter.USED_BYTES] = self._used_bytes

    # --- equal requests at the same time ---

    def join(self, key: bytes, waiter: Waiter) -> bool:
        """Wait for an equal request that runs already; False: there is none, and the caller now is that request."""
        waiting = self._running.get(key)
        if waiting is None:
            self._running[key] = []
            return False
        waiting.append(waiter)
        return True

    def leave(self, key: bytes, waiter: Waiter) -> None:
        """Wait no longer."""
        waiting = self._running.get(key)
        if waiting is not None and waiter in waiting:
            waiting.remove(waiter)

    def answered(self, key: bytes, outputs: Sequence[OutputView], parameters: Mapping[str, ParameterValue]) -> None:
        """The running request has this answer: give it to all that wait."""
        for waiter in self._running.pop(key, ()):
            waiter.leader_answered(outputs, parameters)

    def failed(self, key: bytes) -> None:
        """The running request has no answer: those that wait run by themselves, the next of them first."""
        for waiter in self._running.pop(key, ()):
            waiter.leader_failed()
