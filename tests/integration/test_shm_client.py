"""``forebay.client.shm`` and ``forebay.client.shm_asyncio`` against a real server (issue 7)."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from forebay_server import PATIENCE_S, ForebayServer, wait_until
from shm_models import serve, write_models

import forebay.client.shm
import forebay.client.shm_asyncio
from forebay.client.shm import (
    Cancelled,
    DeadlineExceeded,
    Engine,
    InvalidArgument,
    NoServer,
    NotFound,
    Options,
    WrongProcess,
)

Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("shm") / "models")


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[ForebayServer]:
    with serve(repository) as running:
        yield running


@pytest.fixture
def engine(server: ForebayServer) -> Iterator[Engine]:
    with forebay.client.shm.connect(server.runtime_base) as connected:
        yield connected


@pytest.fixture(scope="module")
def reference(repository: Path) -> onnxruntime.InferenceSession:
    path = repository / "alpha_model" / "2" / "model.onnx"
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def some_features(rows: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).random((rows, 50), dtype=np.float32)


def expected(reference: onnxruntime.InferenceSession, features: Floats) -> Floats:
    name = reference.get_inputs()[0].name
    return np.asarray(reference.run(None, {name: features})[0], dtype=np.float32).reshape(-1, 1)


def metric(server: ForebayServer, name: str, model: str) -> int:
    """Return the sum of a counter over the model's versions and stages."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=PATIENCE_S) as reply:
        page = reply.read().decode()
    lines = [line for line in page.splitlines() if line.startswith(name + "{") and f'model="{model}"' in line]
    return sum(int(float(line.rpartition(" ")[2])) for line in lines)


# --- the example of the issue ---


def test_inputs_are_filled_and_outputs_read_in_place(engine: Engine, reference: onnxruntime.InferenceSession) -> None:
    model = engine.model("alpha_model")
    x = model.input("features", rows=1)
    assert (x.dtype, x.shape) == (np.dtype(np.float32), (1, 50))
    x[:] = features = some_features(1)
    y = model.infer()
    assert (y.dtype, y.shape) == (np.dtype(np.float32), (1, 1))
    np.testing.assert_allclose(y, expected(reference, features), rtol=1e-5)
    assert model.output("prediction") is y


def test_many_in_flight_answer_out_of_order(engine: Engine, reference: onnxruntime.InferenceSession) -> None:
    model = engine.model("alpha_model")
    futures = []
    for seed in range(200):
        rows = 1 + seed % 5
        model.input("features", rows=rows)[:] = some_features(rows, seed)
        futures.append(model.submit())
    for seed in reversed(range(200)):
        want = expected(reference, some_features(1 + seed % 5, seed))
        np.testing.assert_allclose(futures[seed].result(), want, rtol=1e-5)


def test_more_in_flight_than_allowed_waits(engine: Engine) -> None:
    model = engine.model("alpha_model")
    futures = []
    for value in range(1500):
        model.input("features", rows=1)[:] = value
        futures.append(model.submit())
    assert all(future.result().shape == (1, 1) for future in futures)


def test_results_of_futures_outlive_later_requests(engine: Engine) -> None:
    model = engine.model("alpha_model")
    x = model.input("features", rows=1)
    x[:] = 0.25
    kept = model.submit().result()
    copy = kept.copy()
    for value in range(300):
        model.input("features", rows=1)[:] = value
        model.submit().result()
    np.testing.assert_array_equal(kept, copy)


def test_rows_come_back_when_results_are_dropped(engine: Engine) -> None:
    model = engine.model("alpha_model")
    for _ in range(20):
        futures = []
        for _ in range(100):
            model.input("features", rows=4)[:] = 0
            futures.append(model.submit())
        for future in futures:
            future.result()
    # One slab of 256 rows, perhaps a second of twice as many.
    assert engine.statistics().arena_used_bytes < 1024 * 1024
    assert engine.statistics().in_flight == 0


def test_nothing_is_copied_for_a_model_of_fixed_shapes(server: ForebayServer, engine: Engine) -> None:
    """I-1: the counters on both sides stay where they are."""
    model = engine.model("alpha_model")
    before = metric(server, "forebay_copied_bytes_total", "alpha_model")
    for rows in (1, 64, 7):
        for _ in range(50):
            model.input("features", rows=rows)[:] = 1
            model.infer()
    assert engine.statistics().copied_bytes == 0
    assert metric(server, "forebay_copied_bytes_total", "alpha_model") == before


