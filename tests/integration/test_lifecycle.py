"""The living repository with real processes: changes in place, updates under load, hung workers, repositories."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forebay_server import CONF_MODELS, ForebayServer, roles_below

tritonclient = pytest.importorskip("tritonclient.http")

ALPHA_INFER = "/v2/models/alpha_model/infer"
UNLOAD_ALPHA = "/v2/repository/models/alpha_model/unload"
LOAD_ALPHA = "/v2/repository/models/alpha_model/load"

FAULT_CONFIG = """
backend: "forebay_fault"
max_batch_size: 4
input [ { name: "in" data_type: TYPE_INT32 dims: [ 1 ] } ]
output [ { name: "out" data_type: TYPE_INT32 dims: [ 1 ] } ]
instance_group [ { count: 1 kind: KIND_CPU } ]
"""

#: First element of the input that makes the fault backend hang.
HANG = -5


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The example ONNX model, version 2 only."""
    target = tmp_path / "models" / "alpha_model"
    shutil.copytree(CONF_MODELS / "alpha_model", target)
    edit_config(tmp_path / "models", "all { }", "latest { num_versions: 1 }")
    return tmp_path / "models"


@pytest.fixture
def server(repository: Path) -> Iterator[ForebayServer]:
    with ForebayServer(repository, "--model-control-mode=explicit", "--load-model=*") as running:
        yield running


def edit_config(repository: Path, old: str, new: str) -> None:
    """Replace the one place of the example's configuration that says ``old``."""
    path = repository / "alpha_model" / "config.pbtxt"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def infer(server: ForebayServer) -> int:
    """Send one request to the example model; return the status."""
    tensor = {"name": "features", "datatype": "FP32", "shape": [1, 50], "data": [0.5] * 50}
    return server.post(ALPHA_INFER, json.dumps({"inputs": [tensor]}).encode())[0]


def get_json(server: ForebayServer, path: str) -> Any:
    status, body = server.get(path)
    assert status == 200, body
    return json.loads(body)


def workers(server: ForebayServer) -> dict[str, int]:
    """Return the workers' pids by role."""
    return {role: pid for role, pid in server.pids().items() if role.startswith("worker ")}


def inference_count(server: ForebayServer) -> int:
    (entry,) = get_json(server, "/v2/models/alpha_model/stats")["model_stats"]
    return int(entry["inference_count"])


class Load:
    """Threads that send requests with tritonclient as long as the ``with`` block lasts."""

    def __init__(self, server: ForebayServer, *, senders: int = 4, versions: tuple[str, ...] = ("",)) -> None:
        self.answered = 0
        self.errors: list[str] = []
        self._server = server
        self._versions = versions
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._send) for _ in range(senders)]

    def _send(self) -> None:
        features = np.full((1, 50), 0.5, np.float32)
        inputs = [tritonclient.InferInput("features", features.shape, "FP32")]
        inputs[0].set_data_from_numpy(features)
        with tritonclient.InferenceServerClient(self._server.http_url) as client:
            while not self._done.is_set():
                for version in self._versions:
                    try:
                        answer = client.infer("alpha_model", inputs, model_version=version)
                    except Exception as error:  # whatever it is, it is a failed request
                        self.errors.append(f"{type(error).__name__}: {error}")
                    else:
                        assert answer.as_numpy("prediction").shape == (1, 1)
                        self.answered += 1

    def wait_answers(self, count: int) -> None:
        """Wait until so many more requests have been answered."""
        wanted = self.answered + count
        self._server.wait_for(lambda: bool(self.errors) or self.answered >= wanted, "more answers")

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        self.wait_answers(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()


# --- updates


def threads_after_update(server: ForebayServer) -> list[int]:
    """Load the example model anew, wait until its old workers have ended, and return all threads of the new ones."""
    before = set(workers(server).values())
    assert server.post(LOAD_ALPHA)[0] == 200
    server.wait_for(lambda: not before & set(workers(server).values()), "the old workers to end")
    return [int(name) for pid in workers(server).values() for name in os.listdir(f"/proc/{pid}/task")]


def test_workers_of_an_update_serve_at_the_usual_priority(server: ForebayServer, repository: Path) -> None:
    """While they load they get what serving workers leave of the CPU."""
    os.utime(repository / "alpha_model" / "2" / "model.onnx")
    threads = threads_after_update(server)
    assert {os.sched_getscheduler(thread) for thread in threads} == {os.SCHED_OTHER}
    assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads} == {os.getpriority(os.PRIO_PROCESS, 0)}
    assert infer(server) == 200


