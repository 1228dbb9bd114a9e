"""Paired effects over seeds with their bootstrap intervals.

Shape suffixes: D data sets, S seeds, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations_with_replacement
from typing import Literal

import numpy as np
from scipy import stats

__all__ = ["ALPHA", "Arm", "Comparison", "Effects", "bootstrap_t", "paired_effects"]

ALPHA = 0.05  # of every test; intervals are of level 1 - ALPHA, and 1 - 2 ALPHA for equivalence
EXACT_SEEDS = 8  # 6435 different resamples of 8; of 9 there are 24310
RESAMPLES = 9999
FEWEST_SEEDS = 5  # of 4 values there are 35 resamples, and the interval is 1.8 times as wide as Student's


@dataclass(frozen=True)
class Arm:
    """The measurements of one arm.

    Args:
        name: as it is shown, such as "bn_step".
        value_by_seed: one number per seed; None is a run that diverged.
    """

    name: str
    value_by_seed: Mapping[int, float | None]

    @property
    def diverged(self) -> int:
        return sum(value is None for value in self.value_by_seed.values())


@dataclass(frozen=True)
class Comparison:
    """Two arms run on the same seeds, and what a difference between them means.

    Args:
        control: the arm compared with.
        arm: the arm in question.
        unit: of the measurement, "nats" or "seconds".
        better: whether lower or higher measurements are better.
        diverged_value: what stands for a diverged run, so that effects stay finite: for a loss, that of the unigram
            baseline, which knows only how frequent each token is. Needed as soon as one run diverged.

    Raises:
        ValueError: fewer than two seeds; other seeds in one arm than in the other, for nothing is dropped; a
            measurement that is not finite; a diverged run without `diverged_value`.
    """

    control: Arm
    arm: Arm
    unit: str
    better: Literal["lower", "higher"] = "lower"
    diverged_value: float | None = None

    def __post_init__(self) -> None:
        names = f"{self.arm.name} against {self.control.name}"
        unpaired = set(self.control.value_by_seed) ^ set(self.arm.value_by_seed)
        if unpaired:
            raise ValueError(f"{names}: seeds {sorted(unpaired)} were run for one arm alone; run them for both")
        if len(self.arm.value_by_seed) < 2:
            raise ValueError(f"{names}: an effect needs at least 2 seeds, got {len(self.arm.value_by_seed)}")
        for arm in (self.control, self.arm):
            for seed, value in arm.value_by_seed.items():
                if value is not None and not math.isfinite(value):
                    raise ValueError(f"{arm.name}, seed {seed}: {value} is no measurement; a diverged run is None")
        if self.diverged_value is None and self.control.diverged + self.arm.diverged:
            raise ValueError(f"{names}: a run diverged; give diverged_value, such as the loss of the unigram baseline")

    @property
    def seeds(self) -> int:
        return len(self.arm.value_by_seed)

    def differences(self) -> np.ndarray:
        """Differences (S) between the arms by ascending seed, positive where the arm is better than the control.

        A diverged run counts as `diverged_value`; a pair of which both diverged is a difference of 0.
        """
        sign = 1.0 if self.better == "higher" else -1.0
        in_order = sorted(self.arm.value_by_seed)
        return np.array([sign * (self._value(self.arm, seed) - self._value(self.control, seed)) for seed in in_order])

    def _value(self, arm: Arm, seed: int) -> float:
        value = arm.value_by_seed[seed]
        if value is None:
            assert self.diverged_value is not None  # checked on construction
            return self.diverged_value
        return value


@dataclass(frozen=True)
class Effects:
    """Mean paired differences of D data sets over the same number of seeds; a verdict has one, a simulation thousands.

    Args:
        mean_D, sd_D: of the differences over seeds; sd with n - 1.
        low_D, high_D: the 95 % interval of the mean.
        low_90_D, high_90_D: the 90 % interval, on which equivalence is decided.
        seeds: how many pairs.
    """

    mean_D: np.ndarray
    sd_D: np.ndarray
    low_D: np.ndarray
    high_D: np.ndarray
    low_90_D: np.ndarray
    high_90_D: np.ndarray
    seeds: int

    @property
    def error(self) -> np.ndarray:
        """Standard errors of the means (D)."""
        return self.sd_D / math.sqrt(self.seeds)


def paired_effects(differences_DS: np.ndarray) -> Effects:
    """The effects of D comparisons, one row of differences each, with their intervals."""
    seeds = differences_DS.shape[1]
    (low_D, high_D), (low_90_D, high_90_D) = bootstrap_t(differences_DS, 1 - ALPHA, 1 - 2 * ALPHA)
    return Effects(differences_DS.mean(1), _sd(differences_DS), low_D, high_D, low_90_D, high_90_D, seeds)


def bootstrap_t(values_DS: np.ndarray, *levels: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """Two-sided intervals of the mean by the studentized bootstrap (Efron 1979; Efron and Tibshirani 1993, 12.5).

    Every resample gives t* = (its mean - the mean) / its own standard error; the quantiles of t* take the place of
    Student's. All resamples are enumerated up to 8 seeds; beyond, 9999 are drawn, always the same: no chance enters.
    scipy.stats.bootstrap has percentile, basic and BCa intervals alone, too narrow for few seeds.

    COVERAGE_TABLE

    Args:
        values_DS: one row per data set, at least 2 values each.
        levels: nominal coverages, such as 0.95.

    Returns:
        For each level lower and upper bounds (D). Equal values give an interval of width 0.
    """
    seeds = values_DS.shape[1]
    mean_D = values_DS.mean(1)
    error_D = _sd(values_DS) / math.sqrt(seeds)
    counts_RS, weight_R = _resamples(seeds)
    centred_DS = values_DS - mean_D[:, None]
    t_DR = _studentized(centred_DS, counts_RS)
    tails = [(1 - level) / 2 for level in levels]
    quantiles = _quantiles(t_DR, weight_R, [*tails, *(1 - tail for tail in tails)])
    bounds = []
    for tail, lower_D, upper_D in zip(tails, quantiles[: len(tails)], quantiles[len(tails) :], strict=True):
        # Resamples of equal values have no standard error. Where they fill a tail (many ties) t* has no quantile
        # there, and below 5 seeds there are too few different resamples: Student's then, on both sides.
        student = stats.t.isf(tail, seeds - 1)
        usable_D = np.isfinite(lower_D) & np.isfinite(upper_D) & (seeds >= FEWEST_SEEDS)
        above_D, below_D = np.where(usable_D, upper_D, student), np.where(usable_D, lower_D, -student)
        bounds.append((mean_D - above_D * error_D, mean_D - below_D * error_D))
    return bounds


def _sd(values_DS: np.ndarray) -> np.ndarray:
    # The mean of equal numbers may be off by a rounding, and their spread then not 0.
    return np.where(np.ptp(values_DS, 1) == 0, 0.0, values_DS.std(1, ddof=1))


@lru_cache(maxsize=32)
def _resamples(seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each resample takes each seed (R, S), and the probability of each resample (R)."""
    if seeds > EXACT_SEEDS:
        counts_RS = np.random.default_rng(0).multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES)
        return counts_RS.astype(float), np.full(RESAMPLES, 1 / RESAMPLES)
    counts_RS = np.array(
        [np.bincount(chosen, minlength=seeds) for chosen in combinations_with_replacement(range(seeds), seeds)]
    )
    orders_R = [math.factorial(seeds) / math.prod(map(math.factorial, counts)) for counts in counts_RS.tolist()]
    return counts_RS.astype(float), np.array(orders_R) / seeds**seeds


