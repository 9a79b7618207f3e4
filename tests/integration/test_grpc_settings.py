"""The gRPC port with other settings than the default: restrictions, compression, TLS, keep-alive, ages, stopping."""

from __future__ import annotations

import queue
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from forebay_server import CONF_MODELS, PATIENCE_S, ForebayServer
from grpc_clients import Stream, alpha_model_of, features, is_final, tensor, url_of
from grpc_wire import connect, frame
from http_models import write_models
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import InferenceServerException, shared_memory


@pytest.fixture(scope="module")
def expected() -> Any:
    return alpha_model_of(2)


@pytest.fixture
def alpha(tmp_path: Path) -> Path:
    shutil.copytree(CONF_MODELS / "alpha_model", tmp_path / "models" / "alpha_model")
    return tmp_path / "models"


def test_restricted_protocols(alpha: Path) -> None:
    """Spec G-080."""
    with (
        ForebayServer(alpha, "--grpc-restricted-protocol=inference,health:admin=secret", protocols=("grpc",)) as server,
        grpcclient.InferenceServerClient(url_of(server)) as client,
    ):
        text = "This protocol is restricted, expecting header 'triton-grpc-protocol-admin'"
        key = {"triton-grpc-protocol-admin": "secret"}
        inputs = [tensor("features", features(1))]
        for _ in range(2):
            for headers in ({}, {"triton-grpc-protocol-admin": "wrong"}):
                with pytest.raises(InferenceServerException, match=text) as caught:
                    client.infer("alpha_model", inputs, headers=headers)
                assert caught.value.status() == "StatusCode.UNAVAILABLE"
            client.infer("alpha_model", inputs, headers=key)
        with pytest.raises(InferenceServerException, match=text):
            client.is_server_live()
        assert client.is_server_live(headers=key)
        assert client.get_server_metadata().name == "triton"


def test_compressed_replies(alpha: Path, expected: Any) -> None:
    """Spec G-084."""
    with (
        ForebayServer(alpha, "--grpc-infer-response-compression-level=high", protocols=("grpc",)) as server,
        grpcclient.InferenceServerClient(url_of(server)) as client,
    ):
        given = features(64)
        for _ in range(2):
            result = client.infer("alpha_model", [tensor("features", given)])
            np.testing.assert_allclose(result.as_numpy("prediction"), expected(given), rtol=1e-5)
        stream = Stream(client)
        stream.ask("alpha_model", [tensor("features", given)])
        assert is_final(stream.take())
        client.stop_stream()


def test_a_stopping_server_finishes_what_it_was_asked(tmp_path: Path) -> None:
    """Spec G-087: SIGTERM while a call runs."""
    models = write_models(tmp_path / "models")
    with ForebayServer(models, protocols=("grpc",)) as server:
        with grpcclient.InferenceServerClient(url_of(server)) as client:
            done: queue.Queue[Any] = queue.Queue()
            one = [tensor("INPUT0", np.ones(1, np.float32))]
            client.infer("slow", one)
            client.async_infer("slow", one, callback=lambda result, error: done.put(error))
            time.sleep(0.2)
            server.process.send_signal(signal.SIGTERM)
            assert done.get(timeout=PATIENCE_S) is None
        assert server.process.wait(PATIENCE_S) == 0


def test_streams_end_with_the_server(alpha: Path) -> None:
    """Spec G-087: an idle stream ends well; who watches the health is told."""
    with ForebayServer(alpha, protocols=("grpc",)) as server, grpc.insecure_channel(url_of(server)) as channel:
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"")
        assert next(watch) == b"\x08\x01"
        stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        stop = threading.Event()
        stream = stub.ModelStreamInfer(iter(lambda: stop.wait(PATIENCE_S), True))
        # The header is out as soon as the stream is taken.
        stream.initial_metadata()
        server.process.send_signal(signal.SIGTERM)
        assert list(stream) == []
        assert stream.code() is grpc.StatusCode.OK
        stop.set()
        assert next(watch) == b"\x08\x02"
        with pytest.raises(grpc.RpcError) as caught:
            next(watch)
        failed: Any = caught.value
        assert failed.code() is grpc.StatusCode.UNAVAILABLE
        assert server.process.wait(PATIENCE_S) == 0


