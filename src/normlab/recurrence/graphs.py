"""The launches of a sequence, or of a segment of it, on a GPU, recorded as CUDA graphs and replayed.

Launching the kernels of a time step takes the CPU longer than running them takes the GPU. So from the third call of one
shape on they are replayed. `NORMLAB_CUDA_GRAPHS=0` turns that off. A graph owns its memory: up to `MOST_GRAPHS` of them
stay allocated between calls. When there are so many, a shape takes the place of another by being called often while the
other is not called at all.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch

__all__ = ["Lease", "Tape", "TapeShape", "held", "leased_bytes", "needed_again", "one_at_a_time", "release"]

log = logging.getLogger(__name__)

CALLS_BEFORE_CAPTURE = 2
MOST_GRAPHS = 8
"""Captured sequences that are kept, forward and backward counted as one."""
MOST_SHAPES = 64
"""Shapes whose calls are counted, those with graphs aside."""
CALLS_UNTIL_FORGOTTEN = 2000
"""A shape that has not been called for so many calls of others loses its graphs."""
CALLS_TO_DISPLACE = 20
"""When there are `MOST_GRAPHS`: for each graph of a shape, calls of another one, with none of its own in between, after
which it loses them to that. Recording one again should take as long as some 5 calls without, so that little is lost
where two shapes take turns. A hundred lengths in random order do so about once in 2,000,000 calls."""
MOST_TO_DISPLACE = 4
"""Captured sequences of one shape with which it takes no more from others: two layers in both directions have so many,
calls with one time step each, which wait for backward together, would take all."""


class TapeShape(Protocol):
    """What a sequence's memory and launches depend on; hashable. Two calls of equal shape can replay one graph.

    Attributes:
        length, rows, hidden: T, B, H.
        dtype: of the state.
        kept: whether there will be a backward.
    """

    @property
    def device(self) -> torch.device: ...
    @property
    def length(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def kept(self) -> bool: ...


class Tape:
    """The memory of a layer over some time steps, from forward to backward, and the launches that touch it alone.

    Attributes:
        forward_graph, backward_graph: None for a tape that is launched anew each time.
        gradients: the memory of backward that its graph works on.
    """

    forward_graph: torch.cuda.CUDAGraph | None = None
    backward_graph: torch.cuda.CUDAGraph | None = None
    gradients: Any = None

    def launch_forward(self) -> None:
        """Launch all time steps."""
        raise NotImplementedError

    def new_gradients(self) -> Any:
        """Memory for `launch_backward`, which writes it anew every time."""
        raise NotImplementedError

    def launch_backward(self, gradients: Any) -> None:
        """Launch all time steps, from the last to the first."""
        raise NotImplementedError

    def forward(self) -> None:
        """Run all time steps."""
        self.launch_forward() if self.forward_graph is None else self.forward_graph.replay()

    def backward(self, gradients: Any) -> None:
        """Run all time steps, from the last to the first; `gradients`: those of the tape, if it has any."""
        self.launch_backward(gradients) if self.backward_graph is None else self.backward_graph.replay()


AnyTape = TypeVar("AnyTape", bound=Tape)


@dataclass
class _Graphs:
    """The captured tapes of one shape.

    Attributes:
        idle: those that no call is using.
        latest: numbers of the last calls.
    """

    idle: list[Any] = field(default_factory=list)
    calls: int = 0
    latest: deque[int] = field(default_factory=lambda: deque(maxlen=CALLS_TO_DISPLACE * MOST_GRAPHS))
    captured: int = 0
    fails: bool = False
    gradients: Any = None


_calls = itertools.count()
_leases: weakref.WeakSet[Lease[Any]] = weakref.WeakSet()
_graphs: OrderedDict[tuple[Any, Any], _Graphs] = OrderedDict()
"""By kind of tape and shape, the latest last."""
one_at_a_time = threading.RLock()
"""Held by a thread that looks for a tape, captures one, or works on gradients that tapes of one shape share."""


class Lease(Generic[AnyTape]):
    """A tape for one call, until nothing can ask for its backward any more."""

    _home: _Graphs | None = None

    def __init__(self, kind: Callable[[Any], AnyTape], shape: TapeShape) -> None:
        with one_at_a_time:
            _leases.add(self)
            home = _home(kind, shape) if _with_graphs(shape.device) else None
            if home is not None and home.idle:
                self.tape, self._home = home.idle.pop(), home
                return
            with torch.inference_mode(False):  # whose tensors nothing else may write to
                self.tape = kind(shape)
            if home is not None and _capture(self.tape, shape.kept, home):
                self._home = home

    def __del__(self) -> None:
        if self._home is not None:
            self._home.idle.append(self.tape)


def held() -> int:
    """How many captured sequences there are, those in use among them but not those of forgotten shapes."""
    with one_at_a_time:
        return sum(graphs.captured for graphs in _graphs.values())


def leased_bytes() -> int:
    """Memory of the tapes of calls that can still be asked for their backward: no hook of autograd's sees them."""
    with one_at_a_time:
        leases = list(_leases)
    storages = {storage.data_ptr(): storage for lease in leases for storage in _storages(getattr(lease, "tape", None))}
    return sum(storage.nbytes() for storage in storages.values())


