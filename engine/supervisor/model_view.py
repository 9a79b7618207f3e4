"""What others are told of the models: catalog entries, the repository index, and whether the server is ready."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from forebay.engine.supervisor.ensembles import Ensembles
from forebay.engine.supervisor.models import UNLOADED, Model, VersionStatus
from forebay.ipc.catalog import ModelEntry


class ModelView:
    """Reads the models of one lifecycle. Used in the supervisor's event loop only."""

    def __init__(self, models: Mapping[str, Model], ensembles: Ensembles) -> None:
        """Args:
        models: by identity; ours to read.
        ensembles: says whether a loaded ensemble can serve.
        """
        self._models = models
        self._ensembles = ensembles

    def entries(self, slot: str, slots: tuple[str, ...]) -> tuple[ModelEntry, ...]:
        """Return the catalog's entries for the frontend of ``slot``; ``slots`` are all that count requests."""
        entries = [entry for model in self._models.values() for entry in self._entries(model, slot, slots)]
        return tuple(sorted(entries, key=lambda entry: (entry.name, entry.version)))

    def _entries(self, model: Model, slot: str, slots: tuple[str, ...]) -> list[ModelEntry]:
        entries: list[ModelEntry] = []
        for version, status in model.status.items():
            state, reason = self.state(model, version, status)
            served = model.serving.get(version)
            if served is not None:
                _problem, decoupled = self._ensembles.judge(served.prepared, served.route)
                entries.append(served.entry(slot, slots, state=state, reason=reason, decoupled=decoupled))
            else:
                namespace = model.found.namespace if model.found is not None else ""
                entries.append(
                    ModelEntry(name=model.name, version=version, state=state, reason=reason, namespace=namespace)
                )
        if not entries:
            # Known by its directory alone (spec H-211); no version number is 0.
            known = ModelEntry(name=model.name, version=0, state="UNAVAILABLE", reason=model.problem)
            entries.append(msgspec.structs.replace(known, has_no_version=model.has_no_version))
        return entries

    def state(self, model: Model, version: int, status: VersionStatus) -> tuple[str, str]:
        served = model.serving.get(version)
        if served is not None and status.state == "READY":
            if not served.is_serving:
                return "UNAVAILABLE", served.reason
            problem, _is_decoupled = self._ensembles.judge(served.prepared, served.route)
            if problem:
                return "UNAVAILABLE", problem
        return status.state, status.reason

    def index(self, *, ready_only: bool) -> list[dict[str, str]]:
        """Return the repository index (spec H-210..H-213), sorted by name then version."""
        rows: list[dict[str, str]] = []
        # By name also where namespaces tell models of one name apart.
        for model in sorted(self._models.values(), key=lambda model: model.name):
            if not model.status:
                if not ready_only:
                    rows.append({"name": model.name})
                continue
            for version in sorted(model.status):
                state, reason = self.state(model, version, model.status[version])
                if ready_only and state != "READY":
                    continue
                row = {"name": model.name, "version": str(version), "state": state}
                # A failed update leaves the old version serving, and says so here (better than L-014, L-017).
                if reason or model.problem:
                    row["reason"] = reason or f"update failed: {model.problem}"
                rows.append(row)
        return rows

    @property
    def is_ready(self) -> bool:
        """Whether everything serves that was not unloaded or excused (spec H-031)."""
        return all(self._is_model_ready(model) for model in self._models.values())

    def _is_model_ready(self, model: Model) -> bool:
        if not model.status:
            return not model.problem or model.is_excused
        for version, status in model.status.items():
            state, reason = self.state(model, version, status)
            if state == "UNAVAILABLE" and (reason == UNLOADED or status.is_excused):
                continue
            if state not in ("READY", "UNLOADING"):
                return False
        return True
