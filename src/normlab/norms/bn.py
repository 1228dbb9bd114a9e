"""Batch normalization (Ioffe & Szegedy 2015, arXiv 1502.03167) with one stored set of statistics for all time steps."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from normlab.config import require_choice
from normlab.norms.base import Norm, Step
from normlab.norms.moments import Moments, Prefix, moments, pooled, prefix_moments, zero_padding


@final
class BatchNorm(Norm):
    """y = (x - mean) / sqrt(var + eps) * weight + bias: the batch's statistics in training, stored ones in evaluation.

    The stored values pool all valid entries of the sequence and are updated once per sequence. A training
    statistic over a single entry has no variance: the stored values stand in for it.

    Args:
        momentum: weight of the newest batch in the stored values.
        causal: decides the default of `pool`: "batch" if True, else "batch_time".
        pool: entries that share a training statistic: "batch" (rows, at this time step), "batch_time" (all of the
            batch: sees the future; equals torch.nn.BatchNorm1d), "prefix" (rows, up to this time step).
        unbiased: store the Bessel-corrected variance, as torch does.
    """

    formula = "(x - mean_B) / sqrt(var_B + eps) * weight + bias"
    scale_invariant = True
    shift_invariant = True
    batch_independent = False
    needs_statistics = True
    recurrent_gain = 0.1  # Cooijmans et al. 2016, arXiv 1603.09025
    recurrent_pool = "batch"

    running_mean: Tensor
    running_var: Tensor

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
    ) -> None:
        super().__init__(dim, affine=affine, bias=bias, gain=gain, eps=eps)
        self.momentum, self.unbiased = momentum, unbiased
        self.pool = pool or ("batch" if causal else "batch_time")
        require_choice("bn pool", self.pool, ("batch", "batch_time", "prefix"))
        self.causal = self.pool != "batch_time"
        self.works_at_batch_1 = self.pool != "batch"
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def normalize(
        self, x_BTF: Tensor, mask_BT: Tensor | None = None, step: Step = 0, carry: Prefix | None = None
    ) -> tuple[Tensor, Moments | None, Prefix | None]:
        x = zero_padding(x_BTF, mask_BT)
        if not self.training:
            return self.standardize(x, self.running_mean, self.running_var), None, None
        rows, columns = x.shape[:2]
        self.require_rows(x, rows if self.pool == "batch" else rows * columns)
        if self.pool == "prefix":
            batch, carry = prefix_moments(x, mask_BT, True, carry)
            to_store = moments(x.detach(), mask_BT, (0, 1), synchronize=True)
        else:
            batch = moments(x, mask_BT, (0,) if self.pool == "batch" else (0, 1), synchronize=True)
            to_store = batch
        mean, var = batch.mean, batch.var
        if mask_BT is not None or self.pool == "prefix":
            mean = torch.where(batch.count > 1, mean, self.running_mean)
            var = torch.where(batch.count > 1, var, self.running_var)
        steps = to_store.mean.shape[1]
        statistics = Moments(
            to_store.mean.detach().squeeze(0), to_store.var.detach().squeeze(0), to_store.count.flatten().expand(steps)
        )
        return self.standardize(x, mean, var), statistics, carry

    @torch.no_grad()
    def store(self, statistics: Moments, step: Step = 0) -> None:
        mean, var, count = pooled(statistics)
        if self.unbiased:
            var = var * count / (count - 1).clamp(min=1)
        # A batch with a single valid entry in all has no variance to store.
        rate = self.momentum * (count > 1)
        self.running_mean.add_((mean - self.running_mean) * rate)
        self.running_var.add_((var - self.running_var) * rate)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pool={self.pool}, momentum={self.momentum:g}, unbiased={self.unbiased}"
