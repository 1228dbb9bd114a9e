"""Bias and variance of the predictions of several runs, and the spread of their losses.

Shape suffixes: R runs, N predictions, V vocabulary or classes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from normlab.config import InputError
from normlab.data.batches import Batch
from normlab.probes.base import Measurement, Probe, Row, Subject

__all__ = ["BiasVariance", "split_losses"]


@dataclass(frozen=True)
class BiasVariance(Probe):
    """Split of the test loss of runs that differ in seed or corpus (a resample) alone, on the same test data.

    With data.resample the seeds draw the training texts as well.

    Cross-entropy (Heskes 1998): with the common prediction q proportional to exp(mean over runs of log p_r),
    mean_r -log p_r(y) = -log q(y) + mean_r KL(q || p_r): bias and variance in nats. Brier score: mean_r |p_r - y|^2 =
    |mean p - y|^2 + mean_r |p_r - mean p|^2. Both biases hold the noise that no model could remove. Runs whose
    predictions are not finite are counted (`diverged_runs`) and cannot enter the means.

    Args:
        examples: texts, or tokens of a language model; at least so many as fill whole batches.
    """

    runs: ClassVar[tuple[int, int | None]] = (2, None)
    examples: int = 1024

    def __post_init__(self) -> None:
        self.require_positive("examples")

    @torch.no_grad()
    def measure(self, *subjects: Subject) -> Measurement:
        first = subjects[0]
        for subject in subjects[1:]:
            _require_comparable(first, subject)
        batches = list(self._batches(first))
        finite = [_is_finite(subject, batches) for subject in subjects]
        kept = [subject for subject, good in zip(subjects, finite, strict=True) if good]
        if not kept:
            raise InputError("the predictions of none of these runs are finite")
        # Batch by batch: predictions over a vocabulary of words are large.
        parts: list[dict[str, Tensor]] = []
        for position, streams in enumerate(zip(*(_log_p(subject, batches) for subject in kept), strict=True)):
            parts.append(split_losses(torch.stack(streams), _targets(batches[position])))
        whole = {name: torch.cat([part[name] for part in parts], -1).mean(-1) for name in parts[0]}
        rows: list[Row] = []
        numbers = iter(range(len(kept)))
        for subject, good in zip(subjects, finite, strict=True):
            row: Row = {"run": subject.run, "seed": subject.config.seed}
            index = next(numbers) if good else None
            for column, name in (("loss_nats", "loss_RN"), ("brier", "brier_RN"), ("variance_nats", "kl_RN")):
                row[column] = math.nan if index is None else float(whole[name][index])
            rows.append(row)
        summary = {name: float(value.mean()) for name, value in _named(whole).items()}
        spread = whole["loss_RN"].std() if len(kept) > 1 else torch.tensor(math.nan)
        summary |= {"loss_spread_nats": float(spread), "runs": len(subjects)}
        return Measurement({**summary, "diverged_runs": len(subjects) - len(kept)}, rows)

    def _batches(self, subject: Subject) -> Iterator[Batch]:
        taken = 0
        for batch in map(subject.place, subject.loader("test")):
            yield batch
            taken += len(_targets(batch))
            if taken >= self.examples:
                return


def _named(whole: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "loss_nats": whole["loss_RN"],
        "loss_bias_nats": whole["bias_N"],
        "loss_variance_nats": whole["kl_RN"],
        "brier": whole["brier_RN"],
        "brier_bias": whole["brier_bias_N"],
        "brier_variance": whole["brier_RN"].mean() - whole["brier_bias_N"],
    }


def split_losses(log_p_RNV: Tensor, targets_N: Tensor) -> dict[str, Tensor]:
    """Per prediction: losses and Brier scores of each run, KL of the common prediction to each, and both biases."""
    at_target = targets_N.expand(len(log_p_RNV), -1).unsqueeze(-1)
    mean_NV = log_p_RNV.mean(0)
    log_q_NV = mean_NV - mean_NV.logsumexp(-1, keepdim=True)
    p_RNV, mean_p_NV = log_p_RNV.exp(), log_p_RNV.exp().mean(0)
    truth_NV = F.one_hot(targets_N, log_p_RNV.shape[-1]).to(mean_p_NV.dtype)
    return {
        "loss_RN": -log_p_RNV.gather(-1, at_target).squeeze(-1),
        "kl_RN": (log_q_NV.exp() * (log_q_NV - log_p_RNV)).sum(-1),
        "bias_N": -log_q_NV.gather(-1, targets_N.unsqueeze(-1)).squeeze(-1),
        "brier_RN": (p_RNV - truth_NV).square().sum(-1),
        "brier_bias_N": (mean_p_NV - truth_NV).square().sum(-1),
    }


def _targets(batch: Batch) -> Tensor:
    if batch.labels_B is not None:
        return batch.labels_B
    assert batch.targets_BT is not None
    return batch.targets_BT.flatten() if batch.mask_BT is None else batch.targets_BT[batch.mask_BT]


def _log_p(subject: Subject, batches: Iterable[Batch]) -> Iterator[Tensor]:
    for batch, output in subject.outputs(batches):
        logits = output.logits
        if batch.labels_B is None:
            logits = logits.flatten(0, 1) if batch.mask_BT is None else logits[batch.mask_BT]
        yield F.log_softmax(logits.double(), -1)


def _is_finite(subject: Subject, batches: Iterable[Batch]) -> bool:
    return all(bool(log_p.isfinite().all()) for log_p in _log_p(subject, batches))


def _require_comparable(one: Subject, other: Subject) -> None:
    def question(subject: Subject) -> object:
        data = dataclasses.replace(subject.config.data, corpus=one.config.data.corpus)  # a resample is a file
        return dataclasses.replace(subject.config, seed=0, data=data, output=one.config.output)

    if question(one) != question(other):
        raise InputError(f"{one.run} and {other.run} differ in more than seed and data.corpus; give runs of one arm")
    tests = [subject.text.splits["test"].ids for subject in (one, other)]
    if one.text.vocabulary != other.text.vocabulary or tests[0].tolist() != tests[1].tolist():
        raise InputError(f"{one.run} and {other.run} have different test texts or symbols; give runs on one corpus")
