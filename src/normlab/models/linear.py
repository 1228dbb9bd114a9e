"""torch.nn.Linear with the fastest matrix products of the machine at hand (normlab/machine/products.py).

Shape suffixes: N rows, I and O features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from normlab.machine.products import choice, input_gradient, product, weight_gradient
from normlab.norms import fused

__all__ = ["Linear"]

FEWEST_MULTIPLICATIONS = 2**23
"""Below, the detour through Python costs what a faster product saves."""


class Linear(nn.Linear):
    """As torch.nn.Linear in everything but speed: on a CPU in float32 the three products of a training step are
    those that `machine.products.choice` names. Elsewhere, for small inputs and under autocast, torch.compile,
    torch.func and forward-mode differentiation it is torch.nn.Linear.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self._gains(input):
            return functional.linear(input, self.weight, self.bias)
        x_NI = input.reshape(-1, self.in_features)
        y_NO: Any = _Linear.apply(x_NI, self.weight, self.bias)
        return y_NO.view(*input.shape[:-1], self.out_features)

    def _gains(self, x: Tensor) -> bool:
        return (
            fused.applies()
            and x.device.type == "cpu"
            and type(x) is Tensor  # a fake or functional one only stands for a tensor
            and x.dtype == self.weight.dtype == torch.float32
            and x.numel() * self.out_features >= FEWEST_MULTIPLICATIONS
            and not torch.is_autocast_enabled("cpu")
            and bool(choice().onednn)
        )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_NI, weight_OI)
        return product(x_NI, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (d_y_NO,) = grads
        x_NI, weight_OI = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        d_bias = d_y_NO.sum(0) if needs_bias else None
        if torch.is_grad_enabled():  # for second derivatives: products that have a gradient themselves
            return d_y_NO @ weight_OI if needs_x else None, d_y_NO.t() @ x_NI if needs_weight else None, d_bias
        return (
            input_gradient(d_y_NO, weight_OI) if needs_x else None,
            weight_gradient(d_y_NO, x_NI) if needs_weight else None,
            d_bias,
        )
