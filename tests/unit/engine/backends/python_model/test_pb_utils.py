"""``triton_python_backend_utils`` without a worker: tensors, configuration, metrics, nested calls (spec 7)."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from forebay.engine.backends.python_model import engine_access
from forebay.engine.backends.python_model import triton_python_backend_utils as pb_utils
from forebay.engine.backends.python_model.engine_access import NestedRequest, NestedResponse, NoEngineAccess
from forebay.engine.backends.python_model.metric_family import Owner
from forebay.engine.backends.python_model.metrics import registry
from forebay.engine.backends.python_model.outer_requests import executing
from forebay.engine.backends.python_model.request import Phase
from forebay.engine.backends.python_model.response import Answering
from forebay.ipc.errors import Cancelled, InvalidArgument, NotFound, Unavailable
from forebay.ipc.tensor import DATATYPES

# --- names and constants ---


def test_every_name_of_triton_s_module_is_there() -> None:
    """P-123 and the tables of section 7."""
    assert pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START == 1
    assert pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END == 2
    assert pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL == 1
    assert (pb_utils.TRITONSERVER_REQUEST_RELEASE_ALL, pb_utils.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE) == (1, 2)
    assert (pb_utils.TRITONSERVER_MEMORY_CPU, pb_utils.TRITONSERVER_MEMORY_GPU) == (1, 0)
    for name in pb_utils.__all__:
        assert hasattr(pb_utils, name)
    error = pb_utils.TritonError("m")
    assert (error.message(), error.code()) == ("m", pb_utils.TritonError.INTERNAL)


def test_types_are_shown_as_triton_shows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """P-007 names the type of what was returned instead of a response."""
    for name in ("triton_python_backend_utils", "c_python_backend_utils"):
        monkeypatch.setitem(sys.modules, name, pb_utils)
    pb_utils.install("model/1")
    assert pb_utils.get_model_dir() == "model/1"
    assert str(pb_utils.Tensor) == "<class 'c_python_backend_utils.Tensor'>"


# --- tensors ---


@pytest.mark.parametrize("name", [name for name in DATATYPES if name not in ("BF16", "BYTES")])
def test_tensor_of_every_numpy_type(name: str) -> None:
    """P-050, P-051, P-113, P-114."""
    row = DATATYPES[name]
    array = np.zeros((2, 3), row.numpy_dtype)
    tensor = pb_utils.Tensor("x", array)
    assert (tensor.name(), tensor.shape(), tensor.triton_dtype()) == ("x", [2, 3], row.number)
    assert tensor.as_numpy() is array
    assert pb_utils.triton_string_to_numpy(f"TYPE_{name}") == row.numpy_dtype
    assert pb_utils.TRITON_STRING_TO_NUMPY[f"TYPE_{name}"] == row.numpy_dtype
    assert pb_utils.triton_to_numpy_type(row.number) is row.numpy_dtype.type
    assert pb_utils.numpy_to_triton_type(row.numpy_dtype) == row.number


def test_strings() -> None:
    """P-057, P-113, P-116."""
    for array in (np.array(["é"], object), np.array([b"x"]), np.array(["x"])):
        assert pb_utils.Tensor("x", array).triton_dtype() == 13
    assert pb_utils.triton_string_to_numpy("TYPE_STRING") is np.object_
    elements = np.array([b"a", b"", b"\0\xff"], object)
    packed = pb_utils.serialize_byte_tensor(elements)
    assert isinstance(packed, bytes)
    assert pb_utils.serialize_byte_tensor(elements[:0]) == ()
    assert pb_utils.serialize_byte_tensor(np.zeros(2)) is None
    assert pb_utils.deserialize_bytes_tensor(packed).tolist() == elements.tolist()
    with pytest.raises(pb_utils.TritonModelException, match="incomplete string"):
        pb_utils.deserialize_bytes_tensor(b"\5\0\0\0a")
    with pytest.raises(pb_utils.TritonModelException, match=r"^DLPack does not have support for string tensors\.$"):
        pb_utils.Tensor("x", elements).to_dlpack()


def test_tensor_refuses_what_it_cannot_hold() -> None:
    """P-050, P-113."""
    with pytest.raises(pb_utils.TritonModelException, match=r"^Tensor name cannot be an empty string\.$"):
        pb_utils.Tensor("", np.zeros(1))
    with pytest.raises(pb_utils.TritonModelException, match=r"^NumPy dtype is not supported\.$"):
        pb_utils.Tensor("x", np.zeros(1, complex))
    with pytest.raises(pb_utils.TritonModelException, match="needs a numpy array, got list"):
        pb_utils.Tensor("x", [1])
    with pytest.raises(KeyError, match="TYPE_BF16"):
        pb_utils.triton_string_to_numpy("TYPE_BF16")
    assert [pb_utils.triton_to_numpy_type(number) for number in (0, 14)] == [None, None]
    assert [pb_utils.numpy_to_triton_type(kind) for kind in (np.bytes_, np.complex64)] == [13, None]


def test_response_refuses_what_it_cannot_hold() -> None:
    """P-070."""
    empty: list[Any] = [None]
    with pytest.raises(
        pb_utils.TritonModelException, match=r"^Output tensor for inference response should not be empty"
    ):
        pb_utils.InferenceResponse(empty)
    error: Any = "text"
    with pytest.raises(TypeError, match="must be a TritonError"):
        pb_utils.InferenceResponse(error=error)


def test_scalars_and_slices_become_contiguous() -> None:
    assert pb_utils.Tensor("x", np.array(3.0)).shape() == []
    assert pb_utils.Tensor("x", np.arange(6)[::2]).as_numpy().flags.c_contiguous


def test_dlpack_shares_memory_both_ways() -> None:
    """P-054."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = pb_utils.Tensor("x", array)
    assert np.shares_memory(np.from_dlpack(tensor), array)
    back = pb_utils.Tensor.from_dlpack("y", tensor.to_dlpack())
    assert np.shares_memory(back.as_numpy(), array)
    assert back.shape() == [2, 3]
    with pytest.raises(pb_utils.TritonModelException, match=r"^DLPack tensor is not contiguous\. Only contiguous"):
        pb_utils.Tensor.from_dlpack("y", array.T)


