"""Custom batching strategies are refused (spec S-034)."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import pytest

from forebay.engine.repository.repository import ModelRepository
from forebay.ipc.errors import Code

MakeRepository = Callable[[dict[str, str | bytes | None]], pathlib.Path]

DYNAMIC = 'backend: "identity" max_batch_size: 8 dynamic_batching { } '
SEQUENCES = 'backend: "identity" max_batch_size: 8 sequence_batching { } '
PARAMETER = 'parameters { key: "TRITON_BATCH_STRATEGY_PATH" value { string_value: "/opt/volume.so" } }'


@pytest.fixture
def problems_of(make_repository: MakeRepository) -> Callable[..., list[tuple[str, Code]]]:
    def poll(text: str, *files: str) -> list[tuple[str, Code]]:
        root = make_repository({"m/config.pbtxt": text, "m/1/weights": b"", **dict.fromkeys(files, b"")})
        found = ModelRepository([str(root)]).poll_model("m")
        return [(problem.text, problem.code) for problem in found.problems]

    return poll


Poll = Callable[..., list[tuple[str, Code]]]


def test_a_strategy_that_is_named_is_refused(problems_of: Poll) -> None:
    ((text, code),) = problems_of(DYNAMIC + PARAMETER)
    assert text.startswith("custom batching strategy '/opt/volume.so' cannot be loaded: ")
    assert code is Code.UNSUPPORTED


@pytest.mark.parametrize("place", ["m/1/batchstrategy.so", "m/batchstrategy.so"])
def test_a_strategy_that_lies_beside_the_model_is_refused(problems_of: Poll, place: str) -> None:
    ((text, _code),) = problems_of(DYNAMIC, place)
    assert text.startswith(f"custom batching strategy '{place}' cannot be loaded: ")


def test_sequences_and_strategies_exclude_each_other_in_tritons_words(problems_of: Poll) -> None:
    text = "TRITON_BATCH_STRATEGY_PATH cannot be specified with sequence batcher, using default batching strategy"
    assert problems_of(SEQUENCES + PARAMETER) == [(text, Code.INVALID_ARG)]


@pytest.mark.parametrize("config", [SEQUENCES, 'backend: "identity" max_batch_size: 8'])
def test_a_strategy_that_nobody_would_ask_does_no_harm(problems_of: Poll, config: str) -> None:
    assert problems_of(config, "m/batchstrategy.so") == []