def test_a_lone_client_rings_the_worker_itself(server: ForebayServer, engine: Engine) -> None:
    model = engine.model("alpha_model")
    model.input("features", rows=1)[:] = 1
    wait_until(lambda: model.infer() is not None and engine.connection.grant_count > 0, "a grant")
    before = metric(server, "nv_inference_count", "alpha_model")
    for _ in range(20):
        model.infer()
    assert metric(server, "nv_inference_count", "alpha_model") == before + 20


# --- names, versions, shapes ---


def test_models_and_versions(engine: Engine) -> None:
    assert ("alpha_model", 1, "READY") in engine.models()
    assert engine.model("alpha_model").version == 2
    assert engine.model("alpha_model", 1).version == 1
    first, second = engine.model("alpha_model", "1"), engine.model("alpha_model", 2)
    answers = []
    for model in (first, second):
        model.input("features")[:] = 0.5
        answers.append(float(model.infer()[0, 0]))
    assert answers[0] != answers[1]


def test_unknown_names_say_what_there_is(engine: Engine) -> None:
    """Spec H-062."""
    with pytest.raises(NotFound, match="Request for unknown model: 'nobody' is not found"):
        engine.model("nobody")
    with pytest.raises(NotFound, match="'alpha_model' version 7 is not found"):
        engine.model("alpha_model", 7)
    with pytest.raises(InvalidArgument, match="has no input 'x', but 'features'"):
        engine.model("alpha_model").input("x")
    with pytest.raises(InvalidArgument, match="takes 1 to 64 rows at a time, not 65"):
        engine.model("alpha_model").input("features", rows=65)
    with pytest.raises(InvalidArgument, match="no input of model 'alpha_model' was filled"):
        engine.model("alpha_model").infer()


def test_variable_shapes(engine: Engine) -> None:
    model = engine.model("echo")
    for size in (1, 1000, 3, 2_000_000):
        x = model.input("INPUT0", shape=(size,))
        x[:] = np.arange(size)
        np.testing.assert_array_equal(model.infer(), np.arange(size, dtype=np.float32))
    with pytest.raises(InvalidArgument, match="say which, with shape="):
        model.input("INPUT0")


def test_strings(engine: Engine) -> None:
    model = engine.model("pair")
    for words in ([[b"a", b"", b"ccc"]], [["\u00e9", "x" * 50_000, "z"]]):
        model.put("INPUT0", np.ones((1, 2), np.float32))
        model.put("INPUT1", words)
        model.infer()
        want = [w if isinstance(w, bytes) else w.encode() for w in words[0]]
        assert model.output("OUTPUT1").tolist() == [want]
        np.testing.assert_array_equal(model.output("OUTPUT0"), np.ones((1, 2), np.float32))


def test_wrong_tensors_are_refused_before_they_are_sent(engine: Engine) -> None:
    model = engine.model("pair")
    with pytest.raises(InvalidArgument, match="is FP32, not int64"):
        model.put("INPUT0", np.ones((1, 2), np.int64))
    with pytest.raises(InvalidArgument, match="takes 1 to 4 rows"):
        model.put("INPUT0", np.ones((5, 2), np.float32))
    model.put("INPUT0", np.ones((2, 2), np.float32))
    with pytest.raises(InvalidArgument, match="needs input 'INPUT1'"):
        model.infer()
    model.put("INPUT1", [["a"]])
    with pytest.raises(InvalidArgument, match="same number of rows"):
        model.infer()


def test_large_tensors(engine: Engine) -> None:
    model = engine.model("echo")
    size = 4 * 1024 * 1024
    for _ in range(3):
        x = model.input("INPUT0", shape=(size,))
        x[:] = 3.0
        y = model.infer()
        assert y.shape == (size,)
        assert float(y[-1]) == 3.0


def test_decoupled_responses(engine: Engine) -> None:
    model = engine.model("repeat")
    assert model.is_decoupled
    for count in (0, 1, 30):
        model.input("COUNT")[0] = count
        answers = [response["INDEX"] for response in model.stream()]
        assert [int(answer[-1]) for answer in answers] == list(range(count))
        assert all(len(answer) == (20_000 if i % 2 else 2) for i, answer in enumerate(answers))


