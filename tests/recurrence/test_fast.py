"""The fast recurrence against the reference: outputs, states, all gradients, stored statistics.

Shape suffixes: B batch, T time, I input features, H hidden.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from normlab.norms import build_norm
from normlab.norms.base import Norm
from normlab.recurrence import fast, kernels, reference
from normlab.recurrence.reference import SiteNorms, Weights

NORMS = ("none", "ln", "rms", "gn", "bn", "bn_step")
BY_ROW, BY_COLUMN = ("none", "ln", "rms", "gn"), ("none", "bn", "bn_step")
EXACT = {"rtol": 1e-9, "atol": 1e-9}
# Float32: sums over B or 4H entries in another order, exp and tanh by other polynomials.
SINGLE = {"rtol": 2e-4, "atol": 2e-5}
MAX_STEPS = 6


@pytest.fixture(params=["c", "c on 2 threads", "torch"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The kernels, and what runs on a machine without a compiler."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "load", lambda dtype: None)
    elif kernels.compiler() is None:
        pytest.skip("no C compiler on this machine")
    before = torch.get_num_threads()
    if request.param == "c on 2 threads":
        monkeypatch.setattr(fast, "SMALLEST_PARALLEL", 0)
        torch.set_num_threads(2)
    yield request.param
    torch.set_num_threads(before)


def build(names: tuple[str, str, str], inputs: int, hidden: int, *, bias: bool, affine: bool, seed: int) -> Any:
    torch.manual_seed(seed)
    norms = []
    for name, dim, site_bias in zip(names, (4 * hidden, 4 * hidden, hidden), (True, False, True), strict=True):
        options: dict[str, Any] = {} if name == "none" else {"affine": affine, "bias": site_bias}
        options |= {"gn": {"groups": 2}, "bn_step": {"max_steps": MAX_STEPS}}.get(name, {})
        norm = build_norm(name, dim, **options).double()
        for parameter in norm.parameters():
            torch.nn.init.normal_(parameter, 1.0, 0.3)
        norms.append(norm)
    sizes = ((4 * hidden, inputs), (4 * hidden, hidden), (4 * hidden,))
    weights = [(torch.randn(size, dtype=torch.float64) * 0.5).requires_grad_() for size in sizes]
    return Weights(weights[0], weights[1], weights[2] if bias else None, None), SiteNorms(*norms)


def results(
    layer: Any, weights: Weights, norms: SiteNorms, x: Tensor, mask: Any, h: Tensor, c: Tensor, step: int
) -> Any:
    """Everything a layer gives: outputs, states, gradients, stored values."""
    out, last_h, last_c, _ = layer(x, mask, h, c, weights, norms, step)
    found: list[Tensor] = [out, last_h, last_c]
    leaves = [x, h, c, *weights, *(parameter for norm in norms for parameter in norm.parameters())]
    leaves = [leaf for leaf in leaves if leaf is not None]
    ramp = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).cos()
    loss = (out * ramp).sum() + last_h.square().sum() + last_c.sin().sum()
    found += torch.autograd.grad(loss, leaves)
    return found + [buffer for norm in norms for buffer in norm.buffers()]


def both(weights: Weights, norms: SiteNorms, *args: Any) -> Iterator[tuple[Tensor, Tensor]]:
    assert not fast.never_for(norms, weights)
    assert not fast.not_now_for(args[0], args[2], args[3], weights, norms, args[4])
    twins = copy.deepcopy(norms)
    return zip(
        results(fast.lstm_layer, weights, norms, *args),
        results(reference.lstm_layer, weights, twins, *args),
        strict=True,
    )


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    family = draw(st.sampled_from((BY_ROW, BY_COLUMN, NORMS)))
    return {
        "names": tuple(draw(st.sampled_from(family)) for _ in range(3)),
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


def inputs_of(case: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    rows, length, hidden = case["rows"], case["length"], case["hidden"]
    x = torch.randn(length, rows, case["inputs"], dtype=torch.float64)
    mask = None
    if case["masked"]:
        # Not only at the end; columns with one row or none come up.
        mask = torch.rand(rows, length) < 0.5
    h, c = (torch.randn(rows, hidden, dtype=torch.float64).requires_grad_() for _ in range(2))
    return x.requires_grad_(), mask, h, c


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_float64_equals_the_reference(engine: str, case: dict[str, Any]) -> None:
    weights, norms = build(
        case["names"], case["inputs"], case["hidden"], bias=case["bias"], affine=case["affine"], seed=case["seed"]
    )
    x, mask, h, c = inputs_of(case)
    reference.lstm_layer(torch.randn_like(x), None, h.detach(), c.detach(), weights, norms, 1)
    for norm in norms:
        norm.train(case["training"])
    for one, other in both(weights, norms, x, mask, h, c, case["step"]):
        torch.testing.assert_close(one, other, **EXACT)
