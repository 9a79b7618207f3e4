"""Triton's Python backend: an unchanged ``model.py``, run in the worker itself (spec section 7).

Inputs are views of the request's shared memory, outputs are written into the block that the client reads. A model that
crashes takes its own worker with it and nothing else. ``model.py`` is code: load only what you trust.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
import sys
import threading
from collections.abc import Coroutine, Sequence
from typing import Any

import msgspec

from forebay.engine.backends.base import Backend, DescribedModel, RowsInstance, parse_bool, parse_int
from forebay.engine.backends.python_model import environment, triton_python_backend_utils
from forebay.engine.backends.python_model.engine_access import install
from forebay.engine.backends.python_model.errors import exception_text, shown_path
from forebay.engine.backends.python_model.gpus import gpus
from forebay.engine.backends.python_model.late_answers import may_answer_late
from forebay.engine.backends.python_model.metric_family import Owner
from forebay.engine.backends.python_model.model_config import ModelConfig
from forebay.engine.backends.python_model.outer_requests import executing
from forebay.engine.backends.python_model.outputs import ModelOutputs
from forebay.engine.backends.python_model.request import InferenceRequest, Phase, Recipient
from forebay.engine.backends.python_model.response import InferenceResponse, start_answering_dropped
from forebay.engine.backends.python_model.shm_access import ShmEngineAccess
from forebay.engine.devices.base import Device
from forebay.engine.worker.parcel_request import ParcelRequest
from forebay.engine.worker.request_rows import RowRequest
from forebay.ipc.client_wire import RUNTIME_DIRECTORY_VARIABLE
from forebay.ipc.errors import BackendFailed, Code, Internal, InvalidArgument, NotFound, ServingError
from forebay.ipc.log import log
from forebay.ipc.worker_messages import InstanceSpec

#: Executions of ``async def execute`` that may be under way at once, unless the model parameter says otherwise.
ASYNC_EXECUTIONS_MAX = 64


def import_model(spec: InstanceSpec) -> Any:
    """Import the model's file as ``<version>.<stem>`` and return its ``TritonPythonModel`` class (spec P-001, P-002).

    Raises:
        InvalidArgument, NotFound: the file's name is wrong or it is not there.
        Internal: importing it raised; the text is Triton's.
    """
    name, directories = _module_of(spec)
    environment.activate(spec)
    triton_python_backend_utils.install(spec.version_path)
    sys.path += [directory for directory in directories if directory not in sys.path]
    print_whole_lines()
    try:
        module = importlib.import_module(name)
        return module.TritonPythonModel
    except BaseException as error:  # the model's own code, which may even want to exit
        raise model_failure(error, spec) from None


def print_whole_lines() -> None:
    """Have lines of a model appear when they are printed, also in a pipe, and in one piece, also beside other workers'.

    With PYTHONUNBUFFERED, ``print`` writes a line and its end apart.
    """
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(line_buffering=True, write_through=False)


def _module_of(spec: InstanceSpec) -> tuple[str, tuple[str, ...]]:
    """Return the module that has the model's class, and where it and what it imports are found.

    Raises:
        InvalidArgument, NotFound: the file's name is wrong or it is not there.
    """
    backend_file: str = spec.extra.get("backend_file", "")
    own_directories = (spec.version_path, os.path.dirname(spec.version_path))
    if backend_file:
        # A Python based backend: its own modules come first (spec P-134).
        return "model", (os.path.dirname(backend_file), *own_directories)
    file_name = spec.model_file or "model.py"
    if not file_name.endswith(".py"):
        raise InvalidArgument(f"Model name must end with '.py'. Model name is \"{file_name}\".")
    if not os.path.isfile(os.path.join(spec.version_path, file_name)):
        raise NotFound(f"unable to find '{spec.version}/{file_name}' for model instance '{spec.instance_name}'")
    return f"{os.path.basename(spec.version_path)}.{file_name.removesuffix('.py')}", own_directories


def _own_folders(spec: InstanceSpec) -> list[str]:
    """Return where the model's own code is."""
    backend_file: str = spec.extra.get("backend_file", "")
    return [spec.model_path, os.path.dirname(backend_file)] if backend_file else [spec.model_path]


