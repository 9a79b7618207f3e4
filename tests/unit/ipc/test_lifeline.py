"""The lifeline carries typed messages with descriptors, whole or not at all."""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import os
import resource
import socket
import threading
from collections.abc import Iterator

import pytest

from forebay.ipc.frontend_messages import ConnectionMoved, FrontendToSupervisor, QuietWanted
from forebay.ipc.lifeline import DescriptorsLost, Lifeline, PeerClosed
from forebay.ipc.messages import Failed, Started

Said = Started | Failed | ConnectionMoved | QuietWanted
Pair = tuple[Lifeline[Said], Lifeline[Said]]


@pytest.fixture
def pair() -> Iterator[Pair]:
    one, other = socket.socketpair()
    lifelines = (
        Lifeline[Said](one, FrontendToSupervisor),
        Lifeline[Said](other, FrontendToSupervisor),
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
    sender = Lifeline[Said](high, FrontendToSupervisor)
    receiver = Lifeline[Said](other, FrontendToSupervisor)
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


@contextlib.contextmanager
def no_room_for_descriptors() -> Iterator[None]:
    """Let this process open nothing more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_message_whose_descriptors_find_no_room_gets_none_of_the_next(pair: Pair) -> None:
    sender, receiver = pair
    sender.send(Started(detail="before"))
    sender.send(ConnectionMoved(), (0,))
    with no_room_for_descriptors():
        assert receiver.receive() == (Started(detail="before"), [])
        assert receiver.receive() == (ConnectionMoved(), [])
    read_end, write_end = os.pipe()
    sender.send(ConnectionMoved(), (write_end,))
    _message, (fd,) = receiver.receive()
    assert os.fstat(fd).st_ino == os.fstat(write_end).st_ino
    for each in (read_end, write_end, fd):
        os.close(each)


def test_message_that_means_nothing_without_its_descriptors_ends_the_lifeline(pair: Pair) -> None:
    sender, receiver = pair
    sender.send(Started(), (0,))
    with no_room_for_descriptors(), pytest.raises(DescriptorsLost):
        receiver.receive()


def test_message_without_descriptors_is_not_waited_for_either(pair: Pair) -> None:
    sender, receiver = pair
    count = 0
    while sender.send_nowait(QuietWanted()):
        count += 1
    assert 0 < count < 100_000
    assert [receiver.receive() for _ in range(count)] == [(QuietWanted(), [])] * count


def test_send_that_would_have_to_wait_is_not_begun(pair: Pair) -> None:
    sender, receiver = pair
    count = 0
    while sender.send_nowait(ConnectionMoved(), (0,)):
        count += 1
    assert 0 < count < 100_000
    for _ in range(count):
        message, (fd,) = receiver.receive()
        os.close(fd)
        assert message == ConnectionMoved()
    assert sender.send_nowait(ConnectionMoved(), (0,))
    receiver.close()
    with pytest.raises(PeerClosed):
        sender.send_nowait(ConnectionMoved(), (0,))
