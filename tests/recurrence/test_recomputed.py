"""What backward keeps, with and without `recompute`, and the reference where it recomputes.

That both give the same numbers is tested on whole LSTMs, in tests/models/test_lstm_backends.py.

B batch, T time, IN input features, H hidden.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import normlab
from normlab.config import NormOptions
from normlab.norms import build_norm
from normlab.norms.base import GatheredPenalties
from normlab.recurrence import cuda, fast, reference
from normlab.recurrence.reference import SEGMENT, SiteNorms, Weights

B, T, IN, H, GROUPS = 3, 2000, 5, 8, 2
NORMALIZED = (4, 4, 1)
FEATURES = (4 * H, 4 * H, H)
STATISTICS = {  # numbers per time step of a site of so many features
    "none": lambda features: 0,
    "ln": lambda features: B,
    "rms": lambda features: B,
    "gn": lambda features: B * GROUPS,
    "bn": lambda features: features,
    "bn_step": lambda features: features,
}


def saved(run: Callable[[], Any], apart: Iterable[Tensor]) -> int:
    """Numbers that backward of `run` keeps, `apart` aside."""
    known = {tensor.untyped_storage().data_ptr() for tensor in apart}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(kept[place].untyped_storage().nbytes() // kept[place].itemsize for place in kept if place not in known)


def case(names: tuple[str, ...], length: int) -> tuple[list[Tensor], Weights, SiteNorms]:
    """Input, h and c; weights; norms."""
    norms = SiteNorms(
        *(
            build_norm(name, dim, **({"groups": GROUPS} if name == "gn" else {}))
            for name, dim in zip(names, FEATURES, strict=True)
        )
    )
    sizes = ((length, B, IN), (B, H), (B, H), (4 * H, IN), (4 * H, H), (4 * H,))
    x, h, c, *weights = (torch.randn(size, requires_grad=True) for size in sizes)
    return [x, h, c], Weights(*weights, None), norms


def leaves(states: list[Tensor], weights: Weights, norms: SiteNorms) -> list[Any]:
    return [*states, *weights[:3], *(parameter for norm in norms for parameter in norm.parameters())]


def of_layer(layer: Any, names: tuple[str, ...], length: int = T, **options: Any) -> int:
    (x, h, c), weights, norms = case(names, length)
    return saved(lambda: layer(x, None, h, c, weights, norms, **options), leaves([x, h, c], weights, norms))


MIXED = [("none", "ln", "gn"), ("bn_step", "none", "none"), ("ln", "bn", "none")]


@pytest.mark.parametrize("names", [(name,) * 3 for name in STATISTICS] + MIXED, ids="-".join)
def test_what_the_fast_form_keeps_is_as_documented(names: tuple[str, str, str]) -> None:
    sites = list(zip(names, NORMALIZED, FEATURES, strict=True))
    multiple = 7 + sum(normalized for name, normalized, _ in sites if name != "none")
    statistics = T * sum(STATISTICS[name](features) for name, _, features in sites)
    assert of_layer(fast.lstm_layer, names) == multiple * B * T * H + statistics
    starts = -(-T // SEGMENT) * B * H
    assert of_layer(fast.lstm_layer, names, recompute=True) == B * T * H + starts


class Idle:
    """Kernels for a GPU that do nothing: what is allocated does not depend on numbers."""

    class triton:  # noqa: N801
        @staticmethod
        def next_power_of_2(number: int) -> int:
            return 1 << (number - 1).bit_length()

    def __getattr__(self, name: str) -> Any:
        return defaultdict(lambda: lambda *args, **options: None)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "takes", lambda device: True)
    monkeypatch.setattr(cuda, "failure", lambda device: "")
    monkeypatch.setattr(cuda, "_kernels", Idle)


class Peak(TorchDispatchMode):
    """The most numbers that tensors held at any one time, those `apart` aside."""

    def __init__(self, apart: Iterable[Tensor]) -> None:
        super().__init__()
        self._apart = {tensor.untyped_storage()._cdata for tensor in apart}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes() // tensor.itemsize
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.numbers = max(self.numbers, sum(size for key, (_, size) in self._alive.items() if key not in self._apart))
        return result


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(("name", "normalized", "input_site"), [("none", 0, 0), ("ln", 5, 4)])
def test_memory_on_a_gpu_is_as_documented(name: str, normalized: int, input_site: int) -> None:
    names, segment = (name,) * 3, B * SEGMENT * H
    starts = -(-T // SEGMENT) * B * H
    assert of_layer(fast.lstm_layer, names, recompute=True) == B * T * H + starts

    def peak(segments: int, *, gradient: bool, back: bool, recompute: bool) -> int:
        (x, h, c), weights, norms = case(names, segments * SEGMENT)
        given, d_output = leaves([x, h, c], weights, norms), torch.ones(len(x), B, H)
        with torch.set_grad_enabled(gradient), Peak([*given, d_output]) as memory:
            output = fast.lstm_layer(x, None, h, c, weights, norms, recompute=recompute)[0]
            if back:
                torch.autograd.grad(output, given, d_output)
        return memory.numbers

    def per_segment(**options: bool) -> tuple[int, float]:
        """Numbers that a segment more takes, and multiples of B x S x H beside it."""
        fewer, more = peak(2, **options), peak(3, **options)
        return more - fewer, (3 * fewer - 2 * more) / segment

    d_input, gradients = B * SEGMENT * IN, 5 + normalized + input_site
    # The output; c at its start; the gradient of the input. The rest is that of one segment, and weights.
    grows, rest = per_segment(gradient=False, back=False, recompute=False)
    assert grows == segment
    assert rest < 5 + input_site + 1
    grows, rest = per_segment(gradient=True, back=False, recompute=True)
    assert grows == segment + B * H
    assert rest < 5 + input_site + 1
    grows, rest = per_segment(gradient=True, back=True, recompute=True)
    assert grows == segment + B * H + d_input
    assert rest < 15 + normalized + gradients + 2
    # Without recomputing all grows.
    grows, _ = per_segment(gradient=True, back=False, recompute=False)
    assert grows // segment == 1 + 11 + normalized + input_site
    grows, _ = per_segment(gradient=True, back=True, recompute=False)
    assert (grows - d_input) // segment == 1 + 11 + normalized + gradients


@pytest.mark.parametrize("names", [("ln",) * 3, ("inorm",) * 3, ("brn",) * 3], ids="-".join)
def test_what_the_reference_keeps(names: tuple[str, str, str]) -> None:
    """Not the outputs themselves: whoever uses them keeps them."""
    length = 4 * SEGMENT
    states = 4 * 2 * B * H
    projected = 4 * B * length * H if names[0] == "inorm" else 0  # it pools over time
    assert of_layer(reference.lstm_layer, names, length, recompute=True) <= states + projected
    assert of_layer(reference.lstm_layer, names, length) > 15 * B * length * H


def test_an_input_site_by_itself_adds_its_result() -> None:
    x = torch.randn(T, B, IN)
    sizes = []
    for options in (NormOptions(), NormOptions(pool="batch_time")):
        lstm = normlab.LSTM(IN, H, norm="bn", causal=True, norm_options=options, recompute=True)
        sizes.append(saved(lambda lstm=lstm: lstm(x), [x, *lstm.parameters()]))
    assert sizes[1] - sizes[0] == 4 * B * T * H


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_backward_twice_and_in_another_mode(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    """Backward may come after `eval()`, and again."""
    monkeypatch.setattr(fast, "SEGMENT", 4)
    monkeypatch.setattr(reference, "SEGMENT", 4)
    x = torch.randn(9, 4, IN, dtype=torch.float64, requires_grad=True)
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        lstm = normlab.LSTM(IN, H, norm="bn", recompute=recompute, backend=backend, dtype=torch.float64)
        out = lstm(x)[0].square().sum()
        lstm.eval()
        found += [torch.autograd.grad(out, [x, *lstm.parameters()], retain_graph=True) for _ in range(2)]
    first, second, third, fourth = found
    assert all(one.equal(other) for one, other in zip(first + third, second + fourth, strict=True))
    for one, other in zip(first, third, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_second_derivatives_on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "SEGMENT", 4)
    torch.manual_seed(0)
    x = torch.randn(9, 4, IN, dtype=torch.float64, requires_grad=True)
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        lstm = normlab.LSTM(IN, H, norm="ln", recompute=recompute, backend="reference", dtype=torch.float64)
        (grad,) = torch.autograd.grad(lstm(x)[0].square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), [x, *lstm.parameters()], allow_unused=True))
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_penalties_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "SEGMENT", 4)
    x = torch.randn(9, 4, IN, dtype=torch.float64, requires_grad=True)
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        lstm = normlab.LSTM(IN, H, norm="rbn", recompute=recompute, dtype=torch.float64)
        with GatheredPenalties(lstm) as penalties:
            out = lstm(x)[0].square().sum()
            penalty = penalties.total()
            assert penalty is not None
            gradients = torch.autograd.grad(out + 10 * penalty, [x, *lstm.parameters()], retain_graph=True)
            again = penalties.total()
            assert again is not None
            assert penalty.equal(again)
        found.append([penalty, *gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
