"""Requests at the edges of the HTTP protocol, to be sent to a real Triton and to us: see ``compare_with_triton.py``.

They ask the models of ``models.py``: those of the recorded transcripts, with Python models in place of the
``identity`` backend, which Triton's wheel on PyPI does not have.
"""

from __future__ import annotations

from triton_probes.binary_requests import binaries, encodings
from triton_probes.control_requests import metrics, repository, traces
from triton_probes.generate_requests import generates, schedules
from triton_probes.json_inputs import inputs
from triton_probes.json_requests import bodies, outputs
from triton_probes.paths import paths, restricted
from triton_probes.region_requests import regions

#: All kinds of requests.
GROUPS = (
    paths,
    restricted,
    bodies,
    inputs,
    outputs,
    binaries,
    encodings,
    generates,
    schedules,
    regions,
    traces,
    repository,
    metrics,
)
