"""What people see of a start-up: the progress of models, the table of them, the endpoints, a client to copy."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING

from forebay.engine.console import Console, Endpoint, ExampleTensor, ModelProgress, ModelRow, Phase, client_snippet
from forebay.engine.supervisor.listeners import Listener

if TYPE_CHECKING:
    # Brings protobuf along, which the supervisor imports while its children start.
    from forebay.engine.supervisor.models import Model

#: How often progress is drawn anew, s.
_TICK_S = 0.1

_NAMES = {
    "http": "HTTP",
    "grpc": "gRPC",
    "sagemaker": "SageMaker",
    "vertex_ai": "Vertex AI",
    "metrics": "Metrics",
}
_NOTES = {"http": "KServe v2, Triton's HTTP protocol", "metrics": "Prometheus"}


class StartDisplay:
    """Shows a server's start on the console."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._is_over = False

    async def run(self) -> None:
        """Draw until cancelled."""
        while True:
            await asyncio.sleep(_TICK_S)
            self._console.tick()

    def show_progress(
        self, model: str, version: int, phase: str, instances_ready: int, instance_count: int, reason: str
    ) -> None:
        """Draw how far a model is; nothing once the table was shown."""
        if not self._is_over:
            event = ModelProgress(model, version, _phase(phase), instances_ready, instance_count, reason)
            self._console.show_progress(event)

    def show_models(self, models: Mapping[str, Model]) -> None:
        """Show the table of what was loaded; this ends the progress."""
        self._is_over = True
        rows: list[ModelRow] = []
        for name in sorted(models):
            model = models[name]
            if not model.status:
                rows.append(ModelRow(name, "", model.backend, 0, "", "UNAVAILABLE", model.problem or "not loaded"))
            for version, status in sorted(model.status.items()):
                served = model.serving.get(version)
                rows.append(
                    ModelRow(
                        name,
                        str(version),
                        model.backend,
                        served.serving_count if served is not None else 0,
                        served.device if served is not None else "",
                        status.state,
                        status.reason,
                        served.load_ns / 1e9 if served is not None else None,
                    )
                )
        self._console.show_models(rows)

    def show_endpoints(self, listeners: Mapping[str, Listener], models: Mapping[str, Model]) -> None:
        endpoints = [
            Endpoint(_NAMES[protocol], _url(protocol, listener), _NOTES.get(protocol, ""))
            for protocol, listener in listeners.items()
        ]
        self._console.show_endpoints(endpoints)
        if "http" in listeners and (lines := _example_client(listeners["http"], models)):
            self._console.show_client(lines)


def _phase(text: str) -> Phase:
    match text:
        case "queued" | "loading config" | "starting worker" | "loading" | "warming" | "ready" | "failed":
            return text
        case _:
            return "loading"


def _reachable(address: str) -> str:
    """Return an address that a client on this machine can connect to."""
    return "localhost" if address in ("0.0.0.0", "::", "127.0.0.1") else address


def _url(protocol: str, listener: Listener) -> str:
    address, port = listener.address
    place = f"{_reachable(address)}:{port}"
    return f"http://{place}/metrics" if protocol == "metrics" else place if protocol == "grpc" else f"http://{place}"


def _example_client(listener: Listener, models: Mapping[str, Model]) -> list[str]:
    for name in sorted(models):
        for served in models[name].serving.values():
            prepared = served.prepared
            return client_snippet(
                f"{_reachable(listener.address[0])}:{listener.address[1]}",
                name,
                [ExampleTensor(tensor.name, tensor.datatype, tensor.dims) for tensor in prepared.inputs],
                [ExampleTensor(tensor.name, tensor.datatype, tensor.dims) for tensor in prepared.outputs],
                has_batch=prepared.spec.is_batching,
            )
    return []
