"""The process tree as a whole: real processes that are started, killed and stopped."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from forebay_server import CONF_MODELS, ForebayServer, is_running, wait_until

ALPHA = "worker alpha_model:2 alpha_model_0_0"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The example repository without what needs PyTorch."""
    shutil.copytree(CONF_MODELS / "alpha_model", tmp_path / "models" / "alpha_model")
    return tmp_path / "models"


@pytest.fixture
def server(repository: Path) -> Iterator[ForebayServer]:
    """A server that no test minds killing."""
    with ForebayServer(repository) as running:
        yield running


def kill_and_wait_replaced(server: ForebayServer, role: str) -> int:
    """Kill a process and return the pid of the one in its place."""
    killed = server.pid_of(role)
    os.kill(killed, signal.SIGKILL)
    server.wait_for(lambda: server.pid_of(role) not in (0, killed), f"a new {role}")
    return server.pid_of(role)


def test_every_process_is_named_by_its_role(server: ForebayServer) -> None:
    roles = set(server.pids())
    assert {"supervisor", "janitor", "scheduler", "http 0", "zygote onnxruntime"} <= roles
    workers = {role for role in roles if role.startswith("worker ")}
    assert workers == {f"worker alpha_model:{v} alpha_model_0_{k}" for v in (1, 2) for k in (0, 1)}


def test_zygote_forks_without_threads(server: ForebayServer) -> None:
    pid = server.pids()["zygote onnxruntime"]
    assert len(os.listdir(f"/proc/{pid}/task")) == 1


def test_worker_holds_only_its_own_descriptors(server: ForebayServer) -> None:
    """A worker keeps nothing of the zygote: its siblings' doorbells and lifelines would outlive them."""
    pids = server.pids()
    zygote = {os.readlink(f"/proc/{pids['zygote onnxruntime']}/fd/{fd}") for fd in _fds(pids["zygote onnxruntime"])}
    worker = {os.readlink(f"/proc/{pids[ALPHA]}/fd/{fd}") for fd in _fds(pids[ALPHA]) if fd > 2}
    assert not {name for name in zygote & worker if name.startswith("socket:")}


def _fds(pid: int) -> list[int]:
    return [int(name) for name in os.listdir(f"/proc/{pid}/fd") if int(name) > 2]


def test_sigterm_ends_everything_with_exit_code_0(server: ForebayServer) -> None:
    """Spec R-110, F-175."""
    pids = server.pids()
    assert server.stop() == 0
    assert "Signal (15) received." in server.stdout
    assert "successfully unloaded 'alpha_model' version 2" in server.stderr
    wait_until(lambda: not any(is_running(pid) for pid in pids.values()), "all processes to end")
    assert os.listdir(server.runtime_base) == []


def test_no_request_is_lost_when_the_server_stops_under_load(server: ForebayServer) -> None:
    """Every request on a kept connection is answered; the last reply says that there are no more."""
    failures: list[str] = []
    answered = [0] * 8

    def send_until_refused(client: int) -> None:
        connection = http.client.HTTPConnection("localhost", server.http_port, timeout=30)
        body = json.dumps({"inputs": [{"name": "features", "shape": [1, 50], "datatype": "FP32", "data": [0.5] * 50}]})
        while not failures:
            try:
                connection.request("POST", "/v2/models/alpha_model/infer", body)
                reply = connection.getresponse()
                reply.read()
            except ConnectionRefusedError:
                return
            except (OSError, http.client.HTTPException) as error:
                failures.append(repr(error))
                return
            answered[client] += 1
            if reply.status != 200:
                failures.append(str(reply.status))

    threads = [threading.Thread(target=send_until_refused, args=(client,)) for client in range(len(answered))]
    for thread in threads:
        thread.start()
    wait_until(lambda: bool(failures) or min(answered) > 5, "every client to be served")
    assert server.stop() == 0
    for thread in threads:
        thread.join()
    assert failures == []


