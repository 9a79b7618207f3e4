"""The submit socket: typed messages, in order; a flood ends in a refusal, garbage in an error."""

from __future__ import annotations

import random
import select
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
from forebay_server import wait_until

from forebay.ipc import channel
from forebay.ipc.channel import SubmitReceiver, SubmitSender, TypedCodec, submit_address
from forebay.ipc.messages import Cancel, FrontendToScheduler, GrantReturned, RowsCancel, RunSubmit, Submit

Context = zmq.Context[zmq.Socket[bytes]]


@pytest.fixture
def context() -> Iterator[Context]:
    made: Context = zmq.Context(io_threads=1)
    yield made
    made.term()


#: Of each sender in the test of signals.
_MESSAGE_COUNT = 1000


def receive(receiver: SubmitReceiver) -> FrontendToScheduler:
    found: list[FrontendToScheduler] = []

    def has_one() -> bool:
        message = receiver.receive_nowait()
        if message is not None:
            found.append(message)
        return bool(found)

    wait_until(has_one, "a message")
    return found[0]


def test_messages_arrive_in_order(context: Context, tmp_path: Path) -> None:
    receiver = SubmitReceiver(context, str(tmp_path))
    sender = SubmitSender(context, str(tmp_path))
    messages = [
        Submit(producer=7, epoch=1, runs=(RunSubmit(3, 4096, 64, 0, 2, 1, 5),)),
        Cancel(producer=7, tokens=(1, 2), rows=(RowsCancel(3, 4096, (0, 1)),)),
        GrantReturned(producer=7, instance=1, generation=9),
    ]
    for message in messages:
        assert sender.send_nowait(message)
    assert [receive(receiver) for _ in messages] == messages
    assert receiver.receive_nowait() is None
    sender.close()
    receiver.close()


def test_the_descriptor_signals_for_every_message_that_comes_after_the_last_was_taken(
    context: Context, tmp_path: Path
) -> None:
    """Nobody looks at the socket while its descriptor is silent: a signal that were missed would be a request lost."""
    receiver = SubmitReceiver(context, str(tmp_path))
    senders = [SubmitSender(context, str(tmp_path)) for _ in range(3)]

    def send(sender: SubmitSender) -> None:
        dice = random.Random(id(sender))
        for _ in range(_MESSAGE_COUNT):
            assert sender.send_nowait(Cancel(producer=7, tokens=(1,)))
            if dice.random() < 0.3:
                time.sleep(dice.random() / 2000)

    threads = [threading.Thread(target=send, args=(sender,)) for sender in senders]
    for thread in threads:
        thread.start()
    count = 0
    while count < len(senders) * _MESSAGE_COUNT:
        assert select.select([receiver.fileno()], [], [], 20)[0], f"no signal after {count} messages"
        count += receiver.receive_nowait() is not None
        while receiver.has_more:
            count += receiver.receive_nowait() is not None
    for thread in threads:
        thread.join()
    for sender in senders:
        sender.close()
    receiver.close()


def test_sender_may_come_first(context: Context, tmp_path: Path) -> None:
    """A restarted scheduler finds what was sent while there was none."""
    sender = SubmitSender(context, str(tmp_path))
    assert sender.send_nowait(GrantReturned(producer=7, instance=1, generation=9))
    receiver = SubmitReceiver(context, str(tmp_path))
    assert receive(receiver) == GrantReturned(producer=7, instance=1, generation=9)
    sender.close()
    receiver.close()


def test_sender_refuses_when_nobody_reads(context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """I-6: never growth, never a hang."""
    monkeypatch.setattr(channel, "HIGH_WATER_MARK", 10)
    sender = SubmitSender(context, str(tmp_path))
    sent = [sender.send_nowait(GrantReturned(producer=7, instance=1, generation=9)) for _ in range(20)]
    assert sent == [True] * 10 + [False] * 10
    sender.close()


def test_garbage_is_an_error_and_consumed(context: Context, tmp_path: Path) -> None:
    receiver = SubmitReceiver(context, str(tmp_path))
    raw = context.socket(zmq.PUSH)
    raw.connect(submit_address(str(tmp_path)))
    for data in (b"", b"\xc1", msgspec.msgpack.encode([99, 1]), msgspec.msgpack.encode([1, "x", 1])):
        raw.send(data)
    raw.send(msgspec.msgpack.encode(GrantReturned(producer=7, instance=1, generation=9)))
    errors = 0
    while True:
        try:
            assert receive(receiver) == GrantReturned(producer=7, instance=1, generation=9)
            break
        except (msgspec.DecodeError, msgspec.ValidationError):
            errors += 1
    assert errors == 4
    raw.close(linger=0)
    receiver.close()


def test_codec_reads_one_union() -> None:
    codec = TypedCodec[FrontendToScheduler](FrontendToScheduler)
    message = Cancel(producer=1, tokens=(5,))
    assert codec.decode(codec.encode(message)) == message


def test_socket_is_a_file_of_the_runtime_directory(context: Context, tmp_path: Path) -> None:
    """I-5: ipc:// only."""
    receiver = SubmitReceiver(context, str(tmp_path))
    assert submit_address(str(tmp_path)) == f"ipc://{tmp_path}/submit.sock"
    assert stat.S_ISSOCK((tmp_path / "submit.sock").stat().st_mode)
    receiver.close()
