"""Spec H-301."""

import pytest

from forebay.frontend.cloud.vertex_ai_heads import VertexAiHeads
from forebay.frontend.http.head import Target

HEADS = VertexAiHeads({"AIP_PREDICT_ROUTE": "/predict", "AIP_HEALTH_ROUTE": "/health"}, lambda: "only")


def parse(method: str, path: str, *headers: str):
    return HEADS.parse("\r\n".join([f"{method} {path} HTTP/1.1", *headers, "", ""]).encode())


def test_routes() -> None:
    assert parse("GET", "/health").raw.startswith(b"GET /v2/health/ready ")
    head = parse("POST", "/predict")
    assert (head.target, head.model) == (Target.INFER, "only")
    assert parse("GET", "/v2").raw.startswith(b"GET /-/400 ")


@pytest.mark.parametrize(
    ("redirect", "translated"),
    [
        ("v2", "GET /v2"),
        ("metrics", "GET /metrics"),
        ("v2/models/stats", "GET /v2/models/stats"),
        ("v2/models/m/versions/2/config", "GET /v2/models/m/versions/2/config"),
        ("v2/models/m/infer", "POST /v2/models/m/infer"),
        ("v2/repository/index", "POST /v2/repository/index"),
        ("v2/systemsharedmemory/region/r/status", "GET /v2/systemsharedmemory/region/r/status"),
        ("v2/cudasharedmemory/unregister", "POST /v2/cudasharedmemory/unregister"),
        ("v2/systemsharedmemory/region/r/register", "GET /-/400"),
        ("v2/repository/models/m/load", "GET /-/400"),
        ("v2/models/m/trace/setting", "GET /-/400"),
        ("", "GET /-/400"),
    ],
)
def test_redirects(redirect: str, translated: str) -> None:
    raw = parse("POST", "/predict", f"X-Vertex-Ai-Triton-Redirect: {redirect}").raw
    assert raw.startswith(translated.encode() + b" HTTP/1.1\r\n")


def test_redirects_are_posted() -> None:
    assert parse("GET", "/predict", "x-vertex-ai-triton-redirect: v2").raw.startswith(b"GET /-/405 ")
