"""Shared memory of clients (spec 1.9), with tritonclient's own tools and with clients that misbehave."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker, shared_memory

import numpy as np
import pytest
import tritonclient.http as httpclient
from forebay_server import ForebayServer
from http_models import copied_bytes, wait_nothing_in_use, write_models
from http_wire import WireClient, get, post
from tritonclient.utils import InferenceServerException, serialize_byte_tensor
from tritonclient.utils import shared_memory as triton_shm


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForebayServer]:
    models = write_models(tmp_path_factory.mktemp("regions") / "models")
    with ForebayServer(models, "--allow-client-shm=true") as server:
        yield server


@pytest.fixture
def server(running: ForebayServer) -> Iterator[ForebayServer]:
    """The server, without regions before and after."""
    before = {role: pid for role, pid in running.pids().items() if role.split()[0] in ("http", "supervisor")}
    yield running
    assert running.post("/v2/systemsharedmemory/unregister")[0] == 200
    wait_nothing_in_use(running)
    after = running.pids()
    assert {role: after.get(role) for role in before} == before, "a process was restarted"


@pytest.fixture
def client(server: ForebayServer) -> Iterator[httpclient.InferenceServerClient]:
    with httpclient.InferenceServerClient(server.http_url) as opened:
        yield opened


@pytest.fixture
def key() -> str:
    return f"/forebay-test-{os.getpid()}-{secrets.token_hex(4)}"


@contextmanager
def owned(key: str, size: int) -> Iterator[shared_memory.SharedMemory]:
    """Own a shared memory object that a test may unlink."""
    memory = shared_memory.SharedMemory(key.lstrip("/"), create=True, size=size)
    try:
        yield memory
    finally:
        memory.close()
        try:
            memory.unlink()
        except FileNotFoundError:
            resource_tracker.unregister(f"/{key.lstrip('/')}", "shared_memory")


def register(server: ForebayServer, name: str, key: str, byte_size: int, offset: int = 0) -> tuple[int, str]:
    body = json.dumps({"key": key, "offset": offset, "byte_size": byte_size}).encode()
    status, answer = server.post(f"/v2/systemsharedmemory/region/{name}/register", body)
    return status, str(json.loads(answer)["error"]) if answer else ""


def ask(
    server: ForebayServer, model: str, inputs: list[dict[str, object]], outputs: list[dict[str, object]]
) -> tuple[int, dict[str, object]]:
    status, answer = server.post(
        f"/v2/models/{model}/infer", json.dumps({"inputs": inputs, "outputs": outputs}).encode()
    )
    return status, json.loads(answer)


def place(region: str, byte_size: int, offset: int = 0) -> dict[str, object]:
    parameters: dict[str, object] = {"shared_memory_region": region, "shared_memory_byte_size": byte_size}
    return parameters | ({"shared_memory_offset": offset} if offset else {})


def given(count: int, parameters: dict[str, object], name: str = "INPUT0", datatype: str = "FP32") -> dict[str, object]:
    return {"name": name, "datatype": datatype, "shape": [count], "parameters": parameters}


# --- with tritonclient --------------------------------------------------------------------------------------------


def test_inputs_and_outputs_in_regions(
    client: httpclient.InferenceServerClient, server: ForebayServer, key: str
) -> None:
    """H-191, H-192, H-194, H-197..H-199."""
    values = np.arange(3_000, dtype=np.float32)
    copied = copied_bytes(server, "echo", "ingress"), copied_bytes(server, "echo", "egress")
    source = triton_shm.create_shared_memory_region("source", key, values.nbytes)
    target = triton_shm.create_shared_memory_region("target", key + "-out", values.nbytes + 100)
    try:
        triton_shm.set_shared_memory_region(source, [values])
        client.register_system_shared_memory("source", key, values.nbytes)
        client.register_system_shared_memory("target", key + "-out", values.nbytes + 100)
        assert client.get_system_shared_memory_status() == [
            {"name": "source", "key": key, "offset": 0, "byte_size": values.nbytes},
            {"name": "target", "key": key + "-out", "offset": 0, "byte_size": values.nbytes + 100},
        ]
        assert [entry["name"] for entry in client.get_system_shared_memory_status("source")] == ["source"]
        tensor = httpclient.InferInput("INPUT0", [2_000], "FP32")
        tensor.set_shared_memory("source", 8_000, offset=4_000)
        output = httpclient.InferRequestedOutput("OUTPUT0")
        output.set_shared_memory("target", 8_060, offset=40)
        for _ in range(3):
            result = client.infer("echo", [tensor], outputs=[output])
            entry = result.get_output("OUTPUT0")
            assert set(entry) == {"name", "datatype", "shape"}
            got = triton_shm.get_contents_as_numpy(target, np.float32, entry["shape"], offset=40)
            np.testing.assert_array_equal(got, values[1_000:])
        client.unregister_system_shared_memory("source")
        client.unregister_system_shared_memory("source")
        assert [entry["name"] for entry in client.get_system_shared_memory_status()] == ["target"]
        client.unregister_system_shared_memory()
        assert client.get_system_shared_memory_status() == []
        with pytest.raises(InferenceServerException, match="Unable to find shared memory region: 'source'"):
            client.infer("echo", [tensor])
    finally:
        triton_shm.destroy_shared_memory_region(source)
        triton_shm.destroy_shared_memory_region(target)
    wait_nothing_in_use(server)
    # Nothing goes through user space.
    assert (copied_bytes(server, "echo", "ingress"), copied_bytes(server, "echo", "egress")) == copied


def test_rows_in_regions(client: httpclient.InferenceServerClient, key: str) -> None:
    """A model whose requests lie in slab rows."""
    values = np.random.default_rng(2).standard_normal((4, 50)).astype(np.float32)
    direct = httpclient.InferInput("features", [4, 50], "FP32")
    direct.set_data_from_numpy(values)
    expected = client.infer("alpha_model", [direct]).as_numpy("prediction")
    region = triton_shm.create_shared_memory_region("both", key, values.nbytes + 16)
    try:
        triton_shm.set_shared_memory_region(region, [values])
        client.register_system_shared_memory("both", key, values.nbytes + 16)
        tensor = httpclient.InferInput("features", [4, 50], "FP32")
        tensor.set_shared_memory("both", values.nbytes)
        output = httpclient.InferRequestedOutput("prediction")
        output.set_shared_memory("both", 16, offset=values.nbytes)
        client.infer("alpha_model", [tensor], outputs=[output])
        got = triton_shm.get_contents_as_numpy(region, np.float32, [4, 1], offset=values.nbytes)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    finally:
        client.unregister_system_shared_memory("both")
        triton_shm.destroy_shared_memory_region(region)


def test_strings_in_regions(client: httpclient.InferenceServerClient, key: str) -> None:
    """H-202."""
    words = np.array([b"one", b"", b"drei"], dtype=np.object_)
    size = len(serialize_byte_tensor(words).item())
    region = triton_shm.create_shared_memory_region("words", key, 2 * size)
    try:
        triton_shm.set_shared_memory_region(region, [serialize_byte_tensor(words)])
        client.register_system_shared_memory("words", key, 2 * size)
        tensor = httpclient.InferInput("INPUT0", [3], "BYTES")
        tensor.set_shared_memory("words", size)
        output = httpclient.InferRequestedOutput("OUTPUT0")
        output.set_shared_memory("words", size, offset=size)
        client.infer("strings", [tensor], outputs=[output])
        got = triton_shm.get_contents_as_numpy(region, np.object_, [3], offset=size)
        assert got.tolist() == words.tolist()
        broken = httpclient.InferInput("INPUT0", [3], "BYTES")
        broken.set_shared_memory("words", size - 1)
        with pytest.raises(InferenceServerException, match="incomplete string data"):
            client.infer("strings", [broken])
    finally:
        client.unregister_system_shared_memory("words")
        triton_shm.destroy_shared_memory_region(region)


# --- errors -------------------------------------------------------------------------------------------------------


def test_errors_of_registering(server: ForebayServer, key: str) -> None:
    """H-193; Triton's text, then why and the usual cause."""
    status, text = register(server, "r", key, 10)
    assert status == 500
    assert text.startswith(f"Unable to open shared memory region: '{key}': No such file or directory (ENOENT); ")
    assert "--ipc=host" in text
    assert "/dev/shm" not in text
    server.wait_for(lambda: f"/dev/shm{key}: No such file or directory (ENOENT)" in server.stderr, "the log")
    with owned(key, 4096):
        for size, offset in ((4097, 0), (4096, 1), (0, 0), (2**63, 0), (1, 2**63)):
            assert register(server, "r", key, size, offset) == (
                400,
                "failed to register shared memory region 'r': invalid args",
            )
        assert register(server, "r", key, 4096) == (200, "")
        assert register(server, "r", key, 4096) == (400, "shared memory region 'r' already in manager")
    assert register(server, "s", "/triton_python_backend_shm_region_1", 8)[0] == 400
    assert server.post("/v2/systemsharedmemory/region/zz/register", b'{"byte_size":10}') == (
        400,
        b'{"error":"Shared memory register request has no \'key\' field"}',
    )
    assert server.get("/v2/systemsharedmemory/region/zz/status") == (
        404,
        b'{"error":"Unable to find system shared memory region: \'zz\'"}',
    )
    assert server.get("/v2/cudasharedmemory/status") == (200, b"[]")
    assert server.get("/v2/cudasharedmemory/region/r/status")[0] == 404


