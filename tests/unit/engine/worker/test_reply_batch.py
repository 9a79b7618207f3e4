"""Answers that go out together: one message to each frontend, as many as they need."""

from __future__ import annotations

import os
import socket

from forebay.engine.worker.places import Producer, Producers
from forebay.engine.worker.reply_batch import ReplyBatch
from forebay.ipc.arena import create_memory_file
from forebay.ipc.doorbell import create_doorbell
from forebay.ipc.wire import FLAG_FINAL, HEADER, MESSAGE_BYTES_MAX, REPLY, TIMES, TIMES_END, Kind

INSTANCE = 11
TIMES_NS = (1, 2, 3, 4)


def attach(producers: Producers, number: int) -> tuple[Producer, socket.socket]:
    arena = create_memory_file("test", 4096)
    sender, receiver = create_doorbell()
    receiver.setblocking(False)
    producer = Producer(number, os.dup(arena), 4096, sender.detach())
    os.close(arena)
    producers.attach(producer)
    return producer, receiver


def read(receiver: socket.socket) -> list[tuple[int, int, bytes]]:
    """Return token, flags and head of each answer in one message."""
    message = receiver.recv(MESSAGE_BYTES_MAX)
    kind, _flags, count, instance, _batch = HEADER.unpack_from(message)
    assert (kind, instance) == (Kind.PARCEL_REPLIES, INSTANCE)
    assert TIMES.unpack_from(message, HEADER.size) == TIMES_NS
    answers, offset = [], TIMES_END
    for _ in range(count):
        token, flags, size = REPLY.unpack_from(message, offset)
        offset += REPLY.size + size
        answers.append((token, flags, message[offset - size : offset]))
    assert offset == len(message)
    return answers


def test_each_producer_gets_its_own_in_one_message() -> None:
    producers = Producers()
    (first, to_first), (second, to_second) = attach(producers, 1), attach(producers, 2)
    batch = ReplyBatch(producers, INSTANCE, TIMES_NS)
    batch.add(first, 5, FLAG_FINAL, b"a")
    batch.add(second, 6, 0, b"bb")
    batch.add(first, 7, FLAG_FINAL, b"")
    batch.send()
    batch.send()
    assert read(to_first) == [(5, FLAG_FINAL, b"a"), (7, FLAG_FINAL, b"")]
    assert read(to_second) == [(6, 0, b"bb")]
    for producer, receiver in ((first, to_first), (second, to_second)):
        producers.detach(producer.id)
        assert receiver.recv(1) == b"", "nothing was sent twice"
        receiver.close()


def test_answers_that_one_message_does_not_hold_take_several() -> None:
    producers = Producers()
    producer, receiver = attach(producers, 1)
    batch = ReplyBatch(producers, INSTANCE, TIMES_NS)
    head = bytes(MESSAGE_BYTES_MAX // 2 - 64)
    for token in range(4):
        batch.add(producer, token, FLAG_FINAL, head)
    batch.send()
    assert [[token for token, _flags, _head in read(receiver)] for _ in range(2)] == [[0, 1], [2, 3]]
    producers.detach(1)
    receiver.close()


def test_producer_that_died_meanwhile_is_left_out() -> None:
    producers = Producers()
    producer, receiver = attach(producers, 1)
    batch = ReplyBatch(producers, INSTANCE, TIMES_NS)
    batch.add(producer, 1, FLAG_FINAL, b"x")
    producers.detach(1)
    batch.send()
    assert receiver.recv(1) == b""
    receiver.close()
