"""Python models over real processes: requests in slab rows and parcels side by side look to the model as in Triton."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from forebay_server import ForebayServer, wait_until
from tritonclient.utils import InferenceServerException

MODELS = Path(__file__).parents[1] / "data" / "python_models"

ROWS_CONFIG = """
backend: "python"
max_batch_size: 8
input { name: "IN" data_type: TYPE_FP32 dims: [ 4 ] }
output { name: "OUT" data_type: TYPE_FP32 dims: [ 4 ] }
output { name: "ABOUT" data_type: TYPE_INT32 dims: [ 3 ] }
dynamic_batching { }
"""
ECHO_CONFIG = """
backend: "python"
input { name: "IN" data_type: TYPE_INT32 dims: [ 1 ] }
output { name: "OUT" data_type: TYPE_INT32 dims: [ 1 ] }
output { name: "SEEN" data_type: TYPE_UINT8 dims: [ 256 ] }
"""
ECHO = """
import json
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        given = pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()
        seen = {
            "id": request.request_id(), "parameters": json.loads(request.parameters()), "timeout": request.timeout(),
            "correlation": request.correlation_id(), "outputs": sorted(request.requested_output_names()),
        }
        text = np.frombuffer(json.dumps(seen).encode().ljust(256), np.uint8)
        tensors = [pb_utils.Tensor("OUT", given), pb_utils.Tensor("SEEN", text)]
        return pb_utils.InferenceResponse(tensors)
"""
HANGING_CONFIG = """
backend: "python"
input { name: "IN" data_type: TYPE_INT32 dims: [ 1 ] }
output { name: "OUT" data_type: TYPE_INT32 dims: [ 1 ] }
parameters { key: "worker_timeout_secs" value { string_value: "1" } }
"""
HANGING = """
import asyncio
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    async def execute(self, requests):
        given = pb_utils.get_input_tensor_by_name(requests[0], "IN").as_numpy()
        if given[0] < 0:
            await asyncio.Event().wait()
        await asyncio.sleep(0.3)
        return [pb_utils.InferenceResponse([pb_utils.Tensor("OUT", given)]) for _request in requests]
"""
WAITING_CONFIG = """
backend: "python"
input { name: "IN" data_type: TYPE_INT32 dims: [ 1 ] }
output { name: "OUT" data_type: TYPE_INT32 dims: [ 1 ] }
"""
WAITING = """
import time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            given = pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()
            if given[0] < 0:
                print("began to wait", flush=True)
                while not request.is_cancelled():
                    time.sleep(0.001)
                print("heard of the client's end", flush=True)
        return [pb_utils.InferenceResponse([pb_utils.Tensor("OUT", given)]) for _request in requests]
"""
#: What Python makes of bytes that are no UTF-8, a file name for example, is in all that it says.
MISSPELT = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        given = pb_utils.get_input_tensor_by_name(requests[0], "IN").as_numpy()
        if given[0] == 0:
            raise ValueError("raised \\udc80")
        return [pb_utils.InferenceResponse(error=pb_utils.TritonError("answered \\udc80"))]
"""
#: Its configuration lacks one thing; the rest is to stay.
COMPLETING = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        config.add_input({"name": "MORE", "data_type": "TYPE_FP32", "dims": [1], "optional": True})
        return config

    def execute(self, requests):
        given = pb_utils.get_input_tensor_by_name(requests[0], "IN").as_numpy()
        return [pb_utils.InferenceResponse([pb_utils.Tensor("OUT", given)]) for _request in requests]
"""
MINDED = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.mood = 1

    async def is_ready(self):
        if self.mood == 3:
            raise ValueError("no mood")
        return {0: False, 1: True}.get(self.mood, "perhaps")

    def execute(self, requests):
        given = pb_utils.get_input_tensor_by_name(requests[0], "IN").as_numpy()
        self.mood = int(given[0])
        return [pb_utils.InferenceResponse([pb_utils.Tensor("OUT", given)]) for _request in requests]
"""


@pytest.fixture(name="server", scope="module")
def server_of_python_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForebayServer]:
    root = tmp_path_factory.mktemp("models")
    shutil.copytree(MODELS / "rows", root / "rows")
    (root / "rows" / "config.pbtxt").write_text(ROWS_CONFIG)
    for name, config, code in (
        ("echo", ECHO_CONFIG, ECHO),
        ("hanging", HANGING_CONFIG, HANGING),
        ("waiting", WAITING_CONFIG, WAITING),
        ("minded", WAITING_CONFIG, MINDED),
        ("misspelt", WAITING_CONFIG.replace("[ 1 ]", "[ -1 ]"), MISSPELT),
        ("completing", WAITING_CONFIG, COMPLETING),
    ):
        (root / name / "1").mkdir(parents=True)
        (root / name / "config.pbtxt").write_text(config)
        (root / name / "1" / "model.py").write_text(code)
    with ForebayServer(root, protocols=("http", "grpc", "metrics")) as server:
        yield server


