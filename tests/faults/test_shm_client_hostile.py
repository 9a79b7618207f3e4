"""Shared-memory clients that lie, scribble and flood: nothing but their own answers may be affected (S3, S12)."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from forebay_server import PATIENCE_S, ForebayServer
from raw_shm_client import RawClient
from shm_models import serve, write_models

import forebay.client.shm
from forebay.client.discovery import door_paths
from forebay.client.door import OpenedModel
from forebay.ipc.client_wire import DOOR_HEADER, HELLO, MAGIC, SubmitKind
from forebay.ipc.messages import ParcelHead, TensorPlace
from forebay.ipc.wire import GROW, HEADER, Kind


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForebayServer]:
    with serve(write_models(tmp_path_factory.mktemp("shm") / "models", instances=1)) as running:
        yield running


class Bystander:
    """An honest client in a thread, all of whose answers must be right."""

    def __init__(self, server: ForebayServer) -> None:
        self._engine = forebay.client.shm.connect(server.runtime_base)
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self.answers = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            alpha, pair = self._engine.model("alpha_model"), self._engine.model("pair")
            wanted: dict[int, float] = {}
            while not self._stop.is_set():
                value = self.answers % 10
                alpha.input("features", rows=1)[:] = value / 10
                answer = float(alpha.infer(timeout_s=PATIENCE_S)[0, 0])
                assert wanted.setdefault(value, answer) == pytest.approx(answer, abs=1e-6)
                pair.put("INPUT0", np.full((1, 3), value, np.float32))
                pair.put("INPUT1", [["word"]])
                assert pair.infer(timeout_s=PATIENCE_S).tolist() == [[value] * 3]
                self.answers += 1
        except BaseException as error:
            self._failure = error

    def check(self) -> None:
        """Wait for a few more answers, then stop."""
        goal = self.answers + 20
        end_s = time.monotonic() + PATIENCE_S
        while self.answers < goal and self._failure is None:
            assert time.monotonic() < end_s, "the honest client gets no answers"
            time.sleep(0.01)
        self._stop.set()
        self._thread.join()
        self._engine.close()
        if self._failure is not None:
            raise self._failure


@pytest.fixture
def bystander(server: ForebayServer) -> Iterator[Bystander]:
    """Somebody else uses the server during the test; no process may die meanwhile."""
    before = set(server.pids().values())
    honest = Bystander(server)
    yield honest
    honest.check()
    assert before <= set(server.pids().values())


@pytest.fixture
def client(server: ForebayServer) -> Iterator[RawClient]:
    with RawClient(server.runtime_base) as raw:
        yield raw


# --- lies about places ---


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"rows_each": 65}, "a request must have 1 to 64 rows, this one has 65"),
        ({"rows_each": 0}, "a request must have 1 to 64 rows, this one has 0"),
        ({"first": 64}, "the message names rows outside their slab"),
        ({"first": 0xFFFFFFFF}, "the message names rows outside their slab"),
        ({"requests": 0xFFFFFFFF}, "the message names rows outside their slab"),
        ({"requests": 0}, "the message names an impossible slab"),
        ({"capacity": 0}, "the message names an impossible slab"),
        ({"capacity": 0xFFFFFFFF}, "the message names an impossible slab"),
        ({"base": 1 << 20}, "the message names a slab outside the client's arena"),
        ({"base": (1 << 64) - 64}, "the message names a slab outside the client's arena"),
        ({"capacity": 1 << 19}, "the message names a slab outside the client's arena"),
        ({"route": 999}, "the model version was unloaded before the request could run"),
    ],
)
def test_rows_at_impossible_places_are_refused(
    bystander: Bystander, client: RawClient, fields: dict[str, int], text: str
) -> None:
    client.send_run(client.open("alpha_model"), **fields)
    assert client.failure() == text


def test_rows_for_a_model_without_rows_are_refused(bystander: Bystander, client: RawClient) -> None:
    client.send_run(client.open("echo"))
    assert client.failure() == "the model does not take requests in slab rows"


def place(**fields: object) -> TensorPlace:
    values: dict[str, object] = {
        "name": "INPUT0", "datatype": "FP32", "shape": (1, 4), "offset": 64, "byte_size": 16, "arena": 0
    } | fields  # fmt: skip
    return TensorPlace(**values)  # type: ignore[arg-type]


WORDS = TensorPlace("INPUT1", "BYTES", (1, 1), 128, 4)


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ((place(arena=1), WORDS), "a client's tensors must lie in its own arena"),
        ((place(offset=1 << 20), WORDS), "message names a place outside its arena"),
        ((place(offset=-64), WORDS), "message names a place outside its arena"),
        ((place(byte_size=1 << 40), WORDS), "input 'INPUT0' does not have the bytes of its shape"),
        ((place(shape=(2, 4), byte_size=32), WORDS), "unexpected shape for input 'INPUT0'"),
        ((place(shape=(1, -4)), WORDS), "unexpected shape for input 'INPUT0'"),
        ((place(shape=(1, 1 << 62, 1 << 62)), WORDS), "unexpected shape for input 'INPUT0'"),
        ((place(shape=(1, 1 << 62)), WORDS), "input 'INPUT0' does not have the bytes of its shape"),
        ((place(datatype="INT64"), WORDS), "data-type is 'INT64', but model 'pair' expects 'FP32'"),
        ((place(name="OTHER"), WORDS), "unexpected inference input 'OTHER' for model 'pair'"),
        ((place(), place()), "input 'INPUT0' already exists in request"),
        ((place(),), "missing required input(s) ['INPUT1']"),
        ((place(), TensorPlace("INPUT1", "BYTES", (1, 1), 128, -1)), "message names a place outside its arena"),
    ],
)
def test_parcels_that_do_not_fit_the_model_are_refused(
    bystander: Bystander, client: RawClient, inputs: tuple[TensorPlace, ...], text: str
) -> None:
    client.send_parcel(client.open("pair"), ParcelHead(inputs=inputs, reply_offset=4096, reply_bytes=4096))
    assert text in client.failure()


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"\xc1",
        b"\x92" * 30_000,
        ParcelHead(inputs=(place(), WORDS), reply_offset=(1 << 20) - 64, reply_bytes=4096),
        ParcelHead(inputs=(place(), WORDS), reply_offset=-64, reply_bytes=64),
    ],
)
def test_heads_that_cannot_be_read_are_refused(
    bystander: Bystander, client: RawClient, head: ParcelHead | bytes
) -> None:
    client.send_parcel(client.open("pair"), head)
    assert "the worker cannot read the request" in client.failure()


def test_parcels_beyond_the_limits_are_refused(bystander: Bystander, client: RawClient) -> None:
    pair = client.open("pair")
    client.send_parcel(pair, b"\x80" * 40_000)
    assert "names and parameters may take 32768 bytes" in client.failure()
    client.send_parcel(pair, b"\x80", rows=5)
    assert client.failure() == "a request must have 1 to 4 rows, this one has 5"


# --- messages that are no messages ---


def send_until_refused(client: RawClient, model: OpenedModel) -> None:
    """Hand in requests, right and wrong ones, without reading an answer."""
    end_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < end_s:
        client.send_run(model, first=99)
        client.send_run(model)


@pytest.mark.parametrize(
    "message",
    [
        b"x",
        bytes(15),
        HEADER.pack(200, 0, 1, 0, 1),
        HEADER.pack(SubmitKind.RUNS, 0, 1, 0, 1),
        HEADER.pack(SubmitKind.RUNS, 0, 0xFFFF, 0, 1) + bytes(100),
        HEADER.pack(SubmitKind.PARCEL, 0, 1, 0, 1) + bytes(10),
        HEADER.pack(SubmitKind.PARCEL, 0, 1, 0, 1) + b"\xff" * 80,
        HEADER.pack(SubmitKind.CANCEL, 0, 3, 0, 1),
        HEADER.pack(SubmitKind.COLLECT, 0, 1, 0, 1) + GROW.pack(1, 1 << 40, 1 << 40),
        HEADER.pack(SubmitKind.RINGS, 0, 2, 0, 1) + bytes(4),
        HEADER.pack(Kind.DONE, 0, 1, 1, 1),
        HEADER.pack(Kind.SYNCED, 0, 1, 1, 1),
    ],
)
def test_unreadable_submissions_end_the_connection(bystander: Bystander, client: RawClient, message: bytes) -> None:
    model = client.open("alpha_model")
    client.submissions.send(message)
    with pytest.raises(BrokenPipeError):
        send_until_refused(client, model)


def test_tokens_and_collects_of_nobody_do_nothing(bystander: Bystander, client: RawClient) -> None:
    model = client.open("echo")
    client.send(SubmitKind.CANCEL, bytes(8 * 100), 100)
    client.send(SubmitKind.COLLECT, GROW.pack(7, 64, 64), sender=next(iter(model.rings)))
    client.send(SubmitKind.COLLECT, GROW.pack(7, 64, 64), sender=4_000_000_000)
    client.send(SubmitKind.RUNS, b"", 0, epoch=77)
    client.send_run(client.open("alpha_model"), first=99)
    assert client.failure() == "the message names rows outside their slab"


def test_random_bytes_everywhere(server: ForebayServer, bystander: Bystander) -> None:
    chance = random.Random(7)
    for _ in range(60):
        with RawClient(server.runtime_base) as client:
            model = client.open("alpha_model")
            targets = [client.submissions, *model.rings.values()]
            client.announce(model)
            for _ in range(20):
                message = bytearray(chance.randbytes(chance.choice((1, 16, 40, 56, 72, 96, 2000))))
                if len(message) >= HEADER.size and chance.random() < 0.8:
                    kind = chance.choice((*SubmitKind, Kind.RUNS, Kind.PARCELS))
                    HEADER.pack_into(message, 0, kind, 0, 1, 0, client.welcome.epoch)
                try:
                    chance.choice(targets).send(message, socket.MSG_DONTWAIT)
                except OSError:
                    break


def test_nonsense_at_the_door(server: ForebayServer, bystander: Bystander) -> None:
    chance = random.Random(11)
    (path,) = door_paths(server.runtime_base)
    for first in (
        b"x",
        bytes(8),
        DOOR_HEADER.pack(3, 0, 1) + bytes(8),
        DOOR_HEADER.pack(1, 0, 1),
        DOOR_HEADER.pack(1, 0, 1) + HELLO.pack(b"whatever", 1, 0, 0),
        DOOR_HEADER.pack(1, 0, 1) + HELLO.pack(MAGIC, 2, 0, 0),
        DOOR_HEADER.pack(1, 0, 1) + HELLO.pack(MAGIC, 1, 0, 1 << 60),
        *(chance.randbytes(chance.randrange(1, 4000)) for _ in range(50)),
    ):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(PATIENCE_S)
            sock.connect(path)
            sock.send(first)
            answer = sock.recv(65536)
            assert not answer or DOOR_HEADER.unpack_from(answer)[0] == 5


def test_hello_is_said_once(client: RawClient) -> None:
    with pytest.raises(forebay.client.shm.InvalidArgument, match="HELLO was said before"):
        client.door.enter(0)


@pytest.mark.parametrize("offset", [1 << 20, 1 << 63, 4, (1 << 20) - 8])
def test_counters_outside_the_arena_are_not_read(bystander: Bystander, client: RawClient, offset: int) -> None:
    client.door.tell_counts(client.open("alpha_model").route, offset)
    client.door.tell_counts(12345, 64)
    assert client.door.list_models()


# --- rings ---


def test_nothing_is_run_from_a_ring_that_is_not_open(bystander: Bystander, client: RawClient) -> None:
    model = client.open("alpha_model")
    (ring,) = model.rings.values()
    for ticket in (0, 1, 1 << 63 | 1 << 32 | 1):
        client.ring(ring, ticket)
    client.completions.settimeout(0.2)
    with pytest.raises(TimeoutError):
        client.receive()


@pytest.mark.parametrize(
    "fields",
    [{"rows": 65}, {"rows": 0}, {"requests": 0}, {"requests": 2}, {"requests": 0xFFFFFFFF, "rows": 0xFFFFFFFF}],
)
def test_a_ring_with_impossible_numbers_is_closed(
    server: ForebayServer, client: RawClient, fields: dict[str, int]
) -> None:
    model = client.open("alpha_model")
    instance, ticket = client.wait_granted(model)
    client.ring(model.rings[instance], ticket, **fields)
    assert client.receive_until(Kind.REVOKE)[1:3] == (instance, ticket)
    # By way of the scheduler it goes on.
    client.send_run(model)
    assert client.receive_until(Kind.RUNS_DONE)[0] == Kind.RUNS_DONE


@pytest.mark.parametrize("fields", [{"first": 64}, {"base": 1 << 20}, {"capacity": 1 << 23}, {"capacity": 0xFFFFFFFF}])
def test_a_ring_with_places_outside_is_answered_with_an_error(client: RawClient, fields: dict[str, int]) -> None:
    model = client.open("alpha_model")
    instance, ticket = client.wait_granted(model)
    client.ring(model.rings[instance], ticket, **fields)
    assert client.receive_until(Kind.RUNS_FAILED)[1] == instance


def test_a_ring_of_somebody_else_cannot_be_named(server: ForebayServer, client: RawClient) -> None:
    """The producer in a message from a ring is ignored: a ring has one owner."""
    model = client.open("alpha_model")
    instance, ticket = client.wait_granted(model)
    with RawClient(server.runtime_base) as other:
        other.open("alpha_model")
        message = bytearray(HEADER.pack(Kind.RUNS, 1, 1, 0, ticket) + bytes(40))
        np.frombuffer(message, np.uint32)[4:6] = other.welcome.producer, 1
        np.frombuffer(message, np.uint32)[6:12] = 64, 0, 64, 0, 1, 0
        model.rings[instance].send(message)
        assert client.receive_until(Kind.RUNS_DONE)[1] == instance
        other.completions.settimeout(0.1)
        with pytest.raises(TimeoutError):
            other.receive()


def test_a_stopped_client_holds_nobody_up(server: ForebayServer, client: RawClient) -> None:
    """A client that is granted the only instance and then does nothing for ever; grants are the worker's to end."""
    client.wait_granted(client.open("alpha_model"))
    Bystander(server).check()


