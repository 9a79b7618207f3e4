"""Which sequences a connection is kept for while the server stops (spec R-112)."""

from __future__ import annotations

import time

import pytest

from forebay.frontend.codec.infer_request import ParsedInfer
from forebay.frontend.http.open_sequences import OpenSequences
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.errors import Unavailable

ENTRY = ModelEntry("m", 1, "READY", route=3, sequence_idle_us=60_000_000)


def request(sequence_id: int | str, **flags: bool) -> ParsedInfer:
    return ParsedInfer(id="", inputs=(), outputs=(), sequence_id=sequence_id, **flags)


def goes_on(sequences: OpenSequences, sequence_id: int | str, **flags: bool) -> bool:
    try:
        sequences.check_goes_on(ENTRY, request(sequence_id, **flags))
    except Unavailable:
        return False
    return True


def test_a_sequence_goes_on_until_its_end() -> None:
    sequences = OpenSequences()
    sequences.asked(ENTRY, request("a", sequence_start=True))
    assert sequences
    assert goes_on(sequences, "a")
    assert goes_on(sequences, "a", sequence_end=True)
    assert not goes_on(sequences, "a", sequence_start=True)
    assert not goes_on(sequences, "b")
    sequences.asked(ENTRY, request("a", sequence_end=True))
    assert not sequences


def test_a_request_that_failed_begins_none() -> None:
    sequences = OpenSequences()
    for sequence_id in (1, 2):
        sequences.asked(ENTRY, request(sequence_id, sequence_start=True))
    sequences.answered(ENTRY, request(1), has_failed=True)
    sequences.answered(ENTRY, request(2), has_failed=False)
    assert not goes_on(sequences, 1)
    assert goes_on(sequences, 2)


def test_idle_time_counts_from_the_last_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [1_000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    sequences = OpenSequences()
    sequences.asked(ENTRY, request(1, sequence_start=True))
    now_s[0] += 50
    sequences.answered(ENTRY, request(1), has_failed=False)
    now_s[0] += 59
    assert sequences
    now_s[0] += 2
    assert not sequences


def test_a_client_cannot_have_more_and_more_of_them_remembered() -> None:
    sequences = OpenSequences()
    for sequence_id in range(1, 3_000):
        sequences.asked(ENTRY, request(sequence_id, sequence_start=True))
    assert not goes_on(sequences, 1)
    assert goes_on(sequences, 2_999)
    assert len(sequences._ends_s) < 1_100  # pyright: ignore[reportPrivateUsage]