@pytest.mark.parametrize(("model_priority", "nice"), [("PRIORITY_MIN", {14}), ("PRIORITY_MAX", {-5, 0})])
def test_model_has_the_priority_of_its_configuration(
    server: ForebayServer, repository: Path, model_priority: str, nice: set[int]
) -> None:
    """Spec C-051: against other models; nobody may go before all others without the right to."""
    config = repository / "alpha_model" / "config.pbtxt"
    config.write_text(f"{config.read_text()}\noptimization {{ priority: {model_priority} }}\n")
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    assert {os.getpriority(os.PRIO_PROCESS, thread) - ours for thread in threads_after_update(server)} <= nice
    assert infer(server) == 200


# --- changes in place


def test_more_instances_are_added_to_those_that_run(server: ForebayServer, repository: Path) -> None:
    """Spec R-090: nothing is loaded again, and what was counted stays."""
    assert infer(server) == 200
    before, counted = workers(server), inference_count(server)
    edit_config(repository, "count: 2", "count: 3")
    assert server.post(LOAD_ALPHA)[0] == 200
    after = workers(server)
    assert len(after) == 3
    assert before.items() <= after.items()
    assert inference_count(server) == counted
    assert get_json(server, "/v2/models/alpha_model/config")["instance_group"][0]["count"] == 3


def test_fewer_instances_end_after_what_they_run(server: ForebayServer, repository: Path) -> None:
    """Spec R-090: totals never go backwards, whether instances go or come back."""
    with Load(server) as load:
        edit_config(repository, "count: 2", "count: 1")
        assert server.post(LOAD_ALPHA)[0] == 200
        server.wait_for(lambda: len(workers(server)) == 1, "one worker to end")
        load.wait_answers(50)
        edit_config(repository, "count: 1", "count: 2")
        assert server.post(LOAD_ALPHA)[0] == 200
        assert len(workers(server)) == 2
        load.wait_answers(50)
    assert load.errors == []
    assert inference_count(server) == load.answered


def test_batching_changes_without_a_reload(server: ForebayServer, repository: Path) -> None:
    """Better than Triton (L-015): workers live on, requests in flight and queued are answered."""
    before = workers(server)
    with Load(server) as load:
        for delay_us in (0, 200, 3000, 100):
            path = repository / "alpha_model" / "config.pbtxt"
            lines = path.read_text().splitlines()
            lines = [
                f"  max_queue_delay_microseconds: {delay_us}" if "max_queue_delay" in line else line for line in lines
            ]
            path.write_text("\n".join(lines))
            assert server.post(LOAD_ALPHA)[0] == 200
            load.wait_answers(30)
    assert load.errors == []
    assert workers(server) == before
    config = get_json(server, "/v2/models/alpha_model/config")
    assert config["dynamic_batching"]["max_queue_delay_microseconds"] == 100


def test_batching_that_needs_another_form_of_request_is_a_reload(server: ForebayServer, repository: Path) -> None:
    """Priorities are of single requests, which do not share rows: workers are replaced, and nobody notices."""
    before = workers(server)
    with Load(server) as load:
        priorities = "max_queue_delay_microseconds: 100\n  priority_levels: 2\n  default_priority_level: 1"
        edit_config(repository, "max_queue_delay_microseconds: 5000", priorities)
        assert server.post(LOAD_ALPHA)[0] == 200
        load.wait_answers(30)
    assert load.errors == []
    server.wait_for(lambda: not set(before.values()) & set(workers(server).values()), "the old workers to end")


