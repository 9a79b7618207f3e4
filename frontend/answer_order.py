"""Answers in the order of their requests, for models with ``preserve_ordering`` (spec S-024).

Several instances finish in any order; whoever asked first is answered first. Order is kept per frontend process:
between two of them nobody could tell. What is held stays in shared memory, where its requests have their room anyway.
"""

from __future__ import annotations

from collections.abc import Callable


class AnswerOrder:
    """The requests of one model version in the order of their submission."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        #: Token to the answers that wait for earlier requests: how to give each, and whether it is the last.
        self._held: dict[int, list[tuple[Callable[[], None], bool]]] = {}

    def expect(self, token: int) -> None:
        """A request was submitted; again after a loss, it keeps its place."""
        self._held.setdefault(token, [])

    def answer(self, token: int, give: Callable[[], None], *, final: bool) -> None:
        """Give an answer when it is its turn, and then those that waited for it."""
        held = self._held
        if next(iter(held), token) != token:
            held[token].append((give, final))
            return
        give()
        if final:
            held.pop(token, None)
            self._give_held()

    def _give_held(self) -> None:
        while self._held:
            token = next(iter(self._held))
            answers = self._held[token]
            while answers:
                give, final = answers.pop(0)
                give()
                if final:
                    del self._held[token]
                    break
            else:
                return