@pytest.mark.torch
def test_dlpack_carries_bfloat16() -> None:
    """P-052, P-054: numpy has no such type, so it goes by DLPack."""
    torch = pytest.importorskip("torch")
    source = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    tensor = pb_utils.Tensor.from_dlpack("x", source)
    assert tensor.triton_dtype() == 14
    with pytest.raises(pb_utils.TritonModelException, match="BF16 and cannot be converted to NumPy"):
        tensor.as_numpy()
    again = torch.from_dlpack(tensor)
    assert again.dtype == torch.bfloat16
    assert again.tolist() == [1.5, -2.0]
    assert again.data_ptr() == source.data_ptr()


# --- responses ---


def test_parameters_are_checked() -> None:
    """P-041, P-070."""
    assert pb_utils.InferenceResponse(parameters={"a": 1, "b": True, "c": "x"}).parameters() == {
        "a": 1,
        "b": True,
        "c": "x",
    }
    bad: Any = {"a": 1.5}
    with pytest.raises(pb_utils.TritonModelException, match=r"^Expect parameters values to have type bool/int/str"):
        pb_utils.InferenceResponse(parameters=bad)


@pytest.mark.parametrize("parameters", [{"a": 2**63}, {"a": -(2**63) - 1}, {"a": "\udc80"}, {"\udc80": 1}])
def test_parameters_that_cannot_be_sent_are_refused(parameters: dict[str, int | str]) -> None:
    """A worker that tried would end."""
    with pytest.raises(pb_utils.TritonModelException, match=r"64 bits|cannot be sent"):
        pb_utils.InferenceResponse(parameters=parameters)


def test_output_of_a_failed_response_raises() -> None:
    """P-111."""
    good = pb_utils.InferenceResponse([pb_utils.Tensor("a", np.zeros(1))])
    assert pb_utils.get_output_tensor_by_name(good, "a") is good.output_tensors()[0]
    assert pb_utils.get_output_tensor_by_name(good, "b") is None
    with pytest.raises(pb_utils.TritonModelException, match="why"):
        pb_utils.get_output_tensor_by_name(pb_utils.InferenceResponse(error=pb_utils.TritonError("why")), "a")


# --- configuration ---


