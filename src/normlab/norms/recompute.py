"""Stored statistics estimated anew from data ("precise BN", Wu & Johnson 2021, arXiv 2105.07576)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from normlab.config import InputError
from normlab.norms.batch_statistics import BatchStatisticsNorm
from normlab.norms.moments import Moments, processes_with

__all__ = ["StatisticsGap", "at_rest", "recompute_statistics", "stores_statistics"]


@dataclass(frozen=True)
class StatisticsGap:
    """How far one site's stored values were from the re-estimated ones (over stored sets and features).

    Attributes:
        mean: mean of |mean_stored - mean| / sigma (0 for a norm that does not centre); a set that training never
            updated counts with the one that evaluation took in its place.
        std: mean of |sigma_stored / sigma - 1|, sigma = sqrt(var + eps).
        entries: what the estimate rests on, summed over those sets.
        sets: stored sets that were estimated anew; others saw fewer than 2 entries and keep what they had.
    """

    mean: float
    std: float
    entries: int
    sets: int


def stores_statistics(model: nn.Module) -> bool:
    """Whether any norm in `model` keeps values that `recompute_statistics` can estimate."""
    return any(isinstance(module, BatchStatisticsNorm) for module in model.modules())


@torch.no_grad()
def recompute_statistics(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[Any], Any] | None = None
) -> dict[str, StatisticsGap]:
    """Replace the stored statistics of every norm in `model` by those of `batches`, exactly pooled.

    Every batch goes through `model` once, the norms that store statistics in training mode (so that each normalizes
    with its batch, as while training) and everything else in evaluation mode (no dropout). Mean and variance of each
    stored set are those of all its valid entries in all batches and processes, whatever the sizes of batches: sums in
    float64, by the law of total variance. All else, modes, gradients, random state and the norms' own counters
    included, is afterwards as it was, bit by bit; if a batch fails, so are the stored statistics.

    Args:
        batches: the inputs, of the composition used in training; as many in each process, and of 2 rows or more where
            a norm needs them. A tensor is passed to `model` alone, a mapping by keywords, a tuple or list by position
            (labels too: see `forward`); a batch of normlab's loaders by its tokens and mask.
        forward: takes one batch through the model, where the above does not fit.

    Returns:
        The gap between old and new values per norm, by its name in `model`; empty (and no batch read) if no norm
        stores any.

    Raises:
        InputError: `batches` is empty, or one process has more of them than another.
    """
    norms = {name: part for name, part in model.named_modules() if isinstance(part, BatchStatisticsNorm)}
    if not norms:
        return {}
    run = forward or (lambda batch: _call(model, batch))
    count = 0
    with ExitStack() as stack:
        stack.enter_context(at_rest(model))
        for norm in norms.values():
            norm.train()
            norm.begin_collecting()
            stack.callback(setattr, norm, "collected", None)
        for batch in _in_step(batches, next(iter(norms.values())).running_var.device):
            run(batch)
            count += 1
        if count == 0:
            raise InputError("recompute_statistics got no batches; give some of the training data")
        collected = {name: norm.collected for name, norm in norms.items()}
    gaps: dict[str, StatisticsGap] = {}
    for name, norm in norms.items():
        exact = collected[name]
        assert exact is not None
        gaps[name] = _gap(norm, exact)
        norm.set_stored(exact)
    return gaps


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if hasattr(batch, "model_inputs"):
        return model(*batch.model_inputs())
    return model(*batch)


def _in_step(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """The batches; processes that share statistics must all have one more, or none."""
    rest = iter(batches)
    while True:
        batch = next(rest, _NO_BATCH)
        have, processes = processes_with(batch is not _NO_BATCH, device)
        if have not in (0, processes):
            raise InputError(
                f"recompute_statistics got one more batch in {have} of {processes} processes; give each as many"
            )
        if batch is _NO_BATCH:
            return
        yield batch


_NO_BATCH = object()


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; afterwards the modes and the random state are as before."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng():  # all CUDA devices too
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def _gap(norm: BatchStatisticsNorm, exact: Moments) -> StatisticsGap:
    known = exact.count.squeeze(-1) > 1
    if not bool(known.any()):
        return StatisticsGap(0.0, 0.0, 0, 0)
    # As evaluation would use them: a time step never updated takes an earlier one's.
    stored_mean, stored_var = (
        None if value is None else value.double().reshape(-1, norm.dim).expand(norm.sets, -1)[known]
        for value in norm.stored(0, norm.sets)
    )
    assert stored_var is not None
    sigma = (norm.unbias(exact).var[known] + norm.eps).sqrt()
    mean = 0.0 if stored_mean is None else float(((stored_mean - exact.mean[known]).abs() / sigma).mean())
    std = float(((stored_var + norm.eps).sqrt() / sigma - 1).abs().mean())
    return StatisticsGap(mean, std, int(exact.count[known].sum()), int(known.sum()))
