"""Parcels in flight and their answers."""

from __future__ import annotations

import time
from collections.abc import Container
from typing import TYPE_CHECKING

import msgspec

from forebay.frontend.data_plane.owners import ParcelOwner
from forebay.frontend.data_plane.recovery import ATTEMPTS_MAX, gave_up
from forebay.ipc.counters import ProducerCounter as Count
from forebay.ipc.counting import count_answered, count_failure
from forebay.ipc.ensemble.device_rooms import bytes_without_room, lent_rooms
from forebay.ipc.errors import BackendFailed, Cancelled, Code, Internal, ServingError, WorkerDied, from_wire
from forebay.ipc.messages import ParcelSubmit, ReplyHead
from forebay.ipc.wire import FLAG_FINAL, GROW, HEADER, REPLY, TIMES_END, TOKEN, Kind

if TYPE_CHECKING:
    from forebay.frontend.data_plane.route_client import RouteClient
    from forebay.frontend.engine_client import EngineClient

_encode = msgspec.msgpack.Encoder().encode


class ParcelInFlight:
    """A parcel in flight."""

    __slots__ = ("has_responses", "last_response_ns", "owner", "route", "submit")

    def __init__(self, route: RouteClient, submit: ParcelSubmit, owner: ParcelOwner) -> None:
        self.route = route
        self.submit = submit
        self.owner = owner
        #: The client has part of the answer: the request cannot be tried again.
        self.has_responses = False
        #: When the worker sent the last of them; kept for statistics of responses only.
        self.last_response_ns = 0