def test_second_signal_ends_at_once(server: ForebayServer) -> None:
    pids = server.pids()
    # A frontend that cannot finish makes the drain wait.
    os.kill(server.pid_of("http"), signal.SIGSTOP)
    os.kill(server.pid, signal.SIGTERM)
    wait_until(lambda: "Signal (15) received." in server.stdout, "the first signal")
    os.kill(server.pid, signal.SIGINT)
    assert server.process.wait(20) == 1
    wait_until(lambda: not any(is_running(pid) for pid in pids.values()), "all processes to end")
    assert os.listdir(server.runtime_base) == []


def test_exit_timeout_ends_a_drain_that_does_not_finish(repository: Path) -> None:
    """Spec R-113."""
    with ForebayServer(repository, "--exit-timeout-secs=1") as server:
        os.kill(server.pid_of("http"), signal.SIGSTOP)
        assert server.stop() == 1
        assert "Exit timeout expired" in server.stderr


def test_killed_supervisor_leaves_nothing_behind(server: ForebayServer) -> None:
    pids = server.pids()
    shared_memory = set(os.listdir("/dev/shm"))
    assert os.listdir(server.runtime_base) != []
    os.kill(server.pid, signal.SIGKILL)
    server.process.wait()
    wait_until(lambda: not any(is_running(pid) for pid in pids.values()), "all processes to end")
    wait_until(lambda: os.listdir(server.runtime_base) == [], "the runtime directory to be removed")
    assert not {name for name in set(os.listdir("/dev/shm")) - shared_memory if "forebay" in name}


def test_killed_janitor_is_replaced(server: ForebayServer) -> None:
    """Whoever kills the supervisor after it finds nothing left behind either."""
    kill_and_wait_replaced(server, "janitor")
    os.kill(server.pid, signal.SIGKILL)
    server.process.wait()
    wait_until(lambda: os.listdir(server.runtime_base) == [], "the runtime directory to be removed")


def test_stale_runtime_directory_is_removed_by_the_next_server(repository: Path) -> None:
    with ForebayServer(repository) as server:
        # A machine that goes down takes both at once.
        os.kill(server.pid, signal.SIGSTOP)
        os.kill(server.pid_of("janitor"), signal.SIGKILL)
        os.kill(server.pid, signal.SIGKILL)
        server.process.wait()
        (stale,) = os.listdir(server.runtime_base)
        with ForebayServer(repository, environment={"FOREBAY_RUNTIME_DIRECTORY": str(server.runtime_base)}) as second:
            assert stale not in os.listdir(server.runtime_base)
            assert second.stop() == 0


def test_killed_worker_is_replaced_while_the_model_stays_ready(server: ForebayServer) -> None:
    kill_and_wait_replaced(server, ALPHA)
    server.wait_logged("worker alpha_model:2 #0 is back")
    assert "SIGKILL" in server.stderr
    assert server.get("/v2/models/alpha_model/ready")[0] == 200


def test_model_is_unavailable_while_no_instance_lives(repository: Path) -> None:
    config = repository / "alpha_model" / "config.pbtxt"
    config.write_text(config.read_text().replace("count: 2", "count: 1"))
    with ForebayServer(repository) as server:
        # The zygote cannot fork while it is stopped, so the worker is not replaced before we have looked.
        os.kill(server.pids()["zygote onnxruntime"], signal.SIGSTOP)
        os.kill(server.pids()[ALPHA], signal.SIGKILL)
        server.wait_for(lambda: server.get("/v2/models/alpha_model/versions/2/ready")[0] == 400, "UNAVAILABLE")
        assert server.get("/v2/models/alpha_model/versions/1/ready")[0] == 200
        os.kill(server.pids()["zygote onnxruntime"], signal.SIGCONT)
        server.wait_for(lambda: server.get("/v2/models/alpha_model/versions/2/ready")[0] == 200, "READY")


def test_killed_zygote_is_replaced_with_its_workers(server: ForebayServer) -> None:
    before = server.pids()
    kill_and_wait_replaced(server, "zygote onnxruntime")
    for role in [role for role in before if role.startswith("worker ")]:
        server.wait_for(lambda role=role: server.pids().get(role, before[role]) != before[role], f"a new {role}")  # type: ignore[misc]
    server.wait_for(lambda: server.get("/v2/health/ready")[0] == 200, "the server to be ready")