def test_a_client_that_floods_a_ring_holds_nobody_up(server: ForebayServer, client: RawClient) -> None:
    model = client.open("alpha_model")
    instance, ticket = client.wait_granted(model)
    ring = model.rings[instance]
    ring.setblocking(False)
    honest = Bystander(server)
    sent = 0
    end_s = time.monotonic() + 1.0
    while time.monotonic() < end_s:
        try:
            client.ring(ring, ticket)
            sent += 1
        except BlockingIOError:
            time.sleep(0.0001)
        except OSError:
            break
    assert sent > 0
    honest.check()


# --- memory ---


def test_scribbling_over_the_whole_arena(server: ForebayServer, bystander: Bystander) -> None:
    """Writes anything anywhere at any time: its own answers may be nonsense, nobody else's are."""
    with forebay.client.shm.connect(server.runtime_base, arena_bytes=1 << 20) as engine:
        alpha, pair = engine.model("alpha_model"), engine.model("pair")
        stop = threading.Event()

        def scribble() -> None:
            noise = np.random.default_rng(1).integers(0, 255, 1 << 20, np.uint8).tobytes()
            while not stop.is_set():
                engine.connection.view[:] = noise
                engine.connection.view[:] = bytes(1 << 20)

        thread = threading.Thread(target=scribble)
        thread.start()
        try:
            for _ in range(100):
                alpha.input("features", rows=8)
                alpha.infer(timeout_s=PATIENCE_S)
                pair.put("INPUT0", np.zeros((1, 4), np.float32))
                pair.put("INPUT1", [["x" * 100]])
                try:
                    pair.infer(timeout_s=PATIENCE_S)
                except forebay.client.shm.ServingError:
                    pass  # A length that is no length.
        finally:
            stop.set()
            thread.join()


