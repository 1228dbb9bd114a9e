"""Layers of a GRU and of RNNs, drawn at random, and all that one gives.

Shape suffixes: B batch, T time, I input features, H hidden, G gates (3H, H).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from normlab.norms import build_norm
from normlab.recurrence.reference import SiteNorms, Weights

NORMS = ("none", "ln", "rms", "gn", "bn", "bn_step")
MAX_STEPS = 6
GATES = {"gru": 3, "tanh": 1, "relu": 1}
SMALL = {"rows": 5, "length": 7, "inputs": 3, "hidden": 18, "masked": True, "bias": True, "affine": True}
"""A case of `build`, but for `cell` (a key of `GATES`) and `names` (of the norms of both sites)."""


def layer(where: Any, cell: str) -> Any:
    """The layer's function in `where`: reference or fast_cells."""
    return where.gru_layer if cell == "gru" else partial(where.rnn_layer, activation=cell)


def build(
    case: dict[str, Any], device: torch.device | str = "cpu"
) -> tuple[Weights, SiteNorms, Tensor, Tensor | None, Tensor]:
    """Weights, norms, x, mask, h: float64, on `device`."""
    torch.manual_seed(case.get("seed", 0))
    hidden, inputs, rows, length = case["hidden"], case["inputs"], case["rows"], case["length"]
    width = GATES[case["cell"]] * hidden
    norms = []
    for name, site_bias in zip(case["names"], case.get("site_biases", (True, False)), strict=True):
        options: dict[str, Any] = {} if name == "none" else {"affine": case["affine"], "bias": site_bias}
        options |= {"gn": {"groups": 2}, "bn_step": {"max_steps": MAX_STEPS}}.get(name, {})
        norm = build_norm(name, width, **options).double().to(device)
        for parameter in norm.parameters():
            torch.nn.init.normal_(parameter, 1.0, 0.3)
        norms.append(norm)

    def drawn(*size: int) -> Tensor:
        return (torch.randn(size, dtype=torch.float64) * 0.5).to(device).requires_grad_()

    bias, hidden_bias = (drawn(width), drawn(width)) if case["bias"] else (None, None)
    weights = Weights(
        drawn(width, inputs), drawn(width, hidden), bias, None, hidden_bias if case["cell"] == "gru" else None
    )
    # Not only at the end; columns with one row or none come up.
    mask = (torch.rand(rows, length) < 0.5).to(device) if case["masked"] else None
    return weights, SiteNorms(*norms), drawn(length, rows, inputs), mask, drawn(rows, hidden)


def results(run: Any, weights: Weights, norms: SiteNorms, x: Tensor, mask: Any, h: Tensor, step: int) -> list[Tensor]:
    """Everything a layer gives: outputs, state, gradients, stored values."""
    out, last_h, _ = run(x, mask, h, weights, norms, step)
    leaves = [x, h, *weights, *(parameter for norm in norms for parameter in norm.parameters())]
    ramp = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out).cos()
    loss = (out * ramp).sum() + last_h.square().sum()
    found = torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None])
    return [out, last_h, *found, *(buffer for norm in norms for buffer in norm.buffers())]


def assert_close(one: Tensor, other: Tensor, tolerance: float = 1e-9) -> None:
    """Relative to the largest entry: a variance over 2 rows may be nearly 0, and gradients 10,000 or more."""
    scale = other.abs().max().clamp(min=1) if one.is_floating_point() else 1
    torch.testing.assert_close(one / scale, other / scale, rtol=tolerance, atol=tolerance)
