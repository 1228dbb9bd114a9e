"""Regularized batch normalization (Wang et al. 2022, arXiv 2210.05153)."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor

from normlab.norms.batch_statistics import BatchStatisticsNorm
from normlab.norms.moments import Moments


@final
class RegularizedBatchNorm(BatchStatisticsNorm):
    """`bn` with a penalty on the distance between the batch's statistics and the stored ones:

        penalty_mean * sum_F (mean_run - mean_B)^2 + penalty_var * sum_F |var_run - var_B|

    averaged over the training statistics of a sequence (time steps, with pool="batch"). The stored values are those
    before this batch is taken in. The penalty reaches the loss through `GatheredPenalties`; the training task adds it.

    Args:
        penalty_mean: weight of the first term.
        penalty_var: weight of the second.
        shared: arguments of `BatchStatisticsNorm`.
    """

    formula = "bn; loss + a sum_F (mean_run - mean_B)^2 + b sum_F |var_run - var_B|"
    paper = "Wang et al. 2022, arXiv 2210.05153"
    scale_invariant = True
    shift_invariant = True

    def __init__(self, dim: int, *, penalty_mean: float = 0.01, penalty_var: float = 0.01, **shared: Any) -> None:
        super().__init__(dim, **shared)
        self.penalty_mean, self.penalty_var = penalty_mean, penalty_var

    def transform(self, x: Tensor, mask_BT: Tensor | None, batch: Moments) -> Tensor:
        if self.penalties is not None:
            mean, var = self.stored_mean, self.stored_var
            assert mean is not None
            distance = self.penalty_mean * (mean - batch.mean).square() + self.penalty_var * (var - batch.var).abs()
            self.penalties.append(distance.sum(-1).flatten())
        return self.standardize(x, batch.mean, batch.var)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, penalty_mean={self.penalty_mean:g}, penalty_var={self.penalty_var:g}"