def model_failure(error: BaseException, spec: InstanceSpec) -> Internal:
    """Return a model's exception as what the index shows (spec P-005)."""
    return Internal(exception_text(error, spec.model_path))


def initialize_arguments(spec: InstanceSpec) -> dict[str, str]:
    """Return what ``initialize`` gets: all values are strings (spec P-003, appendix G)."""
    config = msgspec.json.decode(spec.config_json or b"{}", type=dict[str, Any])
    if not config.get("default_model_filename"):
        config["default_model_filename"] = "model.py"
    return {
        "model_config": msgspec.json.encode(config).decode(),
        "model_instance_kind": spec.kind,
        "model_instance_name": spec.instance_name,
        "model_instance_device_id": str(spec.device_id),
        "model_repository": spec.model_path,
        "model_version": str(spec.version),
        "model_name": spec.model,
    }


def _takes_gpu_tensors(spec: InstanceSpec) -> bool:
    """Return whether inputs on the instance's GPU stay there (spec P-056).

    Raises:
        InvalidArgument: the parameter is neither yes nor no.
    """
    forced = spec.parameters.get("FORCE_CPU_ONLY_INPUT_TENSORS", "yes").lower()
    if forced not in ("yes", "no", "true", "false", "1", "0", "on", "off"):
        raise InvalidArgument(f"Incorrect value for FORCE_CPU_ONLY_INPUT_TENSORS: {forced}'")
    return spec.kind == "GPU" and forced in ("no", "false", "0", "off")


#: Parameter of a model's configuration: whether its outputs are held against it (spec L-022).
_CHECK_OUTPUTS = "FOREBAY_CHECK_OUTPUTS"


class StreamFailed(BackendFailed):
    """A decoupled model raised: it has another code than with other models in Triton 2.51."""

    code = Code.UNKNOWN