@pytest.fixture(name="client", params=["http", "grpc"])
def client_of_either_protocol(request: pytest.FixtureRequest, server: ForebayServer) -> Iterator[Any]:
    if request.param == "http":
        client: Any = httpclient.InferenceServerClient(f"127.0.0.1:{server.http_port}")
    else:
        client = grpcclient.InferenceServerClient(f"127.0.0.1:{server.ports()['GRPCInferenceService']}")
    client.module = httpclient if request.param == "http" else grpcclient
    yield client
    client.close()


def ask(client: Any, model: str, values: Any, **options: Any) -> Any:
    given = client.module.InferInput("IN", list(values.shape), "FP32" if values.dtype == np.float32 else "INT32")
    given.set_data_from_numpy(values)
    return client.infer(model, [given], **options)


def seen(result: Any) -> Any:
    return json.loads(result.as_numpy("SEEN").tobytes())


def rows(first: float, count: int = 1) -> Any:
    values = np.arange(count * 4, dtype=np.float32).reshape(count, 4) + 10
    values[0, 0] = first
    return values


def test_what_a_model_does_not_complete_stays_as_configured(server: ForebayServer) -> None:
    """P-121, R-062."""
    client: Any = httpclient.InferenceServerClient(f"127.0.0.1:{server.http_port}")
    config = client.get_model_config("completing")
    assert [tensor["name"] for tensor in config["input"]] == ["IN", "MORE"]
    assert [tensor["name"] for tensor in config["output"]] == ["OUT"]
    client.module = httpclient
    assert ask(client, "completing", np.array([3], np.int32)).as_numpy("OUT").tolist() == [3]
    client.close()


def test_a_request_with_nothing_but_tensors_looks_empty(client: Any) -> None:
    """P-031..P-036: twice, because the second goes by a plan."""
    for _ in range(2):
        result = ask(client, "echo", np.array([7], np.int32))
        assert result.as_numpy("OUT").tolist() == [7]
        assert seen(result) == {
            "id": "", "parameters": {}, "timeout": 0, "correlation": 0, "outputs": ["OUT", "SEEN"],
        }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"request_id": "mine"}, {"id": "mine"}),
        ({"parameters": {"color": "red", "count": 3}}, {"parameters": {"color": "red", "count": 3}}),
        ({"timeout": 5_000_000}, {"timeout": 5_000_000}),
        ({"sequence_id": 12}, {"correlation": 12}),
    ],
    ids=["id", "parameters", "timeout", "sequence"],
)
def test_what_a_request_carries_is_seen(client: Any, options: dict[str, Any], expected: dict[str, Any]) -> None:
    """P-031..P-035: also right after a request of the same shape that carried nothing, and not in the next one."""
    nothing = {"id": "", "parameters": {}, "timeout": 0, "correlation": 0, "outputs": ["OUT", "SEEN"]}
    for _ in range(2):
        assert seen(ask(client, "echo", np.array([7], np.int32))) == nothing
        assert seen(ask(client, "echo", np.array([7], np.int32), **options)) == {**nothing, **expected}


def test_a_choice_of_outputs_is_seen(client: Any) -> None:
    """P-036"""
    chosen = [client.module.InferRequestedOutput("SEEN")]
    assert seen(ask(client, "echo", np.array([1], np.int32), outputs=chosen))["outputs"] == ["SEEN"]
    both = [client.module.InferRequestedOutput(name) for name in ("SEEN", "OUT")]
    assert seen(ask(client, "echo", np.array([1], np.int32), outputs=both))["outputs"] == ["OUT", "SEEN"]


def test_an_error_of_one_request_is_its_own(client: Any) -> None:
    """P-009"""
    assert ask(client, "rows", rows(1)).as_numpy("OUT")[0, 0] == 2
    with pytest.raises(InferenceServerException, match="not this one"):
        ask(client, "rows", rows(-1))
    with pytest.raises(InferenceServerException, match="message: ValueError: bad thing"):
        ask(client, "rows", rows(-2))
    with pytest.raises(InferenceServerException, match="but its configuration promises FP32"):
        ask(client, "rows", rows(-3))
    assert ask(client, "rows", rows(1)).as_numpy("OUT")[0, 0] == 2


@pytest.mark.parametrize(("case", "text"), [(0, "raised"), (1, "answered")])
def test_a_text_that_cannot_be_encoded_ends_no_worker(client: Any, server: ForebayServer, case: int, text: str) -> None:
    """Spec P-008, P-009: the request fails, and in a text its place is taken by its number."""
    pid = server.pid_of("worker misspelt")
    with pytest.raises(InferenceServerException, match=rf"{text}.*\\udc80"):
        ask(client, "misspelt", np.array([case], np.int32))
    assert server.pid_of("worker misspelt") == pid