def make_certificates(folder: Path) -> dict[str, Path]:
    """Make an authority and certificates for server and client with the openssl program."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("the openssl program is not installed")

    def run(*arguments: str) -> None:
        subprocess.run([openssl, *arguments], check=True, capture_output=True, cwd=folder, timeout=PATIENCE_S)

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    run("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=test authority", "-days", "2")
    for name in ("server", "client"):
        run("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
        run("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
            "-out", f"{name}.crt", "-days", "2", "-extfile", "names")  # fmt: skip
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("mutual", [False, True])
def test_tls(alpha: Path, tmp_path: Path, mutual: bool, expected: Any) -> None:
    """Spec G-081."""
    folder = tmp_path / "certificates"
    folder.mkdir()
    files = make_certificates(folder)
    flags = [f"--grpc-server-cert={files['server.crt']}", f"--grpc-server-key={files['server.key']}"]
    if mutual:
        flags += ["--grpc-use-ssl-mutual=true", f"--grpc-root-cert={files['ca.crt']}"]
    else:
        flags += ["--grpc-use-ssl=true"]
    with ForebayServer(alpha, *flags, protocols=("grpc",)) as server:
        own = {"private_key": str(files["client.key"]), "certificate_chain": str(files["client.crt"])}

        def open_client(**more: str) -> grpcclient.InferenceServerClient:
            return grpcclient.InferenceServerClient(
                url_of(server), ssl=True, root_certificates=str(files["ca.crt"]), **more
            )

        with open_client(**(own if mutual else {})) as client:
            given = features(3)
            result = client.infer("alpha_model", [tensor("features", given)])
            np.testing.assert_allclose(result.as_numpy("prediction"), expected(given), rtol=1e-5)
        if mutual:
            with open_client() as stranger, pytest.raises(InferenceServerException):
                stranger.is_server_live(client_timeout=5)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--grpc-use-ssl=true"], "--grpc-use-ssl needs --grpc-server-cert and --grpc-server-key"),
        (
            ["--grpc-use-ssl=true", "--grpc-server-cert=/nowhere", "--grpc-server-key=/nowhere"],
            "cannot use the gRPC server certificate: [Errno 2] No such file or directory",
        ),
    ],
)
def test_a_certificate_that_cannot_be_used_ends_the_start(alpha: Path, flags: list[str], text: str) -> None:
    """And not each try to serve, one after the other, while HTTP is served."""
    server = ForebayServer(alpha, *flags, protocols=("grpc", "http"))
    server.launch()
    assert server.process.wait(PATIENCE_S) == 1
    assert f"error: creating server: Internal - grpc frontend failed to start: {text}" in server.stderr
    assert "Started" not in server.stderr


def test_tensors_in_shared_memory(tmp_path: Path) -> None:
    """Spec G-013, G-014, G-038, G-043, G-046: inputs and outputs in a region, nothing in the messages."""
    models = write_models(tmp_path / "models")
    given = np.arange(1000, dtype=np.float32)
    size = given.nbytes
    region = shared_memory.create_shared_memory_region("both", f"/forebay_test_{tmp_path.name}", 2 * size)
    try:
        shared_memory.set_shared_memory_region(region, [given])
        with (
            ForebayServer(models, "--allow-client-shm=true", protocols=("grpc",)) as server,
            grpcclient.InferenceServerClient(url_of(server)) as client,
        ):
            source = grpcclient.InferInput("INPUT0", [1000], "FP32")
            source.set_shared_memory("both", size)
            target = grpcclient.InferRequestedOutput("OUTPUT0")
            target.set_shared_memory("both", size, offset=size)
            with pytest.raises(InferenceServerException, match="Unable to find shared memory region: 'both'"):
                client.infer("echo", [source], outputs=[target])
            client.register_system_shared_memory("both", f"/forebay_test_{tmp_path.name}", 2 * size)
            assert client.get_system_shared_memory_status().regions["both"].byte_size == 2 * size
            for _ in range(2):
                response = client.infer("echo", [source], outputs=[target]).get_response()
                assert list(response.raw_output_contents) == [b""]
                found = shared_memory.get_contents_as_numpy(region, np.float32, [1000], offset=size)
                np.testing.assert_array_equal(found, given)
            stream = Stream(client)
            stream.ask("echo", [source], outputs=[target])
            assert list(stream.take().raw_output_contents) == [b""]
            client.stop_stream()
            source.set_shared_memory("both", size, offset=2 * size)
            with pytest.raises(InferenceServerException, match=r"[Ii]nvalid offset"):
                client.infer("echo", [source])
            # A place outside of the region is noticed before a size that does not fit the shape.
            source.set_shared_memory("both", 4 * size, offset=size)
            with pytest.raises(InferenceServerException, match=r"Invalid offset \+ byte size for shared memory region"):
                client.infer("echo", [source])
            client.unregister_system_shared_memory("both")
            assert not client.get_system_shared_memory_status().regions
    finally:
        shared_memory.destroy_shared_memory_region(region)


def test_too_many_pings(alpha: Path) -> None:
    """Spec G-082: a client that pings too often is told so."""
    limits = ["--grpc-http2-min-recv-ping-interval-without-data=300000", "--grpc-http2-max-ping-strikes=2"]
    with ForebayServer(alpha, *limits, protocols=("grpc",)) as server:
        host, port = url_of(server).split(":")
        with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as wire:
            ping = b"\0\0\x08\x06\0\0\0\0\0" + bytes(8)
            wire.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
            for _ in range(4):
                wire.sendall(ping)
                time.sleep(0.05)
            assert b"too_many_pings" in b"".join(iter(lambda: wire.recv(4096), b""))


def test_connections_grow_old(alpha: Path) -> None:
    """Spec G-083: connections end, calls do not fail."""
    with (
        ForebayServer(alpha, "--grpc-max-connection-age=300", protocols=("grpc",)) as server,
        grpcclient.InferenceServerClient(url_of(server)) as client,
    ):
        end_s = time.monotonic() + 1.5
        while time.monotonic() < end_s:
            client.infer("alpha_model", [tensor("features", features(1))])


def read_frames(wire: socket.socket, until_s: float) -> list[tuple[float, int, int, bytes]]:
    """Return what the server sends until a time, or the end: when it came, type, flags and payload of each frame."""
    data, found = b"", []
    while (left_s := until_s - time.monotonic()) > 0:
        wire.settimeout(left_s)
        try:
            received = wire.recv(4096)
        except TimeoutError:
            break
        if not received:
            found.append((time.monotonic(), -1, 0, b""))
            break
        data += received
        while len(data) >= 9 + (size := int.from_bytes(data[:3], "big")) and len(data) >= 9:
            found.append((time.monotonic(), data[3], data[4], data[9 : 9 + size]))
            data = data[9 + size :]
    return found


PING, END = 6, -1


def pings(frames: list[tuple[float, int, int, bytes]]) -> list[bytes]:
    return [payload for _when, kind, flags, payload in frames if kind == PING and not flags & 1]


def read_ping(wire: socket.socket) -> bytes:
    """Wait for the server's next ping, past its other frames; return its payload."""
    wire.settimeout(PATIENCE_S)
    while True:
        head = wire.recv(9, socket.MSG_WAITALL)
        assert len(head) == 9, "the server has left"
        payload = wire.recv(size, socket.MSG_WAITALL) if (size := int.from_bytes(head[:3], "big")) else b""
        if head[3] == PING and not head[4] & 1:
            return payload