def _studentized(centred_DS: np.ndarray, counts_RS: np.ndarray) -> np.ndarray:
    """t* of every resample (D, R); infinite where a resample has no spread."""
    seeds = centred_DS.shape[1]
    scale_D1 = np.abs(centred_DS).max(1, keepdims=True)
    unit_DS = centred_DS / np.where(scale_D1 > 0, scale_D1, 1.0)  # tolerances below are relative to the largest
    mean_DR = unit_DS @ counts_RS.T / seeds
    variance_DR = (unit_DS**2) @ counts_RS.T / seeds - mean_DR**2
    spread_DR = variance_DR > 1e-12
    error_DR = np.sqrt(np.where(spread_DR, variance_DR, 1.0) / (seeds - 1))
    pointlike_DR = np.where(np.abs(mean_DR) > 1e-9, np.copysign(np.inf, mean_DR), 0.0)
    return np.where(spread_DR, mean_DR / error_DR, pointlike_DR)


def _quantiles(values_DR: np.ndarray, weight_R: np.ndarray, probabilities: list[float]) -> list[np.ndarray]:
    """For each probability the smallest value of each row at which the weights reach it (D)."""
    if np.ptp(weight_R) == 0:  # equal weights need no full sort
        ranks = [math.ceil(probability * len(weight_R)) - 1 for probability in probabilities]
        return list(np.partition(values_DR, ranks, axis=1)[:, ranks].T)
    order_DR = np.argsort(values_DR, axis=1)
    reached_DR = np.cumsum(weight_R[order_DR], axis=1)
    rows_D = np.arange(len(values_DR))
    return [values_DR[rows_D, order_DR[rows_D, (reached_DR < p).sum(1)]] for p in probabilities]
