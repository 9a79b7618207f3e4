"""Large bodies of no known plan, and what is kept of them for the next."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from typing import Any
from unittest import mock

from engine_scene import Surroundings, play, turn

from forebay.frontend.catalog_view import CatalogView
from forebay.frontend.http.head import HeadParser
from forebay.frontend.http.server import HttpFrontend
from forebay.frontend.http.settings import HttpView
from forebay.frontend.regions import RegionTable
from forebay.ipc.catalog import Catalog
from forebay.ipc.regions import Region
from forebay.ipc.wire import Kind

TENSOR = bytes(range(16))


class Uploads:
    """A frontend whose clients send bodies in two parts."""

    def __init__(self, scene: Surroundings) -> None:
        self.scene = scene
        self.regions = RegionTable()
        catalog = CatalogView(Catalog(generation=1, models=(scene.route.entry,)))
        control: Any = mock.Mock()
        self.frontend = HttpFrontend(scene.engine, HttpView(), control, catalog, HeadParser(), self.regions)
        self.replies: list[bytes] = []
        self.connection: Any = SimpleNamespace(
            add_call=lambda _call: None, answer=self._answer, sort=lambda _route: None
        )

    def _answer(self, _call: object, buffers: list[Any]) -> None:
        self.replies.append(b"".join(bytes(buffer) for buffer in buffers))

    def send(self, text: bytes) -> None:
        """Send a request whose tensor follows behind its JSON."""
        head = self.frontend.heads.parse(
            b"POST /v2/models/m/infer HTTP/1.1\r\nHost: a\r\nInference-Header-Content-Length: %d\r\n"
            b"Content-Length: %d\r\n\r\n" % (len(text), len(text) + len(TENSOR))
        )
        upload = self.frontend.open_upload(self.connection, head, memoryview(text))
        upload.next_place()[: len(TENSOR)] = TENSOR
        assert upload.received(len(TENSOR))
        upload.submit(self.connection)

    async def run(self, output: bytes) -> None:
        """Have a worker answer what was sent."""
        await turn()
        (message,) = self.scene.take_sent()
        (submitted,) = message.runs
        slab = self.scene.engine.slabs[submitted.base][1]
        self.scene.route.output_slice(slab, submitted.first, 1, 0)[:] = output
        await self.scene.tell_runs(Kind.RUNS_DONE, (submitted.first, 1), slab=slab)


def test_outputs_of_a_repeated_upload_go_to_their_region_again() -> None:
    """H-198; the JSON is parsed once, the region found each time."""
    tensor = {"name": "X", "datatype": "FP32", "shape": [1, 4], "parameters": {"binary_data_size": 16}}
    place = {"name": "Y", "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 4}}
    text = json.dumps({"inputs": [tensor], "outputs": [place]}).encode()

    async def scenario(s: Surroundings) -> None:
        uploads = Uploads(s)
        fd = os.memfd_create("region")
        os.ftruncate(fd, 4)
        uploads.regions.add(Region("r", "system", os.dup(fd), 0, 4))
        for output in (b"1111", b"2222", b"3333"):
            uploads.send(text)
            await uploads.run(output)
            assert os.pread(fd, 4, 0) == output
            assert uploads.replies[-1].startswith(b"HTTP/1.1 200 ")
            assert output not in uploads.replies[-1]
        uploads.regions.remove("r")
        os.close(fd)

    play(scenario)