@pytest.mark.parametrize(
    "name", ["", "/", ".", "..", "../etc/passwd", "a/../../../etc/passwd", "a\0b", "x" * 300, "/a/b"]
)
def test_keys_name_nothing_but_shared_memory_objects(server: ForebayServer, name: str) -> None:
    status, text = register(server, "r", name, 1)
    assert (status, text.startswith("Unable to open shared memory region")) == (500, True)


def test_links_and_pipes_are_no_shared_memory(server: ForebayServer, key: str) -> None:
    path = f"/dev/shm{key}"
    os.symlink("/etc/hostname", path)
    try:
        assert register(server, "r", key, 1)[0] == 500
    finally:
        os.unlink(path)
    os.mkfifo(path)
    try:
        assert register(server, "r", key, 1)[0] == 500
    finally:
        os.unlink(path)


def test_errors_of_requests(server: ForebayServer, key: str) -> None:
    """H-090, H-198, H-200."""
    with owned(key, 4096) as memory:
        memory.buf[:] = bytes(4096)
        assert register(server, "r", key, 4096) == (200, "")
        cases: list[tuple[dict[str, object], int, str]] = [
            (given(2, place("nope", 8)), 404, "Unable to find shared memory region: 'nope'"),
            (given(2, place("r", 8, 4096)), 400, "Invalid offset for shared memory region: 'r'"),
            (given(2, place("r", 8, 2**63)), 400, "Invalid offset for shared memory region: 'r'"),
            (given(2, place("r", 8, 4092)), 400, "Invalid offset + byte size for shared memory region: 'r'"),
            (given(2, place("r", 2**62)), 400, "Invalid offset + byte size for shared memory region: 'r'"),
            (
                given(2, place("r", 12)),
                400,
                "input byte size mismatch for input 'INPUT0' for model 'echo'. Expected 8, got 12",
            ),
            (given(2, place("r", 8)) | {"data": [1, 2]}, 400, "But set 'data' 'shared_memory_region'"),
        ]
        for tensor, status, text in cases:
            got, answer = ask(server, "echo", [tensor], [])
            assert (got, text in str(answer["error"])) == (status, True), answer
        status, answer = ask(
            server, "echo", [given(4, place("r", 16))], [{"name": "OUTPUT0", "parameters": place("r", 12)}]
        )
        assert status == 500
        assert answer["error"] == (
            "shared memory size specified with the request for output 'OUTPUT0' (12 bytes) should be at least 16 bytes "
            "to hold the results"
        )
        status, answer = ask(
            server, "echo", [given(4, place("r", 16))], [{"name": "OUTPUT0", "parameters": place("q", 12)}]
        )
        assert (status, answer["error"]) == (404, "Unable to find shared memory region: 'q'")