def test_options_travel(engine: Engine) -> None:
    model = engine.model("echo")
    model.input("INPUT0", shape=(2,))[:] = 1
    options = Options(request_id="r1", parameters={"a": 1}, sequence_id=7, sequence_start=True, outputs=("OUTPUT0",))
    assert model.infer(options=options).shape == (2,)
    model.input("INPUT0", shape=(2,))[:] = 1
    assert model.infer(options=Options(sequence_id=7, sequence_end=True)).shape == (2,)


def test_python_models_of_fixed_shapes_are_asked_in_rows(server: ForebayServer, engine: Engine) -> None:
    """What carries more than tensors is told by a head, with the same inputs in the same place."""
    model = engine.model("named_sum")
    left, right = model.input("LEFT", rows=2), model.input("RIGHT", rows=2)
    left[:], right[:] = 1, [[1, 2], [3, 4]]
    assert model.infer().tolist() == [[2, 3], [4, 5]]
    assert model.infer(options=Options(request_id="abc")).tolist() == [[5, 6], [7, 8]]
    assert model.output("SUM").tolist() == [[5, 6], [7, 8]]
    right += 1
    assert model.infer().tolist() == [[3, 4], [5, 6]]
    assert engine.statistics().copied_bytes == 0
    left[0] = -1
    with pytest.raises(InvalidArgument, match="negative"):
        model.infer()
    left[0] = 1
    first = model.submit()
    model.input("LEFT", rows=2)[:], model.input("RIGHT", rows=2)[:] = 1, 1
    second = model.submit(options=Options(request_id="abc"))
    assert second.result().tolist() == [[5, 5], [5, 5]]
    assert first.result().tolist() == [[3, 4], [5, 6]]


def test_members_of_a_group_fail_one_by_one(engine: Engine) -> None:
    """A Python model's errors stand behind the answer of the batch that the requests were in."""
    group = engine.model("named_sum").group(4)
    group.input("LEFT")[:] = [[1, 1], [-1, 1], [1, 1], [-1, 1]]
    group.input("RIGHT")[:] = 1
    group.submit()
    errors = group.wait()
    assert {index: error.text for index, error in errors.items()} == {1: "negative", 3: "negative"}


# --- groups ---


def test_a_group_shares_a_message_and_answers_one_by_one(
    server: ForebayServer, engine: Engine, reference: onnxruntime.InferenceSession
) -> None:
    model = engine.model("alpha_model")
    features = np.random.default_rng(3).standard_normal((40, 50), np.float32)
    for count, rows in ((40, 1), (10, 4), (1, 8)):
        group = model.group(count, rows)
        assert len(group) == count
        group.input("features")[:] = features[: count * rows]
        group.submit()
        found = group.result(20)
        expected = reference.run(None, {"features": features[: count * rows]})[0]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        assert group.done() == count
    assert engine.statistics().copied_bytes == 0
    group.put("features", features[:8])
    assert engine.statistics().copied_bytes == 8 * 200
    with pytest.raises(InvalidArgument, match="submitted once"):
        group.submit()


def test_groups_wait_for_their_turn_and_give_their_rows_back(engine: Engine) -> None:
    model = engine.model("alpha_model")
    model.group(1).input("features")
    used = engine.statistics().arena_used_bytes
    groups = [model.group(200) for _ in range(8)]
    for group in groups:
        group.input("features")[:] = 0
        group.submit()
    for group in groups:
        assert group.wait(20) == {}
    assert engine.statistics().in_flight == 0
    del groups, group
    for _ in range(20):
        again = model.group(200)
        again.input("features")[:] = 0
        again.submit()
        again.wait(20)
        del again
    # Slabs stay for the next rows; none was needed beyond those of the first eight groups.
    assert engine.statistics().arena_used_bytes < used + 8 * 200 * 50 * 4 * 4


def test_groups_that_cannot_be_are_refused(engine: Engine) -> None:
    with pytest.raises(InvalidArgument, match="do not live in rows"):
        engine.model("echo").group(2)
    model = engine.model("alpha_model")
    with pytest.raises(InvalidArgument, match="rows at a time"):
        model.group(2, 1000)
    with pytest.raises(InvalidArgument, match="a group has 1 to"):
        model.group(100_000)
    with pytest.raises(InvalidArgument, match="no input 'nope'"):
        model.group(2).input("nope")


