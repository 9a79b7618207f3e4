"""ONNX Runtime behind a plain HTTP server: what somebody would write in an afternoon. A peer for ``bench.gpu``.

    python -m bench.peer_onnx_server --port N --model NAME=FILE [--model ...] --provider CUDAExecutionProvider

``POST /<model>`` with the input as raw float32 answers the first output as raw float32. One thread runs the models, as
one GPU does; requests are not batched.
"""

from __future__ import annotations

import argparse
import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime as ort
from aiohttp import web


def provider(name: str) -> tuple[str, dict[str, str]]:
    """Return an execution provider with the options that all use who are compared."""
    return name, {"cudnn_conv_algo_search": "HEURISTIC"} if name == "CUDAExecutionProvider" else {}


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(prog="bench.peer_onnx_server")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--provider", default="CPUExecutionProvider")
    options = parser.parse_args()
    if options.provider != "CPUExecutionProvider":
        ort.preload_dlls()
    sessions = {
        name: ort.InferenceSession(file, providers=[provider(options.provider)])
        for name, _, file in (text.partition("=") for text in options.model)
    }
    thread = ThreadPoolExecutor(1)

    async def infer(request: web.Request) -> web.Response:
        session = sessions[request.match_info["model"]]
        [tensor] = session.get_inputs()
        array = np.frombuffer(await request.read(), np.float32).reshape(-1, *tensor.shape[1:])
        loop = asyncio.get_running_loop()
        outputs = await loop.run_in_executor(thread, lambda: session.run(None, {tensor.name: array}))
        return web.Response(body=np.ascontiguousarray(outputs[0]).tobytes())

    async def ready(_request: web.Request) -> web.Response:
        return web.Response()

    app = web.Application(client_max_size=1 << 30)
    app.router.add_post("/{model}", infer)
    app.router.add_get("/v2/health/ready", ready)
    web.run_app(app, host="127.0.0.1", port=options.port, print=lambda _text: None)


if __name__ == "__main__":
    main()
