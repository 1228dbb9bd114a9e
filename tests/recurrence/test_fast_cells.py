"""Fast GRU and RNN against the reference: outputs, state, all gradients, stored statistics.

Shape suffixes: B batch, T time, I input features, H hidden, G gates (3H, H).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from normlab.norms import build_norm
from normlab.recurrence import fast, fast_cells, kernels, reference
from normlab.recurrence.reference import SiteNorms, Weights

NORMS = ("none", "ln", "rms", "gn", "bn", "bn_step")
EXACT = {"rtol": 1e-9, "atol": 1e-9}
MAX_STEPS = 6
# Without a compiler there is nothing but the reference.
pytestmark = pytest.mark.skipif(kernels.compiler() is None, reason="no C compiler on this machine")
GATES = {"gru": 3, "tanh": 1, "relu": 1}


def layer(where: Any, cell: str) -> Any:
    return where.gru_layer if cell == "gru" else partial(where.rnn_layer, activation=cell)


def build(case: dict[str, Any]) -> tuple[Weights, SiteNorms, Tensor, Tensor | None, Tensor]:
    """Weights, norms, x, mask, h."""
    torch.manual_seed(case.get("seed", 0))
    hidden, inputs, rows, length = case["hidden"], case["inputs"], case["rows"], case["length"]
    width = GATES[case["cell"]] * hidden
    norms = []
    for name, site_bias in zip(case["names"], (True, False), strict=True):
        options: dict[str, Any] = {} if name == "none" else {"affine": case["affine"], "bias": site_bias}
        options |= {"gn": {"groups": 2}, "bn_step": {"max_steps": MAX_STEPS}}.get(name, {})
        norm = build_norm(name, width, **options).double()
        for parameter in norm.parameters():
            torch.nn.init.normal_(parameter, 1.0, 0.3)
        norms.append(norm)

    def drawn(*size: int) -> Tensor:
        return (torch.randn(size, dtype=torch.float64) * 0.5).requires_grad_()

    bias, hidden_bias = (drawn(width), drawn(width)) if case["bias"] else (None, None)
    weights = Weights(
        drawn(width, inputs), drawn(width, hidden), bias, None, hidden_bias if case["cell"] == "gru" else None
    )
    # Not only at the end; columns with one row or none come up.
    mask = torch.rand(rows, length) < 0.5 if case["masked"] else None
    return weights, SiteNorms(*norms), drawn(length, rows, inputs), mask, drawn(rows, hidden)


def results(run: Any, weights: Weights, norms: SiteNorms, x: Tensor, mask: Any, h: Tensor, step: int) -> list[Tensor]:
    """Everything a layer gives: outputs, state, gradients, stored values."""
    out, last_h, _ = run(x, mask, h, weights, norms, step)
    leaves = [x, h, *weights, *(parameter for norm in norms for parameter in norm.parameters())]
    ramp = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).cos()
    loss = (out * ramp).sum() + last_h.square().sum()
    found = torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None])
    return [out, last_h, *found, *(buffer for norm in norms for buffer in norm.buffers())]


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


SMALL = {"rows": 5, "length": 7, "inputs": 3, "hidden": 18, "masked": True, "bias": True, "affine": True}


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_float64_equals_the_reference(case: dict[str, Any]) -> None:
    weights, norms, x, mask, h = build(case)
    # Stored values that are not those of a new norm.
    layer(reference, case["cell"])(torch.randn_like(x), None, h.detach(), weights, norms, 1)
    for norm in norms:
        norm.train(case["training"])
    for one, other in both(case["cell"], weights, norms, x, mask, h, case["step"]):
        torch.testing.assert_close(one, other, **EXACT)
