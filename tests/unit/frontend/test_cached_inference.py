"""Equal requests at the same time, of which one runs."""

from __future__ import annotations

from fake_engine import FakeEngine, FakeRoute, spec, words

from forebay.frontend.cached_inference import CachedInference
from forebay.frontend.data_plane.route_client import RouteClient
from forebay.frontend.inference import InputTensor, OnResponse, OutputView, RequestMeta, Response
from forebay.frontend.response_cache import ResponseCache
from forebay.ipc.counters import CACHE_WORDS
from forebay.ipc.errors import Unavailable

OUTPUT = Response(outputs=(OutputView("Y", "UINT8", (1,), b"y"),))


class Inner:
    """What runs on a miss; the test answers it."""

    rows = 1

    def __init__(self, route: FakeRoute) -> None:
        self.route: RouteClient = route.client
        self.places = [memoryview(bytearray(4))]
        self.respond: OnResponse | None = None
        self.is_cancelled = False

    def submit(self, meta: RequestMeta, on_response: OnResponse) -> None:
        assert not self.is_cancelled
        self.respond = on_response

    def cancel(self) -> None:
        self.is_cancelled = True


class Requests:
    """Equal requests to one model."""

    def __init__(self, count: int) -> None:
        engine = FakeEngine()
        route = engine.add("m", (spec("X"),), (spec("Y"),))
        cache = ResponseCache(engine.client, 1 << 12, words(CACHE_WORDS))
        self.inner = [Inner(route) for _ in range(count)]
        self.all = [CachedInference(cache, inner, [InputTensor("X", "FP32", (1,), 4)]) for inner in self.inner]

    @property
    def running(self) -> list[int]:
        return [number for number, inner in enumerate(self.inner) if inner.respond is not None]

    def respond(self, number: int, response: Response) -> None:
        respond, self.inner[number].respond = self.inner[number].respond, None
        assert respond is not None
        respond(response)


def test_one_of_equal_requests_runs_and_all_have_its_answer() -> None:
    """S-176."""
    requests = Requests(3)
    answers: list[bytes] = []
    for request in requests.all:
        request.submit(RequestMeta(), lambda response: answers.append(bytes(response.outputs[0].data)))
    assert requests.running == [0]
    requests.respond(0, OUTPUT)
    assert answers == [b"y"] * 3
    assert [inner.is_cancelled for inner in requests.inner] == [False, True, True]


def test_request_that_leaves_has_the_next_one_run() -> None:
    requests = Requests(3)
    for request in requests.all:
        request.submit(RequestMeta(), lambda _response: None)
    requests.all[1].cancel()
    requests.all[0].cancel()
    assert requests.running == [0, 2]


def test_request_that_an_answer_to_another_cancels_is_over() -> None:
    """As when both came on one connection, which the first answer closes."""
    requests = Requests(3)
    answered: list[int] = []

    def take_and_leave(_response: Response) -> None:
        answered.append(1)
        requests.all[2].cancel()

    requests.all[0].submit(RequestMeta(), lambda _response: answered.append(0))
    requests.all[1].submit(RequestMeta(), take_and_leave)
    requests.all[2].submit(RequestMeta(), lambda _response: answered.append(2))
    requests.respond(0, OUTPUT)
    assert answered == [0, 1]


def test_request_that_the_failure_of_another_cancels_does_not_run() -> None:
    requests = Requests(3)

    def refused(_meta: RequestMeta, on_response: OnResponse) -> None:
        on_response(Response(error=Unavailable("no"), ran=False))

    requests.all[0].submit(RequestMeta(), lambda _response: None)
    requests.all[1].submit(RequestMeta(), lambda _response: requests.all[2].cancel())
    requests.all[2].submit(RequestMeta(), lambda _response: None)
    requests.inner[1].submit = refused  # type: ignore[method-assign]
    requests.respond(0, Response(error=Unavailable("no")))
    assert requests.running == []