def test_without_the_flag(server: ForebayServer, tmp_path_factory: pytest.TempPathFactory) -> None:
    """H-190: registering is refused, status works."""
    models = write_models(tmp_path_factory.mktemp("plain") / "models")
    with ForebayServer(models) as plain:
        status, text = register(plain, "r", "/k", 8)
        assert status == 501
        assert text == "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable."
        assert plain.get("/v2/systemsharedmemory/status") == (200, b"[]")


# --- clients that misbehave ---------------------------------------------------------------------------------------


def test_truncated_region(server: ForebayServer, key: str) -> None:
    """FACTS: a mapping of it would kill the process with SIGBUS."""
    with owned(key, 1 << 20) as memory:
        assert register(server, "r", key, 1 << 20) == (200, "")
        source = given(1_000, place("r", 4_000, 500_000))
        target = {"name": "OUTPUT0", "parameters": place("r", 4_000)}
        assert ask(server, "echo", [source], [target])[0] == 200
        fd = os.open(f"/dev/shm{key}", os.O_RDWR)
        os.ftruncate(fd, 500_100)
        status, answer = ask(server, "echo", [source], [])
        assert (status, "it was truncated after it had been registered" in str(answer["error"])) == (400, True)
        os.ftruncate(fd, 100)
        status, answer = ask(server, "echo", [given(50, {}) | {"data": [1] * 50}], [target])
        assert (status, "truncated" in str(answer["error"])) == (400, True)
        # Writing to it must not make it grow again.
        assert os.fstat(fd).st_size == 100
        os.ftruncate(fd, 1 << 20)
        os.close(fd)
        assert ask(server, "echo", [source], [target])[0] == 200
        assert bytes(memory.buf[:4]) == bytes(4)


