"""SageMaker's endpoint: ``/ping``, ``/invocations`` and ``/models/M/invoke`` in Triton's terms (spec H-300).

`sagemaker_server.cc` of Triton's server; its environment variables are those of SageMaker's containers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from forebay.frontend.cloud.translated_heads import BAD_REQUEST_PATH, RequestLine, TranslatedHeads
from forebay.ipc.errors import InvalidArgument

_INFERENCE_TYPES = ("infer", "generate", "generate_stream")
_INVOKE = re.compile(r"/models/([^/]+)/invoke")
#: Listing, loading, looking at and unloading models: served under these paths.
_MODELS = re.compile(r"/models/?|/models/[^/]+")


class SageMakerHeads(TranslatedHeads):
    """Parses the heads of requests to SageMaker's port."""

    binary_type = "application/vnd.sagemaker-triton.binary+json;json-header-size="

    def __init__(self, environment: Mapping[str, str], restricted: Sequence[tuple[str, str]] = ()) -> None:
        """
        Args:
            environment: names the model of ``/invocations``, what ``/ping`` asks and how inference is done.
            restricted: as for :class:`HeadParser`.

        Raises:
            InvalidArgument: a variable has a value that means nothing.
        """
        super().__init__("", restricted)
        self._model = environment.get("SAGEMAKER_TRITON_DEFAULT_MODEL_NAME") or (
            "unspecified_SAGEMAKER_TRITON_DEFAULT_MODEL_NAME"
        )
        self._ping = environment.get("SAGEMAKER_TRITON_PING_MODE") or "ready"
        self._inference = environment.get("SAGEMAKER_TRITON_INFERENCE_TYPE") or "infer"
        if self._inference not in _INFERENCE_TYPES:
            raise InvalidArgument(
                f"Server has invalid inference type '{self._inference}'. Must be one of: {', '.join(_INFERENCE_TYPES)}."
            )

    def translate(self, request: RequestLine, headers: dict[str, str]) -> RequestLine:
        path = request.path.partition("?")[0]
        if path == "/ping":
            return RequestLine(request.method, f"/v2/health/{self._ping}")
        if path == "/invocations":
            return RequestLine(request.method, f"/v2/models/{self._model}/{self._inference}")
        if (invoked := _INVOKE.fullmatch(path)) is not None and request.method == "POST":
            return RequestLine("POST", f"/v2/models/{invoked[1]}/infer")
        if _MODELS.fullmatch(path):
            return RequestLine(request.method, path)
        return RequestLine("GET", BAD_REQUEST_PATH)
