"""Every message survives the wire, has its own tag in its union, and says no to wrong fields."""

from __future__ import annotations

import typing

import msgspec
import pytest

from forebay.ipc import frontend_messages, messages, scheduler_messages, worker_messages
from forebay.ipc.messages import Cancel, Message, ParcelHead, ReplyHead, RowsCancel, Submit, TensorPlace
from forebay.ipc.scheduler_messages import BatchingPolicy, InstanceUp, QueuePolicy, Resource, RouteUp, SchedulerStart

UNIONS = {
    name: union
    for module in (messages, scheduler_messages, frontend_messages, worker_messages)
    for name, union in vars(module).items()
    if "To" in name and typing.get_args(union)
}


@pytest.mark.parametrize("name", UNIONS)
def test_tags_of_a_union_are_distinct(name: str) -> None:
    members = typing.get_args(UNIONS[name])
    tags = [member.__struct_config__.tag for member in members]
    assert len(set(tags)) == len(tags)
    msgspec.msgpack.Decoder(UNIONS[name])


def test_every_message_is_frozen_and_an_array() -> None:
    for member in Message.__subclasses__():
        assert member.__struct_config__.frozen
        assert member.__struct_config__.array_like


@pytest.mark.parametrize(
    "message",
    [
        RouteUp(
            route=1,
            name="m",
            version=2,
            batching=BatchingPolicy(
                max_batch_size=8, dynamic=True, priority_queue_policy={1: QueuePolicy(max_queue_size=5)}
            ),
            extra={"sequence": {"strategy": {"type": "direct"}}},
        ),
        InstanceUp(route=1, instance=2, name="i", resources=(Resource("R", 1, 0),), rate_priority=3),
        SchedulerStart(epoch=2, runtime_directory="/x", is_rate_limited=True, resources=(Resource("R", 4),)),
    ],
)
def test_scheduler_reads_what_the_supervisor_writes(message: Message) -> None:
    data = msgspec.msgpack.encode(message)
    assert msgspec.msgpack.decode(data, type=scheduler_messages.SupervisorToScheduler) == message


def test_a_peer_that_knows_fewer_fields_is_understood() -> None:
    """New fields go last, with a default."""
    assert msgspec.msgpack.decode(msgspec.msgpack.encode([2, 7, [1]]), type=Cancel) == Cancel(producer=7, tokens=(1,))


@pytest.mark.parametrize(
    "fields", [[1, "seven", 1], [1], [1, 7, 1, [[1, 2]]], [2, 7, [1], [[1, 2, "x"]]], [77, 1], {"producer": 1}, None]
)
def test_wrong_fields_are_refused_at_the_door(fields: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=messages.FrontendToScheduler)


def test_heads_survive_the_wire() -> None:
    place = TensorPlace("X", "FP32", (1, 2), 64, 8, arena=3)
    head = ParcelHead(
        inputs=(place,), reply_offset=128, reply_bytes=64, parameters={"a": 1, "b": "x", "c": True, "d": 0.5},
        correlation_id="seq", sequence_start=True,
    )  # fmt: skip
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(head), type=ParcelHead) == head
    reply = ReplyHead(outputs=(place,), parameters={"a": 1}, index=2)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(reply), type=ReplyHead) == reply


def test_correlation_ids_of_both_kinds_keep_their_type() -> None:
    """Spec S-059."""
    for correlation_id in (0, 2**64 - 1, "7", ""):
        head = ParcelHead(inputs=(), reply_offset=0, reply_bytes=0, correlation_id=correlation_id)
        decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(head), type=ParcelHead)
        assert decoded.correlation_id == correlation_id
        assert type(decoded.correlation_id) is type(correlation_id)


def test_cancelled_rows_are_named_by_slab() -> None:
    message = Cancel(producer=7, rows=(RowsCancel(3, 4096, (1, 2)),))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=messages.FrontendToScheduler) == message
    assert Submit(producer=1, epoch=1).runs == ()
