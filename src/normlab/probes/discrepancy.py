"""How far stored statistics are from those of a batch, and what that costs in loss.

Shape suffixes: B batch, T time, F features.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normlab.config import require_choice
from normlab.data.batches import Batch
from normlab.norms.base import Step
from normlab.norms.batch_statistics import BatchStatisticsNorm
from normlab.norms.moments import Moments, Prefix
from normlab.probes.base import Measurement, Probe, Row, Subject, prediction_nats, site_summary
from normlab.probes.sites import Site, freeze_stored, model_sites, on_reference

__all__ = ["Discrepancy"]

QUANTITIES = ("discrepancy_mean", "discrepancy_std")


@dataclass(frozen=True)
class Discrepancy(Probe):
    """Train-inference discrepancy: stored statistics against those of training batches, per site and time step.

    discrepancy_mean: mean over features j and batches B of |mean_stored,j - mean_B,j| / sigma_B,j; discrepancy_std:
    of |sigma_stored,j / sigma_B,j - 1|, sigma = sqrt(var + eps) (Wang et al. 2022, arXiv 2210.05153, in their code).
    Each batch is normalized with its own statistics, as while training, without dropout. Batch statistics are noisy:
    exact stored values have a discrepancy too. Norms that store nothing have none.

    `loss_nats_stored` and `loss_nats_batch` are the losses on the same validation texts with stored statistics and
    with the batch's own, which see the rows of the batch (with pool=batch_time later text too).

    Args:
        batches: of the run's batch size.
        statistics: stored values: "final" (re-estimated), or "running" (averages, as training left them).
    """

    batches: int = 32
    statistics: str = "final"

    def __post_init__(self) -> None:
        self.require_positive("batches")
        require_choice("statistics", self.statistics, ("final", "running"))

    @torch.no_grad()
    def measure(self, subject: Subject) -> Measurement:
        if self.statistics == "running":
            subject.model.load_state_dict(subject.checkpoint("best").state_dict())
        found = {
            site: (norm, _Compared())
            for site, norm in model_sites(subject.model).values()
            if isinstance(norm, BatchStatisticsNorm)
        }
        every = subject.batches("valid", self.batches)
        # One row alone may have no statistics of its own.
        valid = [batch for batch in every if len(batch.tokens_BT) > 1] or every
        losses = {"loss_nats_stored": _loss_nats(subject, valid)}
        freeze_stored(subject.model)
        for norm, compared in found.values():
            norm.train()
            object.__setattr__(norm, "batch_statistics", _comparing(norm, compared))
        losses["loss_nats_batch"] = _loss_nats(subject, valid)
        for _, compared in found.values():
            compared.clear()
        with on_reference(subject.model):
            for _ in subject.outputs(subject.batches("train", self.batches, train=True)):
                pass
        rows = [row for site, (_, compared) in found.items() for row in compared.rows(site)]
        return Measurement({**_summary(rows), **losses}, rows)


def _summary(rows: list[Row]) -> dict[str, float]:
    summary = {quantity: statistics.fmean([row[quantity] for row in rows] or [0.0]) for quantity in QUANTITIES}
    for quantity in QUANTITIES:
        by_path: dict[str, list[float]] = {}
        for row in rows:
            by_path.setdefault(row["path"], []).append(row[quantity])
        medians = [statistics.median(values) for values in by_path.values()]
        summary[f"{quantity}_median"] = statistics.fmean(medians or [0.0])
    return {**summary, **site_summary(rows, QUANTITIES)}


class _Compared:
    """Sums over batches of both discrepancies, by time step; None = one statistic serves all steps."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._sums: dict[int | None, tuple[float, float, int]] = {}

    def add(self, steps: Sequence[int | None], mean_T: Tensor, std_T: Tensor, used_T: Tensor) -> None:
        for column in used_T.nonzero().flatten().tolist():
            mean, std, count = self._sums.get(steps[column], (0.0, 0.0, 0))
            self._sums[steps[column]] = (mean + float(mean_T[column]), std + float(std_T[column]), count + 1)

    def rows(self, site: Site) -> list[Row]:
        return [
            {**site.columns(), "step": step, "discrepancy_mean": mean / count, "discrepancy_std": std / count}
            for step, (mean, std, count) in self._sums.items()
        ]


def _comparing(norm: BatchStatisticsNorm, compared: _Compared) -> Any:
    batch_statistics = norm.batch_statistics

    def comparing(x: Tensor, mask_BT: Tensor | None, step: Step, carry: Prefix | None) -> Any:
        result = batch_statistics(x, mask_BT, step, carry)
        batch: Moments = result[0]
        columns = batch.mean.shape[1]
        pools_time = norm.pool == "batch_time"
        if isinstance(step, int) or bool((step == step[0]).all()):
            first = int(step if isinstance(step, int) else step[0])
            steps = [None] if pools_time else range(first, first + columns)
            compared.add(steps, *_compare(norm, batch, *norm.stored(step, columns)))
        return result

    return comparing


def _compare(
    norm: BatchStatisticsNorm, batch: Moments, stored_mean: Tensor | None, stored_var: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Both discrepancies per time step, and where there are the 2 entries that a variance takes."""
    columns = batch.mean.shape[1]
    sigma = (batch.var + norm.eps).sqrt()
    mean = torch.zeros_like(sigma) if stored_mean is None else (stored_mean - batch.mean).abs() / sigma
    std = ((stored_var + norm.eps).sqrt() / sigma - 1).abs()
    mean_T, std_T = (value.mean((0, 2)) for value in (mean, std))
    return mean_T, std_T, (batch.count.expand(-1, columns, -1) > 1).all(-1).all(0)


def _loss_nats(subject: Subject, batches: list[Batch]) -> float:
    return float(
        torch.cat([prediction_nats(output.logits, batch) for batch, output in subject.outputs(batches)]).mean()
    )