def test_model_config_texts() -> None:
    """P-121, P-122."""
    config = pb_utils.ModelConfig(
        {"name": "m", "max_batch_size": 4, "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [2]}]}
    )
    decided = pb_utils.ModelConfig({"name": "m", "model_transaction_policy": {"decoupled": False}})
    cases: list[tuple[Callable[[], None], str]] = [
        (
            lambda: config.set_max_batch_size(2),
            "configuration specified max_batch_size 4, but in auto-complete-config function for model 'm' specified "
            "max_batch_size 2",
        ),
        (
            lambda: config.add_input({"name": "x", "data_type": "TYPE_FP32", "dims": [2], "format": 1}),
            "input 'x' in auto-complete-config function for model 'm' contains property other than 'name', "
            "'data_type', 'dims' and 'optional'.",
        ),
        (
            lambda: config.add_output({"data_type": "TYPE_FP32", "dims": [2]}),
            "output in auto-complete-config function for model 'm' is missing 'name' property.",
        ),
        (
            lambda: config.add_input({"name": "x", "data_type": "TYPE_INT8", "dims": [2]}),
            "unable to load model 'm', configuration expects datatype TYPE_FP32 for input 'x', model provides "
            "TYPE_INT8",
        ),
        (
            lambda: config.add_input({"name": "x", "data_type": "TYPE_FP32", "dims": [3]}),
            "model 'm', tensor 'x': the model expects dims [3] but the model configuration specifies dims [2]",
        ),
        (
            lambda: config.set_model_transaction_policy({"decoupled": True, "other": 1}),
            "model transaction property in auto-complete-config function for model 'm' contains property other than "
            "'decoupled'.",
        ),
        (
            lambda: decided.set_model_transaction_policy({"decoupled": True}),
            "trying to change decoupled property in auto-complete-config for model 'm', which is already set to "
            "'False'.",
        ),
        (
            lambda: pb_utils.ModelConfig({"name": "m", "sequence_batching": {}}).set_dynamic_batching(),
            "Configuration specified scheduling_choice as 'sequence_batching', but auto-complete-config function for "
            "model 'm' tries to set scheduling_choice as 'dynamic_batching'",
        ),
    ]
    for act, text in cases:
        with pytest.raises(ValueError, match=r".") as caught:
            act()
        assert str(caught.value) == text
    config.set_model_transaction_policy({"decoupled": True})
    assert pb_utils.using_decoupled_model_transaction_policy(config.as_dict())
    assert pb_utils.get_input_config_by_name(config.as_dict(), "x") == config.as_dict()["input"][0]
    assert pb_utils.get_output_config_by_name(config.as_dict(), "x") is None


# --- metrics ---


def test_metrics_are_shared_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """P-119, P-120."""
    family = pb_utils.MetricFamily("t_total", "d", pb_utils.MetricFamily.COUNTER)
    metric = family.Metric(labels={"a": "b"})
    metric.increment(2)
    same = pb_utils.MetricFamily("t_total", "d", pb_utils.MetricFamily.COUNTER).Metric(labels={"a": "b"})
    assert same._stored is metric._stored  # pyright: ignore[reportPrivateUsage]
    refusal = (
        r"^Failed to increment metric value: Failed to process the request for model 'm_0', message: "
        r"TRITONSERVER_METRIC_KIND_COUNTER can only be incremented monotonically by non-negative values\.$"
    )
    monkeypatch.setattr(Owner, "name", "m_0")
    with pytest.raises(pb_utils.TritonModelException, match=refusal):
        metric.increment(-1)
    with pytest.raises(pb_utils.TritonModelException):
        metric.set(1)
    with pytest.raises(pb_utils.TritonModelException):
        pb_utils.MetricFamily("t_total", "d", pb_utils.MetricFamily.GAUGE)
    wrong: Any = "x"
    with pytest.raises(pb_utils.TritonModelException, match=r"^Failed to create metric\. Labels must be a dictionary"):
        family.Metric(labels=wrong)
    with pytest.raises(pb_utils.TritonModelException, match=r"^Failed to create metric\. Unexpected buckets found"):
        family.Metric(buckets=[1])
    histogram = pb_utils.MetricFamily("t_seconds", "d", pb_utils.MetricFamily.HISTOGRAM)
    with pytest.raises(pb_utils.TritonModelException, match=r"^Failed to create metric\. Missing required buckets"):
        histogram.Metric()
    observed = histogram.Metric(buckets=[1, 2])
    for value in (0.5, 1, 1.5, 7):
        observed.observe(value)
    [sample] = [sample for sample in registry.samples() if sample.name == "t_seconds"]
    assert sample.metrics[0].buckets == ((1, 2), (2, 3), (float("inf"), 4))
    assert sample.metrics[0].value == 10
    del histogram
    with pytest.raises(pb_utils.TritonModelException, match="'MetricFamily' has been deleted"):
        observed.observe(1)


# --- nested calls ---


class FakeCall:
    """A nested call whose responses a thread hands in."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._responses: list[NestedResponse] = []
        self._on_news: Callable[[], None] | None = None
        self.cancelled = threading.Event()
        self.cancel = self.cancelled.set
        self.is_over = False

    def abandon(self) -> None:
        self.is_over = True
        self.put(NestedResponse((), {}, Cancelled("request was cancelled"), True, True))

    def put(self, response: NestedResponse) -> None:
        with self._lock:
            self._responses.append(response)
            self._lock.notify_all()
            on_news, self._on_news = self._on_news, None
        if on_news is not None:
            on_news()

    def take(self) -> list[NestedResponse]:
        with self._lock:
            found, self._responses = self._responses, []
            return found

    def wait(self) -> None:
        with self._lock:
            self._lock.wait_for(lambda: self._responses)

    def notify(self, on_news: Callable[[], None]) -> None:
        with self._lock:
            if not self._responses:
                self._on_news = on_news
                return
        on_news()


class FakeEngine(NoEngineAccess):
    """Models: echo, failing, stream (three responses from a thread), slow (until cancelled)."""

    def __init__(self) -> None:
        self.requests: list[NestedRequest] = []
        self.calls: list[FakeCall] = []
        self.loaded: dict[str, Any] = {}

    def infer(self, request: NestedRequest) -> FakeCall:
        self.requests.append(request)
        if request.model == "nope":
            raise NotFound("Failed for execute the inference request. Model 'nope' is not ready.")
        call = FakeCall()
        self.calls.append(call)
        if request.model != "slow":
            threading.Thread(target=self._answer, args=(request, call.put)).start()
        return call

    def _answer(self, request: NestedRequest, put: Callable[[NestedResponse], None]) -> None:
        if request.model == "failing":
            put(NestedResponse((), {}, Unavailable("busy"), True, True))
        elif request.model == "stream":
            for index in range(3):
                tensor = pb_utils.Tensor("OUT", np.array([index]))
                put(NestedResponse((tensor,), {}, None, True, False))
            put(NestedResponse((), {}, None, False, True))
        else:
            put(NestedResponse(request.inputs, {"p": 1.5}, None, True, True))

    def load_model(self, name: str, config: str, files: Mapping[str, bytes]) -> None:
        if name == "bad":
            raise InvalidArgument("no")
        self.loaded[name] = (config, dict(files))

    def is_model_ready(self, name: str, version: str) -> bool:
        return name in self.loaded


@pytest.fixture
def fake_engine() -> Iterator[FakeEngine]:
    engine = FakeEngine()
    engine_access.install(engine)
    Phase.is_serving = True
    yield engine
    Phase.is_serving = False
    engine_access.install(NoEngineAccess())


def nested(model: str) -> pb_utils.InferenceRequest:
    return pb_utils.InferenceRequest(
        model_name=model,
        requested_output_names=["OUT"],
        inputs=[pb_utils.Tensor("IN", np.ones(2, np.float32))],
        parameters={"k": "v"},
        flags=pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START,
        correlation_id=7,
    )


def test_exec_returns_the_response(fake_engine: FakeEngine) -> None:
    """P-090, P-096."""
    response = nested("echo").exec()
    assert isinstance(response, pb_utils.InferenceResponse)
    assert response.output_tensors()[0].as_numpy().tolist() == [1, 1]
    assert response.parameters() == {"p": 1.5}
    [request] = fake_engine.requests
    assert (request.correlation_id, request.flags, request.parameters) == (7, 1, {"k": "v"})
    assert not request.allows_many_responses


def test_exec_puts_errors_into_the_response(fake_engine: FakeEngine) -> None:
    """P-093: refused requests are INTERNAL with Triton's prefix; answers keep their code (L-026)."""
    refused = nested("nope").exec()
    assert isinstance(refused, pb_utils.InferenceResponse)
    error = refused.error()
    assert error is not None
    assert (error.code(), error.message()) == (
        pb_utils.TritonError.INTERNAL,
        "Model nope - Error when running inference: Failed for execute the inference request. Model 'nope' is not "
        "ready.",
    )
    failed = nested("failing").exec()
    assert isinstance(failed, pb_utils.InferenceResponse)
    error = failed.error()
    assert error is not None
    assert (error.code(), error.message()) == (pb_utils.TritonError.UNAVAILABLE, "busy")


def test_decoupled_exec_iterates_and_cancels(fake_engine: FakeEngine) -> None:
    """P-092."""
    responses = nested("stream").exec(decoupled=True)
    assert isinstance(responses, pb_utils.ResponseIterator)
    assert [response.output_tensors()[0].as_numpy().tolist() for response in responses] == [[0], [1], [2]]
    assert list(responses) == []
    slow = nested("slow").exec(decoupled=True)
    assert isinstance(slow, pb_utils.ResponseIterator)
    slow.cancel()
    assert fake_engine.calls[-1].cancelled.is_set()


def test_calls_end_with_the_request_that_they_are_made_for(fake_engine: FakeEngine) -> None:
    """L-026: those of the execution's own context, its tasks among them; not those of other threads."""
    elsewhere: list[Any] = []

    def call_elsewhere() -> None:
        elsewhere.append(nested("slow").exec(decoupled=True))

    async def in_tasks() -> list[Any]:
        return await asyncio.gather(nested("slow").async_exec(), asyncio.to_thread(nested("slow").exec))

    outer: Any = type("Outer", (), {"is_cancelled": True, "is_final": False})
    outside = executing.set([outer])
    try:
        thread = threading.Thread(target=call_elsewhere)
        thread.start()
        thread.join()
        answers: list[Any] = [nested("slow").exec(), *nested("slow").exec(decoupled=True), *asyncio.run(in_tasks())]
    finally:
        executing.reset(outside)
    assert [answer.error().message() for answer in answers] == ["request was cancelled"] * 4
    assert {answer.error().code() for answer in answers} == {pb_utils.TritonError.CANCELLED}
    assert [call.is_over for call in fake_engine.calls] == [False, True, True, True, True]


def test_async_exec_waits_without_blocking(fake_engine: FakeEngine) -> None:
    """P-091, L-027; a cancelled task cancels the request (L-026)."""

    async def scenario() -> None:
        answers = await asyncio.gather(*(nested("echo").async_exec() for _ in range(3)))
        assert all(isinstance(answer, pb_utils.InferenceResponse) for answer in answers)
        values = [r.output_tensors()[0].as_numpy()[0] async for r in nested("stream").async_stream_exec()]
        assert values == [0, 1, 2]
        task = asyncio.ensure_future(nested("slow").async_exec())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert fake_engine.calls[-1].cancelled.is_set()

    asyncio.run(scenario())


def test_nested_calls_outside_serving_are_refused() -> None:
    """P-094."""
    with pytest.raises(pb_utils.TritonModelException, match=r"^BLS is only supported during the 'execute' function\.$"):
        nested("echo").exec()


def test_constructor_checks() -> None:
    """P-042."""
    where = "request with id 'r' and model name 'm' should not be empty"
    nothing: Any = [None]
    with pytest.raises(pb_utils.TritonModelException, match=rf"^Input tensor for {where}\.$"):
        pb_utils.InferenceRequest(request_id="r", model_name="m", inputs=nothing)
    with pytest.raises(pb_utils.TritonModelException, match=rf"^Requested output name for {where}\.$"):
        pb_utils.InferenceRequest(request_id="r", model_name="m", requested_output_names=[""])
    wrong: Any = 1.5
    with pytest.raises(pb_utils.TritonModelException, match=r"^Correlation ID must be integer or string$"):
        pb_utils.InferenceRequest(correlation_id=wrong)


def test_models_can_be_loaded_by_models(fake_engine: FakeEngine) -> None:
    """P-098."""
    pb_utils.load_model("m", config="{}", files={"file:1/model.onnx": b"x"})
    assert fake_engine.loaded == {"m": ("{}", {"1/model.onnx": b"x"})}
    assert pb_utils.is_model_ready("m")
    with pytest.raises(pb_utils.TritonModelException, match=r"^Failed to load model: no$"):
        pb_utils.load_model("bad")
    with pytest.raises(pb_utils.TritonModelException, match=r"^Failed to unload model: "):
        pb_utils.unload_model("m")


# --- senders ---


class _Source:
    """What a worker has of a request."""

    is_final = False

    def finish(self) -> None:
        self.is_final = True


def test_sender_says_first_what_a_model_that_is_not_decoupled_may_not() -> None:
    """P-075, in Triton's order: after the last response, a further one is one too many."""
    source: Any = _Source()
    sent: list[Any] = []
    sender = pb_utils.InferenceResponseSender(Answering(source, lambda *what: sent.append(what), decoupled=False))
    wrong: Any = "text"
    with pytest.raises(TypeError, match="only an InferenceResponse"):
        sender.send(wrong)
    with pytest.raises(pb_utils.TritonModelException, match="cannot send complete final before sending a response"):
        sender.send(flags=1)
    response = pb_utils.InferenceResponse([])
    sender.send(response, flags=1)
    with pytest.raises(pb_utils.TritonModelException, match="cannot send more than one response"):
        sender.send(response)
    with pytest.raises(pb_utils.TritonModelException, match="has been closed"):
        sender.send(flags=1)
    assert len(sent) == 1
    source.finish()


def test_levels_of_the_log_have_triton_s_numbers() -> None:
    """P-118, P-123."""
    log = pb_utils.Logger
    assert (log.INFO, log.WARNING, log.ERROR, log.VERBOSE) == (0, 1, 2, 3)
