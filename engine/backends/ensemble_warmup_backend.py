"""Runs the warm-up samples of an ensemble, as a shared-memory client of the server that loads it (spec C-110..C-115).

The server's own: ``engine/supervisor/ensemble_warmup.py`` starts it, tells it of a side door where it gets the
ensemble before anybody else, and ends it when it has loaded, that is, when all samples have run.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from forebay.client import shm
from forebay.engine.backends.base import Array, Backend, RequestInstance
from forebay.engine.repository.model_spec import WarmupSpec
from forebay.engine.worker.warmup import sample_failed, tensor_array
from forebay.ipc.errors import Internal, ServingError, Unsupported
from forebay.ipc.worker_messages import InstanceSpec

if TYPE_CHECKING:
    from forebay.engine.worker.parcel_request import ParcelRequest


class WarmedUp(RequestInstance):
    """Nothing is left to do."""

    def execute(self, requests: Sequence[ParcelRequest]) -> None:
        raise Internal("a warm-up takes no requests")


class EnsembleWarmupBackend(Backend):
    """``forebay_ensemble_warmup``."""

    def load(self, spec: InstanceSpec) -> WarmedUp:
        if "door" not in spec.extra:
            raise Unsupported(f"backend '{spec.backend}' is the server's own")
        with shm.connect(str(spec.extra["door"])) as engine:
            ensemble = engine.model(spec.model, spec.version)
            for sample in msgspec.convert(spec.extra["samples"], tuple[WarmupSpec, ...]):
                run_sample(ensemble, sample, spec.model_path)
        return WarmedUp()


def run_sample(ensemble: shm.Model, sample: WarmupSpec, model_path: str) -> None:
    """Run a sample as often as it says; each time ``batch_size`` requests of one row together.

    Raises:
        ServingError: the sample cannot be made.
        InvalidArgument: a request failed (spec C-114).
    """
    if sample.batch_size == 0:
        return
    arrays = {given.name: tensor_array(given, model_path) for given in sample.inputs}
    if ensemble.max_batch_size > 0:
        arrays = {name: array[None] for name, array in arrays.items()}
    for _ in range(sample.count):
        try:
            _run_once(ensemble, sample, arrays)
        except ServingError as error:
            raise sample_failed(sample, error) from None


def _run_once(ensemble: shm.Model, sample: WarmupSpec, arrays: dict[str, Array]) -> None:
    futures: list[shm.Future] = []
    for _ in range(sample.batch_size):
        for name, array in arrays.items():
            ensemble.put(name, array)
        # For stateful steps each request is a sequence of its own, as in warm-ups of models.
        options = shm.Options(
            request_id=sample.name, sequence_id=_sequence_id(), sequence_start=True, sequence_end=True
        )
        if ensemble.is_decoupled:
            for _response in ensemble.stream(options=options):
                pass
        else:
            futures.append(ensemble.submit(options=options))
    for future in futures:
        future.outputs()


def _sequence_id() -> int:
    """Return a number that clients hardly have, whose sequences go on in the same models; fits controls of 32 bits."""
    return (1 << 30) + secrets.randbelow(1 << 30)


BACKEND = EnsembleWarmupBackend
