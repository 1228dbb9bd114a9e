"""How much an example's output depends on the other examples of its batch.

Shape suffixes: N examples, T time (1 for a classifier).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.config import InputError
from normlab.data.batches import Batch
from normlab.probes.base import Measurement, Probe, Row, Subject, prediction_nats
from normlab.probes.sites import freeze_stored, set_norms_training

__all__ = ["Companions"]


@dataclass(frozen=True)
class Companions(Probe):
    """Variance of an example's loss over random batch companions, in training mode without dropout.

    The same training examples are dealt into batches anew in every draw. companion_variance is the variance (over
    draws, unbiased) of an example's loss in nats, averaged over examples and time steps; example_variance that of the
    examples' mean losses over draws, between examples; the ratio is the first over the second (nan where that is 0). A
    norm that sees one example at a time has 0.

    Args:
        examples: in all; 0 takes 4 batches. As many whole batches as they fill are used, at least 2.
        draws: of companions.
    """

    examples: int = 0
    draws: int = 8

    def __post_init__(self) -> None:
        if self.draws < 2:
            raise InputError(f"--draws of the probe {self.name} is {self.draws}; a variance takes at least 2")
        if self.examples < 0:
            raise InputError(f"--examples of the probe {self.name} is {self.examples}; it must be >= 0")

    @torch.no_grad()
    def measure(self, subject: Subject) -> Measurement:
        everything, size = self._examples(subject)
        set_norms_training(subject.model)
        freeze_stored(subject.model)
        assert everything.mask_BT is not None
        count = len(everything.tokens_BT)
        mean = square = torch.zeros((), device=subject.device)
        for draw in range(1, self.draws + 1):
            order_N = torch.randperm(count).to(subject.device)
            dealt = [_rows(everything, rows) for rows in order_N.split(size)]
            loss_NT = torch.cat([_prediction_losses(subject.model, batch) for batch in dealt])[order_N.argsort()]
            deviation = loss_NT - mean  # Welford 1962
            mean = mean + deviation / draw
            square = square + deviation * (loss_NT - mean)
        keep_NT = everything.mask_BT if subject.is_language_model else everything.mask_BT[:, :1]
        return _measured(mean, square / (self.draws - 1), keep_NT)

    def _examples(self, subject: Subject) -> tuple[Batch, int]:
        """Whole batches as one, all padded to the longest so that every draw has the same shapes; rows of each."""
        stateless = dataclasses.replace(subject.config.data, stream="windows")
        subject = dataclasses.replace(subject, config=dataclasses.replace(subject.config, data=stateless))
        size = subject.loader("train", train=True).batch_size
        found = subject.batches("train", (self.examples or 4 * size) // size, train=True)
        if len(found) < 2:
            raise InputError(
                f"the probe {self.name} deals out 2 batches or more, {2 * size} examples at this run's batch size, and "
                f"got {len(found)}; raise --examples, or give a run with more training text"
            )
        rows = min(len(batch.tokens_BT) for batch in found)
        longest = max(batch.tokens_BT.shape[1] for batch in found)

        def joined(values: list[Tensor]) -> Tensor:
            return torch.cat([F.pad(value[:rows], (0, longest - value.shape[1])) for value in values])

        tokens = [batch.tokens_BT for batch in found]
        masks = [torch.ones_like(b.tokens_BT, dtype=torch.bool) if b.mask_BT is None else b.mask_BT for b in found]
        targets = [batch.targets_BT for batch in found if batch.targets_BT is not None]
        labels = [batch.labels_B[:rows] for batch in found if batch.labels_B is not None]
        everything = Batch(
            joined(tokens),
            joined(masks),
            joined(targets) if targets else None,
            torch.cat(labels) if labels else None,
        )
        return everything, rows


def _rows(batch: Batch, rows: Tensor) -> Batch:
    return Batch._make(None if value is None else value[rows] for value in batch)


def _prediction_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Loss of each prediction, B x T (B x 1 for a classifier), 0 in padding, in float64."""
    nats = prediction_nats(model(*batch.model_inputs()).logits, batch).double()
    if batch.labels_B is not None:
        return nats.unsqueeze(1)
    assert batch.mask_BT is not None
    return nats.new_zeros(batch.mask_BT.shape).masked_scatter(batch.mask_BT, nats)


def _measured(mean: Tensor, variance: Tensor, mask_NT: Tensor) -> Measurement:
    """Means over examples, per time step and over all steps, of each example's `mean` and `variance` over draws."""
    rows: list[Row] = []
    for step in range(mean.shape[1]):
        here = mask_NT[:, step]
        if int(here.sum()) > 1:
            between = float(mean[here, step].var())
            within = float(variance[here, step].mean())
            rows.append({"step": step, "companion_variance": within, "example_variance": between})
    columns = ("companion_variance", "example_variance")
    within, between = (statistics.fmean(row[name] for row in rows) for name in columns)
    for row in rows:
        row["ratio"] = _ratio(row["companion_variance"], row["example_variance"])
    summary = {"companion_variance_ratio": _ratio(within, between)}
    return Measurement({**summary, "companion_variance": within, "example_variance": between}, rows)


def _ratio(within: float, between: float) -> float:
    return within / between if between else math.nan
