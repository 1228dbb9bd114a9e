"""What norms do to whole tensors, with backward passes written by hand: autograd's own read and write the tensor two to
five times as often. Each has its plain form beside it, which says what it computes and serves where a hand-written
backward cannot: under torch.compile (which fuses by itself), torch.func and forward-mode differentiation.

Backward passes are made of operators that have derivatives themselves, so second derivatives are exact too.

Shape suffixes: B batch, T time, F features.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["RunningSums", "applies", "local_response", "rescale", "running_sum"]


def applies() -> bool:
    """Whether a hand-written backward pass can serve."""
    return not (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0  # pyright: ignore[reportAttributeAccessIssue]
    )


def rescale(x: Tensor, mean: Tensor | None, scale: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """(x - mean) * scale * weight + bias, where all others broadcast to `x`; None = without."""
    if applies():
        y: Any = _Rescale.apply(x, mean, scale, weight, bias)
        return y
    y = x if mean is None else x - mean
    y = y * scale if weight is None else y * scale * weight
    return y if bias is None else y + bias


class _Rescale(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor | None, scale: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, mean, scale, weight, bias)
        y = x * scale if mean is None else (x - mean).mul_(scale)
        if weight is not None:
            y.mul_(weight)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,) = grads
        x, mean, scale, weight, bias = ctx.saved_tensors
        needs_x, needs_mean, needs_scale, needs_weight, needs_bias = ctx.needs_input_grad
        d_mean = d_scale = d_weight = d_bias = None
        d_x = (g * scale if weight is None else g * weight * scale) if needs_x or needs_mean else None
        if needs_mean and d_x is not None:
            d_mean = -d_x.sum_to_size(mean.shape)
        if needs_scale or needs_weight:
            product = g * (x if mean is None else x - mean)
            if needs_scale:
                d_scale = (product if weight is None else product * weight).sum_to_size(scale.shape)
            if needs_weight and weight is not None:
                d_weight = (product * scale).sum_to_size(weight.shape).to(weight.dtype)
        if needs_bias and bias is not None:
            d_bias = g.sum_to_size(bias.shape).to(bias.dtype)
        return d_x, d_mean, d_scale, d_weight, d_bias


def running_sum(x_BTF: Tensor, *, reverse: bool = False) -> Tensor:
    """Cumulative sum over time; `reverse` sums what is to come."""
    if applies():
        y: Any = _RunningSum.apply(x_BTF, reverse)
        return y
    return x_BTF.flip(1).cumsum(1).flip(1) if reverse else x_BTF.cumsum(1)


class _RunningSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, reverse: bool) -> Tensor:
        ctx.reverse = reverse
        sums = RunningSums(x, 1)
        sums.terms[0].copy_(x)
        return sums.add_up(reverse=reverse)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return running_sum(grads[0], reverse=not ctx.reverse), None


class RunningSums:
    """Room for tensors like `x_BTF`, to be filled by the caller and then summed over time in place, all together.

    In blocks of time steps, all blocks at once: on a CPU torch.cumsum over a middle dimension takes four times as
    long. The sums are also shorter, hence more accurate. Without gradient.

    Attributes:
        terms: the room, one tensor after the other in its first dimension.
    """

    BLOCK = 16

    def __init__(self, x_BTF: Tensor, tensors: int) -> None:
        rows, steps, features = x_BTF.shape
        self._in_blocks = not x_BTF.is_cuda and steps > self.BLOCK
        blocks = -(-steps // self.BLOCK) if self._in_blocks else 1
        whole = x_BTF.new_empty(tensors, rows, blocks, self.BLOCK if self._in_blocks else steps, features)
        self._blocks = whole.flatten(0, 1)
        padded = whole.flatten(2, 3)
        padded[:, :, steps:] = 0
        self.terms = padded[:, :, :steps]

    def add_up(self, *, reverse: bool = False) -> Tensor:
        """The sums, in the place of `terms`."""
        if not self._in_blocks:
            terms = self.terms
            return terms.copy_(terms.flip(2).cumsum(2).flip(2) if reverse else terms.cumsum(2))
        inside = self._blocks
        places = inside.unbind(2)[:: -1 if reverse else 1]
        for place, next_place in pairwise(places):
            next_place.add_(place)  # `+=` on an indexed tensor would copy it onto itself
        totals = places[-1]
        # Of the other blocks alone: what a block holds, taken in and out again, would leave its rounding, or a NaN.
        if reverse:
            inside[:, :-1].add_(totals[:, 1:].flip(1).cumsum(1).flip(1).unsqueeze(2))
        else:
            inside[:, 1:].add_(totals[:, :-1].cumsum(1).unsqueeze(2))
        return self.terms


def local_response(x: Tensor, window: int, alpha: float, beta: float, k: float) -> Tensor:
    """x / (k + alpha * mean(x^2 over the `window` features around each one))^beta, with zeros beyond the ends."""
    if applies():
        y: Any = _LocalResponse.apply(x, window, alpha, beta, k)
        return y
    return x * _inverse_power(_damping(x, window, alpha, k), beta)


def _damping(x: Tensor, window: int, alpha: float, k: float) -> Tensor:
    return _window_sum(x.square(), window // 2, (window - 1) // 2).mul_(alpha / window).add_(k)


def _inverse_power(x: Tensor, beta: float) -> Tensor:
    """x^-beta; for the published beta by roots, in half the time of a general power."""
    if beta != 0.75:
        return x**-beta
    return x.rsqrt() * x.sqrt().rsqrt()  # the root of x.rsqrt() would have no derivative where x is infinite


def _window_sum(x: Tensor, before: int, after: int) -> Tensor:
    """Of each entry and so many `before` and `after` it along the last dimension: torch.nn.functional.avg_pool1d, on a
    CPU, takes ten times as long.
    """
    total, features = x.clone(), x.shape[-1]
    for distance in range(1, min(max(before, after), features - 1) + 1):
        if distance <= before:
            total[..., distance:] += x[..., : features - distance]
        if distance <= after:
            total[..., : features - distance] += x[..., distance:]
    return total


class _LocalResponse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, window: int, alpha: float, beta: float, k: float) -> Tensor:
        damping = _damping(x, window, alpha, k)
        power = _inverse_power(damping, beta)
        ctx.window, ctx.alpha, ctx.beta, ctx.k = window, alpha, beta, k
        ctx.save_for_backward(x, damping, power)
        return x * power

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x, damping, power), (g,) = ctx.saved_tensors, grads
        if torch.is_grad_enabled():  # for second derivatives both depend on x
            damping = _damping(x, ctx.window, ctx.alpha, ctx.k)
            power = _inverse_power(damping, ctx.beta)
        scaled = g * power
        # Entry f is in the windows of as many features after it as it has before it in its own.
        felt = _window_sum(scaled * x / damping, (ctx.window - 1) // 2, ctx.window // 2)
        return torch.addcmul(scaled, x, felt, value=-2 * ctx.alpha * ctx.beta / ctx.window), None, None, None, None
