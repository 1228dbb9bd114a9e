"""Fast GRU and RNN against the reference: outputs, state, all gradients, stored statistics.

Shape suffixes: B batch, T time, I input features, H hidden, G gates (3H, H).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cells import GATES, MAX_STEPS, NORMS, SMALL, assert_close, build, layer, results
from derivatives import require_first_alone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from normlab.machine import c_kernels
from normlab.recurrence import fast, fast_cells, kernels, reference
from normlab.recurrence.reference import SiteNorms, Weights

# Without a compiler there is nothing but the reference.
pytestmark = pytest.mark.skipif(kernels.compiler() is None, reason="no C compiler on this machine")


def both(cell: str, weights: Weights, norms: SiteNorms, x: Tensor, mask: Any, h: Tensor, step: int) -> Iterator[Any]:
    assert not fast_cells.never_for(norms, weights)
    assert not fast_cells.not_now_for(x, h, weights, norms, step)
    twins = copy.deepcopy(norms)
    return zip(
        results(layer(fast_cells, cell), weights, norms, x, mask, h, step),
        results(layer(reference, cell), weights, twins, x, mask, h, step),
        strict=True,
    )


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "cell": draw(st.sampled_from(sorted(GATES))),
        "names": tuple(draw(st.sampled_from(NORMS)) for _ in range(2)),
        "rows": draw(st.integers(2, 6)),
        "length": draw(st.integers(1, 9)),
        "inputs": draw(st.integers(1, 5)),
        # Beyond one block of columns too.
        "hidden": draw(st.sampled_from((4, 6, 18, 66, 130))),
        "masked": draw(st.booleans()),
        "training": draw(st.sampled_from((True, True, False))),
        "bias": draw(st.booleans()),
        "affine": draw(st.booleans()),
        "step": draw(st.integers(0, MAX_STEPS + 1)),
        "seed": draw(st.integers(0, 99)),
    }


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_float64_equals_the_reference(case: dict[str, Any]) -> None:
    weights, norms, x, mask, h = build(case)
    # Stored values that are not those of a new norm.
    layer(reference, case["cell"])(torch.randn_like(x), None, h.detach(), weights, norms, 1)
    for norm in norms:
        norm.train(case["training"])
    for one, other in both(case["cell"], weights, norms, x, mask, h, case["step"]):
        assert_close(one, other)


@pytest.mark.parametrize("cell", sorted(GATES))
@pytest.mark.parametrize("names", [("ln", "ln"), ("bn_step", "bn_step")])
def test_several_threads_equal_one(monkeypatch: pytest.MonkeyPatch, cell: str, names: Any) -> None:
    weights, norms, x, mask, h = build({**SMALL, "cell": cell, "names": names, "hidden": 130})
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(fast, "_threads", lambda tape, threads=threads: threads)
        found.append(results(layer(fast_cells, cell), weights, copy.deepcopy(norms), x, mask, h, 0))
    for one, other in zip(*found, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("cell", sorted(GATES))
def test_without_gradient_the_same_numbers_and_stored_values(cell: str) -> None:
    for names in (("none", "none"), ("ln", "ln"), ("bn_step", "bn_step")):
        weights, norms, x, mask, h = build({**SMALL, "cell": cell, "names": names})
        for mask_BT in (None, mask):
            twins = copy.deepcopy(norms)
            with_gradient = layer(fast_cells, cell)(x, mask_BT, h, weights, norms, 2)
            with torch.no_grad():
                without = layer(fast_cells, cell)(x, mask_BT, h, weights, twins, 2)
            for one, other in zip(with_gradient[:2], without[:2], strict=True):
                assert one.equal(other)
            for one, other in zip(norms, twins, strict=True):
                assert all(a.equal(b) for a, b in zip(one.buffers(), other.buffers(), strict=True))


@pytest.mark.parametrize("cell", sorted(GATES))
@pytest.mark.parametrize("names", [("none", "none"), ("ln", "ln"), ("bn", "bn"), ("rms", "gn")])
def test_float32_is_close_to_the_reference_in_float64(cell: str, names: Any) -> None:
    # Not wider: with such weights a bare RNN is then chaotic, and rounding grows.
    size = {"rows": 16, "length": 12, "inputs": 24, "hidden": 24}
    weights, norms, x, mask, h = build({**SMALL, **size, "cell": cell, "names": names})

    def single(value: Any) -> Any:
        return None if value is None else value.detach().float().requires_grad_()

    norms_32 = copy.deepcopy(norms)
    for norm in norms_32:
        norm.float()
    weights_32 = Weights(*(single(weight) for weight in weights))
    found = results(layer(fast_cells, cell), weights_32, norms_32, single(x), mask, single(h), 0)
    exact = results(layer(reference, cell), weights, norms, x, mask, h, 0)
    for one, other in zip(found, exact, strict=True):
        if one.is_floating_point():
            # Sums in another order, exp and tanh by other polynomials.
            assert_close(one.double(), other, 2e-4)


@pytest.mark.parametrize("cell", sorted(GATES))
def test_padding_may_hold_anything_and_nan_elsewhere_shows(cell: str) -> None:
    for names in (("none", "none"), ("ln", "ln"), ("bn", "bn")):
        weights, norms, x, mask, h = build({**SMALL, "cell": cell, "names": names})
        assert mask is not None
        filled = x.detach().masked_fill(~mask.t().unsqueeze(-1), float("nan")).requires_grad_()
        plain = results(layer(fast_cells, cell), weights, copy.deepcopy(norms), x, mask, h, 0)
        padded = results(layer(fast_cells, cell), weights, copy.deepcopy(norms), filled, mask, h, 0)
        # The weight of the input, in third place, sums over x itself: callers put zeros there.
        for place, (one, other) in enumerate(zip(plain, padded, strict=True)):
            if place != 4:
                assert_close(one, other)
    weights, norms, x, _, h = build({**SMALL, "cell": cell, "names": ("none", "none")})
    out = layer(fast_cells, cell)(x + torch.nan, None, h, weights, norms)[0]
    assert out.isnan().all()


@pytest.mark.parametrize("cell", sorted(GATES))
def test_backward_twice_with_the_graph_kept_and_never_a_second_derivative(cell: str) -> None:
    weights, norms, x, _, h = build({**SMALL, "cell": cell, "names": ("ln", "ln")})
    out = layer(fast_cells, cell)(x, None, h, weights, norms)[0].square().sum()
    require_first_alone(out, x, weights.hidden)


def test_without_a_compiler_the_reference_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, norms, x, mask, h = build({**SMALL, "cell": "tanh", "names": ("ln", "ln")})
    fast_out = fast_cells.rnn_layer(x, mask, h, weights, norms)[0]
    for name, value in (("_libraries", {}), ("_failed", set()), ("compiler", lambda: None)):
        monkeypatch.setattr(c_kernels, name, value)
    assert fast_cells.not_now_for(x, h, weights, norms, 0) == "no C compiler that works"
    slow_out = fast_cells.rnn_layer(x, mask, h, weights, norms)[0]
    assert_close(slow_out, fast_out)
    assert not slow_out.equal(fast_out)


def test_recomputing_gives_the_same_numbers_and_keeps_less() -> None:
    results = []
    for recompute in (False, True):
        weights, norms, x, mask, h = build({**SMALL, "cell": "gru", "names": ("bn_step", "bn_step")})
        kept: set[int] = set()

        def pack(tensor: torch.Tensor, kept: set[int] = kept) -> torch.Tensor:
            kept.add(tensor.untyped_storage().data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = fast_cells.gru_layer(x, mask, h, weights, norms, recompute=recompute)[0]
        found = torch.autograd.grad(out.square().sum(), [x, h, weights.hidden])
        stored = [buffer for norm in norms for buffer in norm.buffers()]
        results.append(([out, *found, *stored], len(kept)))
    (values, count), (again, fewer) = results
    for one, other in zip(values, again, strict=True):
        assert_close(other, one)
    assert fewer < count
