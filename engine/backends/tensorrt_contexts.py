"""The execution contexts of one TensorRT instance, all on one stream and with one scratch memory.

There is one for each optimisation profile, and with CUDA graphs one more for each set of shapes: a graph holds the
state of the context that it was captured from, and what is changed there later changes what it does. TensorRT-RTX,
which makes its graphs itself, would make them anew whenever the shapes of a context change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from forebay.engine.backends.tensorrt_engines import LoadedEngine
from forebay.engine.backends.tensorrt_profiles import Numbers, Profile
from forebay.engine.devices.base import Device, DeviceError, Graph, Memory, Stream
from forebay.ipc.errors import BackendFailed, InvalidArgument
from forebay.ipc.log import log
from forebay.ipc.worker_messages import InstanceSpec

#: Contexts with graphs for each profile: each takes memory of its own besides the scratch memory.
GRAPHS_MAX = 64


class BoundContext:
    """An execution context."""

    def __init__(self, context: Any, *, keeps_shapes: bool = False, captures: bool = False) -> None:
        """Tell it nothing yet.

        Args:
            keeps_shapes: it always runs with the same shapes and addresses.
            captures: its first run is followed by the capture of a graph.
        """
        self.context: Any = context
        self.keeps_shapes = keeps_shapes
        self.captures = captures
        #: Shapes and addresses are those of the next run.
        self.is_told = False
        self.graph: Graph | None = None

    def close(self) -> None:
        graph, self.graph = self.graph, None
        if graph is not None:
            graph.close()
        self.context = None


class _ProfileContexts:
    """Those of one profile."""

    def __init__(self, number: int, profile: Profile, common: BoundContext) -> None:
        self.number = number
        self.profile = profile
        self.common = common
        self.by_shapes: dict[tuple[object, ...], BoundContext] = {}


class Contexts:
    """All contexts of an instance. Runs are enqueued on the stream; their end is for the caller to wait for."""

    def __init__(
        self,
        spec: InstanceSpec,
        owner: LoadedEngine,
        device: Device,
        stream: Stream,
        inputs: Sequence[str],
        numbers: Sequence[int],
        *,
        uses_graphs: bool,
    ) -> None:
        """Make a context for each profile.

        Args:
            numbers: of the profiles that may be used.
            uses_graphs: all shapes are fixed, and nothing is read or written in host memory.
        """
        self._model = spec.model
        self._instance_name = spec.instance_name
        self._owner = owner
        self._stream = stream
        self._uses_graphs = uses_graphs
        #: Generation of the buffers that graphs use.
        self._generation = 0
        # Contexts that never run at the same time can share it; its size is that of the largest profile, used or not.
        self._scratch: Memory = device.allocate(int(owner.engine.device_memory_size_v2))
        self._profiles = [
            _ProfileContexts(number, Profile(owner.engine, number, inputs), BoundContext(self._make_context(number)))
            for number in numbers
        ]
        stream.synchronize()

    def _make_context(self, number: int) -> Any:
        try:
            context = self._owner.make_context()
        except InvalidArgument as error:
            raise InvalidArgument(f"unable to load model '{self._model}': {error.text}") from None
        context.set_device_memory(self._scratch.address, self._scratch.byte_size)
        if number != 0 and not context.set_optimization_profile_async(number, self._stream.handle):
            raise InvalidArgument(f"model '{self._model}': cannot use profile {number}")
        return context

    def choose(self, shapes: Mapping[str, Numbers], values: Mapping[str, Numbers], generation: int) -> BoundContext:
        """Return the context that suits inputs best.

        Args:
            values: of shape tensors.
            generation: counts how often buffers have moved.

        Raises:
            InvalidArgument: no profile takes them.
        """
        found = self._nearest(shapes, values)
        if not self._uses_graphs:
            return found.common
        self.note_generation(generation)
        key = (*shapes.items(),)
        bound = found.by_shapes.get(key)
        if bound is None:
            if len(found.by_shapes) >= GRAPHS_MAX:
                return found.common
            bound = found.by_shapes[key] = self._make_for_graph(found)
        return bound

    def _nearest(self, shapes: Mapping[str, Numbers], values: Mapping[str, Numbers]) -> _ProfileContexts:
        nearest, least = None, 0
        for one in self._profiles:
            distance = one.profile.distance(shapes, values)
            if distance is not None and (nearest is None or distance < least):
                nearest, least = one, distance
        if nearest is None:
            problem = self._profiles[0].profile.problem(self._instance_name, shapes, values)
            others = ", ".join(str(one.number) for one in self._profiles[1:])
            raise InvalidArgument(problem + (f"; nor do the optimization profiles {others} take it" if others else ""))
        return nearest

    def _make_for_graph(self, found: _ProfileContexts) -> BoundContext:
        try:
            context = self._make_context(found.number)
        except InvalidArgument as error:
            log.warning(f"model '{self._model}' runs without CUDA graphs for some shapes: {error}")
            return found.common
        return BoundContext(context, keeps_shapes=True, captures=not self._owner.makes_graphs)

    def note_generation(self, generation: int, *, but: BoundContext | None = None) -> None:
        """Forget the graphs if the buffers that they use have moved, except those of ``but``."""
        if generation == self._generation:
            return
        self._generation = generation
        for one in self._profiles:
            for key, bound in list(one.by_shapes.items()):
                if bound is not but:
                    del one.by_shapes[key]
                    if bound is not one.common:
                        bound.close()

    def run(self, bound: BoundContext) -> None:
        """Enqueue a run of a context that knows its shapes and addresses.

        Raises:
            BackendFailed: with the library's own words.
        """
        if bound.graph is not None:
            self._stream.launch(bound.graph)
            return
        if not bound.context.execute_async_v3(self._stream.handle):
            self._stream.synchronize()
            raise BackendFailed(f"model '{self._model}': TensorRT: {self._owner.logger.take()}")
        if bound.captures:
            # What has run once as it is can be captured for the next time; whatever comes of it, it is not tried again.
            bound.captures = False
            bound.graph = self._capture(bound.context)

    def _capture(self, context: Any) -> Graph | None:
        self._stream.synchronize()
        self._stream.begin_capture()
        has_run = False
        try:
            has_run = bool(context.execute_async_v3(self._stream.handle))
        finally:
            # Whatever happens: a stream that captures is of no other use.
            graph = self._end_capture()
        if graph is not None and not has_run:
            graph.close()
            return None
        return graph

    def _end_capture(self) -> Graph | None:
        try:
            return self._stream.end_capture()
        except DeviceError as error:
            log.warning(f"model '{self._model}' runs without CUDA graphs: {error}")
            return None

    def close(self) -> None:
        """Give up the contexts, then their memory; the stream is idle."""
        for one in self._profiles:
            for bound in (one.common, *one.by_shapes.values()):
                bound.close()
        self._profiles.clear()
        self._scratch.close()
