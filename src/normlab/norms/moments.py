"""Mean and variance over any set of entries: masked, counted, in fp32, shared by all processes.

This is the only place where statistics are computed.

Shape suffixes: B batch, T time, F features, N groups of rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from normlab.norms import fused


class Moments(NamedTuple):
    """Statistics of one set of entries per element: `mean`, biased `var`, and `count` of valid entries (float)."""

    mean: Tensor
    var: Tensor
    count: Tensor


class Prefix(NamedTuple):
    """What came before, per row: `count` B x 1 x 1, `mean` and `square` (sum of squared deviations) B x 1 x F."""

    count: Tensor
    mean: Tensor
    square: Tensor


class _SumOverProcesses(torch.autograd.Function):
    """Sum of a tensor over all processes; its gradient is the sum of theirs, since each process used the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def several_processes() -> bool:
    """Whether statistics of batch norms are shared with other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_processes(x: Tensor) -> Tensor:
    """The sum of `x` over all processes, with gradient; `x` itself where there is one."""
    if not several_processes():
        return x
    total = _SumOverProcesses.apply(x)
    assert isinstance(total, Tensor)
    return total


def for_statistics(x: Tensor) -> Tensor:
    """`x` in the precision of statistics: fp64 stays, everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def zero_padding(x_BTF: Tensor, mask_BT: Tensor | None) -> Tensor:
    """`x_BTF` with zeros where `mask_BT` is False, so that NaN there reaches neither values nor gradients."""
    return x_BTF if mask_BT is None else torch.where(mask_BT.unsqueeze(-1), x_BTF, 0)


def moments(
    x: Tensor, mask_BT: Tensor | None, dims: tuple[int, ...], *, center: bool = True, synchronize: bool = False
) -> Moments:
    """Moments of `x` over `dims` (kept with size 1), in two passes.

    Args:
        x: B x T x F (any shape if `mask_BT` is None), 0 at padding (see `zero_padding`).
        mask_BT: True = real entry; None = all are. With a mask, `dims` are among 0 and 1.
        dims: the dimensions whose entries share statistics.
        center: False gives mean 0 and var = E[x^2], the mean square.
        synchronize: pool over all processes too, with gradient.
    """
    x = for_statistics(x)
    synchronize = synchronize and several_processes()
    keep = None if mask_BT is None else mask_BT.unsqueeze(-1).to(x.dtype)
    entries = 1
    for dim in dims:
        entries *= x.shape[dim]
    count = x.new_full((1,) * x.ndim, entries) if keep is None else keep.sum(dims, keepdim=True)
    if synchronize:
        count = sum_over_processes(count)
    several = _Moments.apply if fused.applies() else _moments
    mean, var = several(x, keep, count.clamp(min=1), dims, center, synchronize)
    return Moments(mean, var, count)


def _moments(
    x: Tensor, keep: Tensor | None, divisor: Tensor, dims: tuple[int, ...], center: bool, synchronize: bool
) -> tuple[Tensor, Tensor]:
    """Mean and variance of `x`, which is 0 wherever `keep` is 0."""

    def total(values: Tensor) -> Tensor:
        summed = values.sum(dims, keepdim=True)
        return sum_over_processes(summed) if synchronize else summed

    if not center:
        var = total(x.square()) / divisor
        return torch.zeros_like(var), var
    mean = total(x) / divisor
    deviation = x - mean if keep is None else (x - mean) * keep
    return mean, total(deviation.square()) / divisor