def test_instances_that_cannot_be_added_leave_the_model_as_it_was(server: ForebayServer, repository: Path) -> None:
    before = workers(server)
    edit_config(repository, "kind: KIND_CPU", "kind: KIND_GPU")
    status, body = server.post(LOAD_ALPHA)
    assert status == 400
    assert b"load failed for model 'alpha_model': version 2 is at UNAVAILABLE state" in body
    assert workers(server) == before
    assert infer(server) == 200
    (row,) = json.loads(server.post("/v2/repository/index")[1])
    assert row["state"] == "READY"
    assert row["reason"].startswith("update failed: ")


def test_scheduler_that_dies_after_a_change_knows_the_new_policy(server: ForebayServer, repository: Path) -> None:
    edit_config(repository, "count: 2", "count: 1")
    assert server.post(LOAD_ALPHA)[0] == 200
    server.wait_for(lambda: len(workers(server)) == 1, "one worker to end")
    killed = server.pid_of("scheduler")
    os.kill(killed, signal.SIGKILL)
    server.wait_for(lambda: server.pid_of("scheduler") not in (0, killed), "a new scheduler")
    assert infer(server) == 200


# --- updates under load


def test_versions_come_and_go_under_load(server: ForebayServer, repository: Path) -> None:
    """Spec R-087: no request to a version that stays, or to the newest, ever fails."""
    with Load(server, versions=("", "2")) as load:
        for policy in ("all { }", "specific { versions: [ 2 ] }", "all { }"):
            path = repository / "alpha_model" / "config.pbtxt"
            lines = [
                f"version_policy {{ {policy} }}" if line.startswith("version_policy") else line
                for line in path.read_text().splitlines()
            ]
            path.write_text("\n".join(lines))
            assert server.post(LOAD_ALPHA)[0] == 200
            load.wait_answers(20)
        model = repository / "alpha_model" / "2" / "model.onnx"
        for _ in range(3):
            # Another file under the old name, as a deployment does it.
            staged = model.with_name("staged")
            staged.write_bytes(model.read_bytes())
            staged.rename(model)
            assert server.post(LOAD_ALPHA)[0] == 200
            load.wait_answers(20)
    assert load.errors == []


def test_failed_updates_under_load_fail_no_request(server: ForebayServer, repository: Path) -> None:
    """Spec R-086: the old version serves on, and the log says why the new one does not."""
    good = (repository / "alpha_model" / "2" / "model.onnx").read_bytes()
    with Load(server) as load:
        for _ in range(3):
            (repository / "alpha_model" / "2" / "model.onnx").write_bytes(b"broken")
            assert server.post(LOAD_ALPHA)[0] == 400
            load.wait_answers(20)
        (repository / "alpha_model" / "2" / "model.onnx").write_bytes(good)
        assert server.post(LOAD_ALPHA)[0] == 200
        load.wait_answers(20)
    assert load.errors == []
    assert server.stderr.count("failed to load 'alpha_model' version 2: ") == 3
    (row,) = json.loads(server.post("/v2/repository/index")[1])
    assert "reason" not in row


# --- hung workers


def fault_infer(server: ForebayServer, element: int) -> tuple[int, str]:
    tensor = {"name": "in", "datatype": "INT32", "shape": [1, 1], "data": [element]}
    status, body = server.post("/v2/models/faulty/infer", json.dumps({"inputs": [tensor]}).encode())
    return status, body.decode()


def start_faulty(tmp_path: Path, config: str, *flags: str) -> ForebayServer:
    folder = tmp_path / "faulty_models" / "faulty"
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(config)
    return ForebayServer(folder.parent, *flags, environment={"FOREBAY_TEST_BACKENDS": "1"})


