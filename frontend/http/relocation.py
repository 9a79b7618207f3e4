"""Connections of quiet models get a frontend process of their own while another model is crowded.

Requests of a quiet model pass those of a crowded one (:mod:`.express`), but in one process they wait for each other's
work all the same. So a frontend that has a crowd asks for a *quiet frontend*, which listens nowhere, and hands it over
the connections whose requests go to other models: their sockets, by way of the supervisor, at moments at which nothing
is asked on them. The client notices nothing. Should the quiet frontend have a crowd itself, it hands that back.

Measured on the development machine (``python -m bench.isolation``): 99th percentile of a quiet model beside a saturated
tiny one 995 -> 342 to 690 us, depending on the hour, beside one that computes all the time 934 -> 207 to 590 us. Being
less nice, where it may, brings the quiet frontend another 345 -> 236 us beside a tiny one (medians of 12 rounds by
turns, same server, asked by a real-time client).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket

    from forebay.frontend.frontend_process import FrontendProcess
    from forebay.frontend.http.connection import Connection
    from forebay.frontend.http.server import HttpFrontend

#: Reviews in a row that find a connection in the wrong place, before it is handed over: 0.15 s; ...
_REVIEWS = 3
#: ... those are no longer in a row that are so many seconds apart.
_APART_S = 0.5
#: Connections that one review hands over: each costs a few system calls here, and the supervisor the same.
_MOVES_MAX = 8
#: Seconds between two times that the supervisor is told of the crowds.
_TELL_S = 0.25
#: Seconds that a connection stays at least with the quiet frontend, and with one that it was sent back to: it is of a
#: crowd where many come together, which may be none where few do.
_STAY_QUIET_S, _STAY_S = 1.0, 30.0


class Relocation:
    """Of one HTTP frontend."""

    def __init__(self, process: FrontendProcess, frontend: HttpFrontend) -> None:
        """Hand over, and take, from now on."""
        self._process = process
        self._frontend = frontend
        self._is_quiet = process.start.is_quiet
        #: Connections in the wrong place, and how many reviews in a row have found them there.
        self._misplaced: dict[Connection, int] = {}
        self._reviewed_s = 0.0
        #: When to tell the supervisor of the crowds again.
        self._telling_s = 0.0
        self._arrivals: set[asyncio.Task[None]] = set()
        frontend.hand_over = process.hand_over
        frontend.express.on_review = self._review
        frontend.express.crowd = set() if self._is_quiet else None
        process.take_connections(self._take)

    def _review(self) -> None:
        now_s = time.monotonic()
        if now_s - self._reviewed_s > _APART_S:
            self._misplaced.clear()
        self._reviewed_s = now_s
        if not self._frontend.engine.crowded_routes or self._frontend.is_draining:
            self._misplaced.clear()
            return
        self._tell_crowds(now_s)
        if self._process.is_quiet_wanted and not self._process.is_quiet_open:
            return
        before = self._misplaced
        self._misplaced = {connection: before.get(connection, 0) + 1 for connection in self._find_misplaced()}
        ready = [connection for connection, reviews in self._misplaced.items() if reviews >= _REVIEWS]
        if ready and not (self._is_quiet or self._process.is_quiet_open):
            self._process.want_quiet()
            return
        moves = 0
        for connection in ready:
            if connection.stays_until_s <= now_s and connection.leave():
                moves += 1
                if moves == _MOVES_MAX:
                    break

    def _tell_crowds(self, now_s: float) -> None:
        if now_s >= self._telling_s:
            self._telling_s = now_s + _TELL_S
            self._process.tell_crowds(tuple(crowded.route for crowded in self._frontend.engine.crowded_routes))

    def _find_misplaced(self) -> Collection[Connection]:
        express = self._frontend.express
        return express.quiet_connections if express.crowd is None else express.crowd

    def _take(self, sock: socket.socket) -> None:
        if self._is_quiet and self._frontend.is_full:
            self._process.hand_over(sock.fileno())
            sock.close()
            return
        arrival = asyncio.get_running_loop().create_task(self._open(sock))
        self._arrivals.add(arrival)
        arrival.add_done_callback(self._arrivals.discard)

    async def _open(self, sock: socket.socket) -> None:
        try:
            _transport, connection = await asyncio.get_running_loop().connect_accepted_socket(
                self._frontend.connection, sock
            )
        except OSError:
            sock.close()  # The client has left meanwhile.
            return
        connection.stays_until_s = time.monotonic() + (_STAY_QUIET_S if self._is_quiet else _STAY_S)
        if self._frontend.is_draining:
            connection.close_if_idle()