class PythonInstance(RowsInstance):
    """One ``TritonPythonModel``."""

    def __init__(self, spec: InstanceSpec, model: Any) -> None:
        self._spec = spec
        self._model = model
        answers_late = may_answer_late(model, *_own_folders(spec))
        # Rows of a slab have room for what is configured and for nothing else, so that is checked in parcels too.
        checks_outputs = parse_bool(spec.parameters, _CHECK_OUTPUTS, spec.rows_mode and not answers_late)
        self.wants_parcels = answers_late or not checks_outputs
        #: Where tensors of requests may lie (spec P-056); None: on the host only. Of decoupled models they are there,
        #: because each response would want a place of its own.
        self._gpu = gpus.find(spec.device_id) if _takes_gpu_tensors(spec) and not spec.decoupled else None
        self.takes_device_tensors = self._gpu is not None
        self._outputs = ModelOutputs(spec, are_checked=checks_outputs, gpu=self._gpu)
        self._recipient = Recipient(spec, self._deliver, self._gpu)
        if hasattr(model, "is_ready"):
            self.ready_check = self._is_ready
        self._is_iterative = bool(spec.extra.get("sequence", {}).get("iterative_sequence", False))
        self._event_loop: asyncio.AbstractEventLoop | None = None
        start_answering_dropped()
        slots = parse_int(spec.parameters, "FOREBAY_ASYNC_EXECUTIONS_MAX", ASYNC_EXECUTIONS_MAX)
        self._async_slots = threading.BoundedSemaphore(max(slots, 1))

    # --- GPUs ---

    @property
    def device(self) -> Device | None:
        return None if self._gpu is None else self._gpu.device

    def count_copies(self, counters: memoryview) -> None:
        # Those of models, too, that have GPUs of their own and tensors of requests on the host.
        gpus.count(counters)

    # --- executing ---

    def execute(self, requests: Sequence[ParcelRequest]) -> None:
        incoming: list[InferenceRequest] = []
        for parcel in requests:
            try:
                incoming.append(InferenceRequest.of_parcel(self._recipient, parcel))
            except ServingError as error:
                parcel.fail(error)
        self._execute(incoming, [request.source for request in incoming])

    def execute_rows(self, requests: Sequence[RowRequest]) -> None:
        recipient = self._recipient
        self._execute([InferenceRequest.of_row(recipient, request) for request in requests], requests)

    def _execute(self, incoming: list[InferenceRequest], sources: Sequence[ParcelRequest | RowRequest]) -> None:
        spec = self._spec
        execute = getattr(self._model, "execute", None)
        if execute is None:
            path = shown_path(os.path.join(spec.version_path, spec.model_file or "model.py"), spec.model_path)
            raise self._failure(f"Python model {path} does not implement `execute` method.")
        while incoming:
            outside = executing.set(sources)
            try:
                result = execute(incoming)
            except BaseException as error:  # the model's own code, which may even want to exit
                raise self._raised(error) from None
            finally:
                executing.reset(outside)
            if not isinstance(result, list) and inspect.iscoroutine(result):
                self._start(result, incoming)
                return
            incoming = self._answer(incoming, result)
            sources = [request.source for request in incoming]

    def _raised(self, error: BaseException) -> BackendFailed:
        failure = self._failure(exception_text(error, self._spec.model_path))
        log.error(failure.text)
        return failure

    def _failure(self, text: str) -> BackendFailed:
        kind = StreamFailed if self._spec.decoupled else BackendFailed
        return kind(f"Failed to process the request(s) for model '{self._spec.instance_name}', message: {text}")

    def _answer(self, requests: list[InferenceRequest], result: Any) -> list[InferenceRequest]:
        """Send what ``execute`` returned; returns the requests that want to come again.

        Raises:
            BackendFailed: it returned something else than it must (spec P-007, P-078).
        """
        if self._spec.decoupled:
            if result is not None:
                raise self._failure(
                    f"Python model '{self._spec.instance_name}' is using the decoupled mode and the execute function "
                    "must return None."
                )
            return self._hand_back([request for request in requests if self._comes_again(request)])
        if not isinstance(result, list):
            raise self._failure(f"Expected a list in the execute return, found type '{type(result)}'.")
        responses: list[Any] = [*result]
        if len(responses) != len(requests):
            raise self._failure(
                "Number of InferenceResponse objects do not match the number of InferenceRequest objects. "
                f"InferenceRequest(s) size is:{len(requests)}, and InferenceResponse(s) size is:{len(responses)}\n"
            )
        for request, response in zip(requests, responses, strict=True):
            if not isinstance(response, InferenceResponse):
                self._check_absence(request, response)
        again: list[InferenceRequest] = []
        for request, response in zip(requests, responses, strict=True):
            if request.is_rescheduled and self._comes_again(request):
                again.append(request)
            elif response is not None and not request.is_closed:
                self._deliver(request.source, response, True)
        return self._hand_back(again) if again else again

    def _hand_back(self, again: list[InferenceRequest]) -> list[InferenceRequest]:
        """Let the scheduler bring these again, together with others (spec S-060); returns those that it cannot."""
        if not self._is_iterative:
            return again
        for request in again:
            request.hand_back()
        return []

    def _check_absence(self, request: InferenceRequest, response: Any) -> None:
        """Check what stands where a response could be: None is right for requests that are answered otherwise."""
        if request.is_rescheduled:
            if response is not None:
                raise self._failure(
                    "Expected a None object in the execute function return list for reschduled request, found type "
                    f"'{type(response)}'."
                )
        elif response is not None or not request.is_sender_taken:
            raise self._failure(
                "Expected an 'InferenceResponse' object in the execute function return list, found type "
                f"'{type(response)}'."
            )

    def _comes_again(self, request: InferenceRequest) -> bool:
        if not request.is_rescheduled or request.is_closed:
            return False
        request.set_release_flags(triton_python_backend_utils.TRITONSERVER_REQUEST_RELEASE_ALL)
        return True

    # --- async def execute (spec P-013) ---

    def _start(self, coroutine: Coroutine[Any, Any, Any], requests: list[InferenceRequest]) -> None:
        if self._event_loop is None:
            self._event_loop = asyncio.new_event_loop()
            threading.Thread(target=self._event_loop.run_forever, name="model", daemon=True).start()
        # Bounds what is under way: the next batch is taken when one of these has ended.
        self._async_slots.acquire()
        asyncio.run_coroutine_threadsafe(self._await(coroutine, requests), self._event_loop)

    async def _await(self, coroutine: Coroutine[Any, Any, Any], requests: list[InferenceRequest]) -> None:
        # A task has a context of its own.
        executing.set([request.source for request in requests])
        try:
            while requests:
                try:
                    result = await coroutine
                except (Exception, SystemExit, KeyboardInterrupt) as error:  # the model's own code
                    raise self._raised(error) from None
                requests = self._answer(requests, result)
                if requests:
                    coroutine = self._model.execute(requests)
        except ServingError as error:
            for request in requests:
                request.source.fail(error)
        except BaseException as error:
            for request in requests:
                request.source.fail(self._failure(f"{type(error).__name__}: {error}"))
            raise
        finally:
            self._async_slots.release()

    # --- readiness (spec P-012) ---

    def _is_ready(self) -> bool:
        """Ask the model.

        Raises:
            BackendFailed: it answered something else than yes or no.
        """
        result = self._model.is_ready()
        if inspect.iscoroutine(result):
            loop = self._event_loop
            if loop is None:
                result = asyncio.run(result)
            else:
                result = asyncio.run_coroutine_threadsafe(result, loop).result()
        if not isinstance(result, bool):
            raise BackendFailed("is_ready() must return a boolean value")
        return result

    # --- answering ---

    def _deliver(self, source: ParcelRequest | RowRequest, response: InferenceResponse, final: bool) -> None:
        """Send one response of the model."""
        error = response.error()
        if error is not None:
            source.fail(error.to_serving_error(), final=final, by_model=True)
            return
        if isinstance(source, RowRequest):
            self._deliver_row(source, response)
        else:
            self._deliver_parcel(source, response, final)

    def _deliver_row(self, source: RowRequest, response: InferenceResponse) -> None:
        try:
            arrays = self._outputs.arrays(source, response)
        except ServingError as failed:
            source.fail(failed, by_model=True)
            return
        source.complete(arrays, response.parameters())

    def _deliver_parcel(self, source: ParcelRequest, response: InferenceResponse, final: bool) -> None:
        try:
            tensors = self._outputs.raw(source, response)
        except ServingError as failed:
            source.fail(failed, final=final, by_model=True)
            return
        source.reply_raw(tensors, response.parameters(), final=final)

    def close(self) -> None:
        Phase.is_serving = False
        finalize = getattr(self._model, "finalize", None)
        if finalize is not None:
            try:
                finalize()
            except Exception as error:  # the model's own code
                log.error(
                    f"finalize of model '{self._spec.model}' raised " + exception_text(error, self._spec.model_path)
                )


