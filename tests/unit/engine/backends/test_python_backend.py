"""The Python backend in real worker processes: every part of the model API that needs no other model (spec 7)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worker_harness import WorkerHarness, spec_from_config

from forebay.ipc.counters import InstanceCounter
from forebay.ipc.errors import Code, ServingError
from forebay.ipc.worker_messages import InstanceSpec

MODELS = Path(__file__).parents[3] / "data" / "python_models"

PROBE = {
    "backend": "python",
    "input": [
        {"name": "ASK", "data_type": "TYPE_STRING", "dims": [1], "optional": True},
        {"name": "DATA", "data_type": "TYPE_FP32", "dims": [-1], "optional": True},
    ],
    "output": [
        {"name": "TEXT", "data_type": "TYPE_STRING", "dims": [1]},
        {"name": "DOUBLE", "data_type": "TYPE_FP32", "dims": [-1]},
    ],
}
REPEAT = {
    "backend": "python",
    "model_transaction_policy": {"decoupled": True},
    "input": [
        {"name": "IN", "data_type": "TYPE_INT32", "dims": [-1]},
        {"name": "DELAY", "data_type": "TYPE_UINT32", "dims": [-1]},
    ],
    "output": [
        {"name": "OUT", "data_type": "TYPE_INT32", "dims": [1]},
        {"name": "IDX", "data_type": "TYPE_UINT32", "dims": [1]},
    ],
}
SQUARE = {
    "backend": "python",
    "model_transaction_policy": {"decoupled": True},
    "input": [{"name": "IN", "data_type": "TYPE_INT32", "dims": [1]}],
    "output": [{"name": "OUT", "data_type": "TYPE_INT32", "dims": [1]}],
}
WAITING = {
    "backend": "python",
    "input": [{"name": "PARTY", "data_type": "TYPE_INT32", "dims": [1]}],
    "output": [{"name": "PRESENT", "data_type": "TYPE_INT32", "dims": [1]}],
}


def spec_of(model: str, config: dict[str, Any], **overrides: Any) -> InstanceSpec:
    return spec_from_config(config, model=model, model_path=str(MODELS / model), **overrides)


def word(text: str) -> Any:
    return np.array([text], dtype=object)


def ask(worker: WorkerHarness, text: str, inputs: dict[str, Any] | None = None, **head: Any) -> Any:
    """Ask for TEXT and return it parsed."""
    [response] = worker.infer({"ASK": word(text), **(inputs or {})}, outputs=("TEXT",), **head)
    assert response.error is None, response.error
    return json.loads(response.outputs["TEXT"][0])


def test_initialize_gets_triton_s_arguments() -> None:
    """P-002, P-003, P-004, P-094, P-117, appendix G."""
    with WorkerHarness(spec_of("probe", PROBE, version=1)) as worker:
        arguments = ask(worker, "arguments")
        config = json.loads(arguments.pop("model_config"))
        assert config["default_model_filename"] == "model.py"
        assert config["input"][0]["name"] == "ASK"
        assert arguments == {
            "model_instance_kind": "CPU",
            "model_instance_name": "probe_0_0",
            "model_instance_device_id": "0",
            "model_repository": str(MODELS / "probe"),
            "model_version": "1",
            "model_name": "probe",
            "early": "BLS is only supported during the 'execute' function.",
            "factor": 2,
            "dir": str(MODELS / "probe" / "1"),
        }


def test_request_shows_everything_the_client_said() -> None:
    """P-030..P-037, P-110."""
    with WorkerHarness(spec_of("probe", PROBE)) as worker:
        answer = ask(
            worker,
            "request",
            id="r1",
            correlation_id="seq",
            sequence_end=True,
            timeout_us=1500,
            parameters={"a": 1, "b": True, "X-FWD-a": "é"},
        )
        assert answer == {
            "id": "r1",
            "correlation": "seq",
            "flags": 2,
            "timeout": 1500,
            "parameters": '{"a":1,"b":true,"X-FWD-a":"é"}',
            "outputs": ["TEXT"],
            "is_set": True,
            "inputs": [["ASK", [1], 13, True]],
            "trace": None,
            "cancelled": False,
            "missing": None,
        }


def test_outputs_in_lent_memory_are_answered_without_a_copy() -> None:
    with WorkerHarness(spec_of("probe", PROBE)) as worker:
        data = np.arange(500, dtype=np.float32)
        before = worker.counter(InstanceCounter.SCATTERED_BYTES)
        [response] = worker.infer({"ASK": word("copy"), "DATA": data}, outputs=("DOUBLE",))
        assert response.in_place
        assert np.array_equal(response.outputs["DOUBLE"], data * 2)
        assert worker.counter(InstanceCounter.SCATTERED_BYTES) == before
        # No room in the block: the same model still answers.
        [response] = worker.infer({"ASK": word("copy"), "DATA": data}, outputs=("DOUBLE",), reply_bytes=64)
        assert not response.in_place
        assert np.array_equal(response.outputs["DOUBLE"], data * 2)


def test_large_and_non_contiguous_outputs_arrive_whole() -> None:
    """P-050; the large one asks for a block first."""
    with WorkerHarness(spec_of("probe", PROBE)) as worker:
        [response] = worker.infer({"ASK": word("large")}, outputs=("DOUBLE",))
        assert np.array_equal(response.outputs["DOUBLE"], np.arange(200_000, dtype=np.float32))
        [response] = worker.infer({"ASK": word("rigid")}, outputs=("DOUBLE",))
        assert response.outputs["DOUBLE"].tolist() == [0, 2, 4, 6, 8, 10]


def test_rescheduled_request_comes_again() -> None:
    """P-040."""
    with WorkerHarness(spec_of("probe", PROBE)) as worker:
        assert ask(worker, "again") == 3


def test_sender_of_a_model_that_is_not_decoupled_checks_its_use() -> None:
    """P-038, P-075."""
    with WorkerHarness(spec_of("probe", PROBE)) as worker:
        assert ask(worker, "sender") == [
            "Inference Response object must be provided when the response flags is set to zero.",
            "Unable to send response. Unsupported flag provided.",
            "Unable to send response. Non-decoupled model cannot send complete final before sending a response.",
        ]
        assert ask(worker, "late_errors") == [
            "Unable to send response. Non-decoupled model cannot send more than one response.",
            "Unable to send response. Response sender has been closed.",
        ]


def test_deadline_counts_as_cancelled() -> None:
    """P-039, L-007."""
    with WorkerHarness(spec_of("probe", PROBE)) as worker:
        assert ask(worker, "wait_for_cancel", deadline_ns=time.monotonic_ns() + 200_000_000) is True


def test_traceback_lists_the_innermost_frame_first() -> None:
    """P-008."""
    with WorkerHarness(spec_of("probe", PROBE)) as worker:
        [response] = worker.infer({"ASK": word("nested_failure")})
        assert response.error is not None
        assert response.error.code == Code.INTERNAL
        head, _, places = response.error.text.partition("\n\nAt:\n")
        assert head == (
            "Failed to process the request(s) for model 'probe_0_0', message: "
            "ValueError: cannot reshape array of size 3 into shape (2,2)"
        )
        functions = [line.rpartition(": ")[2] for line in places.splitlines()]
        assert functions == ["inner", "nested_failure", "answer", "<listcomp>", "execute"] or functions == [
            "inner",
            "nested_failure",
            "answer",
            "execute",
        ]
        assert str(MODELS) not in response.error.text
        assert worker.counter(InstanceCounter.FAILED_BACKEND) == 1


def test_logger_and_prints_reach_the_server_s_output(capfd: pytest.CaptureFixture[str]) -> None:
    """P-016, P-118: the model's own file and line; verbose is hidden."""
    with WorkerHarness(spec_of("probe", PROBE)) as worker:
        assert ask(worker, "log") == worker.process.pid
    output = capfd.readouterr()
    assert "printed" in output.out
    for letter, text in (("I", "an information"), ("W", "a warning"), ("E", "an error"), ("W", "by level")):
        [line] = [line for line in output.err.splitlines() if text in line]
        assert line.startswith(letter)
        assert " model.py:" in line
    assert "nothing to see" not in output.err


