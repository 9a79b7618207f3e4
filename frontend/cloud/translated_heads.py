"""Request heads of a cloud's endpoint, translated to those of Triton's own before anything else looks at them.

Which model is asked, and how, stands in the head alone; so a translated head is all that an inference request needs to
take the usual way, and what a head means is remembered as usual, by the bytes that the client sent.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

from forebay.frontend.http.head import Head, HeadParser

#: Paths of no API, to which refusals without a body are translated (see ``cloud_routes``).
BAD_REQUEST_PATH = "/-/400"
METHOD_NOT_ALLOWED_PATH = "/-/405"

_LENGTH_HEADER = "Inference-Header-Content-Length"


@dataclass(frozen=True)
class RequestLine:
    """What is asked."""

    method: str
    path: str
    """With its query."""


class TranslatedHeads(HeadParser, abc.ABC):
    """Parses the heads of one cloud's endpoint."""

    #: Content type of requests and replies with binary tensors; the bytes of their JSON follow it.
    binary_type: str

    @abc.abstractmethod
    def translate(self, request: RequestLine, headers: dict[str, str]) -> RequestLine:
        """Return what is asked in Triton's own terms.

        Args:
            headers: the first of each name, in lower case.
        """

    def _parse(self, raw: bytes) -> Head:
        head = super()._parse(self._translated(raw))
        head.binary_type = self.binary_type
        # A reply's head is made for each reply: those that are prepared name Triton's content type.
        head.is_plain = False
        return head

    def _translated(self, raw: bytes) -> bytes:
        first, *lines = raw[:-4].decode("latin-1").split("\r\n")
        parts = first.split(" ")
        if len(parts) != 3:
            return raw  # the strict parser says what is wrong
        headers: dict[str, str] = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers.setdefault(name.lower(), value.strip())
        request = self.translate(RequestLine(parts[0], parts[1]), headers)
        content_type = headers.get("content-type", "")
        if content_type.startswith(self.binary_type):
            length_line = f"{_LENGTH_HEADER}: {content_type.removeprefix(self.binary_type)}"
            lines = [line for line in lines if not line.lower().startswith(_LENGTH_HEADER.lower() + ":")]
            lines.append(length_line)
        return "\r\n".join([f"{request.method} {request.path} {parts[2]}", *lines, "", ""]).encode("latin-1")
