"""What is noted of a traced request to an ensemble, and of the requests of its steps (spec O-008)."""

from __future__ import annotations

from collections.abc import Mapping

from forebay.ipc.ensemble.steps import OnStepReply, StepReply
from forebay.ipc.ensemble.tensors import Mapped, Tensor
from forebay.ipc.spans import BACKEND_OUTPUT, QUEUE_INPUT, QUEUE_START, REQUEST_END, Trace


def trace_tensors(trace: Trace, activity: str, tensors: Mapping[str, Tensor], owner: Mapped) -> None:
    """Keep tensors that lie on the host, if tensors are traced."""
    if trace.shows_tensors:
        for name, tensor in tensors.items():
            trace.tensor(activity, name, tensor.datatype, tensor.shape, tensor.view(owner))


def traced_run(trace: Trace, inputs: Mapping[str, Tensor], owner: Mapped, on_reply: OnStepReply) -> OnStepReply:
    """Note that the run of an ensemble begins; return what takes its replies."""

    def take(reply: StepReply) -> None:
        trace_tensors(trace, BACKEND_OUTPUT, reply.outputs, owner)
        on_reply(reply)

    trace.note(QUEUE_START)
    trace_tensors(trace, QUEUE_INPUT, inputs, owner)
    return take


def traced_reply(trace: Trace, on_reply: OnStepReply) -> OnStepReply:
    """Return what takes a step's replies and ends its trace with the last one."""

    def take(reply: StepReply) -> None:
        if reply.final:
            trace.note(REQUEST_END)
            trace.end()
        on_reply(reply)

    return take
