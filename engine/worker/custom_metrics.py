"""Sends the metrics that a Python model defines to the supervisor, which passes them on (spec M-055, P-119).

A thread of its own, made when the model makes its first metric: a model may change a value at any time and from any of
its threads, and nothing may wait for it. It sleeps until something has changed.
"""

from __future__ import annotations

import threading
import time

from forebay.engine.backends.python_model.metrics import MetricsRegistry
from forebay.ipc.lifeline import Lifeline, PeerClosed
from forebay.ipc.worker_messages import ModelMetrics, SupervisorToWorker

#: Changes within so many seconds are sent together.
_COALESCE_S = 0.05


class MetricsSender:
    """One worker's. Sends over the lifeline, on which the worker itself says nothing more once it has loaded."""

    def __init__(self, lifeline: Lifeline[SupervisorToWorker], instance: int, registry: MetricsRegistry) -> None:
        self._lifeline = lifeline
        self._instance = instance
        self._registry = registry
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to send, now or when there is something; the model has been loaded."""
        self._registry.on_change = self._ensure_thread
        if self._registry.samples():
            self._ensure_thread()

    def _ensure_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="custom metrics", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        news = self._registry.news
        while True:
            news.wait()
            time.sleep(_COALESCE_S)
            news.clear()
            try:
                self._lifeline.send(ModelMetrics(instance=self._instance, families=self._registry.samples()))
            except (PeerClosed, TimeoutError):
                return
