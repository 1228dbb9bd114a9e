"""Batch normalization (Ioffe & Szegedy 2015, arXiv 1502.03167) with one stored set of statistics for all time steps."""

from __future__ import annotations

from typing import final

from torch import Tensor

from normlab.norms.batch_statistics import BatchStatisticsNorm
from normlab.norms.moments import Moments


@final
class BatchNorm(BatchStatisticsNorm):
    """y = (x - mean) / sqrt(var + eps) * weight + bias: the batch's statistics in training, stored ones in evaluation.

    With pool="batch_time" and unbiased=True it equals torch.nn.BatchNorm1d over B x F x T. Arguments are those of
    `BatchStatisticsNorm`.
    """

    formula = "(x - mean_B) / sqrt(var_B + eps) * weight + bias"
    paper = "Ioffe & Szegedy 2015, arXiv 1502.03167"
    scale_invariant = True
    shift_invariant = True

    def transform(self, x: Tensor, mask_BT: Tensor | None, batch: Moments) -> Tensor:
        return self.standardize(x, batch.mean, batch.var)
