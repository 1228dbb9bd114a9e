"""A tensor standardized by statistics of its own, in one function with a backward pass by hand: that takes half as many
passes over the tensor as `moments` and `rescale` one after the other. Those are the plain form beside each: it says
what is computed, has the second derivatives, and serves where a hand-written backward cannot (`fused.applies`).

Shape suffixes: B batch, T time, F features.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normlab.norms import fused, kernels
from normlab.norms.moments import Prefix, first_entry, moments, prefix_moments, zero_padding

__all__ = ["by_last_dimension", "by_prefix"]


def by_last_dimension(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias, mean and variance over the last dimension of `x`.

    Args:
        x: any shape, in the precision of statistics.
        weight: None = without; broadcasts to `x`, as `bias` does.
    """
    if not fused.applies():
        return _by_last_dimension(x, weight, bias, eps)
    y: Any = _ByLastDimension.apply(x, weight, bias, eps)
    return y


def _by_last_dimension(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    mean, var, _ = moments(x, None, (-1,))
    return fused.rescale(x, mean, torch.rsqrt(var + eps), weight, bias)


class _ByLastDimension(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        deviation = x - x.mean(-1, keepdim=True)
        scale = deviation.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        unit = deviation.mul_(scale)
        ctx.save_for_backward(x, weight, bias, unit, scale)
        ctx.eps = eps
        y = unit.clone() if weight is None else unit * weight
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, bias, unit, scale = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _gradients_of(_by_last_dimension, ctx, (x, weight, bias, ctx.eps), grads)
        (g,) = grads
        product = g * unit
        d_weight = None if weight is None else product.sum_to_size(weight.shape).to(weight.dtype)
        d_bias = None if bias is None else g.sum_to_size(bias.shape).to(bias.dtype)
        d_unit = g.clone() if weight is None else g * weight
        along = (product if weight is None else product.mul_(weight)).mean(-1, keepdim=True)
        d_x = d_unit.sub_(d_unit.mean(-1, keepdim=True)).addcmul_(unit, along, value=-1).mul_(scale)
        return d_x, d_weight, d_bias, None


def by_prefix(
    x_BTF: Tensor,
    mask_BT: Tensor | None,
    carry: Prefix | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Prefix]:
    """(x - mean) / sqrt(var + eps) * weight + bias with the `prefix_moments` of each row and feature.

    Args:
        x_BTF: in the precision of statistics; anything at padding.
        weight: F, as `bias`; None = without.

    Returns:
        y and the carry for the columns to come.
    """
    library = _library(x_BTF, mask_BT, carry, weight, bias)
    if library is not None:
        found: Any = _ByPrefixOnKernels.apply(x_BTF, weight, bias, mask_BT, carry, eps, library)
    elif carry is None and fused.applies():
        found = _ByPrefix.apply(zero_padding(x_BTF, mask_BT), weight, bias, mask_BT, eps)
    else:
        return _by_prefix(x_BTF, mask_BT, carry, weight, bias, eps)
    y, *after = found
    return y, Prefix(*after)


def _library(
    x: Tensor, mask_BT: Tensor | None, carry: Prefix | None, weight: Tensor | None, bias: Tensor | None
) -> ctypes.CDLL | None:
    """The kernels where they can serve; built only where a gradient is wanted."""
    # A recurrence that asks for column after column has the statistics so far in its carry: nothing is left to sum.
    if x.device.type != "cpu" or x.shape[1] < 2 or not x.numel() or not fused.applies():
        return None
    if carry is not None and any(value.requires_grad for value in carry):
        return None
    if mask_BT is not None and mask_BT.dtype != torch.bool:
        return None  # the kernels would read other bytes than are meant; torch operators refuse such a mask
    gradient = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (x, weight, bias))
    return (kernels.PREFIX.load if gradient else kernels.PREFIX.find)(x.dtype)


def _by_prefix(
    x: Tensor,
    mask_BT: Tensor | None,
    carry: Prefix | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Prefix]:
    x = zero_padding(x, mask_BT)
    (mean, var, _), after = prefix_moments(x, mask_BT, False, carry)
    return fused.rescale(x, mean, torch.rsqrt(var + eps), weight, bias), after


class _ByPrefix(torch.autograd.Function):
    """Sums run over deviations from a pivot, as in `prefix_moments`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mask_BT: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        keep = torch.ones_like(x[..., :1]) if mask_BT is None else mask_BT.unsqueeze(-1).to(x.dtype)
        count = keep.cumsum(1)
        divisor = count.clamp(min=1)
        pivot = first_entry(x, keep)
        sums = fused.RunningSums(x, 2)
        first, second = sums.terms
        torch.sub(x, pivot, out=first)
        if mask_BT is not None:
            first.mul_(keep)
        torch.mul(first, first, out=second)
        sums.add_up()
        # The last sum is the largest. Elsewhere than on a CPU, looking would wait for the device.
        overflown = x.device.type != "cpu" or not bool(second[:, -1].isfinite().all())
        beyond = ~second.isfinite() if overflown else None
        shift = first.div_(divisor)
        var = second.div_(divisor).addcmul_(shift, shift, value=-1).clamp_(min=0)
        if beyond is not None:
            var.masked_fill_(beyond, torch.finfo(x.dtype).max)
        after = (count[:, -1:].clone(), pivot + shift[:, -1:], var[:, -1:] * count[:, -1:])
        scale = var.add_(eps).rsqrt_()
        y = (x - pivot).sub_(shift).mul_(scale)
        if weight is not None:
            y.mul_(weight)
        if bias is not None:
            y.add_(bias)
        ctx.save_for_backward(x, weight, bias, mask_BT, keep, pivot, divisor, shift, scale, beyond)
        ctx.eps = eps
        ctx.mark_non_differentiable(after[0])
        return y, *after

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, bias, mask_BT, keep, pivot, divisor, shift, scale, beyond = ctx.saved_tensors
        g, _, d_mean, d_square = grads
        if torch.is_grad_enabled():
            return (*_by_prefix_twice(ctx, (x, weight, bias), mask_BT, None, (g, d_mean, d_square)), None, None)
        unit = (x - pivot).sub_(shift).mul_(scale)
        sums = fused.RunningSums(x, 2)
        first, second = sums.terms
        d_weight = None if weight is None else torch.mul(g, unit, out=second).sum((0, 1)).to(weight.dtype)
        d_bias = None if bias is None else g.sum((0, 1)).to(bias.dtype)
        d_x = g * scale if weight is None else (g * scale).mul_(weight)
        # What the first and second sums of each time step feel, with the sign turned (and twice, for the second).
        torch.div(d_x, divisor, out=first)
        torch.mul(unit.mul_(scale), first, out=second)
        first[:, -1:] -= d_mean / divisor[:, -1:]
        second[:, -1:] -= 2 * d_square * (keep.sum(1, keepdim=True) > 0)
        if beyond is not None:  # nothing is felt of a variance that was put there
            second.masked_fill_(beyond, 0)
        first.addcmul_(second, shift, value=-1)
        sums.add_up(reverse=True)
        first.addcmul_(torch.sub(x, pivot, out=unit), second)
        if mask_BT is not None:
            first.mul_(keep)
        return d_x.sub_(first), d_weight, d_bias, None, None


class _ByPrefixOnKernels(torch.autograd.Function):
    """The same in C, in one pass over time each way. What is at padding is not read, and `carry` has no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mask_BT: Tensor | None,
        carry: Prefix | None,
        eps: float,
        library: ctypes.CDLL,
    ) -> tuple[Tensor, ...]:
        y, *after = kernels.PrefixCall(library, x, mask_BT, carry, weight, bias, eps).forward()
        ctx.save_for_backward(x, weight, bias, mask_BT, *(carry or ()))
        ctx.eps, ctx.library = eps, library
        ctx.mark_non_differentiable(after[0])
        return y, *after

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, bias, mask_BT, *before = ctx.saved_tensors
        carry = Prefix(*before) if before else None
        d_y, _, d_mean, d_square = grads
        if torch.is_grad_enabled():
            found = _by_prefix_twice(ctx, (x, weight, bias), mask_BT, carry, (d_y, d_mean, d_square))
        else:
            call = kernels.PrefixCall(ctx.library, x, mask_BT, carry, weight, bias, ctx.eps)
            found = call.backward(d_y, d_mean, d_square)
        return *found, None, None, None, None


def _by_prefix_twice(
    ctx: Any,
    inputs: tuple[Tensor, Tensor | None, Tensor | None],
    mask_BT: Tensor | None,
    carry: Prefix | None,
    grads: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor | None, ...]:
    """The gradients of `inputs` (x, weight and bias), which have derivatives themselves."""

    def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        y, (_, mean, square) = _by_prefix(x, mask_BT, carry, weight, bias, ctx.eps)
        return y, mean, square

    return _gradients_of(plain, ctx, inputs, grads)


def _gradients_of(
    plain: Callable[..., Any], ctx: Any, inputs: tuple[Any, ...], grads: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of `plain(*inputs)`, which have derivatives themselves; None where no gradient is needed."""
    found: list[Tensor | None] = [None] * len(inputs)
    wanted = [place for place in range(len(inputs)) if ctx.needs_input_grad[place]]
    sought = torch.autograd.grad(plain(*inputs), [inputs[place] for place in wanted], grads, create_graph=True)
    for place, value in zip(wanted, sought, strict=True):
        found[place] = value
    return tuple(found)