def test_the_arena_can_be_neither_shrunk_nor_grown(client: RawClient) -> None:
    """A truncated mapping would raise SIGBUS in a worker (FACTS 8)."""
    for size in (0, 4096, 1 << 30):
        with pytest.raises(PermissionError):
            os.ftruncate(client.welcome.arena_fd, size)


def test_a_client_that_never_reads_is_cut_off(server: ForebayServer, bystander: Bystander, client: RawClient) -> None:
    """I-6: answers that nobody reads are not kept."""
    model = client.open("alpha_model")
    client.submissions.settimeout(1.0)
    with pytest.raises((BrokenPipeError, TimeoutError)):
        send_until_refused(client, model)
    client.completions.settimeout(PATIENCE_S)
    while client.receive()[0]:
        pass


def test_clients_that_come_and_go(server: ForebayServer, bystander: Bystander) -> None:
    fds = len(os.listdir(f"/proc/{server.pid}/fd"))
    for _ in range(150):
        with RawClient(server.runtime_base) as client:
            client.send_run(client.open("alpha_model"))
    server.wait_for(lambda: len(os.listdir(f"/proc/{server.pid}/fd")) <= fds, "their descriptors to be closed")


def arena_maps(server: ForebayServer, producer: int) -> list[str]:
    """Return the processes below the server that have a producer's arena mapped."""
    name = f"/memfd:forebay-arena-{producer} "
    return [role for role, pid in server.pids().items() if name in _maps(pid)]


