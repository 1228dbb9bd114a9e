"""Matrix products on a CPU in float32: oneDNN's or torch's default ones (MKL's), whichever are faster on this machine.

Which wins depends on processor, torch and threads, so it is measured: once, for about a second, each kind of product by
itself. The result is kept in the user's cache (delete products-*.json there to measure anew) and recorded with each
run, so the same seed gives the same numbers on one machine. NORMLAB_PRODUCTS=onednn or =torch decides instead.

Shape suffixes: N rows, I and O features.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normlab.config import InputError
from normlab.machine import cache

__all__ = ["KINDS", "VARIABLE", "Choice", "Product", "choice", "input_gradient", "kept", "product", "weight_gradient"]

KINDS = ("forward", "input_gradient", "weight_gradient", "recurrent")
"""The products of a linear layer, and one of few rows with the same weight time step by time step."""
VARIABLE = "NORMLAB_PRODUCTS"

_ROUNDS = 7
_WORTHWHILE = 0.97
"""oneDNN is taken below this multiple of the default's time: a tie must not hang on noise."""
_FEWEST_STEPS = 8
"""Below, arranging the weights anew takes longer than it saves."""


class Choice(NamedTuple):
    """Which kinds of product are oneDNN's, and why."""

    onednn: frozenset[str]
    reason: str