@pytest.mark.parametrize("warm_up", [0, 40], ids=["scheduled", "granted"])
def test_hung_execution_is_ended_and_its_request_failed(tmp_path: Path, warm_up: int) -> None:
    """Issue 5, item 4. After some quiet requests the frontend rings the worker itself."""
    with start_faulty(tmp_path, FAULT_CONFIG, "--worker-timeout-secs=1") as server:
        for _ in range(warm_up):
            assert fault_infer(server, 1)[0] == 200
        status, body = fault_infer(server, HANG)
        assert status == 500
        assert "ran longer than model 'faulty' may" in body
        server.wait_logged("took more than 1 s for one batch and was ended")
        server.wait_logged("worker faulty:1 #0 is back")
        server.wait_for(lambda: fault_infer(server, 7)[0] == 200, "the model to serve again")
        # It was not tried again: that would have hung the next worker.
        assert server.stderr.count("has been executing one batch") == 1


def test_hung_parcel_is_failed(tmp_path: Path) -> None:
    config = FAULT_CONFIG.replace("dims: [ 1 ]", "dims: [ -1 ]")
    with start_faulty(tmp_path, config, "--worker-timeout-secs=1") as server:
        status, body = fault_infer(server, HANG)
        assert status == 500
        assert "ran longer than model 'faulty' may" in body


def test_model_has_a_limit_of_its_own(tmp_path: Path) -> None:
    parameter = 'parameters { key: "worker_timeout_secs" value { string_value: "0.5" } }\n'
    with start_faulty(tmp_path, FAULT_CONFIG + parameter) as server:
        assert fault_infer(server, HANG)[0] == 500
        server.wait_logged("took more than 0.5 s for one batch and was ended")


def test_limit_that_is_no_number_fails_the_load(tmp_path: Path) -> None:
    parameter = 'parameters { key: "worker_timeout_secs" value { string_value: "soon" } }\n'
    with start_faulty(tmp_path, FAULT_CONFIG + parameter, "--exit-on-error=false") as server:
        assert (
            "parameter 'worker_timeout_secs' must be a number of seconds, 0 for no limit, got 'soon'" in server.stderr
        )


def test_load_that_hangs_fails_after_its_time(tmp_path: Path) -> None:
    """Issue 5: the others are served, and the reason says what happened."""
    hangs = 'parameters { key: "load_fault" value { string_value: "hang" } }\n'
    with start_faulty(tmp_path, FAULT_CONFIG + hangs, "--load-timeout-secs=1", "--exit-on-error=false") as server:
        server.wait_logged("loading took longer than 1 s (--load-timeout-secs)")
        assert server.get("/v2/health/live")[0] == 200


# --- several repositories, other configurations


def test_two_repositories_with_the_same_model_under_namespacing(tmp_path: Path, repository: Path) -> None:
    """Spec R-015."""
    other = tmp_path / "others"
    shutil.copytree(repository, other)
    with ForebayServer(repository, f"--model-repository={other}", "--model-namespacing=true") as server:
        rows = json.loads(server.post("/v2/repository/index")[1])
        assert [(row["name"], row["state"]) for row in rows] == [("alpha_model", "READY")] * 2
        roles = list(roles_below(server.pid).values())
        assert roles.count("worker alpha_model:2 alpha_model_0_0") == 2


def test_model_of_a_namespace_is_loaded_and_unloaded_by_its_name(tmp_path: Path, repository: Path) -> None:
    """Spec R-015: as long as only one has that name."""
    other = tmp_path / "others"
    shutil.copytree(repository, other)
    flags = ("--model-namespacing=true", "--model-control-mode=explicit")
    with ForebayServer(repository, *flags) as server:
        assert server.post(LOAD_ALPHA)[0] == 200
        assert infer(server) == 200
        assert server.post(UNLOAD_ALPHA)[0] == 200
        assert infer(server) == 404
    with ForebayServer(repository, f"--model-repository={other}", *flags) as server:
        assert server.post(LOAD_ALPHA)[0] == 500
        assert "ambiguity for model 'alpha_model'" in server.stderr
        assert server.post(UNLOAD_ALPHA)[0] == 400