def _storages(part: Any) -> Iterator[torch.UntypedStorage]:
    """Of the tensors of a tape, its memory of backward aside."""
    if isinstance(part, torch.Tensor):
        yield part.untyped_storage()
    elif isinstance(part, tuple):
        for inner in part:
            yield from _storages(inner)
    elif hasattr(part, "__dict__"):
        for name, inner in vars(part).items():
            if name != "gradients":
                yield from _storages(inner)


def release() -> None:
    """Forget all shapes and their graphs, whose memory is freed once no call is using it."""
    with one_at_a_time:
        _graphs.clear()


def needed_again() -> bool:
    """Within a backward: whether there can be another one of the same call."""
    return torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue]


def _with_graphs(device: torch.device) -> bool:
    off = device.type != "cuda" or os.environ.get("NORMLAB_CUDA_GRAPHS") == "0"
    # Inside a capture of the user's own, launches become part of that.
    return not off and not torch.cuda.is_current_stream_capturing()


def _home(kind: Callable[[Any], Tape], shape: TapeShape) -> _Graphs | None:
    """Where a captured tape of this shape is taken from and given back to; None if the call does without."""
    home = _graphs.setdefault((kind, shape), _Graphs())
    _graphs.move_to_end((kind, shape))
    home.calls += 1
    home.latest.append(now := next(_calls))
    while now - next(iter(_graphs.values())).latest[-1] > CALLS_UNTIL_FORGOTTEN:
        _graphs.popitem(last=False)
    # Not one with graphs: where lengths vary, others would be captured in their place, and as soon be gone.
    for key in [key for key, graphs in _graphs.items() if not graphs.captured][:-MOST_SHAPES]:
        del _graphs[key]
    if home.fails or home.calls <= CALLS_BEFORE_CAPTURE:
        return None
    if home.idle or held() < MOST_GRAPHS:
        return home
    key, unused = next((key, graphs) for key, graphs in _graphs.items() if graphs.captured)
    needed = CALLS_TO_DISPLACE * unused.captured
    often = len(home.latest) >= needed and home.latest[-needed] > unused.latest[-1]
    # Those that wait for backward would stay in memory, not counted.
    waits = len(unused.idle) < unused.captured
    if not often or waits or home.captured >= MOST_TO_DISPLACE:
        return None
    del _graphs[key]
    return home


def _capture(tape: Tape, kept: bool, home: _Graphs) -> bool:
    """Record the launches of forward and backward; False if that fails."""
    try:
        # Once for real, with whatever is in memory: nothing is left to compile or to set up.
        tape.launch_forward()
        forward_graph = _record(tape.launch_forward)
        if kept:
            gradients = home.gradients or tape.new_gradients()
            tape.launch_backward(gradients)
            tape.backward_graph = _record(lambda: tape.launch_backward(gradients), forward_graph.pool())
            tape.gradients = home.gradients = gradients
    except RuntimeError as error:
        log.warning("no CUDA graph of a recurrent layer, which goes on without: %s", error)
        home.fails = True
        return False
    tape.forward_graph = forward_graph
    home.captured += 1
    return True


def _record(launch: Callable[[], None], pool: Any = None) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    # The outer one because a failed capture leaves its own stream the current one; "thread_local" because other
    # threads, such as those that load data, go on using the GPU.
    stream = torch.cuda.current_stream()
    here, side = torch.cuda.stream(stream), _side_stream(torch.cuda.current_device(), stream.cuda_stream)
    with here, torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
        launch()
    return graph


@functools.cache
def _side_stream(device: int, of: int) -> torch.cuda.Stream:
    """Where the launches of one stream are recorded.

    That of `torch.cuda.graph` is on the GPU that had the first capture, for ever. One for each, since cuBLAS has a
    workspace per stream, which graphs recorded on one stream but replayed on two would write to at the same time.
    """
    return torch.cuda.Stream(device)