def test_finalize_runs_when_the_worker_stops(tmp_path: Path) -> None:
    """P-010."""
    marker = tmp_path / "finalized"
    with WorkerHarness(spec_of("probe", PROBE), env={"PROBE_FINALIZED": str(marker)}):
        assert not marker.exists()
    assert marker.read_text() == "finalized"


def test_decoupled_model_answers_from_its_threads() -> None:
    """S-130, S-134, P-077: the batch is done long before the last response."""
    with WorkerHarness(spec_of("repeat", REPEAT, decoupled=True)) as worker:
        slow, fast = worker.submit(
            {"IN": np.array([4, 2], np.int32), "DELAY": np.array([300, 0], np.uint32)},
            {"IN": np.array([9], np.int32), "DELAY": np.array([0], np.uint32)},
        )
        worker.wait_done()
        responses = worker.responses(slow, fast)
        assert [r.token for r in responses if r.final] == [fast, slow]
        of_slow = [r for r in responses if r.token == slow and r.index >= 0]
        assert [(r.outputs["OUT"].tolist(), r.outputs["IDX"].tolist()) for r in of_slow] == [([4], [0]), ([2], [1])]
        assert worker.counter(InstanceCounter.SUCCESS) == 2


def test_cancelled_decoupled_request_ends_early() -> None:
    """P-039, S-182."""
    with WorkerHarness(spec_of("repeat", REPEAT, decoupled=True)) as worker:
        [token] = worker.submit({"IN": np.zeros(500, np.int32), "DELAY": np.full(500, 100, np.uint32)})
        worker.cancel(token)
        last = worker.responses(token)[-1]
        assert last.error is not None
        assert last.error.code == Code.CANCELLED
        assert last.index < 100
        assert worker.counter(InstanceCounter.CANCELED) == 1