class _Moments(torch.autograd.Function):
    """`_moments`, of which backward needs no more than `x` and the mean."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor | None, divisor: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
        mean, var = _moments(x, keep, divisor, *how)
        ctx.save_for_backward(x, keep, divisor, mean)
        _, ctx.center, ctx.synchronize = how
        return mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, keep, divisor, mean = ctx.saved_tensors
        both = torch.stack(grads) / divisor
        d_mean, d_var = sum_over_processes(both) if ctx.synchronize else both
        # The deviations sum to 0, so the variance does not feel the mean move.
        d_x = torch.addcmul(d_mean, x - mean, 2 * d_var) if ctx.center else x * (2 * d_var)
        return d_x if keep is None else d_x * keep, None, None, None, None, None


def grouped_moments(
    x_BTF: Tensor,
    mask_BT: Tensor | None,
    group_B: Tensor,
    groups: int,
    *,
    center: bool = True,
    synchronize: bool = False,
) -> Moments:
    """Moments over the rows of each group, per column: mean and var N x T x F, count N x T x 1.

    Args:
        group_B: the group of each row, in [0, groups).
        groups: number of groups, the same in every process if `synchronize`.
        center: as in `moments`.
    """
    x = zero_padding(for_statistics(x_BTF), mask_BT)
    keep_BT1 = torch.ones_like(x[..., :1]) if mask_BT is None else mask_BT.unsqueeze(-1).to(x.dtype)

    def total(values: Tensor) -> Tensor:
        summed = values.new_zeros((groups, *values.shape[1:])).index_add(0, group_B, values)
        return sum_over_processes(summed) if synchronize else summed

    count = total(keep_BT1)
    divisor = count.clamp(min=1)
    mean = total(x) / divisor if center else torch.zeros_like(x[:1])
    deviation = torch.where(keep_BT1 > 0, x - mean[group_B], 0) if center else x
    return Moments(mean.expand(groups, -1, -1), total(deviation.square()) / divisor, count)


def finite_square(x: Tensor) -> Tensor:
    """x^2, the largest finite number where that is beyond it: so that a weight of 0 times it is 0, and not NaN."""
    return x.square().clamp(max=torch.finfo(x.dtype).max)


def pooled(parts: Moments, dim: int) -> Moments:
    """One set of moments from the `parts` along `dim` (kept with size 1), by the law of total variance."""
    count = parts.count.sum(dim, keepdim=True)
    divisor = count.clamp(min=1)
    mean = (parts.count * parts.mean).sum(dim, keepdim=True) / divisor
    var = (parts.count * (parts.var + finite_square(parts.mean - mean))).sum(dim, keepdim=True) / divisor
    return Moments(mean, var, count)


def _next_moments(x_B1F: Tensor, keep_B11: Tensor, carry: Prefix) -> Moments:
    """One more column (Welford 1962): what a recurrence asks for at every time step."""
    count = carry.count + keep_B11
    divisor = count.clamp(min=1)
    deviation = (x_B1F - carry.mean) * keep_B11
    mean = carry.mean + deviation / divisor
    return Moments(mean, (carry.square + deviation * (x_B1F - mean)) / divisor, count)


def first_entry(x: Tensor, keep_BT1: Tensor) -> Tensor:
    """The first valid entry of each row, B x 1 x F."""
    first_B = keep_BT1.squeeze(-1).argmax(1)
    return x[torch.arange(len(x), device=x.device), first_B].unsqueeze(1)


def _cumulative_moments(x: Tensor, keep_BT1: Tensor, carry: Prefix | None) -> Moments:
    """Sums run over deviations from a pivot (the mean so far, else the row's first entry), so that a mean far
    from zero does not cancel the variance. The result does not depend on the pivot, hence neither does the gradient.
    """
    count = keep_BT1.cumsum(1)
    pivot = first_entry(x, keep_BT1)
    if carry is not None:
        pivot = torch.where(carry.count > 0, carry.mean, pivot)
    pivot = pivot.detach()
    if carry is None and fused.applies():
        mean, var = _CumulativeMoments.apply(x, keep_BT1, pivot, count.clamp(min=1))
        return Moments(mean, var, count)
    deviation = (x - pivot) * keep_BT1
    first, second = fused.running_sum(deviation), fused.running_sum(deviation.square())
    if carry is not None:
        before = carry.mean - pivot
        count = count + carry.count
        first = first + carry.count * before
        second = second + carry.square + carry.count * before.square()
    divisor = count.clamp(min=1)
    shift = first / divisor
    # Where the sum of squares has left its precision, inf - inf would be NaN; any statistic that large gives 0.
    var = torch.where(second.isfinite(), second / divisor - shift.square(), torch.finfo(x.dtype).max)
    return Moments(pivot + shift, var.clamp(min=0), count)


class _CumulativeMoments(torch.autograd.Function):
    """Mean and variance of all up to each time step, as `_cumulative_moments` has them; `divisor` is their number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, pivot: Tensor, divisor: Tensor) -> tuple[Tensor, Tensor]:
        deviation = (x - pivot).mul_(keep)
        shift = fused.running_sum(deviation).div_(divisor)
        second = fused.running_sum(deviation.square_())
        var = torch.addcmul(second / divisor, shift, shift, value=-1)
        # The last sum is the largest. Elsewhere than on a CPU, looking would wait for the device.
        ctx.overflown = second.device.type != "cpu" or not bool(second[:, -1].isfinite().all())
        if ctx.overflown:
            var = torch.where(second.isfinite(), var, torch.finfo(x.dtype).max)
        var.clamp_(min=0)
        mean = shift.add_(pivot)
        ctx.save_for_backward(x, keep, pivot, divisor, mean, var)
        return mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, keep, pivot, divisor, mean, var = ctx.saved_tensors
        d_mean, d_var = grads
        d_second = d_var / divisor
        if ctx.overflown:  # nothing is felt of a variance that was put there
            d_second = torch.where(var < torch.finfo(var.dtype).max, d_second, 0)
        d_first = torch.addcmul(d_mean / divisor, mean - pivot, d_second, value=-2)
        later_first, later_second = (fused.running_sum(value, reverse=True) for value in (d_first, d_second))
        return torch.addcmul(later_first, x - pivot, later_second, value=2) * keep, None, None, None