def test_two_repositories_with_the_same_model_without_namespacing(tmp_path: Path, repository: Path) -> None:
    """Spec R-010: the others are served."""
    other = tmp_path / "others"
    shutil.copytree(repository, other)
    shutil.copytree(other / "alpha_model", other / "beta_model")
    config = other / "beta_model" / "config.pbtxt"
    config.write_text(config.read_text().replace('"alpha_model"', '"beta_model"'))
    with ForebayServer(repository, f"--model-repository={other}", "--exit-on-error=false") as server:
        assert "model appears in two or more repositories" in server.stdout + server.stderr
        assert server.get("/v2/models/beta_model/ready")[0] == 200
        assert server.get("/v2/models/alpha_model/ready")[0] == 400


def test_configuration_by_name(repository: Path) -> None:
    """Spec R-016."""
    text = (repository / "alpha_model" / "config.pbtxt").read_text()
    (repository / "alpha_model" / "configs").mkdir()
    (repository / "alpha_model" / "configs" / "small.pbtxt").write_text(text.replace("size: 64", "size: 32"))
    with ForebayServer(repository, "--model-config-name=small") as server:
        assert get_json(server, "/v2/models/alpha_model/config")["max_batch_size"] == 32


def test_failed_load_is_tried_again(repository: Path) -> None:
    """Spec R-085."""
    (repository / "alpha_model" / "2" / "model.onnx").write_bytes(b"broken")
    with ForebayServer(repository, "--model-load-retry-count=2", "--exit-on-error=false") as server:
        assert server.stderr.count("failed to load 'alpha_model' version 2: ") == 3
        assert "retrying to load 'alpha_model', attempt 3" in server.stderr


# --- host policies


def test_instances_run_on_the_cores_of_their_host_policy(repository: Path) -> None:
    """Spec C-099, F-155."""
    core = min(os.sched_getaffinity(0))
    with ForebayServer(repository, f"--host-policy=cpu,cpu-cores={core}-{core}") as server:
        for pid in workers(server).values():
            assert os.sched_getaffinity(pid) == {core}
        assert infer(server) == 200


def test_host_policy_without_a_usable_core_is_one_line_and_exit_code_1(repository: Path) -> None:
    server = ForebayServer(repository, "--host-policy=cpu,cpu-cores=4000-4001")
    server.launch()
    assert server.process.wait(30) == 1
    (line,) = server.stderr.splitlines()
    assert "error: creating server: Invalid argument - --host-policy 'cpu' has no CPU core that this server may" in line


# --- files


def test_model_file_outside_the_repository_is_refused(tmp_path: Path, repository: Path) -> None:
    """Spec C-039: whoever may write into a repository may not have other files opened."""
    outside = tmp_path / "outside.onnx"
    model = repository / "alpha_model" / "2" / "model.onnx"
    model.rename(outside)
    model.symlink_to(outside)
    with ForebayServer(repository, "--exit-on-error=false") as server:
        assert server.get("/v2/models/alpha_model/ready")[0] == 400
        (row,) = json.loads(server.post("/v2/repository/index")[1])
        assert row["state"] == "UNAVAILABLE"
        assert str(tmp_path) not in row["reason"]


# --- forebay validate --load


def validate(repository: Path) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-P", "-m", "forebay.engine.main", "validate", str(repository), "--load", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd="/")
    assert done.stderr == ""
    models: dict[str, Any] = {model["name"]: model for model in json.loads(done.stdout)["models"]}
    return done.returncode, models


def test_validate_loads_models_and_ends_its_workers(repository: Path) -> None:
    code, models = validate(repository)
    assert code == 0
    (loaded,) = models["alpha_model"]["loaded"]
    assert loaded["is_loaded"]
    assert loaded["version"] == 2


def test_validate_compares_tensors_with_the_model_file(repository: Path) -> None:
    """Spec B-022: only the file says that it is wrong."""
    edit_config(repository, "dims: [ 50 ]", "dims: [ 49 ]")
    edit_config(repository, 'name: "prediction"', 'name: "predictions"')
    code, models = validate(repository)
    assert code == 1
    features, predictions = models["alpha_model"]["problems"]
    assert features["text"].startswith("model 'alpha_model', tensor 'features': the model expects 2 dimensions")
    assert features["field"] == "input[0].dims"
    assert features["line"]
    assert predictions["text"] == "unexpected inference output 'predictions', allowed outputs are: prediction"