def test_a_silent_client_is_pinged_and_left(alpha: Path) -> None:
    """Spec G-082: --grpc-keepalive-time, -timeout and -permit-without-calls."""
    flags = ["--grpc-keepalive-time=200", "--grpc-keepalive-timeout=300", "--grpc-keepalive-permit-without-calls=true"]
    with ForebayServer(alpha, *flags, protocols=("grpc",)) as server:
        began_s = time.monotonic()
        with connect(server.ports()["GRPCInferenceService"]) as wire:
            frames = read_frames(wire, began_s + PATIENCE_S)
    assert pings(frames)
    assert frames[-1][1] == END
    assert frames[-1][0] - began_s >= 0.4


def test_a_client_that_answers_pings_is_kept(alpha: Path) -> None:
    """Spec G-082; and no more than --grpc-http2-max-pings-without-data are sent to one that says nothing else."""
    flags = ["--grpc-keepalive-time=100", "--grpc-keepalive-timeout=2000", "--grpc-keepalive-permit-without-calls=true"]
    with (
        ForebayServer(alpha, *flags, "--grpc-http2-max-pings-without-data=3", protocols=("grpc",)) as server,
        connect(server.ports()["GRPCInferenceService"]) as wire,
    ):
        for _ in range(3):
            wire.sendall(frame(PING, 1, 0, read_ping(wire)))
        # For longer than it may be silent when it is asked.
        assert read_frames(wire, time.monotonic() + 2.2) == []


def test_without_calls_nobody_is_pinged(alpha: Path) -> None:
    """Spec G-082: the default of --grpc-keepalive-permit-without-calls."""
    with (
        ForebayServer(
            alpha, "--grpc-keepalive-time=100", "--grpc-keepalive-timeout=100", protocols=("grpc",)
        ) as server,
        connect(server.ports()["GRPCInferenceService"]) as wire,
    ):
        frames = read_frames(wire, time.monotonic() + 0.8)
    assert not pings(frames)
    assert all(kind != END for _when, kind, _flags, _payload in frames)


def test_keep_alive_of_the_official_client(alpha: Path, expected: Any) -> None:
    """The example ``simple_grpc_keepalive_client``; the server allows its pings, so the connection lives."""
    options = grpcclient.KeepAliveOptions(
        keepalive_time_ms=200,
        keepalive_timeout_ms=500,
        keepalive_permit_without_calls=True,
        http2_max_pings_without_data=0,
    )
    flags = ["--grpc-http2-min-recv-ping-interval-without-data=50", "--grpc-keepalive-permit-without-calls=true"]
    given = features(2)
    with (
        ForebayServer(alpha, *flags, protocols=("grpc",)) as server,
        grpcclient.InferenceServerClient(url_of(server), keepalive_options=options) as client,
    ):
        for pause_s in (0.0, 1.2):
            time.sleep(pause_s)
            result = client.infer("alpha_model", [tensor("features", given)])
            np.testing.assert_allclose(result.as_numpy("prediction"), expected(given), rtol=1e-5)