def prefix_moments(
    x_BTF: Tensor, mask_BT: Tensor | None, over_batch: bool, carry: Prefix | None, *, center: bool = True
) -> tuple[Moments, Prefix]:
    """Moments of everything up to and including each column: causal, cumulative over time.

    Args:
        x_BTF: finite at padding (see `zero_padding`).
        over_batch: pool the rows of all processes too (mean 1 x T x F), else one set per row (mean B x T x F).
        center: as in `moments`; False needs `over_batch`, whose pooling adds the rows' own means back.
        carry: what came before `x_BTF`; None for nothing.

    Returns:
        The moments and the carry for the columns to come.
    """
    x = for_statistics(x_BTF)
    keep_BT1 = torch.ones_like(x[..., :1]) if mask_BT is None else mask_BT.unsqueeze(-1).to(x.dtype)
    if carry is not None and x.shape[1] == 1:
        per_row = _next_moments(x, keep_BT1, carry)
    else:
        per_row = _cumulative_moments(x, keep_BT1, carry)
    mean, var, count = per_row
    after = Prefix(count[:, -1:], mean[:, -1:], var[:, -1:] * count[:, -1:])
    if not over_batch:
        return per_row, after

    def total(values: Tensor) -> Tensor:
        return sum_over_processes(values.sum(0, keepdim=True))

    rows = total(count)
    divisor = rows.clamp(min=1)
    joint = total(count * mean) / divisor if center else torch.zeros_like(mean[:1])
    return Moments(joint, total(count * (var + finite_square(mean - joint))) / divisor, rows), after


def longest(columns: int, device: torch.device) -> int:
    """The largest number of columns in any process: those that share statistics per column must all take every one."""
    found = torch.tensor(columns, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def processes_with(flag: bool, device: torch.device) -> tuple[int, int]:
    """In how many processes `flag` is True, and how many there are; all must call it."""
    if not several_processes():
        return int(flag), 1
    count = torch.tensor(int(flag), device=device)
    dist.all_reduce(count)
    return int(count), dist.get_world_size()


def distinct_steps(step_B: Tensor) -> Tensor:
    """The distinct time steps among the rows of all processes, ascending."""
    distinct = torch.unique(step_B)
    if several_processes():
        everyones: list[list[int]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyones, distinct.tolist())
        distinct = torch.tensor(sorted(set().union(*everyones)), device=step_B.device)
    return distinct
