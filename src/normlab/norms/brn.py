"""Batch renormalization (Ioffe 2017, arXiv 1702.03275)."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from normlab.norms.batch_statistics import BatchStatisticsNorm, as_it_stands
from normlab.norms.fused import rescale
from normlab.norms.moments import Moments, for_statistics


@final
class BatchRenorm(BatchStatisticsNorm):
    """y = ((x - mean_B) / sigma_B * r + d) * weight + bias: in training almost what evaluation computes.

    r = sigma_B / sigma_run clipped to [1 / r_max, r_max] and d = (mean_B - mean_run) / sigma_run clipped to
    [-d_max, d_max], both without gradient, sigma = sqrt(var + eps). Unclipped, y = (x - mean_run) / sigma_run. The
    clips open with the updates of the stored values: for `warmup` updates r = 1 and d = 0 (plain `bn`), then linearly
    to `r_max` and `d_max` over `ramp` more.

    Args:
        r_max, d_max: where the clips end (published: 3 and 5).
        warmup: updates of plain batch normalization (published: 5,000 of some 160,000; the default is for runs of
            hundreds of steps).
        ramp: updates over which the clips open (published: 35,000 for r and 20,000 for d).
        shared: arguments of `BatchStatisticsNorm`.
    """

    formula = "((x - mean_B) / sigma_B * r + d) * weight + bias"
    paper = "Ioffe 2017, arXiv 1702.03275"
    scale_invariant = False
    shift_invariant = False
    exact_gradient = False

    updates: Tensor

    def __init__(
        self, dim: int, *, r_max: float = 3.0, d_max: float = 5.0, warmup: int = 100, ramp: int = 200, **shared: Any
    ) -> None:
        super().__init__(dim, **shared)
        self.r_max, self.d_max, self.warmup, self.ramp = r_max, d_max, warmup, ramp
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def transform(self, x: Tensor, mask_BT: Tensor | None, batch: Moments) -> Tensor:
        running_mean, running_var = self.stored_mean, self.stored_var
        assert running_mean is not None
        opened = ((as_it_stands(self.updates) - self.warmup).to(batch.var.dtype) / max(1, self.ramp)).clamp(0, 1)
        r_max, d_max = 1 + (self.r_max - 1) * opened, self.d_max * opened
        sigma = (batch.var + self.eps).sqrt()
        with torch.no_grad():
            running_sigma = (running_var + self.eps).sqrt()
            r = torch.clamp(sigma / running_sigma, 1 / r_max, r_max)
            d = torch.clamp((batch.mean - running_mean) / running_sigma, -d_max, d_max)
        scale, shift = r / sigma, d
        if self.weight is not None:
            scale, shift = scale * self.weight, shift * self.weight
        if self.bias is not None:
            shift = shift + self.bias
        return rescale(for_statistics(x), batch.mean, scale, None, shift).to(x.dtype)

    def update(self, statistics: Moments, step: int | Tensor) -> None:
        super().update(statistics, step)
        self.updates.copy_(as_it_stands(self.updates) + 1)

    def extra_repr(self) -> str:
        clips = f"r_max={self.r_max:g}, d_max={self.d_max:g}, warmup={self.warmup}, ramp={self.ramp}"
        return f"{super().extra_repr()}, {clips}"