def test_killed_scheduler_is_replaced(server: ForebayServer) -> None:
    kill_and_wait_replaced(server, "scheduler")
    server.wait_logged("scheduler died (signal 9 (SIGKILL))")
    assert server.get("/v2/health/ready")[0] == 200


def test_connections_wait_while_a_killed_frontend_is_replaced(server: ForebayServer) -> None:
    """The supervisor holds the listening socket: nothing is refused, it only takes longer."""
    os.kill(server.pid_of("http"), signal.SIGKILL)
    assert server.get("/v2/health/live")[0] == 200


def test_port_in_use_is_one_line_and_exit_code_1(repository: Path) -> None:
    """Spec H-021."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        second = ForebayServer(repository, http_port=port)
        second.launch()
        assert second.process.wait(30) == 1
    assert second.stderr.splitlines() == [
        "error: creating server: Unavailable - failed to start HTTP service: Unavailable - "
        f"Socket '127.0.0.1:{port}' already in use"
    ]
    assert second.stdout == ""
    assert not second.runtime_base.exists() or os.listdir(second.runtime_base) == []


def test_two_servers_do_not_disturb_each_other(server: ForebayServer, repository: Path) -> None:
    with ForebayServer(repository, environment={"FOREBAY_RUNTIME_DIRECTORY": str(server.runtime_base)}) as second:
        assert second.get("/v2/health/ready")[0] == 200
        assert second.stop() == 0
    assert server.get("/v2/health/ready")[0] == 200
    assert len(os.listdir(server.runtime_base)) == 1


def test_two_servers_share_a_port_that_both_reuse(repository: Path) -> None:
    """Spec F-043."""
    with ForebayServer(repository, "--reuse-http-port=true") as first:
        with ForebayServer(repository, "--reuse-http-port=true", http_port=first.http_port) as second:
            assert second.http_port == first.http_port
            assert second.stop() == 0
        assert first.get("/v2/health/ready")[0] == 200


def test_nothing_listens_before_the_models_are_loaded(repository: Path) -> None:
    """Spec H-032."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = ForebayServer(repository, http_port=port)
    server.launch()
    try:
        refused = 0
        while "Started HTTPService" not in server.stderr:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) != 0:
                    refused += 1
                else:
                    # Connected: then the models must have been loaded.
                    assert "successfully loaded 'alpha_model'" in server.stderr
        assert refused > 0
    finally:
        assert server.stop() == 0


def test_bad_model_ends_the_start_with_exit_code_1(repository: Path) -> None:
    """Spec R-083."""
    (repository / "alpha_model" / "2" / "model.onnx").write_bytes(b"not a model")
    server = ForebayServer(repository)
    server.launch()
    assert server.process.wait(60) == 1
    assert "failed to load 'alpha_model' version 2: " in server.stderr
    assert "error: creating server: Internal - failed to load all models" in server.stderr
    assert os.listdir(server.runtime_base) == []


def test_server_runs_with_the_rest_without_exit_on_error(repository: Path) -> None:
    """Spec R-083, R-086, H-031: the whole load of a model fails when one version does."""
    shutil.copytree(repository / "alpha_model", repository / "beta_model")
    config = repository / "beta_model" / "config.pbtxt"
    config.write_text(config.read_text().replace("alpha_model", "beta_model"))
    (repository / "beta_model" / "1" / "model.onnx").write_bytes(b"not a model")
    with ForebayServer(repository, "--exit-on-error=false") as server:
        assert server.get("/v2/models/alpha_model/ready")[0] == 200
        assert server.get("/v2/models/beta_model/ready")[0] == 400
        assert server.get("/v2/health/ready")[0] == 400
        assert not [role for role in server.pids() if "beta_model" in role]


def test_version_that_is_dropped_with_another_is_in_table_and_index(repository: Path) -> None:
    """Spec R-086: a load fails as a whole; nobody shall have to guess where version 1 is."""
    (repository / "alpha_model" / "2" / "model.onnx").write_bytes(b"no model")
    with ForebayServer(repository, "--exit-on-error=false") as server:
        first, second = index(server)
        assert first == {"name": "alpha_model", "version": "1", "state": "UNAVAILABLE", "reason": "unloaded"}
        assert second["state"] == "UNAVAILABLE"
        rows = [line.split() for line in server.stdout.splitlines() if line.startswith("alpha_model")]
        assert [row[:2] for row in rows] == [["alpha_model", "1"], ["alpha_model", "2"]]


