"""Counts requests that ended, in a producer's block of a model version."""

from __future__ import annotations

from forebay.ipc.counters import LAST_BUCKET
from forebay.ipc.counters import ProducerCounter as Count
from forebay.ipc.errors import Code, ServingError

# Plain integers: looking up a member of an enum costs as much as the addition.
_SUCCESS, _SUCCESS_NS, _REQUEST_BUCKETS = int(Count.SUCCESS), int(Count.SUCCESS_NS), int(Count.REQUEST_BUCKETS)


def count_answered(counters: memoryview, requests: int, elapsed_ns: int) -> None:
    """Count requests that have their answer.

    Args:
        elapsed_ns: summed over the requests; their mean decides on the bucket.
    """
    if elapsed_ns < 0:
        elapsed_ns = 0
    counters[_SUCCESS] += requests
    counters[_SUCCESS_NS] += elapsed_ns
    bucket = (elapsed_ns // requests >> 10).bit_length()
    counters[_REQUEST_BUCKETS + (bucket if bucket < LAST_BUCKET else LAST_BUCKET)] += requests


def count_failure(counters: memoryview, error: ServingError, requests: int, elapsed_ns: int, *, ran: bool) -> None:
    """Count failed requests, by Triton's reasons (spec M-021).

    Args:
        elapsed_ns: summed over the requests.
        ran: a worker had them.
    """
    counters[Count.FAILED] += requests
    counters[Count.FAILED_NS] += elapsed_ns
    if error.code is Code.CANCELLED:
        counters[Count.CANCELED] += requests
    elif not ran and error.code is Code.UNAVAILABLE:
        counters[Count.REJECTED] += requests
    elif ran:
        counters[Count.FAILED_BACKEND] += requests
    else:
        counters[Count.FAILED_OTHER] += requests
