"""Instance normalization (Ulyanov et al. 2016, arXiv 1607.08022) of text: each example and feature over time."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from normlab.config import require_choice
from normlab.norms import fused
from normlab.norms.base import Norm, Shares, Step
from normlab.norms.moments import Prefix, first_entry, for_statistics, moments, prefix_moments, zero_padding


@final
class InstanceNorm(Norm):
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the time steps of each example and feature.

    Args:
        causal: decides the default of `pool`: "prefix" if True, else "time".
        pool: "prefix" (time steps up to this one; the first is normalized to 0) or "time" (all of them: sees the
            future; equals torch.nn.InstanceNorm1d).
    """

    formula = "(x - mean_T) / sqrt(var_T + eps) * weight + bias"
    paper = "Ulyanov et al. 2016, arXiv 1607.08022"
    scale_invariant = True
    shift_invariant = True

    def __init__(
        self,
        dim: int,
        *,
        affine: bool = True,
        bias: bool = True,
        gain: float = 1.0,
        eps: float = 1e-5,
        causal: bool = True,
        pool: str | None = None,
    ) -> None:
        super().__init__(dim, affine=affine, bias=bias, gain=gain, eps=eps)
        self.pool = pool or ("prefix" if causal else "time")
        require_choice("inorm pool", self.pool, ("prefix", "time"))
        self.shares = Shares(time="prefix" if self.pool == "prefix" else "sequence")

    @classmethod
    def stepwise_pool(cls, pool: str | None) -> str | None:
        return "prefix"

    def normalize(
        self, x_BTF: Tensor, mask_BT: Tensor | None = None, step: Step = 0, carry: Prefix | None = None
    ) -> tuple[Tensor, None, Prefix | None]:
        x = zero_padding(x_BTF, mask_BT)
        if self.pool == "time":
            mean, var, _ = moments(x, mask_BT, (1,))
            return self.standardize(x, mean, var), None, None
        if carry is None and fused.applies():
            weight, bias = self.weight, self.bias
            y, after = _by_prefix(for_statistics(x), mask_BT, self.eps, weight, bias)
            return y.to(x.dtype), None, after
        (mean, var, _), carry = prefix_moments(x, mask_BT, False, carry)
        return self.standardize(x, mean, var), None, carry

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pool={self.pool}"


def _by_prefix(
    x: Tensor, mask_BT: Tensor | None, eps: float, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Prefix]:
    keep = torch.ones_like(x[..., :1]) if mask_BT is None else mask_BT.unsqueeze(-1).to(x.dtype)
    count = keep.cumsum(1)
    pivot = first_entry(x, keep).detach()
    found: Any = _ByPrefix.apply(x, weight, bias, None if mask_BT is None else keep, pivot, count.clamp(min=1), eps)
    y, mean, var = found
    return y, Prefix(count[:, -1:], mean, var * count[:, -1:])


class _ByPrefix(torch.autograd.Function):
    """`standardize` with `prefix_moments`, in half the passes over the tensor."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        keep: Tensor | None,
        pivot: Tensor,
        divisor: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        sums = fused.RunningSums(x, 2)
        first, second = sums.terms
        torch.sub(x, pivot, out=first)
        if keep is not None:
            first.mul_(keep)
        torch.mul(first, first, out=second)
        sums.add_up()
        largest = torch.finfo(x.dtype).max
        # The last sum is the largest. Elsewhere than on a CPU, looking would wait for the device.
        ctx.overflown = x.device.type != "cpu" or not bool(second[:, -1].isfinite().all())
        beyond = ~second.isfinite() if ctx.overflown else None
        shift = first.div_(divisor)
        var = second.div_(divisor).addcmul_(shift, shift, value=-1).clamp_(min=0)
        if beyond is not None:
            var.masked_fill_(beyond, largest)
        last = (pivot + shift[:, -1:], var[:, -1:].clone())
        scale = var.add_(eps).rsqrt_()
        y = (x - pivot).sub_(shift).mul_(scale)
        if weight is not None:
            y.mul_(weight)
        if bias is not None:
            y.add_(bias)
        ctx.save_for_backward(x, weight, bias, keep, pivot, divisor, shift, scale, beyond)
        ctx.eps = eps
        return y, *last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, bias, keep, pivot, divisor, shift, scale, beyond = ctx.saved_tensors
        g, d_mean, d_var = grads
        y = (x - pivot).sub_(shift).mul_(scale)
        d_weight = None if weight is None else (g * y).sum((0, 1)).to(weight.dtype)
        d_bias = None if bias is None else g.sum((0, 1)).to(bias.dtype)
        d_x = g * scale
        if weight is not None:
            d_x.mul_(weight)
        sums = fused.RunningSums(x, 2)
        first, second = sums.terms
        torch.div(d_x, divisor, out=first)
        torch.mul(y.mul_(scale), first, out=second)
        first[:, -1:] -= d_mean / divisor[:, -1:]
        second[:, -1:] -= 2 * d_var / divisor[:, -1:]
        if beyond is not None:
            second.masked_fill_(beyond, 0)
        first.addcmul_(second, shift, value=-1)
        sums.add_up(reverse=True)
        torch.sub(x, pivot, out=y)
        first.addcmul_(y, second)
        if keep is not None:
            first.mul_(keep)
        return d_x.sub_(first), d_weight, d_bias, None, None, None, None