def _maps(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""


def test_what_a_killed_client_had_is_taken_back(server: ForebayServer) -> None:
    """Whatever it was doing: requests in flight, a grant, a child that still holds its sockets."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            client = RawClient(server.runtime_base)
            alpha, slow = client.open("alpha_model"), client.open("slow")
            client.wait_granted(alpha)
            head = ParcelHead(
                inputs=(TensorPlace("INPUT0", "FP32", (4,), 64, 16),), reply_offset=4096, reply_bytes=4096
            )
            for token in range(1, 20):
                client.send_parcel(slow, head, token=token)
                client.send_run(alpha, first=token)
            grandchild = os.fork()
            if grandchild:
                os.write(writer, f"{client.welcome.producer} {grandchild} ".encode())
            signal.pause()
        finally:
            os._exit(1)
    text = os.read(reader, 100).decode()
    producer, grandchild = (int(word) for word in text.split())
    try:
        server.wait_for(lambda: any("slow" in role for role in arena_maps(server, producer)), "its arena to be mapped")
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        server.wait_for(lambda: not arena_maps(server, producer), "its arena to be unmapped everywhere")
    finally:
        os.kill(grandchild, signal.SIGKILL)
        os.close(reader)
        os.close(writer)


def test_models_are_described_as_they_are(client: RawClient) -> None:
    model: OpenedModel = client.open("pair")
    assert model.signature.max_batch_size == 4
    assert [spec.datatype for spec in model.signature.inputs] == ["FP32", "BYTES"]
    assert not model.signature.uses_rows
