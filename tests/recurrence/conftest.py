"""The GPU's recurrences run in Triton's interpreter where that stands in for the GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from triton_device import INTERPRETED, on_gpu

from normlab.recurrence import cuda, graphs


@pytest.fixture(scope="session")
def patched_once() -> None:
    """Triton patches its language anew for each function that a kernel calls: half the time. Here once for all."""
    from triton import language
    from triton.runtime import interpreter

    for function in (cuda._kernels().forward_step, language.standard.cdiv):  # each sees another module of it
        interpreter._patch_lang(function.fn)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)


@pytest.fixture(autouse=True)
def interpreted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        request.getfixturevalue("patched_once")
        monkeypatch.setattr(cuda, "takes", lambda device: True)


class Replayed:
    """A CUDA graph for the interpreter: the same launches on the same memory."""

    def __init__(self, launch: Any, pool: Any = None) -> None:
        self.replay, self.pool = launch, lambda: None


@pytest.fixture(
    params=[
        pytest.param("cuda", marks=on_gpu),
        pytest.param("interpreter", marks=pytest.mark.skipif(not INTERPRETED, reason="no interpreter")),
    ],
)
def fresh_graphs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """None are there before and after; without a GPU with a stand-in for CUDA's."""
    if request.param == "interpreter":
        monkeypatch.setattr(graphs, "_with_graphs", lambda device: os.environ.get("NORMLAB_CUDA_GRAPHS") != "0")
        monkeypatch.setattr(graphs, "_record", Replayed)
    graphs._graphs.clear()
    yield
    graphs._graphs.clear()
