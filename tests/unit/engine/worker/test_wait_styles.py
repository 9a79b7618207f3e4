"""How a worker waits: whatever the style, every message arrives, and an end is seen."""

from __future__ import annotations

import select
import threading
import time

import pytest

from forebay.engine.worker.wait_styles import Park, Spin, wait_style
from forebay.ipc.doorbell import create_doorbell

STYLES = [Park(), Spin(200), Spin(1_000_000)]


@pytest.mark.parametrize("style", STYLES)
def test_a_message_that_is_there_is_received(style: Park) -> None:
    sender, receiver = create_doorbell()
    buffer = bytearray(64)
    with sender, receiver:
        sender.send(b"one")
        sender.send(b"three")
        assert [style.receive(receiver, buffer), style.receive(receiver, buffer)] == [3, 5]
        assert buffer[:5] == b"three"


@pytest.mark.parametrize("style", STYLES)
def test_a_message_that_comes_later_is_received(style: Park) -> None:
    sender, receiver = create_doorbell()
    with sender, receiver:

        def send_soon() -> None:
            time.sleep(0.02)
            sender.send(b"late")

        thread = threading.Thread(target=send_soon)
        thread.start()
        assert style.receive(receiver, bytearray(64)) == 4
        thread.join()


@pytest.mark.parametrize("style", STYLES)
def test_the_end_of_all_senders_is_seen(style: Park) -> None:
    sender, receiver = create_doorbell()
    with receiver:
        sender.close()
        assert style.receive(receiver, bytearray(64)) == 0


@pytest.mark.parametrize("style", [Park(), Spin(200)])
def test_polling_ends_with_what_is_ready_or_with_its_time(style: Park) -> None:
    sender, receiver = create_doorbell()
    poll = select.poll()
    poll.register(receiver.fileno(), select.POLLIN)
    with sender, receiver:
        assert style.poll(poll, 1) == []
        sender.send(b"x")
        assert style.poll(poll, None) == [(receiver.fileno(), select.POLLIN)]


def test_no_time_to_look_is_sleeping() -> None:
    assert isinstance(wait_style(0), Park)
    assert not isinstance(wait_style(0), Spin)
    assert isinstance(wait_style(50), Spin)
