"""The models that a connection has opened. The connection's lock is held in every call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from forebay.client.counting import RequestCounts, block_bytes
from forebay.client.door import Door, OpenedModel
from forebay.client.grants import Grants
from forebay.client.memory import Memory
from forebay.client.opened import Opened
from forebay.client.submissions import Submissions
from forebay.ipc.errors import ArenaFull, NotReady, ServingError

#: Name, wanted version (0: the newest), namespace ("": any).
Key = tuple[str, int, str]


class Models:
    """By what was asked for."""

    def __init__(self, door: Door, memory: Memory, grants: Grants, submissions: Submissions) -> None:
        self._door = door
        self._memory = memory
        self._grants = grants
        self._submissions = submissions
        self._by_key: dict[Key, Opened] = {}
        #: Blocks that the server may still look at, though requests to these versions are not counted any more.
        self._former_counts: list[RequestCounts] = []

    def __iter__(self) -> Iterator[Opened]:
        return iter(self._by_key.values())

    def get(self, key: Key) -> Opened | None:
        return self._by_key.get(key)

    def open(self, key: Key) -> Opened:
        """Return a model, asking the server for it if need be.

        Raises:
            ServingError: there is none.
        """
        model = self._by_key.get(key)
        return self.add(key, self._door.open_model(*key)) if model is None else model

    def add(self, key: Key, found: OpenedModel) -> Opened:
        """Keep what the door has answered."""
        model = self._by_key.get(key)
        if model is None:
            model = self._by_key[key] = Opened(key, found)
            self._count(model)
        else:
            # Another thread was faster; the worker serves the newest ring.
            model.close_rings()
            model.rings = dict(found.rings)
        self._submissions.announce_rings(found.rings)
        self.take_news()
        return model

    def on_route(self, route: int) -> Opened | None:
        """Return the model that is served by a route."""
        return next((model for model in self if model.route == route), None)

    def take_news(self) -> None:
        """Keep the rings to workers that were started since."""
        news = self._door.news
        while news:
            route, instance, ring = news.popleft()
            model = self.on_route(route)
            if model is None:
                ring.close()
                continue
            if (old := model.rings.pop(instance, None)) is not None:
                old.close()
            model.rings[instance] = ring
            self._submissions.announce_rings([instance])

    def reopen(self, model: Opened, error: ServingError) -> None:
        """The route is not served any more: follow the model to its new one.

        Raises:
            NotReady: there is none; with the text of ``error``.
            ServingError: the server's answer.
        """
        found = self._door.open_model(*model.key)
        if found.route == model.route:
            for ring in found.rings.values():
                ring.close()
            raise NotReady(error.text)
        self._follow(model, found)

    def _follow(self, model: Opened, found: OpenedModel) -> None:
        former_route = model.route
        self._door.gone.discard(former_route)
        self._grants.drop_all(model)
        self._memory.retire(model.replace(found))
        self._submissions.announce_rings(found.rings)
        if model.route != former_route:
            self._count(model)

    def _count(self, model: Opened) -> None:
        """Have requests to the version counted from now on; without room for it they are not."""
        if model.counts is not None:
            self._former_counts.append(model.counts)
        model.counts = None
        with contextlib.suppress(ArenaFull):
            lease = self._memory.loan_block(block_bytes(model.entry))
            model.counts = RequestCounts(self._memory.view, lease, model.entry)
            self._door.tell_counts(model.route, lease.offset)

    def refresh(self, model: Opened) -> None:
        """Follow a model to its newer version, or an ensemble that was loaded anew, if the door has told of one.

        Raises:
            ServingError: it is not served any more.
        """
        if model.route in self._door.gone:
            self._follow(model, self._door.open_model(*model.key))