class ParcelsInFlight:
    """Every parcel that was handed over and has no final answer, by its token."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._in_flight: dict[int, ParcelInFlight] = {}
        self._decode_reply = msgspec.msgpack.Decoder(ReplyHead).decode

    def __len__(self) -> int:
        return len(self._in_flight)

    def routes(self) -> set[RouteClient]:
        """Return the routes that parcels were handed to."""
        return {parcel.route for parcel in self._in_flight.values()}

    def expect(self, route: RouteClient, submit: ParcelSubmit, owner: ParcelOwner) -> None:
        """A parcel is about to be handed over."""
        self._in_flight[submit.token] = ParcelInFlight(route, submit, owner)

    def reply(self, message: memoryview, flags: int, instance: int) -> None:
        """Take in a PARCEL_REPLY message."""
        (token,) = TOKEN.unpack_from(message, TIMES_END)
        self._take(token, flags, message[TIMES_END + TOKEN.size :], instance)

    def replies(self, message: memoryview, count: int, instance: int) -> None:
        """Take in a PARCEL_REPLIES message."""
        offset = TIMES_END
        for _ in range(count):
            token, flags, head_bytes = REPLY.unpack_from(message, offset)
            offset += REPLY.size
            self._take(token, flags, message[offset : offset + head_bytes], instance)
            offset += head_bytes

    def _take(self, token: int, flags: int, head: memoryview, instance: int) -> None:
        parcel = self._in_flight.get(token)
        final = bool(flags & FLAG_FINAL)
        if parcel is not None:
            try:
                reply = self._decode_reply(head)
                for place in reply.outputs:
                    if not place.memory:
                        self._engine.arena.check(place.offset, place.byte_size)
            except (msgspec.DecodeError, msgspec.ValidationError, Internal):
                reply = ReplyHead(code=int(Code.INTERNAL), text="the model's answer could not be read")
                final = True
            if reply.needs_bytes:
                self._lend(parcel, token, reply, instance)
            else:
                if parcel.route.details is not None and instance:
                    times = self._engine.reply_times()
                    submit = parcel.submit
                    parcel.route.details.responded(reply, times, parcel.last_response_ns, submit.enqueue_ns)
                    parcel.last_response_ns = times.end_ns
                parcel.has_responses = True
                if final:
                    del self._in_flight[token]
                self._answer(parcel, reply, final=final, ran=instance != 0)
        if final:
            self._engine.grants.parcel_ended(instance, token)

    def _answer(self, parcel: ParcelInFlight, reply: ReplyHead, *, final: bool, ran: bool) -> None:
        order = parcel.route.order
        if order is None:
            self._give_answer(parcel, reply, final=final, ran=ran)
            return
        times = self._engine.reply_times()

        def give() -> None:
            self._engine.held_times = times
            try:
                self._give_answer(parcel, reply, final=final, ran=ran)
            finally:
                self._engine.held_times = None

        order.answer(parcel.submit.token, give, final=final)

    def _give_answer(self, parcel: ParcelInFlight, reply: ReplyHead, *, final: bool, ran: bool) -> None:
        if final:
            self._count(parcel, reply, ran=ran)
        parcel.owner.parcel_reply(reply, final=final, ran=ran)
        parcel.route.write_counters()

    def _count(self, parcel: ParcelInFlight, reply: ReplyHead, *, ran: bool) -> None:
        counters = parcel.route.counters
        elapsed_ns = time.monotonic_ns() - parcel.submit.enqueue_ns
        if reply.text:
            count_failure(counters, from_wire(reply.code, reply.text), 1, elapsed_ns, ran=ran)
            return
        count_answered(counters, 1, elapsed_ns)
        details = parcel.route.details
        if details is not None:
            details.answered(1, elapsed_ns, parcel.submit.enqueue_ns, self._engine.reply_times() if ran else None)

    def _lend(self, parcel: ParcelInFlight, token: int, reply: ReplyHead, instance: int) -> None:
        byte_size, lent = reply.needs_bytes, b""
        bell = self._engine.grants.bell_of(instance)
        try:
            if bell is None:
                raise WorkerDied("the model instance is gone")
            if reply.needs_rooms:
                rooms = parcel.owner.lend_rooms(reply.needs_rooms)
                byte_size += bytes_without_room(reply.needs_rooms, rooms)
                lent = _encode(lent_rooms(rooms))
            offset = parcel.owner.lend(byte_size)
        except ServingError as error:
            self.fail(token, error)
            self._engine.cancel(token)
            return
        header = HEADER.pack(Kind.COLLECT, 0, 1, self._engine.producer, 0)
        bell.ring(header + GROW.pack(token, offset, byte_size) + lent)

    def fail(self, token: int, error: ServingError) -> None:
        """Answer a parcel with an error of ours, if it is still in flight."""
        parcel = self._in_flight.pop(token, None)
        if parcel is not None:
            reply = ReplyHead(code=int(error.code), text=error.text)
            self._answer(parcel, reply, final=True, ran=isinstance(error, BackendFailed | WorkerDied))

    def withdraw(self, token: int) -> bool:
        """Answer a parcel that nobody waits for any more, if it has not been sent; False: somebody has it."""
        parcel = self._in_flight.get(token)
        if parcel is None or not parcel.route.withdraw_parcel(parcel.submit):
            return False
        self.fail(token, Cancelled("request was cancelled"))
        return True

    def lost(self, token: int, *, is_hung: bool) -> None:
        """The worker that had the parcel is gone: hand it in again, unless that was tried or part of it is answered."""
        parcel = self._in_flight.get(token)
        if parcel is None:
            return
        submit = parcel.submit
        if parcel.has_responses and not is_hung:
            self.fail(
                token,
                WorkerDied(
                    f"an instance of model '{parcel.route.entry.name}' ended unexpectedly before its last response"
                ),
            )
            return
        if is_hung or submit.attempt >= ATTEMPTS_MAX or parcel.route.is_retired:
            self.fail(token, gave_up(parcel.route.entry.name, is_hung=is_hung))
            return
        parcel.route.counters[Count.RESUBMITTED] += 1
        again = msgspec.structs.replace(submit, attempt=submit.attempt + 1)
        parcel.route.submit_parcel(again, parcel.owner)

    def resubmit_except(self, exempt: Container[int]) -> None:
        """Hand in again every parcel but these, to a new scheduler; one with part of its answer is lost."""
        for token, parcel in list(self._in_flight.items()):
            if token in exempt:
                continue
            if parcel.has_responses:
                self.lost(token, is_hung=False)
            else:
                parcel.route.submit_parcel(parcel.submit, parcel.owner)