def test_region_truncated_all_the_time(server: ForebayServer, key: str) -> None:
    with owned(key, 1 << 20):
        assert register(server, "r", key, 1 << 20) == (200, "")
        fd = os.open(f"/dev/shm{key}", os.O_RDWR)
        stop = threading.Event()

        def jitter() -> None:
            while not stop.is_set():
                os.ftruncate(fd, 0)
                os.ftruncate(fd, 1 << 20)

        thread = threading.Thread(target=jitter)
        thread.start()
        try:
            for _ in range(100):
                status, _answer = ask(
                    server,
                    "echo",
                    [given(100_000, place("r", 400_000))],
                    [{"name": "OUTPUT0", "parameters": place("r", 400_000, 500_000)}],
                )
                assert status in (200, 400, 500)
        finally:
            stop.set()
            thread.join()
            os.close(fd)


def test_region_that_was_unlinked_goes_on_working(server: ForebayServer, key: str) -> None:
    with owned(key, 64) as memory:
        memory.buf[:8] = np.array([1, 2], dtype=np.float32).tobytes()
        assert register(server, "r", key, 64) == (200, "")
        os.unlink(f"/dev/shm{key}")
        status, answer = ask(server, "echo", [given(2, place("r", 8))], [])
        assert status == 200
        assert answer["outputs"][0]["data"] == [1.0, 2.0]  # type: ignore[index]


def test_strings_that_change_while_they_are_checked(server: ForebayServer, key: str) -> None:
    """They are checked where the client cannot reach them any more."""
    size = 4 * 1000
    with owned(key, size) as memory:
        assert register(server, "r", key, size) == (200, "")
        stop = threading.Event()

        def jitter() -> None:
            while not stop.is_set():
                memory.buf[2000:2004] = b"\xff\xff\xff\x7f"
                memory.buf[2000:2004] = bytes(4)

        thread = threading.Thread(target=jitter)
        thread.start()
        try:
            for _ in range(100):
                status, _ = ask(server, "strings", [given(1000, place("r", size), datatype="BYTES")], [])
                assert status in (200, 400)
        finally:
            stop.set()
            thread.join()


def test_unregister_waits_for_requests_in_flight(server: ForebayServer, key: str) -> None:
    """H-194: the reply still goes into the region."""
    with owned(key, 64) as memory:
        memory.buf[:8] = np.array([3, 4], dtype=np.float32).tobytes()
        assert register(server, "r", key, 64) == (200, "")
        document = {
            "inputs": [given(2, place("r", 8))],
            "outputs": [{"name": "OUTPUT0", "parameters": place("r", 8, 16)}],
        }
        with WireClient(server.http_port) as wire:
            wire.send(post("/v2/models/slow/infer", json.dumps(document).encode()))
            time.sleep(0.2)
            assert server.post("/v2/systemsharedmemory/region/r/unregister")[0] == 200
            assert server.get("/v2/systemsharedmemory/status") == (200, b"[]")
            # The name is free at once, for other memory.
            assert ask(server, "echo", document["inputs"], [])[0] == 404
            assert wire.answer().status == 200
        assert np.frombuffer(memory.buf[16:24], dtype=np.float32).tolist() == [3.0, 4.0]


