"""Batch normalization with stored statistics for each time step (Cooijmans et al. 2016, arXiv 1603.09025)."""

from __future__ import annotations

from typing import Any, Literal, final

import torch
from torch import Tensor

from normlab.config import require_choice
from normlab.norms.base import Step
from normlab.norms.batch_statistics import BatchStatisticsNorm, as_it_stands
from normlab.norms.moments import Moments, Prefix, distinct_steps, finite_square, grouped_moments


@final
class StepBatchNorm(BatchStatisticsNorm):
    """y = (x - mean_t) / sqrt(var_t + eps) * weight + bias over the rows at time step t; weight and bias serve all t.

    Stored values: one set per time step t < `max_steps`, then as `beyond` says. In evaluation a time step never
    updated takes the nearest earlier one that was. A time step with a single row has no variance: it takes the stored
    values in training too, and updates nothing.

    Args:
        momentum: weight of the newest batch in the stored values of the step with most rows; a step with fewer rows
            counts in proportion. The first update of a step takes the batch's values whole.
        max_steps: number of time steps with a stored set of their own.
        beyond: later time steps share one set of their own ("pooled"; until it is updated, they take the last of the
            `max_steps`), or take the last one and store nothing ("last", as published).
        shared: arguments of `BatchStatisticsNorm`; its one pool is "batch".
    """

    formula = "(x - mean_B,t) / sqrt(var_B,t + eps) * weight + bias"
    paper = "Cooijmans et al. 2016, arXiv 1603.09025"
    scale_invariant = True
    shift_invariant = True
    per_step = True
    fixed_options = frozenset({"pool", "causal"})

    seen: Tensor

    def __init__(
        self, dim: int, *, max_steps: int = 512, beyond: Literal["pooled", "last"] = "pooled", **shared: Any
    ) -> None:
        super().__init__(dim, **shared)
        require_choice("bn_step beyond", beyond, ("pooled", "last"))
        self.max_steps, self.beyond = max_steps, beyond
        # At least 2 sets, so that the buffers have the same shape of S x F for any number.
        self._register_stored(max(2, max_steps + (beyond == "pooled")))
        self.register_buffer("seen", torch.zeros(self.sets, dtype=torch.bool))

    @classmethod
    def stepwise_pool(cls, pool: str | None) -> str | None:
        return pool

    def transform(self, x: Tensor, mask_BT: Tensor | None, batch: Moments) -> Tensor:
        return self.standardize(x, batch.mean, batch.var)

    def batch_statistics(
        self, x: Tensor, mask_BT: Tensor | None, step: Step, carry: Prefix | None
    ) -> tuple[Moments, Moments, Prefix | None]:
        """As `BatchStatisticsNorm`. With a step per row, those for `store` are T x N x F, N distinct steps."""
        if isinstance(step, int):
            return super().batch_statistics(x, mask_BT, step, carry)
        distinct_N = distinct_steps(step)
        group_B = torch.searchsorted(distinct_N, step)
        whole = grouped_moments(x, mask_BT, group_B, len(distinct_N), synchronize=True)
        if self.ghost_rows is not None:
            ghost_B, ghosts = self.ghosts(len(x), x.device)
            group_B = group_B * ghosts + ghost_B
            batch = grouped_moments(x, mask_BT, group_B, len(distinct_N) * ghosts)
        else:
            batch = self.joined(whole, distinct_N) if self.memory_batches else whole
        columns = x.shape[1]
        to_store = Moments(
            whole.mean.detach().transpose(0, 1),
            whole.var.detach().transpose(0, 1),
            whole.count.expand(-1, columns, 1).squeeze(-1).transpose(0, 1),
        )
        return Moments(*(value[group_B] for value in batch)), to_store, carry

    def slot(self, step: Step, columns: int) -> Tensor:
        first = torch.as_tensor(step, device=self.seen.device).reshape(-1, 1)
        time = first + torch.arange(columns, device=self.seen.device)
        return time.clamp(max=self.max_steps - (self.beyond == "last"))

    def stored(self, step: Step, columns: int) -> tuple[Tensor | None, Tensor]:
        mean, var = self.stored_mean, self.stored_var
        assert mean is not None
        index = torch.arange(self.sets, device=self.seen.device)
        nearest = torch.where(as_it_stands(self.seen), index, 0).cummax(0).values
        slot = nearest[self.slot(step, columns)]
        return mean[slot], var[slot]

    def by_slot(self, statistics: Moments, step: Step, least: int) -> Moments:
        """As `BatchStatisticsNorm`: T x F with an int `step`; T x N x F with N distinct steps among the rows."""
        columns = len(statistics.mean)
        steps = step if isinstance(step, int) else distinct_steps(step)
        slot_NT = self.slot(steps, columns)
        count = statistics.count * (statistics.count >= least)
        if self.beyond == "last":
            first = torch.as_tensor(steps, device=count.device).reshape(-1, 1)
            own_NT = first + torch.arange(columns, device=count.device) < self.max_steps
            count = count * own_NT.t().reshape(count.shape)
        slot = slot_NT.t().flatten()
        weight = count.reshape(-1, 1)
        mean, var = statistics.mean.reshape(-1, self.dim), statistics.var.reshape(-1, self.dim)

        # Several time steps may share a slot: pool them (law of total variance).
        def total(values: Tensor) -> Tensor:
            return values.new_zeros((self.sets, values.shape[-1])).index_add(0, slot, values)

        joint_count = total(weight)
        divisor = joint_count.clamp(min=1)
        joint = total(weight * mean) / divisor
        return Moments(joint, total(weight * (var + finite_square(mean - joint[slot]))) / divisor, joint_count)

    def update(self, statistics: Moments, step: Step) -> None:
        # A single row has no variance, so it counts for nothing.
        columns, sets = len(statistics.mean), None
        if isinstance(step, int) and step + columns <= self.max_steps:
            # Each time step has a set of its own, and the other sets need not be looked at.
            sets = slice(step, step + columns)
            count = statistics.count * (statistics.count >= 2)
            new = statistics._replace(count=count.unsqueeze(-1))
        else:
            new = self.by_slot(statistics, step, 2)
        seen, before = self.seen, as_it_stands(self.seen)
        if sets is not None:
            seen, before = seen[sets], before[sets]
        # Rows per step, not entries, say how much a slot has learnt: the shared last slot is no more than full.
        largest = statistics.count.max().clamp(min=1)
        share = self.momentum * (new.count / largest).clamp(max=1)
        self.move(self.unbias(new), torch.where(before.unsqueeze(-1), share, 1.0) * (new.count > 0), sets)
        seen.copy_(before | (new.count.squeeze(-1) > 0))

    def set_stored(self, exact: Moments) -> None:
        super().set_stored(exact)
        self.seen.logical_or_(exact.count.squeeze(-1) > 1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, max_steps={self.max_steps}, beyond={self.beyond}"
