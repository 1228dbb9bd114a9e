"""What all batch norms share: a batch's statistics in training, stored ones in evaluation.

Shape suffixes: B batch, T time, F features, N groups of rows, S stored sets, K remembered batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from normlab.config import InputError, require_choice
from normlab.norms.base import Norm, Shares, Step
from normlab.norms.moments import (
    Moments,
    Prefix,
    for_statistics,
    grouped_moments,
    longest,
    moments,
    pooled,
    prefix_moments,
    several_processes,
    zero_padding,
)


@torch.library.custom_op("normlab::snapshot", mutates_args=())
def _snapshot(stored: Tensor) -> Tensor:
    return stored.clone()


@_snapshot.register_fake
def _(stored: Tensor) -> Tensor:
    return torch.empty_like(stored)


def as_it_stands(stored: Tensor) -> Tensor:
    """A stored value for use in a training step that goes on to change it.

    Under torch.compile the backward graph may compute a value again from the buffer it came from, by then updated
    (torch 2.11 to 2.13: wrong gradients without a word, even through `clone`). The result of an operator that the
    compiler can not look into is kept instead. What changes the stored value begins from this result too: torch 2.11
    does not keep the operator before a change that does not need it.
    """
    return _snapshot(stored) if torch.compiler.is_compiling() else stored


_POOLS = {"batch": Shares(True, "step"), "batch_time": Shares(True, "sequence"), "prefix": Shares(True, "prefix")}


class BatchStatisticsNorm(Norm, ABC):
    """A norm with statistics over the rows of a batch and one stored set of them for all time steps.

    The stored values pool all valid entries of the sequence and are updated once per sequence. A training statistic
    over a single entry has no variance: the stored values stand in for it.

    Attributes:
        centered: it subtracts the mean; else `running_var` is the mean square.
        collected: moments of all batches so far, S x F in float64, while `recompute_statistics` collects them.

    Args:
        momentum: weight of the newest batch in the stored values.
        causal: decides the default of `pool`: "batch" if True, else "batch_time".
        pool: entries that share a training statistic: "batch" (rows, at this time step), "batch_time" (all of the
            batch: sees the future; as torch.nn.BatchNorm1d), "prefix" (rows, up to this time step).
        unbiased: store the Bessel-corrected variance, as torch does.
        ghost_rows: rows per training statistic (ghost batches, Hoffer et al. 2017, arXiv 1705.08741); rows left over
            join the last ghost. None takes all rows, in all processes.
        memory_batches: a training statistic also covers the last so many batches, without gradient: a statistics
            batch larger than the batch. Needs stored sets that match: pool="batch_time", or a norm with
            statistics per time step.
    """

    needs_statistics = True
    recurrent_gain = 0.1  # Cooijmans et al. 2016, arXiv 1603.09025
    centered: ClassVar[bool] = True
    collected: Moments | None = None

    running_mean: Tensor | None
    running_var: Tensor
    recent_mean: Tensor
    recent_var: Tensor
    recent_count: Tensor

    def __init__(
        self,
        dim: int,
        *,
        affine: bool = True,
        bias: bool = True,
        gain: float = 1.0,
        eps: float = 1e-5,
        momentum: float = 0.1,
        causal: bool = True,
        pool: str | None = None,
        unbiased: bool = False,
        ghost_rows: int | None = None,
        memory_batches: int = 0,
    ) -> None:
        super().__init__(dim, affine=affine, bias=bias, gain=gain, eps=eps)
        self.momentum, self.unbiased = momentum, unbiased
        self.ghost_rows, self.memory_batches = ghost_rows, memory_batches
        self.pool = pool or ("batch" if causal else "batch_time")
        require_choice(f"{self.name} pool", self.pool, _POOLS)
        self.shares = _POOLS[self.pool]
        self.works_at_batch_1 = self.pool != "batch"
        if ghost_rows is not None and self.pool == "prefix":
            raise InputError(f"{self.name} has no ghost batches with pool=prefix; use pool=batch or batch_time")
        if ghost_rows is not None and memory_batches:
            raise InputError("ghost_rows makes the statistics batch smaller, memory_batches larger; set one of them")
        if memory_batches and self.pool != "batch_time" and not self.per_step:
            raise InputError(
                f"{self.name} cannot join batches with pool={self.pool} (inside a recurrence there is no other); use "
                "pool=batch_time in a Transformer, or bn_step, which numbers its time steps"
            )
        if memory_batches:  # the remembered batches do not scale and shift along
            self.scale_invariant = self.shift_invariant = False
        self._register_stored(1)

    def _register_stored(self, sets: int) -> None:
        """Buffers for so many stored sets: of shape F for one, else S x F."""
        shape = (self.dim,) if sets == 1 else (sets, self.dim)
        self.sets = sets
        self.register_buffer("running_mean", torch.zeros(shape) if self.centered else None)
        self.register_buffer("running_var", torch.ones(shape))
        if self.memory_batches:
            self.register_buffer("recent_mean", torch.zeros(self.memory_batches, sets, self.dim))
            self.register_buffer("recent_var", torch.zeros(self.memory_batches, sets, self.dim))
            self.register_buffer("recent_count", torch.zeros(self.memory_batches, sets))

    @classmethod
    def stepwise_pool(cls, pool: str | None) -> str | None:
        return "batch"

    @abstractmethod
    def transform(self, x: Tensor, mask_BT: Tensor | None, batch: Moments) -> Tensor:
        """y of `x` in training, with the training statistics `batch` (shapes that broadcast to B x T x F)."""

    def prepare(self, x: Tensor) -> Tensor:
        """What is done to each entry before statistics are taken."""
        return x

    def forward(self, x_BTF: Tensor, mask_BT: Tensor | None = None, step: Step = 0) -> Tensor:
        """As `Norm.forward`; processes whose batches have unlike numbers of time steps take the longest of them."""
        columns = x_BTF.shape[1]
        together = self.training and x_BTF.ndim == 3 and self.pool != "batch_time" and several_processes()
        beyond = longest(columns, x_BTF.device) - columns if together else 0
        if beyond:
            if mask_BT is None:
                mask_BT = torch.ones(x_BTF.shape[:2], dtype=torch.bool, device=x_BTF.device)
            x_BTF, mask_BT = F.pad(x_BTF, (0, 0, 0, beyond)), F.pad(mask_BT, (0, beyond))
        return super().forward(x_BTF, mask_BT, step)[:, :columns]

    def normalize(
        self, x_BTF: Tensor, mask_BT: Tensor | None = None, step: Step = 0, carry: Prefix | None = None
    ) -> tuple[Tensor, Moments | None, Prefix | None]:
        x = self.prepare(zero_padding(x_BTF, mask_BT))
        rows, columns = x.shape[:2]
        if not self.training:
            return self.standardize(x, *self.stored(step, columns)), None, None
        self.require_rows(x, rows if self.pool == "batch" else rows * columns)
        batch, to_store, carry = self.batch_statistics(x, mask_BT, step, carry)
        per_row = self.per_step and isinstance(step, Tensor)
        if mask_BT is not None or self.pool == "prefix" or self.ghost_rows is not None or per_row:
            mean, var = self.stored(step, columns)
            enough = batch.count > 1
            batch = Moments(
                batch.mean if mean is None else torch.where(enough, batch.mean, mean),
                torch.where(enough, batch.var, var),
                batch.count,
            )
        return self.transform(x, mask_BT, batch), to_store, carry

    def batch_statistics(
        self, x: Tensor, mask_BT: Tensor | None, step: Step, carry: Prefix | None
    ) -> tuple[Moments, Moments, Prefix | None]:
        """The statistics to normalize with (they broadcast to B x T x F), those for `store`, and the carry."""
        dims = (0, 1) if self.pool == "batch_time" else (0,)
        if self.pool == "prefix":
            batch, carry = prefix_moments(x, mask_BT, True, carry, center=self.centered)
            whole = moments(x.detach(), mask_BT, (0, 1), center=self.centered, synchronize=True)
        elif self.ghost_rows is not None:
            ghost_B, ghosts = self.ghosts(len(x), x.device)
            batch = grouped_moments(x, mask_BT, ghost_B, ghosts, center=self.centered)
            if self.pool == "batch_time":
                batch = pooled(batch, 1)
            batch = Moments(*(value[ghost_B] for value in batch))
            whole = moments(x.detach(), mask_BT, dims, center=self.centered, synchronize=True)
        else:
            batch = whole = moments(x, mask_BT, dims, center=self.centered, synchronize=True)
            if self.memory_batches:
                batch = self.joined(batch, step)
        columns = whole.mean.shape[1]
        to_store = Moments(whole.mean[0].detach(), whole.var[0].detach(), whole.count.flatten().expand(columns))
        return batch, to_store, carry

    def ghosts(self, rows: int, device: torch.device) -> tuple[Tensor, int]:
        """The ghost batch of each row, and how many there are."""
        assert self.ghost_rows is not None
        count = max(1, rows // self.ghost_rows)
        return (torch.arange(rows, device=device) // self.ghost_rows).clamp(max=count - 1), count

    def joined(self, batch: Moments, step: Step) -> Moments:
        """`batch` (N x T x F) pooled with the remembered batches, which have no gradient."""
        slot_NT = self.slot(step, batch.mean.shape[1])
        remembered = (self.recent_mean, self.recent_var, self.recent_count.unsqueeze(-1))
        parts = [
            torch.cat([own.expand(*batch.mean.shape[:2], -1).unsqueeze(0), as_it_stands(recent)[:, slot_NT]])
            for own, recent in zip(batch, remembered, strict=True)
        ]
        return Moments(*(value.squeeze(0) for value in pooled(Moments(*parts), 0)))

    @property
    def stored_mean(self) -> Tensor | None:
        """`running_mean` as it stands."""
        return None if self.running_mean is None else as_it_stands(self.running_mean)

    @property
    def stored_var(self) -> Tensor:
        """`running_var` as it stands."""
        return as_it_stands(self.running_var)

    # Stored sets. A norm with one set per time step overrides `slot`, `stored` and `update`.

    def slot(self, step: Step, columns: int) -> Tensor:
        """The stored set of each time step: LongTensor (1 or B) x T."""
        return torch.zeros(1, columns, dtype=torch.long, device=self.running_var.device)

    def stored(self, step: Step, columns: int) -> tuple[Tensor | None, Tensor]:
        """Stored mean (None if the norm does not centre) and var; they broadcast to B x T x F."""
        return self.stored_mean, self.stored_var

    def by_slot(self, statistics: Moments, step: Step, least: int) -> Moments:
        """One sequence's `statistics` pooled per stored set: S x F, count S x 1; fewer than `least` entries count 0."""
        count = statistics.count * (statistics.count >= least)
        return pooled(Moments(statistics.mean, statistics.var, count.unsqueeze(-1)), 0)

    @torch.no_grad()
    def store(self, statistics: Moments, step: Step = 0) -> None:
        if self.collected is not None:
            exact = Moments(*(value.double() for value in statistics))
            both = zip(self.collected, self.by_slot(exact, step, 1), strict=True)
            self.collected = Moments(*(v.squeeze(0) for v in pooled(Moments(*(torch.stack(p) for p in both)), 0)))
            return
        self.update(statistics, step)
        if self.memory_batches:
            newest = self.by_slot(statistics, step, 1)
            for recent, value in (
                (self.recent_mean, newest.mean),
                (self.recent_var, newest.var),
                (self.recent_count, newest.count.squeeze(-1)),
            ):
                recent.copy_(torch.cat([as_it_stands(recent)[1:], value.unsqueeze(0)]))

    def update(self, statistics: Moments, step: Step) -> None:
        """Move the stored values towards one sequence's statistics."""
        new = self.by_slot(statistics, step, 1)
        # A batch with a single valid entry in all has no variance to store.
        self.move(self.unbias(new), self.momentum * (new.count > 1).to(new.var.dtype))

    def unbias(self, moments: Moments) -> Moments:
        """With the variance as it is stored."""
        if not self.unbiased:
            return moments
        count = moments.count
        return moments._replace(var=moments.var * count / (count - 1).clamp(min=1))

    def move(self, target: Moments, rate_S1: Tensor, sets: slice | None = None) -> None:
        """stored += rate * (target - stored), except where the target is not finite: that would stay for ever.

        Args:
            sets: the stored sets that `target` and `rate_S1` are of; None = all of them.
        """
        for whole, value in ((self.running_mean, target.mean), (self.running_var, target.var)):
            if whole is not None:
                stored, before = whole, as_it_stands(whole)
                if sets is not None:
                    stored, before = stored[sets], before[sets]
                # Not (value - before) * rate alone: at rate 1 that would round.
                moved = torch.where(rate_S1 == 1, value, before + (value - before) * rate_S1)
                stored.copy_(torch.where(value.isfinite(), moved, before).view_as(stored))

    def begin_collecting(self) -> None:
        """From now on `store` collects, and leaves the stored values alone."""
        zeros = self.running_var.new_zeros((self.sets, self.dim), dtype=torch.float64)
        self.collected = Moments(zeros, zeros, zeros[:, :1])

    def set_stored(self, exact: Moments) -> None:
        """Take `exact` (S x F, count S x 1) as stored values, where it has at least 2 entries."""
        self.move(self.unbias(exact), (exact.count > 1).double())

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]
        parts += [] if self.per_step else [f"pool={self.pool}"]
        parts += [f"momentum={self.momentum:g}"]
        parts += [f"unbiased={self.unbiased}"] if self.centered else []
        parts += [f"ghost_rows={self.ghost_rows}"] if self.ghost_rows is not None else []
        parts += [f"memory_batches={self.memory_batches}"] if self.memory_batches else []
        return ", ".join(parts)


def require_groups(name: str, dim: int, groups: int | None) -> int | None:
    """`groups` if it divides `dim`, else `InputError`."""
    if groups is not None and (groups < 1 or dim % groups):
        raise InputError(
            f"{name} cannot cut {dim} features into {groups} equal groups; "
            f"set model.norm_options.group_scaling to a divisor of {dim}"
        )
    return groups


def scale_groups(x: Tensor, groups: int, eps: float) -> Tensor:
    """x / sqrt(mean of x^2 over the features of its group + eps), per token (in the code of Shen et al. 2020)."""
    grouped = x.unflatten(-1, (groups, -1))
    square = moments(grouped, None, (-1,), center=False).var
    return (for_statistics(grouped) * torch.rsqrt(square + eps)).flatten(-2).to(x.dtype)
