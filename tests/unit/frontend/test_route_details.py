"""What a frontend writes of latencies and responses, and what statistics read (spec M-031, H-236)."""

from __future__ import annotations

import msgspec
from fake_frontend import entry

from forebay.frontend.histograms import read_stage
from forebay.frontend.route_details import RouteDetails
from forebay.frontend.statistics import response_statistics
from forebay.ipc.catalog import ModelEntry
from forebay.ipc.counters import RESPONSES_MAX, CountersFile, Stage, detail_words
from forebay.ipc.errors import Code
from forebay.ipc.messages import InlineTensor, ReplyHead
from forebay.ipc.wire import Times

_OUTPUT = (InlineTensor("OUT", "INT8", (1,), b"\0"),)


def _make(*, has_latencies: bool, decoupled: bool) -> tuple[CountersFile, ModelEntry, RouteDetails]:
    counters = CountersFile()
    words = detail_words(has_latencies=has_latencies, is_decoupled=decoupled)
    offset = counters.allocate(words)
    model = msgspec.structs.replace(
        entry("m"), has_latencies=has_latencies, decoupled=decoupled, detail_offset=offset, detail_offsets=(offset,)
    )
    return counters, model, RouteDetails(model, counters.block(offset, words))


def test_stages_of_a_run_are_counted_with_their_means() -> None:
    counters, model, details = _make(has_latencies=True, decoupled=False)
    details.answered(3, 900_000, 1_000_000, Times(1_100_000, 1_200_000, 1_600_000, 1_650_000))
    words = counters.words[model.detail_offset // 8 :].tolist()
    for stage, us in zip(Stage, (900, 100, 100, 400, 50), strict=False):
        totals = read_stage(words, stage)
        assert (totals.count, totals.sum_us) == (3, 3 * us)
    details.answered(1, 1000)
    words = counters.words[model.detail_offset // 8 :].tolist()
    assert [read_stage(words, stage).count for stage in Stage] == [4, 3, 3, 3, 3, 0, 0, 0]


def test_responses_are_told_apart_by_index_and_outcome() -> None:
    counters, model, details = _make(has_latencies=True, decoupled=True)
    times = Times(10_000, 20_000, 70_000, 75_000)
    details.responded(ReplyHead(inline=_OUTPUT), times, 0, 5_000)
    details.responded(ReplyHead(inline=_OUTPUT, index=1), Times(10_000, 20_000, 95_000, 99_000), 75_000, 5_000)
    details.responded(ReplyHead(index=2), times, 75_000, 5_000)
    details.responded(ReplyHead(code=Code.INTERNAL, text="no", index=3), times, 75_000, 5_000)
    details.responded(ReplyHead(code=Code.CANCELLED, text="gone", index=4), times, 75_000, 5_000)
    details.responded(ReplyHead(index=-1), times, 75_000, 5_000)
    details.responded(ReplyHead(inline=_OUTPUT, index=RESPONSES_MAX), times, 75_000, 5_000)
    found = response_statistics(counters.words, model)
    assert list(found) == ["0", "1", "2", "3", "4"]
    assert found["0"]["compute_infer"] == {"count": 1, "ns": 50_000}
    assert found["0"]["compute_output"] == {"count": 1, "ns": 5_000}
    assert found["0"]["success"] == {"count": 1, "ns": 55_000}
    assert found["1"]["compute_infer"] == {"count": 1, "ns": 20_000}
    assert [found[i]["empty_response"]["count"] for i in "234"] == [1, 0, 0]
    assert [found[i]["fail"]["count"] for i in "234"] == [0, 1, 0]
    assert [found[i]["cancel"]["count"] for i in "234"] == [0, 0, 1]
    words = counters.words[model.detail_offset // 8 :].tolist()
    first = read_stage(words, Stage.FIRST_RESPONSE)
    assert (first.count, first.sum_us) == (1, 70)


def test_without_details_there_are_none() -> None:
    counters, model, _details = _make(has_latencies=True, decoupled=False)
    assert response_statistics(counters.words, model) == {}
