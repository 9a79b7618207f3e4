"""What a plan needs of an ensemble whose requests lie in rows of its models."""

from __future__ import annotations

from collections.abc import Mapping

from forebay.frontend.engine_client import EngineClient
from forebay.frontend.ensemble.run import EnsembleModel
from forebay.frontend.tracing import Sampler
from forebay.ipc.ensemble.run import sequence_parameters
from forebay.ipc.messages import ParameterValue

_SEQUENCE_PARAMETERS = ("sequence_id", "sequence_start", "sequence_end")


def sequence_changes(parameters: Mapping[str, ParameterValue]) -> dict[str, ParameterValue]:
    """Return those of a step's response parameters that change what the ensemble's reply says (spec S-111)."""
    return {name: parameters[name] for name in _SEQUENCE_PARAMETERS if name in parameters}


class EnsembleRows:
    """What both kinds of ensembles in rows have in common: they count and are traced under their own name."""

    __slots__ = ("_ensemble", "engine")

    def __init__(self, ensemble: EnsembleModel) -> None:
        self._ensemble = ensemble
        self.engine: EngineClient = ensemble.route.engine

    @property
    def reply_parameters(self) -> dict[str, ParameterValue]:
        """What every reply says (spec S-111)."""
        return sequence_parameters((0, False, False))

    @property
    def sampler(self) -> Sampler | None:
        """Says which requests to the ensemble are traced."""
        return self._ensemble.route.sampler

    @property
    def copied_in_bytes(self) -> int:
        return self._ensemble.route.copied_in_bytes

    @copied_in_bytes.setter
    def copied_in_bytes(self, count: int) -> None:
        self._ensemble.route.copied_in_bytes = count

    @property
    def copied_out_bytes(self) -> int:
        return self._ensemble.route.copied_out_bytes

    @copied_out_bytes.setter
    def copied_out_bytes(self, count: int) -> None:
        self._ensemble.route.copied_out_bytes = count
