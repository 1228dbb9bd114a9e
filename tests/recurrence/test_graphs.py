"""Which calls replay a graph, with tapes and graphs that do nothing. What real ones compute: test_triton.py."""

from __future__ import annotations

import itertools
import random
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from normlab.recurrence import graphs
from normlab.recurrence.graphs import CALLS_TO_DISPLACE, MOST_GRAPHS, MOST_SHAPES, Lease, Tape


class Shape(NamedTuple):
    length: int
    device: torch.device = torch.device("cpu")
    rows: int = 1
    hidden: int = 1
    dtype: torch.dtype = torch.float32
    kept: bool = True


class EmptyTape(Tape):
    users = 0

    def __init__(self, shape: Any) -> None:
        self.memory = torch.empty(1)

    def launch_forward(self) -> None:
        pass

    def new_gradients(self) -> Any:
        return object()

    def launch_backward(self, gradients: Any) -> None:
        pass


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The pool of each capture so far; None for a forward."""
    found: list[Any] = []

    class Graph:
        def __init__(self, launch: Callable[[], None], pool: Any = None) -> None:
            found.append(pool)

        def pool(self) -> str:
            return "that of forward"

    monkeypatch.setattr(graphs, "_graphs", OrderedDict())
    monkeypatch.setattr(graphs, "_with_graphs", lambda device: True)
    monkeypatch.setattr(graphs, "_record", Graph)
    return found


def test_of_many_lengths_a_few_are_captured_once(records: list[Any]) -> None:
    draw = random.Random(0)
    for _ in range(3000):
        Lease(EmptyTape, Shape(draw.randrange(100)))
    assert records == [None, "that of forward"] * MOST_GRAPHS
    assert len(graphs._graphs) == MOST_GRAPHS + MOST_SHAPES


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_a_new_model_takes_the_place_of_one_that_is_gone(records: list[Any], layers: int) -> None:
    leases: list[Any] = []
    for model in range(2 * MOST_GRAPHS):
        for _ in range(CALLS_TO_DISPLACE + 1):
            leases.clear()
            leases += [Lease(EmptyTape, Shape(model)) for _ in range(layers)]
        assert all(lease.tape.backward_graph for lease in leases)
        assert graphs.held() <= MOST_GRAPHS


def test_a_short_evaluation_leaves_training_its_graphs(records: list[Any]) -> None:
    for _ in range(20):
        for _ in range(3):
            _ = [Lease(EmptyTape, Shape(1)) for _ in range(MOST_GRAPHS)]
        for _ in range(CALLS_TO_DISPLACE * MOST_GRAPHS - 1):
            Lease(EmptyTape, Shape(1, kept=False))
    assert len(records) == 2 * MOST_GRAPHS


def test_many_waiting_calls_leave_the_others_theirs(records: list[Any]) -> None:
    for _ in range(3):
        Lease(EmptyTape, Shape(100))
    for _ in range(10):
        assert Lease(EmptyTape, Shape(100)).tape.backward_graph
        waiting = [Lease(EmptyTape, Shape(1)) for _ in range(100)]
        assert graphs.held() == MOST_GRAPHS
        waiting.clear()
    graphs.release()
    assert graphs.held() == 0
    assert Lease(EmptyTape, Shape(100)).tape.backward_graph is None


def test_from_inference_mode_it_serves_elsewhere(records: list[Any]) -> None:
    with torch.inference_mode():
        for _ in range(3):
            Lease(EmptyTape, Shape(1))
    assert records
    Lease(EmptyTape, Shape(1)).tape.memory.zero_()


def test_threads_take_turns(records: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    record, underway, faults = graphs._record, [], []

    def slow(launch: Callable[[], None], pool: Any = None) -> Any:
        underway.append(launch)
        time.sleep(1e-4)
        if len(underway) > 1:  # torch allows one capture at a time
            faults.append("captured at a time")
        underway.remove(launch)
        return record(launch, pool)

    def call(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(500):
            tape = (lease := Lease(EmptyTape, Shape(draw.randrange(70)))).tape
            tape.users += 1
            if tape.users > 1:
                faults.append("on one tape")
            tape.users -= 1
            del lease

    monkeypatch.setattr(graphs, "_record", slow)
    interval = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-6)
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(call, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert not faults
    assert len(records) == 2 * MOST_GRAPHS


def test_memory_of_calls_that_wait_for_backward() -> None:
    class Nested(EmptyTape):
        def __init__(self, shape: Any) -> None:
            self.memory = torch.empty(5)
            self.part = self.memory[1:]
            self.sites = (SimpleNamespace(mean=torch.empty(2, dtype=torch.float64), spread=None),)
            self.gradients = (torch.empty(100),)

    before = graphs.leased_bytes()
    leases = [Lease(Nested, Shape(1)) for _ in range(2)]
    assert graphs.leased_bytes() - before == 2 * (5 * 4 + 2 * 8)
    leases.clear()
    assert graphs.leased_bytes() == before


def test_recorded_on_a_stream_of_the_same_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[Any] = []

    def graph(recorded: Any, *, stream: Any = "that of the first GPU", **options: Any) -> Any:
        streams.append(stream)
        return nullcontext()

    gpu, stream = iter((0, 1, 0, 0)), iter((7, 7, 7, 8))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: next(gpu))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=next(stream)))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    made = itertools.count()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: (device, next(made)))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    graphs._side_stream.cache_clear()
    for _ in range(4):
        graphs._record(lambda: None)
    graphs._side_stream.cache_clear()
    assert streams == [(0, 0), (1, 1), (0, 0), (0, 2)]  # another one beside another stream