def product(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, without gradient."""
    if x_NI.numel() and _chosen("forward", x_NI):
        return _onednn(x_NI, weight_OI, bias_O)
    return torch.nn.functional.linear(x_NI, weight_OI, bias_O)


def input_gradient(d_y_NO: Tensor, weight_OI: Tensor) -> Tensor:
    """d_y @ weight, without gradient."""
    if d_y_NO.numel() and _chosen("input_gradient", d_y_NO):
        return _onednn(d_y_NO, weight_OI.t())
    return d_y_NO @ weight_OI


def weight_gradient(d_y_NO: Tensor, x_NI: Tensor) -> Tensor:
    """d_y.T @ x, without gradient."""
    if d_y_NO.numel() and _chosen("weight_gradient", d_y_NO):
        return _onednn_weight_gradient(d_y_NO, x_NI)
    return d_y_NO.t() @ x_NI


class Product:
    """`product` with the same weight many times over, arranged once in the order that oneDNN reads it."""

    def __init__(self, weight_OI: Tensor, rows: int, times: int) -> None:
        self._onednn = rows > 0 and _chosen("recurrent", weight_OI)
        self._weight = weight_OI
        if self._onednn and times >= _FEWEST_STEPS:
            self._weight = _packed(weight_OI, rows)

    def __call__(self, x_NI: Tensor) -> Tensor:
        """N x O, in memory of its own."""
        return _onednn(x_NI, self._weight) if self._onednn else x_NI @ self._weight.t()


def choice() -> Choice:
    """The products in use on this machine with the present number of threads; measured if never before."""
    if _kept is not None:
        return _kept
    forced = os.environ.get(VARIABLE, "")
    if forced not in ("", "onednn", "torch"):
        raise InputError(f"{VARIABLE} is {forced!r}; set it to onednn or torch, or unset it to measure")
    if not _available():
        return Choice(frozenset(), "this torch has no oneDNN")
    if forced:
        return Choice(frozenset(KINDS if forced == "onednn" else ()), f"{VARIABLE}={forced}")
    return _measured(torch.get_num_threads())


@contextmanager
def kept(onednn: list[str] | None) -> Iterator[None]:
    """While open, the kinds in `onednn` are oneDNN's whatever was measured: those of a run that goes on. None = open.

    A variable that forces the choice has no say either: a run's numbers come from one sort of product.
    """
    global _kept
    before = _kept
    if onednn is not None and _available():
        _kept = Choice(frozenset(onednn), "as the run began")
    try:
        yield
    finally:
        _kept = before


_kept: Choice | None = None


def _available() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def _chosen(kind: str, like: Tensor) -> bool:
    serves = like.dtype == torch.float32 and like.device.type == "cpu" and torch.backends.mkldnn.enabled
    return serves and kind in choice().onednn


def _onednn(x_NI: Tensor, weight: Any, bias_O: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x_NI, weight, bias_O, "none", [], "")


def _onednn_weight_gradient(d_y_NO: Tensor, x_NI: Tensor) -> Tensor:
    # The wider of the two belongs on the right: the other way round takes up to 1.5 times as long.
    if d_y_NO.shape[1] >= x_NI.shape[1]:
        return _onednn(x_NI.t(), d_y_NO.t()).t()
    return _onednn(d_y_NO.t(), x_NI.t())


def _packed(weight_OI: Tensor, rows: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), rows)


@functools.cache
def _measured(threads: int) -> Choice:
    """From the cache, else measured and put there."""
    parts = (cache.processor(), torch.__version__, str(threads))
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    path = cache.folder() / f"products-{key}.json"
    ratios = _read(path)
    if ratios is None:
        try:
            measured = _measure()
        except RuntimeError as error:  # torch promises nothing of these operators
            return Choice(frozenset(), f"oneDNN's products fail here: {str(error).splitlines()[0]}")
        ratios = _first_to_write(path, measured)
    said = ", ".join(f"{kind} {ratio:.2f}" for kind, ratio in ratios.items())
    return Choice(
        frozenset(kind for kind, ratio in ratios.items() if ratio < _WORTHWHILE),
        f"measured here with {threads} threads, oneDNN's time by the default's: {said}",
    )


def _read(path: Path) -> dict[str, float] | None:
    """The ratios in `path`; None if there are none or something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {kind: float(found[kind]) for kind in KINDS}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _first_to_write(path: Path, ratios: dict[str, float]) -> dict[str, float]:
    """`ratios`, or those of another process that wrote `path` before: all must choose alike."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        whole = Path(scratch) / path.name
        whole.write_text(json.dumps(ratios) + "\n", encoding="utf-8")
        try:
            os.link(whole, path)
        except FileExistsError:
            theirs = _read(path)
            if theirs is not None:
                return theirs
            whole.replace(path)  # something else lay there
        except OSError:  # a file system without links
            whole.replace(path)
    return ratios


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def _measure() -> dict[str, float]:
    """oneDNN's time as a multiple of the default's, per kind, at the shapes of a small Transformer and LSTM."""
    N, I, O, rows = 4096, 256, 768, 32  # noqa: E741
    draw = torch.Generator().manual_seed(0)  # not the run's random numbers
    shapes = ((N, I), (N, O), (O, I))
    x, d_y, weight = (torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu") for shape in shapes)
    packed, few = _packed(weight, rows), x[:rows]
    pairs: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "forward": (lambda: _onednn(x, weight), lambda: x @ weight.t()),
        "input_gradient": (lambda: _onednn(d_y, weight.t()), lambda: d_y @ weight),
        "weight_gradient": (lambda: _onednn_weight_gradient(d_y, x), lambda: d_y.t() @ x),
        "recurrent": (lambda: _onednn(few, packed), lambda: few @ weight.t()),
    }
    seconds: dict[tuple[str, int], list[float]] = {}
    for _ in range(_ROUNDS):
        for kind, pair in pairs.items():
            # In a loop over time the weight stays in the processor's cache, so the first of many is not typical.
            calls = 20 if kind == "recurrent" else 1
            for which, call in enumerate(pair):
                seconds.setdefault((kind, which), []).extend(_seconds(call) for _ in range(calls))
    # The fastest of each: on a busy machine, medians of so few would tell more of its other work.
    return {kind: round(min(seconds[kind, 0]) / min(seconds[kind, 1]), 3) for kind in KINDS}


def _seconds(call: Callable[[], Tensor]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
