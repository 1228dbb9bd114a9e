"""Batch normalization with stored statistics for each time step (Cooijmans et al. 2016, arXiv 1603.09025)."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from normlab.norms.base import Norm, Step
from normlab.norms.moments import Moments, Prefix, distinct_steps, grouped_moments, moments, zero_padding


@final
class StepBatchNorm(Norm):
    """y = (x - mean_t) / sqrt(var_t + eps) * weight + bias over the rows at time step t; weight and bias serve all t.

    Stored values: one set per time step t < `max_steps`; later time steps share the last. In evaluation a time step
    never updated takes the nearest earlier one that was. A time step with a single row has no variance: it takes the
    stored values in training too, and updates nothing.

    Args:
        momentum: weight of the newest batch in the stored values of the step with most rows; a step with fewer rows
            counts in proportion. The first update of a step takes the batch's values whole.
        max_steps: number of stored sets.
        unbiased: store the Bessel-corrected variance.
    """

    formula = "(x - mean_B,t) / sqrt(var_B,t + eps) * weight + bias"
    scale_invariant = True
    shift_invariant = True
    batch_independent = False
    needs_statistics = True
    works_at_batch_1 = False
    per_step = True
    recurrent_gain = 0.1

    running_mean: Tensor
    running_var: Tensor
    seen: Tensor

    def __init__(
        self,
        dim: int,
        *,
        affine: bool = True,
        bias: bool = True,
        gain: float = 1.0,
        eps: float = 1e-5,
        momentum: float = 0.1,
        max_steps: int = 512,
        unbiased: bool = False,
    ) -> None:
        super().__init__(dim, affine=affine, bias=bias, gain=gain, eps=eps)
        self.momentum, self.max_steps, self.unbiased = momentum, max_steps, unbiased
        self.register_buffer("running_mean", torch.zeros(max_steps, dim))
        self.register_buffer("running_var", torch.ones(max_steps, dim))
        self.register_buffer("seen", torch.zeros(max_steps, dtype=torch.bool))

    def normalize(
        self, x_BTF: Tensor, mask_BT: Tensor | None = None, step: Step = 0, carry: Prefix | None = None
    ) -> tuple[Tensor, Moments | None, None]:
        """As `Norm.normalize`. With a step per row, there are statistics per column and distinct step: T x N x F."""
        x = zero_padding(x_BTF, mask_BT)
        columns = x.shape[1]
        if not self.training:
            mean, var = self._stored(step, columns)
            return self.standardize(x, mean, var), None, None
        self.require_rows(x, len(x))
        if isinstance(step, int):
            batch = moments(x, mask_BT, (0,), synchronize=True)
            rows = Moments(*batch)
        else:
            distinct_N = distinct_steps(step)
            group_B = torch.searchsorted(distinct_N, step)
            batch = grouped_moments(x, mask_BT, group_B, len(distinct_N), synchronize=True)
            rows = Moments(batch.mean[group_B], batch.var[group_B], batch.count[group_B])
        mean, var = rows.mean, rows.var
        if mask_BT is not None or not isinstance(step, int):
            stored_mean, stored_var = self._stored(step, columns)
            mean = torch.where(rows.count > 1, mean, stored_mean)
            var = torch.where(rows.count > 1, var, stored_var)
        to_store = Moments(
            batch.mean.detach().transpose(0, 1),
            batch.var.detach().transpose(0, 1),
            batch.count.expand(-1, columns, 1).squeeze(-1).transpose(0, 1),
        )
        if isinstance(step, int):
            to_store = Moments(*(value.squeeze(1) for value in to_store))
        return self.standardize(x, mean, var), to_store, None

    @torch.no_grad()
    def store(self, statistics: Moments, step: Step = 0) -> None:
        """Statistics T x F with an int `step`; T x N x F with N distinct steps among the rows."""
        columns = torch.arange(len(statistics.mean), device=statistics.mean.device)
        time = columns + step if isinstance(step, int) else columns.unsqueeze(1) + distinct_steps(step)
        slot = time.clamp(max=self.max_steps - 1).flatten()
        mean, var = statistics.mean.reshape(-1, self.dim), statistics.var.reshape(-1, self.dim)
        # A single row has no variance, so it counts for nothing.
        weight = (statistics.count * (statistics.count > 1)).reshape(-1, 1)

        # Several time steps may share a slot: pool them first (law of total variance).
        def total(values: Tensor) -> Tensor:
            return values.new_zeros((self.max_steps, values.shape[-1])).index_add(0, slot, values)

        count = total(weight)
        divisor = count.clamp(min=1)
        joint = total(weight * mean) / divisor
        spread = total(weight * (var + (mean - joint[slot]).square())) / divisor
        if self.unbiased:
            spread = spread * count / (count - 1).clamp(min=1)
        # Rows per step, not entries, say how much a slot has learnt: the shared last slot is no more than full.
        largest = weight.max().clamp(min=1)
        rate = torch.where(self.seen.unsqueeze(-1), self.momentum * (count / largest).clamp(max=1), 1.0) * (count > 0)
        self.running_mean.add_((joint - self.running_mean) * rate)
        self.running_var.add_((spread - self.running_var) * rate)
        self.seen.logical_or_(count.squeeze(-1) > 0)

    def _stored(self, step: Step, columns: int) -> tuple[Tensor, Tensor]:
        """Stored mean and var for `columns` time steps from `step` on: (1 or B) x T x F."""
        index = torch.arange(self.max_steps, device=self.seen.device)
        nearest = torch.where(self.seen, index, 0).cummax(0).values
        first = torch.as_tensor(step, device=self.seen.device).reshape(-1, 1)
        slot = nearest[(first + torch.arange(columns, device=self.seen.device)).clamp(max=self.max_steps - 1)]
        return self.running_mean[slot], self.running_var[slot]

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, max_steps={self.max_steps}, momentum={self.momentum:g}, unbiased={self.unbiased}"
        )