def test_gpu_model_without_gpu_says_what_to_do(repository: Path) -> None:
    """Spec C-094."""
    config = repository / "alpha_model" / "config.pbtxt"
    config.write_text(config.read_text().replace("kind: KIND_CPU", "kind: KIND_GPU\n    gpus: [ 0 ]"))
    with ForebayServer(repository, "--exit-on-error=false") as server:
        assert "specifies invalid or unsupported gpu id 0" in server.stderr
        assert "--gpu-fallback cpu" in server.stderr
    with ForebayServer(repository, "--gpu-fallback=cpu") as server:
        assert "runs on the CPU instead" in server.stderr
        assert server.get("/v2/models/alpha_model/ready")[0] == 200


def test_several_http_frontends_share_the_port(repository: Path) -> None:
    with ForebayServer(repository, "--http-frontends=2") as server:
        assert len([role for role in server.pids() if role.startswith("http")]) == 2
        assert all(server.get("/v2/health/ready")[0] == 200 for _ in range(8))


def test_log_file_takes_all_lines(repository: Path, tmp_path: Path) -> None:
    """Spec O-040, O-044, O-047."""
    path = tmp_path / "server.log"
    server = ForebayServer(repository, f"--log-file={path}")
    server.launch()
    try:
        wait_until(lambda: path.exists() and "Started Metrics Service at" in path.read_text(), "the log file")
        assert server.stderr == ""
        pattern = r'^[IWE]\d{4} \d\d:\d\d:\d\d\.\d{6} \d+ \w+\.py:\d+\] ".*"$'
        assert all(re.match(pattern, line) for line in path.read_text().splitlines())
        assert '"loading: alpha_model:1"' in path.read_text()
    finally:
        assert server.stop() == 0


def test_log_settings_change_at_run_time(server: ForebayServer) -> None:
    """Spec H-261, H-263."""
    status, body = server.post("/v2/logging", b'{"log_info":false,"log_verbose_level":1}')
    assert status == 200
    assert json.loads(body) == {
        "log_file": "",
        "log_info": False,
        "log_warning": True,
        "log_error": True,
        "log_verbose_level": 1,
        "log_format": "default",
    }
    assert server.get("/v2/health/live")[0] == 200


# --- the living repository


def infer(server: ForebayServer, model: str = "alpha_model", version: str = "") -> int:
    """Send one request; return the status."""
    path = f"/v2/models/{model}{f'/versions/{version}' if version else ''}/infer"
    data = [0.5] * 50
    document = {"inputs": [{"name": "features", "datatype": "FP32", "shape": [1, 50], "data": data}]}
    return server.post(path, json.dumps(document).encode())[0]


@pytest.fixture
def explicit(repository: Path) -> Iterator[ForebayServer]:
    with ForebayServer(repository, settings={"repository": {"control_mode": "explicit"}}) as running:
        yield running


def index(server: ForebayServer, body: bytes = b"") -> list[dict[str, str]]:
    status, reply = server.post("/v2/repository/index", body)
    assert status == 200
    rows: list[dict[str, str]] = json.loads(reply)
    return rows


def test_explicit_mode_starts_with_nothing_loaded(explicit: ForebayServer) -> None:
    """Spec R-082, H-211."""
    assert index(explicit) == [{"name": "alpha_model"}]
    assert infer(explicit) == 404


def test_load_and_unload_by_name(explicit: ForebayServer) -> None:
    """Spec H-214, H-220, R-094."""
    assert explicit.post("/v2/repository/models/alpha_model/load") == (200, b"")
    assert infer(explicit) == 200
    ready = [{"name": "alpha_model", "version": v, "state": "READY"} for v in ("1", "2")]
    assert index(explicit, b'{"ready":true}') == ready
    assert explicit.post("/v2/repository/models/alpha_model/unload") == (200, b"")
    assert infer(explicit) == 404
    unloaded = [{"name": "alpha_model", "version": v, "state": "UNAVAILABLE", "reason": "unloaded"} for v in ("1", "2")]
    explicit.wait_for(lambda: index(explicit) == unloaded, "the versions to be unloaded")
    explicit.wait_for(lambda: not [r for r in explicit.pids() if r.startswith("worker")], "the workers to end")
    assert explicit.post("/v2/repository/models/alpha_model/unload")[0] == 200
    assert explicit.post("/v2/repository/models/nobody/unload")[0] == 200
    assert explicit.post("/v2/repository/models/alpha_model/load")[0] == 200
    assert infer(explicit) == 200