def test_a_cancelled_group_ends(engine: Engine) -> None:
    model = engine.model("alpha_model")
    group = model.group(100)
    group.input("features")[:] = 0
    group.submit()
    group.cancel()
    errors = group.wait(20)
    assert all(isinstance(error, Cancelled) for error in errors.values())
    assert engine.statistics().in_flight == 0


# --- time ---


def test_deadline(engine: Engine) -> None:
    model = engine.model("slow")
    model.input("INPUT0")[:] = 1
    with pytest.raises(DeadlineExceeded):
        model.infer(timeout_s=0.01)
    # The handle is as good as new.
    model.input("INPUT0")[:] = 2
    assert model.infer().tolist() == [2, 2, 2, 2]


def test_future_can_be_asked_again_after_a_timeout(engine: Engine) -> None:
    model = engine.model("slow")
    model.input("INPUT0")[:] = 1
    future = model.submit()
    with pytest.raises(DeadlineExceeded):
        future.result(timeout_s=0.001)
    assert future.result().tolist() == [1, 1, 1, 1]
    assert future.done()


def test_cancelled_requests_give_their_memory_back(engine: Engine) -> None:
    model = engine.model("slow")
    model.input("INPUT0")[:] = 1
    running = model.submit()
    model.input("INPUT0")[:] = 1
    waiting = model.submit()
    assert waiting.cancel()
    with pytest.raises(Cancelled):
        waiting.result()
    assert running.result().tolist() == [1, 1, 1, 1]
    assert not running.cancel()
    del running, waiting
    model.input("INPUT0")[:] = 1
    model.infer()
    wait_until(lambda: engine.statistics().in_flight == 0, "the cancelled request to end")


def test_cancelled_rows_end_too(engine: Engine) -> None:
    model = engine.model("alpha_model")
    futures = []
    for value in range(200):
        model.input("features", rows=64)[:] = value
        futures.append(model.submit())
    cancelled = [future for future in futures if future.cancel()]
    for future in futures:
        if future in cancelled:
            with pytest.raises(Cancelled):
                future.result()
        else:
            future.result()
    model.input("features", rows=1)[:] = 1
    model.infer()
    wait_until(
        lambda: all(future.done() for future in futures) and engine.statistics().in_flight == 0,
        "all requests to end",
        timeout_s=20.0,
    )


# --- threads, loops, processes ---


def test_threads_share_a_handle(engine: Engine, reference: onnxruntime.InferenceSession) -> None:
    model = engine.model("alpha_model")
    wrong: list[int] = []

    def work(base: int) -> None:
        for seed in range(base, base + 100):
            features = some_features(1, seed)
            model.input("features", rows=1)[:] = features
            if not np.allclose(model.infer(), expected(reference, features), rtol=1e-4):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(base * 1000,)) for base in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_spinning_gives_the_same_answers(server: ForebayServer, reference: onnxruntime.InferenceSession) -> None:
    with forebay.client.shm.connect(server.runtime_base, wait="spin") as engine:
        model = engine.model("alpha_model")
        model.input("features")[:] = features = some_features(1)
        np.testing.assert_allclose(model.infer(timeout_s=PATIENCE_S), expected(reference, features), rtol=1e-5)


def test_asyncio(server: ForebayServer, reference: onnxruntime.InferenceSession) -> None:
    async def main() -> None:
        async with await forebay.client.shm_asyncio.connect(server.runtime_base) as engine:
            model = await engine.model("alpha_model")

            async def one(seed: int) -> Floats:
                await engine.make_way()
                model.input("features", rows=1)[:] = some_features(1, seed)
                return np.asarray(await model.infer(timeout_s=PATIENCE_S), np.float32)

            answers = await asyncio.gather(*(one(seed) for seed in range(700)))
            for seed, answer in enumerate(answers):
                np.testing.assert_allclose(answer, expected(reference, some_features(1, seed)), rtol=1e-5)
            slow = await engine.model("slow")
            slow.input("INPUT0")[:] = 1
            with pytest.raises(DeadlineExceeded):
                await slow.infer(timeout_s=0.01)
            slow.input("INPUT0")[:] = 1
            task = asyncio.create_task(slow.infer())
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())