def test_response_parameters_reach_the_client(client: Any) -> None:
    """P-070: in rows, whether or not a plan is known."""
    for _ in range(3):
        response = ask(client, "rows", rows(-6)).get_response()
        if client.module is httpclient:
            assert response["parameters"] == {"seen": 1, "by": "rows"}
        else:
            assert response.parameters["seen"].int64_param == 1
            assert response.parameters["by"].string_param == "rows"


def test_requests_of_one_batch_are_answered_each_for_itself(server: ForebayServer) -> None:
    """Rows and parcels, whole batches and single rows, good and bad, from many clients at once."""
    errors: list[str] = []

    def work(number: int) -> None:
        client = httpclient.InferenceServerClient(f"127.0.0.1:{server.http_port}")
        for turn in range(40):
            values = rows(-1 if (number + turn) % 5 == 0 else number + 1, 1 + (number + turn) % 3)
            given = httpclient.InferInput("IN", list(values.shape), "FP32")
            given.set_data_from_numpy(values)
            try:
                result = client.infer("rows", [given], request_id="x" if turn % 4 == 0 else "")
                if values[0, 0] < 0 or not np.array_equal(result.as_numpy("OUT"), values * 2):
                    errors.append(f"{values} gave {result.as_numpy('OUT')}")
                if result.as_numpy("ABOUT")[0, 1] != len(values):
                    errors.append(f"{len(values)} rows were seen as {result.as_numpy('ABOUT')}")
            except InferenceServerException as error:
                if values[0, 0] > 0 or error.message() != "not this one":
                    errors.append(str(error))
        client.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_running_model_hears_that_its_client_has_left(server: ForebayServer) -> None:
    """P-039: of a request in rows, scheduled or rung under a grant."""
    body = b'{"inputs":[{"name":"IN","shape":[1],"datatype":"INT32","data":[%d]}]}'
    for count, quiet in enumerate((0, 40), start=1):
        for _ in range(quiet):
            assert server.post("/v2/models/waiting/infer", body % 1)[0] == 200
        with socket.create_connection(("127.0.0.1", server.http_port)) as sock:
            content = body % -1
            head = b"POST /v2/models/waiting/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
            sock.sendall(head % len(content) + content)
            wait_until(lambda n=count: server.stdout.count("began to wait") == n, "the request to run")
        wait_until(lambda n=count: server.stdout.count("heard of the client's end") == n, "it to be told")


def test_a_coroutine_that_hangs_is_ended(server: ForebayServer) -> None:
    """Issue 5: an ``async def execute`` that never ends counts as hung like any other."""
    client = httpclient.InferenceServerClient(f"127.0.0.1:{server.http_port}", network_timeout=60)
    with pytest.raises(InferenceServerException, match="ran longer than model 'hanging' may"):
        ask_http(client, "hanging", np.array([-1], np.int32))
    server.wait_logged("worker hanging:1 #0 is back")
    server.wait_ready("hanging")
    for _ in range(5):
        # Together longer than one may take: each by itself is not.
        assert ask_http(client, "hanging", np.array([1], np.int32)).as_numpy("OUT").tolist() == [1]
    client.close()


def ask_http(client: httpclient.InferenceServerClient, model: str, values: Any) -> Any:
    given = httpclient.InferInput("IN", list(values.shape), "INT32")
    given.set_data_from_numpy(values)
    return client.infer(model, [given])


def is_ready(server: ForebayServer, client: grpcclient.InferenceServerClient) -> tuple[int, str, bool]:
    """Ask over both protocols."""
    status, body = server.get("/v2/models/minded/ready")
    return status, json.loads(body)["error"] if body else "", client.is_model_ready("minded")


def test_a_model_may_say_itself_whether_it_is_ready(server: ForebayServer) -> None:
    """P-012: yes, no, neither, and an exception; requests are taken in any case."""
    http_client = httpclient.InferenceServerClient(f"127.0.0.1:{server.http_port}")
    grpc_client = grpcclient.InferenceServerClient(f"127.0.0.1:{server.ports()['GRPCInferenceService']}")
    refused = "Model 'minded' is not ready"
    for mood, expected in (
        (1, (200, "", True)),
        (0, (400, f"{refused} (user-defined check failed).", False)),
        (2, (400, f"{refused}: is_ready() must return a boolean value", False)),
        (3, (400, f"{refused}: ValueError: no mood", False)),
        (1, (200, "", True)),
    ):
        assert ask_http(http_client, "minded", np.array([mood], np.int32)).as_numpy("OUT").tolist() == [mood]
        assert is_ready(server, grpc_client) == expected
    assert server.get("/v2/health/ready")[0] == 200
    http_client.close()
    grpc_client.close()