def test_load_of_an_unchanged_model_keeps_its_workers(explicit: ForebayServer) -> None:
    """Spec R-089."""
    explicit.post("/v2/repository/models/alpha_model/load")
    before = explicit.pids()
    assert [role for role in before if role.startswith("worker ")]
    assert explicit.post("/v2/repository/models/alpha_model/load")[0] == 200
    assert explicit.pids() == before


def test_load_failures_have_tritons_texts(explicit: ForebayServer) -> None:
    """Spec H-218, E-090, E-102, E-103."""
    load = "/v2/repository/models/{}/load"
    assert explicit.post(load.format("nope")) == (
        500,
        b'{"error":"failed to load \'nope\', failed to poll from model repository"}',
    )
    body = json.dumps({"parameters": {"config": '{"backend":"identity","bogus":1}'}}).encode()
    assert explicit.post(load.format("alpha_model"), body) == (
        500,
        b'{"error":"failed to load \'alpha_model\', failed to poll from model repository"}',
    )
    assert "Invalid config override: bogus: Cannot find field." in explicit.stderr


@pytest.mark.parametrize("policy", ["", "version_policy { specific { versions: [ 3, 5 ] } }"])
def test_load_of_a_model_without_a_version_says_so(explicit: ForebayServer, repository: Path, policy: str) -> None:
    """Spec R-008, as Triton 2.51 answers; the model is known from then on, unlike one that cannot be polled."""
    model = repository / "hollow"
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(f'backend: "identity" {policy}')
    if not policy:
        (model / "1").rmdir()
    text = "load failed for model 'hollow': at least one version must be available under the version policy of model "
    assert explicit.post("/v2/repository/models/hollow/load") == (400, f'{{"error":"{text}\'hollow\'\\n"}}'.encode())
    for path, why in (("", "has no available versions"), ("/versions/1/config", "version 1 is not found")):
        refused = f'{{"error":"Request for unknown model: \'hollow\' {why}"}}'
        assert explicit.get(f"/v2/models/hollow{path}") == (404, refused.encode())
    assert {"name": "hollow"} in index(explicit)


def test_failed_update_keeps_the_old_versions_serving(explicit: ForebayServer, repository: Path) -> None:
    """Spec R-086, H-219; the reason is in the index."""
    assert explicit.post("/v2/repository/models/alpha_model/load")[0] == 200
    (repository / "alpha_model" / "2" / "model.onnx").write_bytes(b"broken")
    status, body = explicit.post("/v2/repository/models/alpha_model/load")
    assert status == 400
    assert b"load failed for model 'alpha_model': version 2 is at UNAVAILABLE state: " in body
    assert infer(explicit) == 200
    assert infer(explicit, version="2") == 200
    row = index(explicit)[1]
    assert row["state"] == "READY"
    assert row["reason"].startswith("update failed: ")


def test_update_with_a_bad_configuration_says_why_and_what_goes_on_serving(
    explicit: ForebayServer, repository: Path
) -> None:
    """Spec H-219; better than L-014: the one who deploys it is told, and not the log alone."""
    assert explicit.post("/v2/repository/models/alpha_model/load")[0] == 200
    config = repository / "alpha_model" / "config.pbtxt"
    config.write_text(config.read_text().replace("max_batch_size", "max_batchsize"))
    status, body = explicit.post("/v2/repository/models/alpha_model/load")
    text = json.loads(body)["error"]
    assert status == 500
    assert text.startswith("failed to load 'alpha_model', failed to poll from model repository: alpha_model/config.pbt")
    assert text.endswith("; did you mean 'max_batch_size'? (goes on serving as before: version 1, 2)")
    assert {row["reason"].partition(":")[0] for row in index(explicit)} == {"update failed"}
    assert infer(explicit) == 200