class PythonBackend(Backend):
    """``backend: "python"``."""

    def describe(self, spec: InstanceSpec) -> DescribedModel:
        model_class = import_model(spec)
        complete = getattr(model_class, "auto_complete_config", None)
        if complete is None:
            return DescribedModel((), ())
        try:
            result = complete(ModelConfig(spec.config_json or b"{}"))
        except Exception as error:  # the model's own code
            raise model_failure(error, spec) from None
        if not isinstance(result, ModelConfig):
            raise Internal(
                f"auto_complete_config function in model '{spec.model}' must return a valid pb.ModelConfig object."
            )
        return DescribedModel((), (), result.as_dict())

    def load(self, spec: InstanceSpec) -> PythonInstance:
        # A wrong value is an error before any code of the model runs.
        _takes_gpu_tensors(spec)
        model_class = import_model(spec)
        Owner.name = spec.instance_name
        install(ShmEngineAccess(os.environ.get(RUNTIME_DIRECTORY_VARIABLE, "")))
        try:
            model = model_class()
            if hasattr(model, "initialize"):
                model.initialize(initialize_arguments(spec))
        except BaseException as error:  # the model's own code, which may even want to exit
            raise model_failure(error, spec) from None
        instance = PythonInstance(spec, model)
        Phase.is_serving = True
        return instance


BACKEND = PythonBackend
