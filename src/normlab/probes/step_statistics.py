"""Population statistics at each time step of each norm site, and the step at which they settle.

Shape suffixes: B batch, T time, F features.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from normlab.config import InputError
from normlab.data.batches import Batch, make_loader
from normlab.norms.base import Norm
from normlab.norms.batch_statistics import BatchStatisticsNorm
from normlab.norms.moments import Moments, pooled
from normlab.probes.base import Measurement, Probe, Row, Subject, site_summary
from normlab.probes.sites import Call, Site, model_sites, watched

__all__ = ["Population", "StepStatistics", "settling_step"]

ENOUGH = 0.25
LATE = 0.75
"""Steps from this share of the length on are the late ones that all are compared with."""


class Population:
    """Mean and variance per time step and feature over all valid entries ever added, in float64."""

    def __init__(self) -> None:
        self.count_T = torch.zeros(0, dtype=torch.float64)
        self.mean_TF = torch.zeros(0, 0, dtype=torch.float64)
        self._square_TF = torch.zeros(0, 0, dtype=torch.float64)

    def add(self, x_BTF: Tensor, mask_BT: Tensor | None, first: int) -> None:
        """Merge (Chan et al. 1979) the entries of the columns that begin at time step `first`."""
        x = x_BTF.double()
        keep = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask_BT is None else mask_BT
        x = torch.where(keep.unsqueeze(-1), x, 0)
        count_T = keep.double().sum(0)
        mean = x.sum(0) / count_T.clamp(min=1).unsqueeze(-1)
        square = torch.where(keep.unsqueeze(-1), x - mean, 0).square().sum(0)
        self._grow(first + x.shape[1], x.shape[2], x.device)
        here = slice(first, first + x.shape[1])
        before, total = self.count_T[here], self.count_T[here] + count_T
        share = (count_T / total.clamp(min=1)).unsqueeze(-1)
        shift = mean - self.mean_TF[here]
        self.mean_TF[here] += shift * share
        self._square_TF[here] += square + shift.square() * share * before.unsqueeze(-1)
        self.count_T[here] = total

    def _grow(self, steps: int, features: int, device: torch.device) -> None:
        more = steps - len(self.count_T)
        if more > 0:
            zeros = torch.zeros(more, features, dtype=torch.float64, device=device)
            self.count_T = torch.cat([self.count_T.to(device), zeros[:, 0]])
            self.mean_TF = torch.cat([self.mean_TF.to(device).reshape(-1, features), zeros])
            self._square_TF = torch.cat([self._square_TF.to(device).reshape(-1, features), zeros])

    def moments(self) -> Moments:
        """Of the steps that enough texts reach: mean and biased var T x F, count T."""
        steps = int((self.count_T >= ENOUGH * self.count_T.max()).sum())  # texts only end, so counts only fall
        count_T = self.count_T[:steps]
        return Moments(self.mean_TF[:steps], self._square_TF[:steps] / count_T.unsqueeze(-1), count_T)


@dataclass(frozen=True)
class StepStatistics(Probe):
    """Mean and variance of each norm site's input at every time step, over many training texts, in evaluation mode.

    Steps that fewer than a quarter of the texts reach are left out. Distances are averages over features j, relative
    to the late steps (the last quarter, their mean and variance pooled): mean_distance_t = |mean_tj - mean_j| /
    sigma_j and std_distance_t = |sigma_tj / sigma_j - 1|. Features that never vary in the late steps are left out.
    The statistics have settled at the first step from which on both distances stay at or below `tolerance` to the
    end; a site that has not settled before the late steps, whose own mean they are compared with, counts with all its
    steps.

    Spreads: std over steps of the means, over the root of the mean variance within a step; std over steps of sigma_tj,
    over its mean. Stored distances: as above, with the values that the norm would use in evaluation at that step in
    place of the late ones, and the population's sigma at that step (and the norm's eps); its root mean square where the
    norm does not centre. None where the norm rescales its input first (`group_scaling`).

    Args:
        batches: of the run's batch size.
        multiple: length of the texts in training lengths (language models; windows of that many tokens).
        tolerance: see above. `noise` is the mean_distance that so many entries would give by chance.
    """

    batches: int = 32
    multiple: int = 1
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        self.require_positive("batches", "multiple")
        if not self.tolerance > 0:
            raise InputError(f"--tolerance of the probe {self.name} is {self.tolerance}; it must be above 0")

    @torch.no_grad()
    def measure(self, subject: Subject) -> Measurement:
        populations: dict[Site, Population] = {}

        def see(site: Site, call: Call) -> None:
            assert call.first is not None  # in windows all rows begin at time step 0
            populations.setdefault(site, Population()).add(call.x_BTF, call.mask_BT, call.first)

        with watched(subject.model, see):
            for batch in self._texts(subject):
                subject.model(batch.tokens_BT, batch.mask_BT)
        norms = {path: norm for path, (_, norm) in model_sites(subject.model).items()}
        summary: dict[str, float] = {}
        rows: list[Row] = []
        settled: dict[str, int] = {}
        moments = {site: population.moments() for site, population in populations.items()}
        for site, population in moments.items():
            of_site = _rows(population, norms[site.path])
            rows += [{**site.columns(), **row} for row in of_site]
            settled[site.site] = max(settled.get(site.site, 0), settling_step(of_site, self.tolerance))
        summary |= {f"settling_step.{name}": step for name, step in settled.items()}
        summary |= site_summary([{**s.columns(), **_spreads(p)} for s, p in moments.items()], SPREADS)
        first = [{**row, **{f"first_step_{name}": row[name] for name in DISTANCES}} for row in rows if row["step"] == 0]
        summary |= site_summary(first, [f"first_step_{name}" for name in DISTANCES])
        summary |= site_summary(rows, [f"stored_{name}" for name in DISTANCES])
        if rows:
            # Mean of |z| / sqrt(entries), z normal.
            summary["noise"] = math.sqrt(2 / math.pi / max(1.0, min(row["entries"] for row in rows)))
            summary["steps"] = max(row["step"] for row in rows) + 1
        return Measurement(summary, rows)

    def _texts(self, subject: Subject) -> list[Batch]:
        if self.multiple > 1 and not subject.is_language_model:
            raise InputError("--multiple is for language models; the texts of a classifier have lengths of their own")
        text = dataclasses.replace(subject.text, length=subject.text.length * self.multiple)
        stateless = dataclasses.replace(subject.config.data, stream="windows")
        loader = make_loader(text, stateless, "train", train=True, seed=subject.config.seed)
        return [subject.place(batch) for _, batch in zip(range(self.batches), loader, strict=False)]


DISTANCES = ("mean_distance", "std_distance")
SPREADS = ("step_mean_spread", "step_std_spread")


def _distances(mean: Tensor, std: Tensor, to_mean: Tensor, to_std: Tensor, used_F: Tensor) -> tuple[Tensor, Tensor]:
    """Averages over the used features of |mean - to_mean| / to_std and |std / to_std - 1|, T each."""
    mean_distance, std_distance = (mean - to_mean).abs() / to_std, (std / to_std - 1).abs()
    return tuple(value[..., used_F].mean(-1) for value in (mean_distance, std_distance))  # pyright: ignore[reportReturnType]


def _rows(population: Moments, norm: Norm) -> list[Row]:
    mean_TF, std_TF, count_T = population.mean, population.var.sqrt(), population.count
    steps = len(count_T)
    late = pooled(Moments(*(value[int(LATE * steps) :] for value in (mean_TF, population.var, count_T[:, None]))), 0)
    to_late = _distances(mean_TF, std_TF, late.mean, late.var.sqrt(), late.var[0] > 0)
    to_stored = None
    if isinstance(norm, BatchStatisticsNorm) and getattr(norm, "group_scaling", None) is None:
        mean, var = norm.stored(0, steps)
        var_TF = population.var if norm.centered else population.var + population.mean.square()
        stored_mean = mean_TF if mean is None else mean.double()
        sigma_TF, all_F = (var_TF + norm.eps).sqrt(), torch.ones_like(late.var[0], dtype=torch.bool)
        stored = _distances(stored_mean, (var.double() + norm.eps).sqrt(), mean_TF, sigma_TF, all_F)
        to_stored = [value.flatten().tolist() for value in stored]
    rows: list[Row] = []
    for step in range(steps):
        row: Row = {"step": step, "entries": int(count_T[step])}
        row |= {"mean": float(mean_TF[step].mean()), "std": float(std_TF[step].mean())}
        for kind, name in enumerate(DISTANCES):
            row[name] = float(to_late[kind][step])
            row[f"stored_{name}"] = None if to_stored is None else to_stored[kind][step]
        rows.append(row)
    return rows


def _spreads(population: Moments) -> dict[str, float]:
    used_F = population.var.sum(0) > 0
    mean_TF, var_TF = population.mean[:, used_F], population.var[:, used_F]
    of_means = mean_TF.std(0, correction=0) / var_TF.mean(0).sqrt()
    of_stds = var_TF.sqrt().std(0, correction=0) / var_TF.sqrt().mean(0)
    return {name: float(value.mean()) for name, value in zip(SPREADS, (of_means, of_stds), strict=True)}


def settling_step(rows: list[Row], tolerance: float) -> int:
    """The first step from which on both distances stay within `tolerance`; all steps if that is a late one."""
    steps = rows[-1]["step"] + 1
    settled = steps
    for row in reversed(rows):
        if not all(row[name] <= tolerance for name in DISTANCES):
            break
        settled = row["step"]
    return settled if settled < LATE * steps else steps