def test_update_under_load_fails_no_request(explicit: ForebayServer, repository: Path) -> None:
    """Spec R-087: every request is answered while the model is replaced again and again."""
    assert explicit.post("/v2/repository/models/alpha_model/load")[0] == 200
    statuses: list[int] = []
    done = threading.Event()

    def send() -> None:
        while not done.is_set():
            statuses.append(infer(explicit))

    senders = [threading.Thread(target=send) for _ in range(4)]
    for sender in senders:
        sender.start()
    try:
        for _ in range(5):
            model = repository / "alpha_model" / "2" / "model.onnx"
            model.write_bytes(model.read_bytes())
            assert explicit.post("/v2/repository/models/alpha_model/load")[0] == 200
    finally:
        done.set()
        for sender in senders:
            sender.join()
    assert len(statuses) > 20
    assert set(statuses) == {200}
    explicit.wait_for(lambda: len([r for r in explicit.pids() if r.startswith("worker")]) == 4, "old workers to end")


def test_load_with_config_override(explicit: ForebayServer) -> None:
    """Spec H-215, R-092."""
    explicit.post("/v2/repository/models/alpha_model/load")
    config = json.loads(explicit.get("/v2/models/alpha_model/config")[1])
    config["max_batch_size"] = 7
    config["dynamic_batching"]["preferred_batch_size"] = [4]
    body = json.dumps({"parameters": {"config": json.dumps(config)}}).encode()
    assert explicit.post("/v2/repository/models/alpha_model/load", body) == (200, b"")
    assert json.loads(explicit.get("/v2/models/alpha_model/config")[1])["max_batch_size"] == 7
    assert explicit.post("/v2/repository/models/alpha_model/load") == (200, b"")
    assert json.loads(explicit.get("/v2/models/alpha_model/config")[1])["max_batch_size"] == 64


def test_python_model_serves_whatever_tensors_an_override_leaves_it(explicit: ForebayServer, repository: Path) -> None:
    """Spec H-215; outputs that nobody asked for are dropped."""
    (repository / "counting" / "1").mkdir(parents=True)
    (repository / "counting" / "1" / "model.py").write_text(
        "import numpy, triton_python_backend_utils as pb_utils\n"
        "class TritonPythonModel:\n"
        "    def execute(self, requests):\n"
        '        counted = pb_utils.Tensor("Y", numpy.arange(3, dtype=numpy.int32))\n'
        "        return [pb_utils.InferenceResponse([counted]) for request in requests]\n"
    )
    output = {"name": "Y", "data_type": "TYPE_INT32", "dims": [3]}
    for config, data in (({}, []), ({"output": [output]}, [[0, 1, 2]])):
        body = json.dumps({"parameters": {"config": json.dumps(config)}}).encode()
        assert explicit.post("/v2/repository/models/counting/load", body) == (200, b"")
        _status, reply = explicit.post("/v2/models/counting/infer", b'{"inputs":[]}')
        assert [tensor["data"] for tensor in json.loads(reply)["outputs"]] == data


def test_load_with_files_uses_nothing_of_the_repository(explicit: ForebayServer, repository: Path) -> None:
    """Spec H-216: the files live as long as the model does."""
    model = base64.b64encode((repository / "alpha_model" / "1" / "model.onnx").read_bytes()).decode()
    config = '{"backend":"onnxruntime","version_policy":{"specific":{"versions":[5]}}}'
    body = json.dumps({"parameters": {"config": config, "file:5/model.onnx": model}}).encode()
    assert explicit.post("/v2/repository/models/sent_model/load", body) == (200, b"")
    assert infer(explicit, "sent_model", "5") == 200
    assert explicit.post("/v2/repository/models/sent_model/unload")[0] == 200
    assert infer(explicit, "sent_model") == 404


def test_load_is_refused_without_explicit_mode(server: ForebayServer) -> None:
    """Spec H-221."""
    text = b'{"error":"explicit model load / unload is not allowed if polling is enabled"}'
    assert server.post("/v2/repository/models/alpha_model/load") == (503, text)
    assert server.post("/v2/repository/models/alpha_model/unload") == (503, text)


