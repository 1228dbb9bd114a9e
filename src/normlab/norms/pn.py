"""PowerNorm (Shen et al. 2020, arXiv 2003.07845): running quadratic mean in the forward pass, approximate backward."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from normlab.norms.base import Shares, Step
from normlab.norms.batch_statistics import BatchStatisticsNorm, as_it_stands, require_groups, scale_groups
from normlab.norms.moments import Moments, for_statistics, sum_over_processes


class _PowerFunction(torch.autograd.Function):
    """x * scale; backward as algorithm 2 of the paper, which also gathers what the running product `nu` moves by.

    All tensors may have further dimensions in front, of independent runs; `nu` then broadcasts to `x`.
    """

    @staticmethod
    def forward(x: Tensor, scale: Tensor, keep: Tensor, nu: Tensor, gathered: Tensor) -> Tensor:
        return x * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, scale, keep, ctx.nu, ctx.gathered = inputs
        ctx.save_for_backward(output, scale, keep)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        y, scale, keep = ctx.saved_tensors
        grad = torch.where(keep > 0, grads[0], 0)
        grad_x = (grad - ctx.nu * y) * scale * keep
        count = keep.sum((-3, -2)).expand_as(ctx.gathered[..., 0, :])
        totals = torch.stack([(grad * y).sum((-3, -2)), (keep * y.square()).sum((-3, -2)), count], -2)
        ctx.gathered.add_(sum_over_processes(totals))
        return grad_x, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Tensor, int]:
        """For torch.vmap: the mapped dimension in front."""
        x, scale, keep, nu, gathered = (
            value.unsqueeze(0) if dim is None else value.movedim(dim, 0)
            for value, dim in zip(inputs, in_dims, strict=True)
        )
        y: Any = _PowerFunction.apply(x, scale, keep, nu.unflatten(0, (-1, 1, 1)), gathered)
        return y, 0


@final
class PowerNorm(BatchStatisticsNorm):
    """y = x / psi * weight + bias, psi^2 = the running mean square + eps, in training too.

    Backward, with hat = x / psi and g = dL/dhat: dL/dx = (g - nu * hat) / psi, then
    nu <- nu * (1 - momentum * mean(hat^2)) + momentum * mean(g * hat), means over all valid entries of the sequence (in
    a recurrence of all its time steps); nu moves when the next sequence is stored. This is not the derivative of the
    forward pass. For the first `warmup` updates psi is that of the batch (as `pnv`; backward as always). The authors'
    code divides by the batch's psi in backward; the paper, and this class, by the one of the forward pass. Second
    derivatives are not to be had. `shares` is that of the warm-up; later no row sees another.

    Args:
        warmup: updates with the batch's own mean square (theirs: 4,000 or more; the default is for runs of hundreds
            of steps).
        group_scaling: as in `pnv`.
        shared: arguments of `BatchStatisticsNorm`; ghost_rows and memory_batches concern the warm-up alone.
    """

    formula = "x / sqrt(running mean(x^2) + eps) * weight + bias"
    paper = "Shen et al. 2020, arXiv 2003.07845"
    scale_invariant = False
    shift_invariant = False
    exact_gradient = False
    centered = False
    fixed_options = frozenset({"unbiased"})  # a mean square has no Bessel correction

    nu: Tensor
    gathered: Tensor
    updates: Tensor

    def __init__(self, dim: int, *, warmup: int = 100, group_scaling: int | None = None, **shared: Any) -> None:
        super().__init__(dim, **shared)
        self.warmup, self.group_scaling = warmup, require_groups(self.name, dim, group_scaling)
        if warmup == 0:
            self.shares = Shares()
        if group_scaling is not None:
            self.shares = self.shares._replace(features="group")
            self.scale_invariant = True
        self.register_buffer("nu", torch.zeros(dim))
        self.register_buffer("gathered", torch.zeros(3, dim))  # sums of g * hat, of hat^2, and their count
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def prepare(self, x: Tensor) -> Tensor:
        return x if self.group_scaling is None else scale_groups(x, self.group_scaling, self.eps)

    def transform(self, x: Tensor, mask_BT: Tensor | None, batch: Moments) -> Tensor:
        x_hat = for_statistics(x)
        square = torch.where(as_it_stands(self.updates) < self.warmup, batch.var.detach(), self.stored_var)
        keep = torch.ones_like(x_hat[..., :1]) if mask_BT is None else mask_BT.unsqueeze(-1).to(x_hat.dtype)
        x_hat = _PowerFunction.apply(x_hat, torch.rsqrt(square + self.eps), keep, self.nu, self.gathered)
        return self.gain_and_bias(x_hat, x.dtype)  # pyright: ignore[reportArgumentType]

    def update(self, statistics: Moments, step: Step) -> None:
        super().update(statistics, step)
        self.updates.copy_(as_it_stands(self.updates) + 1)
        product, square, count = self.gathered
        rate = self.momentum / count.clamp(min=1)
        moved = self.nu * (1 - rate * square) + rate * product
        self.nu.copy_(torch.where(moved.isfinite(), moved, self.nu))
        self.gathered.zero_()

    def extra_repr(self) -> str:
        scaling = "" if self.group_scaling is None else f", group_scaling={self.group_scaling}"
        return f"{super().extra_repr()}, warmup={self.warmup}{scaling}"
