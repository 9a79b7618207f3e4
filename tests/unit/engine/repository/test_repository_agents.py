"""The checksum agent, and agents that do not exist (spec R-126, C-019)."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable

import pytest

from forebay.engine.repository.repository import ModelRepository
from forebay.ipc.errors import Code

MakeRepository = Callable[[dict[str, str | bytes | None]], pathlib.Path]

WEIGHTS = b"0123456789" * 300_000
SUM = hashlib.md5(WEIGHTS, usedforsecurity=False).hexdigest()


def config(*agents: str) -> str:
    listed = " ".join(f"agents {{ {agent} }}" for agent in agents)
    return f'backend: "identity" model_repository_agents {{ {listed} }}'


def checksum(key: str, value: str = SUM) -> str:
    return f'name: "checksum" parameters {{ key: "{key}" value: "{value}" }}'


@pytest.fixture
def problems_of(make_repository: MakeRepository) -> Callable[[str], list[tuple[str, Code]]]:
    def poll(text: str) -> list[tuple[str, Code]]:
        root = make_repository({"m/config.pbtxt": text, "m/1/weights": WEIGHTS})
        found = ModelRepository([str(root)]).poll_model("m")
        return [(problem.text, problem.code) for problem in found.problems]

    return poll


Poll = Callable[[str], list[tuple[str, Code]]]


@pytest.mark.parametrize("algorithm", ["MD5", "md5"])
def test_files_with_the_right_sum_may_be_loaded(problems_of: Poll, algorithm: str) -> None:
    assert problems_of(config(checksum(f"{algorithm}:1/weights"))) == []


@pytest.mark.parametrize(
    ("agent", "text", "code"),
    [
        (
            checksum("MD5:1/weights", "00"),
            f"Mismatched MD5 hash for file 1/weights, expect: 00, got: {SUM}",
            Code.INVALID_ARG,
        ),
        (
            checksum("MD5:1/nothing"),
            "failed to open text file for read 1/nothing: No such file or directory",
            Code.INVALID_ARG,
        ),
        (checksum("1/weights"), "failed to parse key: 1/weights", Code.INVALID_ARG),
        (checksum("SHA1:1/weights"), "Unsupported checksum algorithm: SHA1", Code.UNSUPPORTED),
        (
            'name: "decrypt"',
            "unable to find 'libtritonrepoagent_decrypt.so' for repo agent 'decrypt'",
            Code.INVALID_ARG,
        ),
    ],
)
def test_a_model_that_fails_its_agent_is_not_polled(problems_of: Poll, agent: str, text: str, code: Code) -> None:
    """Texts of Triton's checksum.cc and repo_agent.cc."""
    assert problems_of(config(agent)) == [(text, code)]


@pytest.mark.parametrize("name", ["../other/secret", "/etc/passwd", "1/../../x"])
def test_an_agent_reads_nothing_outside_the_model(problems_of: Poll, name: str) -> None:
    ((text, _code),) = problems_of(config(checksum(f"MD5:{name}")))
    assert text.startswith(f"failed to open text file for read {name}: ")
    assert "got:" not in text


def test_a_sum_is_taken_again_when_the_file_has_changed(make_repository: MakeRepository) -> None:
    root = make_repository({"m/config.pbtxt": config(checksum("MD5:1/weights")), "m/1/weights": WEIGHTS})
    repository = ModelRepository([str(root)])
    assert repository.poll_model("m").problems == ()
    (root / "m" / "1" / "weights").write_bytes(WEIGHTS + b"!")
    (problem,) = repository.poll_model("m").problems
    assert problem.text.startswith("Mismatched MD5 hash for file 1/weights")


def test_the_problem_says_where_it_is_written(make_repository: MakeRepository) -> None:
    root = make_repository({"m/config.pbtxt": 'backend: "identity"\nmodel_repository_agents { agents { name: "x" } }'})
    (problem,) = ModelRepository([str(root)]).poll_model("m").problems
    assert problem.place.startswith("m/config.pbtxt:2:")
    assert problem.possible == ("checksum",)