def test_model_without_config_is_completed(repository: Path) -> None:
    """Spec R-063: B-019 gives it two instances on the CPU."""
    (repository / "alpha_model" / "config.pbtxt").unlink()
    with ForebayServer(repository) as server:
        config = json.loads(server.get("/v2/models/alpha_model/config")[1])
        assert config["max_batch_size"] == 4
        assert config["dynamic_batching"]["preferred_batch_size"] == [4]
        assert config["instance_group"][0]["count"] == 2
        assert infer(server) == 200


def test_killing_everything_under_load_loses_no_other_request(server: ForebayServer) -> None:
    """A killed scheduler or worker costs its requests a retry at most; the server answers every one of them."""
    statuses: list[int] = []
    done = threading.Event()

    def send() -> None:
        while not done.is_set():
            statuses.append(infer(server))

    senders = [threading.Thread(target=send) for _ in range(4)]
    for sender in senders:
        sender.start()
    try:
        for role in (ALPHA, "scheduler", ALPHA.replace("0_0", "0_1")):
            kill_and_wait_replaced(server, role)
        server.wait_logged("is back", count=2)
        sent = len(statuses)
        server.wait_for(lambda: len(statuses) > sent + 20, "more answers")
    finally:
        done.set()
        for sender in senders:
            sender.join()
    assert set(statuses) == {200}


def test_sigterm_while_models_load_ends_with_exit_code_0(repository: Path) -> None:
    server = ForebayServer(repository)
    server.launch()
    server.wait_logged("loading: alpha_model:2")
    pids = server.pids()
    assert server.stop() == 0
    wait_until(lambda: not any(is_running(pid) for pid in pids.values()), "all processes to end")
    assert os.listdir(server.runtime_base) == []


def test_descriptors_and_memory_come_back_after_unloading(explicit: ForebayServer) -> None:
    def cycle() -> None:
        assert explicit.post("/v2/repository/models/alpha_model/load")[0] == 200
        assert infer(explicit) == 200
        assert explicit.post("/v2/repository/models/alpha_model/unload")[0] == 200
        explicit.wait_for(lambda: not [r for r in explicit.pids() if r.startswith("worker")], "the workers to end")

    def descriptor_counts() -> dict[str, int]:
        return {role: len(os.listdir(f"/proc/{pid}/fd")) for role, pid in explicit.pids().items()}

    for _ in range(3):
        cycle()
    # One that is being started has not said its name yet.
    explicit.wait_for(lambda: "" not in explicit.pids(), "every process to be up")
    before = descriptor_counts()
    for _ in range(10):
        cycle()
    explicit.wait_for(lambda: descriptor_counts() == before, f"the descriptors to come back to {before}")


def test_crash_loop_makes_the_model_unavailable_with_the_reason(repository: Path) -> None:
    config = repository / "alpha_model" / "config.pbtxt"
    config.write_text(
        config.read_text().replace("count: 2", "count: 1").replace("all { }", "latest { num_versions: 1 }")
    )
    with ForebayServer(repository) as server:
        for _ in range(5):
            server.wait_for(lambda: server.pid_of("worker") != 0, "the worker")
            pid = server.pid_of("worker")
            os.kill(pid, signal.SIGKILL)
            server.wait_for(lambda pid=pid: server.pid_of("worker") != pid, "its end")  # type: ignore[misc]
        server.wait_logged("ended 5 times within 60 s without answering a request")
        (row,) = index(server)
        assert row["state"] == "UNAVAILABLE"
        assert "ended 5 times within 60 s" in row["reason"]
        # Not 404: it is known, and worth asking for again (spec H-042).
        assert infer(server) == 503


def test_config_that_contradicts_the_model_file_fails_to_load(repository: Path) -> None:
    """Spec B-011."""
    config = repository / "alpha_model" / "config.pbtxt"
    config.write_text(config.read_text().replace('"prediction"', '"predict"'))
    with ForebayServer(repository, "--exit-on-error=false") as server:
        (first, _second) = index(server)
        assert first["state"] == "UNAVAILABLE"
        text = "Invalid argument: unexpected inference output 'predict', allowed outputs are: prediction"
        assert first["reason"] == text
        server.wait_for(lambda: not [role for role in server.pids() if role.startswith("worker")], "workers to end")
