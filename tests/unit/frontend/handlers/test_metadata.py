"""Server metadata, model metadata and configuration: exact bodies."""

from __future__ import annotations

import pytest
from fake_frontend import ask, entry, make_context

from forebay.frontend.handlers.context import ControlSettings
from forebay.frontend.handlers.metadata import TRITON_VERSION
from forebay.ipc.tensor import TensorSpec


def test_server_metadata() -> None:
    """Spec H-035, E-001; the name is ``--id``."""
    answer = ask(make_context(settings=ControlSettings(server_id='tri"ton')), "GET", "/v2")
    assert answer.triple == (
        200,
        "application/json",
        b'{"name":"tri\\"ton","version":"' + TRITON_VERSION.encode() + b'","extensions":["classification","sequence",'
        b'"model_repository","model_repository(unload_dependents)","schedule_policy","model_configuration",'
        b'"system_shared_memory","cuda_shared_memory","binary_tensor_data","parameters","statistics","trace","logging"]}',
    )


def _cached(version: int) -> object:
    return entry(
        "cached",
        version,
        inputs=(TensorSpec("INPUT0", "INT32", (-1,), reshape=(-1, 1)),),
        outputs=(TensorSpec("OUTPUT0", "INT32", (-1,)),),
    )


def test_model_metadata_of_one_version() -> None:
    """Spec H-036, H-037, E-029."""
    context = make_context(_cached(1), _cached(3))  # type: ignore[arg-type]
    assert ask(context, "GET", "/v2/models/cached/versions/1").triple == (
        200,
        "application/json",
        b'{"name":"cached","versions":["1"],"platform":"identity",'
        b'"inputs":[{"name":"INPUT0","datatype":"INT32","shape":[-1,-1]}],'
        b'"outputs":[{"name":"OUTPUT0","datatype":"INT32","shape":[-1,-1]}]}',
    )


def test_model_metadata_lists_all_ready_versions() -> None:
    """Spec H-036; without batching the shape has no batch dimension (H-037)."""
    models = [entry("m", version, max_batch_size=0) for version in (10, 2)]
    context = make_context(*models, entry("m", 11, "LOADING"))
    assert ask(context, "GET", "/v2/models/m").body == (
        b'{"name":"m","versions":["2","10"],"platform":"identity",'
        b'"inputs":[{"name":"INPUT0","datatype":"FP32","shape":[-1]}],'
        b'"outputs":[{"name":"OUTPUT0","datatype":"FP32","shape":[-1]}]}'
    )


@pytest.mark.parametrize("suffix", ["", "/config"])
@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        ("/v2/models/nope", 404, "Request for unknown model: 'nope' is not found"),  # H-039, E-005, E-010
        ("/v2/models/nope/versions/1", 404, "Request for unknown model: 'nope' is not found"),
        ("/v2/models/id_all", 404, "Request for unknown model: 'id_all' has no available versions"),  # H-041, E-006
        ("/v2/models/id_all/versions/9", 404, "Request for unknown model: 'id_all' version 9 is not found"),  # H-040
        ("/v2/models/id_all/versions/1", 503, "Request for unknown model: 'id_all' version 1 is not at ready state"),
    ],
)
def test_models_that_cannot_be_described(path: str, suffix: str, status: int, text: str) -> None:
    context = make_context(entry("id_all", 1, "UNAVAILABLE"))
    assert ask(context, "GET", path + suffix).triple == (
        status,
        "application/json",
        b'{"error":"%s"}' % text.encode(),
    )


def test_config_is_the_repository_bytes_of_the_latest_ready_version() -> None:
    """Spec H-043, H-062."""
    models = [entry("m", version, config_json=b'{"name":"m","v":%d}' % version) for version in (1, 3)]
    context = make_context(*models, entry("m", 4, "LOADING"))
    assert ask(context, "GET", "/v2/models/m/config").triple == (200, "application/json", b'{"name":"m","v":3}')
    assert ask(context, "GET", "/v2/models/m/versions/1/config").body == b'{"name":"m","v":1}'
