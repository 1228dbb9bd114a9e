"""PowerNorm-V (Shen et al. 2020, arXiv 2003.07845): batch normalization by the quadratic mean, not centred."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor

from normlab.norms.batch_statistics import BatchStatisticsNorm, require_groups, scale_groups
from normlab.norms.moments import Moments


@final
class PowerNormV(BatchStatisticsNorm):
    """y = x / sqrt(mean_B(x^2) + eps) * weight + bias: the batch's mean square in training, the stored one after.

    Args:
        group_scaling: first divide each token by the root mean square of so many groups of its features, as the
            authors' code does. That is a norm of its own; the paper's does not have it, so it is off.
        shared: arguments of `BatchStatisticsNorm`.
    """

    formula = "x / sqrt(mean_B(x^2) + eps) * weight + bias"
    paper = "Shen et al. 2020, arXiv 2003.07845"
    scale_invariant = True
    shift_invariant = False
    centered = False
    fixed_options = frozenset({"unbiased"})  # a mean square has no Bessel correction

    def __init__(self, dim: int, *, group_scaling: int | None = None, **shared: Any) -> None:
        super().__init__(dim, **shared)
        self.group_scaling = require_groups(self.name, dim, group_scaling)
        if group_scaling is not None:
            self.shares = self.shares._replace(features="group")

    def prepare(self, x: Tensor) -> Tensor:
        return x if self.group_scaling is None else scale_groups(x, self.group_scaling, self.eps)

    def transform(self, x: Tensor, mask_BT: Tensor | None, batch: Moments) -> Tensor:
        return self.standardize(x, None, batch.var)

    def extra_repr(self) -> str:
        scaling = "" if self.group_scaling is None else f", group_scaling={self.group_scaling}"
        return f"{super().extra_repr()}{scaling}"