def test_descriptors_are_given_back(server: ForebayServer, key: str) -> None:
    def descriptors() -> list[int]:
        return [len(os.listdir(f"/proc/{server.pid_of(role)}/fd")) for role in ("http", "supervisor")]

    with owned(key, 64):
        assert register(server, "r", key, 64)[0] == 200
        server.post("/v2/systemsharedmemory/unregister")
        before = descriptors()
        for number in range(20):
            assert register(server, f"r{number}", key, 64)[0] == 200
            with WireClient(server.http_port) as wire:
                slow = json.dumps({"inputs": [given(2, place(f"r{number}", 8))]}).encode()
                wire.send(post("/v2/models/slow/infer", slow))
                server.get("/v2/health/live")
                wire.reset()
        server.post("/v2/systemsharedmemory/unregister")
    server.wait_for(lambda: descriptors() <= [count + 2 for count in before], "descriptors to be closed")


def test_regions_survive_the_frontend(server: ForebayServer, key: str) -> None:
    with owned(key, 64) as memory:
        memory.buf[:8] = np.array([5, 6], dtype=np.float32).tobytes()
        models = server_models(server)
        with ForebayServer(models, "--allow-client-shm=true") as other:
            assert register(other, "r", key, 64) == (200, "")
            killed = other.pid_of("http")
            os.kill(killed, 9)
            other.wait_for(lambda: other.pid_of("http") not in (0, killed), "a new frontend")
            with WireClient(other.http_port) as wire:
                wire.send(post("/v2/models/echo/infer", json.dumps({"inputs": [given(2, place("r", 8))]}).encode()))
                assert wire.answer().json()["outputs"][0]["data"] == [5.0, 6.0]
                assert wire.send(get("/v2/systemsharedmemory/region/r/status")).answer().json()[0]["key"] == key


def test_every_frontend_of_a_port_knows_every_region(server: ForebayServer, key: str) -> None:
    """As soon as registering is answered, and no longer than until unregistering is."""
    with (
        owned(key, 64) as memory,
        ForebayServer(server_models(server), "--allow-client-shm=true", "--http-frontends=2") as other,
    ):
        memory.buf[:8] = np.array([5, 6], dtype=np.float32).tobytes()
        assert sum(role.startswith("http") for role in other.pids()) == 2
        for _ in range(5):
            assert register(other, "r", key, 64) == (200, "")
            assert {ask(other, "echo", [given(2, place("r", 8))], [])[0] for _ in range(12)} == {200}
            assert other.post("/v2/systemsharedmemory/region/r/unregister")[0] == 200
            assert {ask(other, "echo", [given(2, place("r", 8))], [])[0] for _ in range(12)} == {404}


def test_client_that_dies(server: ForebayServer, key: str) -> None:
    """Its region stays until somebody unregisters it; everybody else is served."""
    code = (
        "import os, sys; fd = os.open('/dev/shm' + sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600); os.ftruncate(fd, 64);"
        "print('made', flush=True); sys.stdin.read(1); os.kill(os.getpid(), 9)"
    )
    with subprocess.Popen([sys.executable, "-c", code, key], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            assert child.stdin is not None
            child.stdout.readline()
            assert register(server, "r", key, 64) == (200, "")
            child.stdin.write(b"x")
            child.stdin.flush()
            assert child.wait() == -9
            assert ask(server, "echo", [given(2, place("r", 8))], [])[0] == 200
        finally:
            child.kill()
            os.unlink(f"/dev/shm{key}")
    assert server.post("/v2/systemsharedmemory/region/r/unregister")[0] == 200
    assert ask(server, "echo", [given(2, place("r", 8))], [])[0] == 404


def server_models(server: ForebayServer) -> str:
    """Return the repository that a server serves."""
    command = server.process.args
    assert isinstance(command, list)
    return str(command[command.index("--model-repository") + 1])