def test_thousands_of_responses_arrive_in_order() -> None:
    with WorkerHarness(spec_of("square", SQUARE, decoupled=True)) as worker:
        [token] = worker.submit({"IN": np.array([3000], np.int32)})
        responses = worker.responses(token)
        assert [response.index for response in responses] == list(range(3000))
        assert responses[-1].final


def test_reader_that_is_slow_holds_the_model_up_and_loses_nothing() -> None:
    """The doorbell's kernel buffer holds some hundred messages; the rest must not pile up in the worker."""
    with WorkerHarness(spec_of("square", SQUARE, decoupled=True)) as worker:
        [token] = worker.submit({"IN": np.array([10_000], np.int32)})
        time.sleep(0.5)
        responses = worker.responses(token)
        assert [response.index for response in responses] == list(range(10_000))


def test_reader_that_is_slow_holds_up_a_thread_too() -> None:
    with WorkerHarness(spec_of("repeat", REPEAT, decoupled=True)) as worker:
        [token] = worker.submit({"IN": np.arange(5000, dtype=np.int32), "DELAY": np.zeros(5000, np.uint32)})
        worker.wait_done()
        time.sleep(0.5)
        values = [r.outputs["OUT"][0] for r in worker.responses(token) if r.index >= 0]
        assert values == list(range(5000))


def test_no_response_is_an_empty_final_one() -> None:
    with WorkerHarness(spec_of("square", SQUARE, decoupled=True)) as worker:
        assert worker.infer({"IN": np.array([0], np.int32)}) == []


def test_forgotten_request_fails_instead_of_hanging() -> None:
    """L-028."""
    with WorkerHarness(spec_of("square", SQUARE, decoupled=True)) as worker:
        [response] = worker.infer({"IN": np.array([-1], np.int32)})
        assert response.error is not None
        assert response.error.text == "the model dropped the request without a final response"


def test_decoupled_execute_must_return_none() -> None:
    """P-078."""
    with WorkerHarness(spec_of("square", SQUARE, decoupled=True)) as worker:
        [response] = worker.infer({"IN": np.array([-2], np.int32)})
        assert response.error is not None
        assert response.error.text == (
            "Failed to process the request(s) for model 'square_0_0', message: Python model 'square_0_0' is using the "
            "decoupled mode and the execute function must return None."
        )


def test_async_executions_overlap() -> None:
    """P-013: none of the three could end without the others."""
    with WorkerHarness(spec_of("waiting", WAITING)) as worker:
        tokens = [worker.submit({"PARTY": np.array([3], np.int32)})[0] for _ in range(3)]
        assert [r.outputs["PRESENT"].tolist() for r in worker.responses(*tokens)] == [[3]] * 3
        [failed] = worker.infer({"PARTY": np.array([-1], np.int32)})
        assert failed.error is not None
        assert "ValueError: no such party\n\nAt:\n  waiting/1/model.py(" in failed.error.text