def test_forked_child_cannot_use_or_end_its_parents_connection(engine: Engine) -> None:
    model = engine.model("alpha_model")
    model.input("features")[:] = 1
    answer = float(model.infer()[0, 0])
    pid = os.fork()
    if not pid:
        status = 1
        try:
            model.infer()
        except WrongProcess:
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert float(model.infer()[0, 0]) == answer


def test_connect_finds_the_server(server: ForebayServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREBAY_RUNTIME_DIRECTORY", str(server.runtime_base))
    with forebay.client.shm.connect() as engine:
        assert engine.models()
    (door,) = server.runtime_base.glob("*/clients.sock")
    for path in (door, door.parent, str(server.runtime_base)):
        with forebay.client.shm.connect(path) as engine:
            assert engine.models()


def test_connect_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(NoServer, match=f"no forebay server is running: .* in {tmp_path}"):
        forebay.client.shm.connect(tmp_path)


def test_arena_size_is_the_clients_choice_up_to_the_servers_limit(server: ForebayServer) -> None:
    with forebay.client.shm.connect(server.runtime_base, arena_bytes=1 << 20) as engine:
        assert engine.statistics().arena_bytes == 1 << 20
        with pytest.raises(forebay.client.shm.ArenaFull):
            engine.model("echo").input("INPUT0", shape=(1 << 20,))
    with pytest.raises(InvalidArgument, match="--arena-byte-size"):
        forebay.client.shm.connect(server.runtime_base, arena_bytes=1 << 40)


def test_arrays_stay_readable_after_close(server: ForebayServer) -> None:
    with forebay.client.shm.connect(server.runtime_base) as engine:
        model = engine.model("alpha_model")
        model.input("features")[:] = 1
        answer = model.submit().result()
        copy = answer.copy()
    np.testing.assert_array_equal(answer, copy)
    with pytest.raises(forebay.client.shm.EngineGone):
        model.infer()


def test_a_second_user_of_the_machine_is_kept_out(server: ForebayServer) -> None:
    """S2: file permissions and SO_PEERCRED."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    (door,) = server.runtime_base.glob("*/clients.sock")
    code = (
        "import os, socket, sys\n"
        "sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
        f"sys.exit(7 if sock.connect_ex({str(door)!r}) == 13 else 1)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 7


def test_reload_moves_clients_to_the_new_version(tmp_path: Path) -> None:
    """Requests that come while a model is replaced are handed to its successor, none fails."""
    repository = write_models(tmp_path / "models")
    with (
        serve(repository, settings={"repository": {"control_mode": "poll", "poll_secs": 1}}) as server,
        forebay.client.shm.connect(server.runtime_base) as engine,
    ):
        model = engine.model("alpha_model")
        assert model.version == 2
        config = repository / "alpha_model" / "config.pbtxt"
        config.write_text(config.read_text().replace("all { }", "specific { versions: [ 1 ] }"))
        model.input("features")[:] = 0.5
        first = float(model.infer()[0, 0])

        def has_moved() -> bool:
            model.input("features")[:] = 0.5
            return float(model.infer()[0, 0]) != first

        wait_until(has_moved, "version 1 to answer")
        assert model.version == 1


def test_server_that_was_killed_and_one_that_comes_back(tmp_path: Path) -> None:
    repository = write_models(tmp_path / "models")
    with serve(repository) as server:
        engine = forebay.client.shm.connect(server.runtime_base)
        model = engine.model("alpha_model")
        slow = engine.model("slow")
        model.input("features")[:] = 1
        answer = float(model.infer()[0, 0])
        slow.input("INPUT0")[:] = 1
        in_flight = slow.submit()
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(forebay.client.shm.EngineGone, match="the engine is gone"):
            in_flight.result(timeout_s=PATIENCE_S)
        with pytest.raises(forebay.client.shm.EngineGone):
            model.infer()
        with pytest.raises(NoServer):
            engine.reconnect(timeout_s=0.0)
        server.process.wait()
        server.launch()
        engine.reconnect(timeout_s=PATIENCE_S)
        model.input("features")[:] = 1
        assert float(model.infer()[0, 0]) == answer
        engine.close()
