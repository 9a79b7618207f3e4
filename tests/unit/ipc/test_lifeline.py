"""The lifeline carries typed messages with descriptors, whole or not at all."""

from __future__ import annotations

import concurrent.futures
import fcntl
import os
import resource
import socket
import threading
from collections.abc import Iterator

import pytest

from forebay.ipc.frontend_messages import FrontendToSupervisor
from forebay.ipc.lifeline import Lifeline, PeerClosed
from forebay.ipc.messages import Failed, Started

Pair = tuple[Lifeline[Started | Failed], Lifeline[Started | Failed]]


@pytest.fixture
def pair() -> Iterator[Pair]:
    one, other = socket.socketpair()
    lifelines = (
        Lifeline[Started | Failed](one, FrontendToSupervisor),
        Lifeline[Started | Failed](other, FrontendToSupervisor),
    )
    yield lifelines
    for lifeline in lifelines:
        lifeline.close()


def test_message_arrives_with_its_descriptors(pair: Pair) -> None:
    sender, receiver = pair
    read_end, write_end = os.pipe()
    sender.send(Started(detail="x"), (write_end,))
    os.close(write_end)
    message, fds = receiver.receive()
    assert message == Started(detail="x")
    os.write(fds[0], b"y")
    assert os.read(read_end, 1) == b"y"
    os.close(fds[0])
    os.close(read_end)


def test_several_messages_in_one_read_keep_their_order(pair: Pair) -> None:
    sender, receiver = pair
    for number in range(5):
        sender.send(Started(detail=str(number)))
    received: list[str] = []
    while len(received) < 5:
        received += [message.detail for message, _fds in receiver.receive_nowait() if isinstance(message, Started)]
    assert received == ["0", "1", "2", "3", "4"]


def test_non_blocking_sender_of_a_large_message_sends_every_byte_once(pair: Pair) -> None:
    """A message larger than the socket buffer was sent twice after the first partial write."""
    sender, receiver = pair
    sender.sock.setblocking(False)
    read_end, write_end = os.pipe()
    text = "z" * 3_000_000
    thread = threading.Thread(target=sender.send, args=(Failed(code=1, text=text), (write_end,)))
    thread.start()
    message, fds = receiver.receive()
    thread.join()
    sender.send(Started(detail="after"))
    following, _ = receiver.receive()
    assert isinstance(message, Failed)
    assert message.text == text
    assert len(fds) == 1
    assert following == Started(detail="after")
    for fd in (*fds, read_end, write_end):
        os.close(fd)


def test_process_of_many_descriptors_can_wait_for_its_peer() -> None:
    """``select`` takes no descriptor above 1023."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    one, other = socket.socketpair()
    high = socket.socket(fileno=fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, 2000))
    one.close()
    sender = Lifeline[Started | Failed](high, FrontendToSupervisor)
    receiver = Lifeline[Started | Failed](other, FrontendToSupervisor)
    sender.sock.setblocking(False)
    large = Failed(code=1, text="z" * 3_000_000)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        sending = threads.submit(sender.send, large)
        other.settimeout(20)
        assert receiver.receive() == (large, [])
        sending.result()
    sender.close()
    receiver.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_peer_that_is_gone_is_an_error_for_both_directions(pair: Pair) -> None:
    sender, receiver = pair
    receiver.close()
    with pytest.raises(PeerClosed):
        sender.send(Started())
    with pytest.raises(PeerClosed):
        sender.receive()