def test_lost_producer_s_requests_are_forgotten() -> None:
    with WorkerHarness(spec_of("repeat", REPEAT, decoupled=True)) as worker:
        worker.submit({"IN": np.zeros(3, np.int32), "DELAY": np.full(3, 50, np.uint32)})
        worker.drop_producer()
        time.sleep(0.3)
        assert worker.process.poll() is None


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"model_file": "model.pyc"}, "Model name must end with '.py'. Model name is \"model.pyc\"."),
        ({"model_file": "other.py"}, "unable to find '1/other.py' for model instance 'probe_0_0'"),
        (
            {"parameters": {"FORCE_CPU_ONLY_INPUT_TENSORS": "maybe"}},
            "Incorrect value for FORCE_CPU_ONLY_INPUT_TENSORS: maybe'",
        ),
        (
            {"parameters": {"EXECUTION_ENV_PATH": "$$TRITON_MODEL_DIRECTORY/env"}},
            "EXECUTION_ENV_PATH of model 'probe' names '$$TRITON_MODEL_DIRECTORY/env', which does not exist",
        ),
        ({"model_file": "helper.py"}, "AttributeError: module '1.helper' has no attribute 'TritonPythonModel'"),
    ],
)
def test_models_that_cannot_be_loaded_say_why(overrides: dict[str, Any], text: str) -> None:
    """P-001, P-056, P-130."""
    with pytest.raises(ServingError) as caught, WorkerHarness(spec_of("probe", PROBE, **overrides)):
        pass
    assert caught.value.text == text


@pytest.mark.parametrize("below", [".", f"lib/python3.{sys.version_info.minor}/site-packages"], ids=["folder", "venv"])
def test_environment_s_packages_come_first(tmp_path: Path, below: str) -> None:
    """P-130: a folder, as `pip install --target` makes it, and a virtual environment."""
    packages = tmp_path / "env" / below
    packages.mkdir(parents=True)
    (packages / "helper.py").write_text("FACTOR = 5\n")
    parameters = {"EXECUTION_ENV_PATH": str(tmp_path / "env")}
    with WorkerHarness(spec_of("probe", PROBE, parameters=parameters)) as worker:
        assert ask(worker, "arguments")["factor"] == 5


def test_environment_archive_is_unpacked_once(tmp_path: Path) -> None:
    """P-130."""
    import tarfile

    (tmp_path / "helper.py").write_text("FACTOR = 7\n")
    archive = tmp_path / "env.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(tmp_path / "helper.py", "helper.py")
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    parameters = {"EXECUTION_ENV_PATH": str(archive)}
    for _ in range(2):
        with WorkerHarness(spec_of("probe", PROBE, parameters=parameters), env=environment) as worker:
            assert ask(worker, "arguments")["factor"] == 7
    assert len(list(tmp_path.glob("forebay-env-*"))) == 1


@pytest.mark.parametrize("kind", ["gz", "xz"])
def test_damaged_environment_archive_is_refused_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    """P-130."""
    import tarfile

    (tmp_path / "noise").write_bytes(os.urandom(100_000))
    archive = tmp_path / f"env.tar.{kind}"
    with tarfile.open(archive, f"w:{kind}") as packed:  # type: ignore[call-overload]
        packed.add(tmp_path / "noise", "noise.py")
    content = archive.read_bytes()
    # The end is missing, or something within is wrong.
    archive.write_bytes(content[:50_000] if kind == "gz" else content[:50_000] + bytes(1000) + content[51_000:])
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    spec = spec_of("probe", PROBE, parameters={"EXECUTION_ENV_PATH": str(archive)})
    with pytest.raises(ServingError, match="unpacked"), WorkerHarness(spec, env=environment):
        pass
    assert not list(tmp_path.glob("forebay-env-*"))


def test_large_streamed_responses_wait_for_blocks_in_bounded_memory() -> None:
    """From a thread: the model is held up until the producer lends."""
    large = [{"name": "OUT", "data_type": "TYPE_INT32", "dims": [-1]}]
    spec = spec_of("bulky", {**SQUARE, "output": large}, decoupled=True)
    with WorkerHarness(spec) as worker:
        [token] = worker.submit({"IN": np.array([40], np.int32)}, reply_bytes=0)
        worker.wait_done()
        time.sleep(0.3)
        responses = [response for response in worker.responses(token) if response.index >= 0]
        assert [int(response.outputs["OUT"][0]) for response in responses] == list(range(40))
        assert all(response.outputs["OUT"].shape == (10_000,) for response in responses)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_line_is_printed_at_once_and_in_one_piece(unbuffered: str) -> None:
    """Two workers that print at the same time must not end up in each other's lines."""
    code = """
from forebay.engine.backends.python_backend import print_whole_lines
print_whole_lines()
print("first")
print("second", "half", flush=True)
input()
"""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.settimeout(60)
        child = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=theirs,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
        # A message is what was written with one system call; the child waits, so that nothing is written at its end.
        lines = [ours.recv(100), ours.recv(100)]
        child.communicate(b"\n")
        assert child.returncode == 0
    assert lines == [b"first\n", b"second half\n"]
