"""Diverged runs as data: rates, and the test that decides where most runs of an arm diverged."""

from __future__ import annotations

from dataclasses import dataclass

from scipy import stats

from normlab.stats.effects import ALPHA, Arm, Comparison

__all__ = ["DivergenceRate", "divergence_decides", "divergence_rate", "p_same_divergence", "seeds_to_separate"]


@dataclass(frozen=True)
class DivergenceRate:
    """Of `runs` runs of an arm `diverged` did; the share is in `low` to `high` with 95 % confidence (Wilson 1927)."""

    arm: str
    diverged: int
    runs: int
    low: float
    high: float


def divergence_rate(arm: Arm) -> DivergenceRate:
    runs = len(arm.value_by_seed)
    interval = stats.binomtest(arm.diverged, runs).proportion_ci(1 - ALPHA, method="wilson")
    return DivergenceRate(arm.name, arm.diverged, runs, float(interval.low), float(interval.high))


def divergence_decides(comparison: Comparison) -> bool:
    """Whether more than half of the runs of either arm diverged: a mean over stand-in values says nothing then."""
    return 2 * max(comparison.control.diverged, comparison.arm.diverged) > comparison.seeds


def p_same_divergence(comparison: Comparison) -> float:
    """Two-sided p-value of "both arms diverge equally often" by Fisher's exact test.

    McNemar's test, which knows of the pairs, cannot fall below 2/32 with five seeds; five against none gives 2/252
    here. Seeds that are hard for both arms make Fisher's test err on the side of no difference.
    """
    return _fisher(comparison.control.diverged, comparison.arm.diverged, comparison.seeds)


def seeds_to_separate(comparison: Comparison, alpha: float = ALPHA, most: int = 200) -> int | None:
    """Seeds at which the shares that diverged, if they stay as they are, differ significantly; None if above `most`."""
    seeds = comparison.seeds
    for more in range(seeds, most + 1):
        control, arm = (round(one.diverged * more / seeds) for one in (comparison.control, comparison.arm))
        if _fisher(control, arm, more) <= alpha:
            return more
    return None


def _fisher(control: int, arm: int, runs: int) -> float:
    # Typed as a bare tuple.
    return float(stats.fisher_exact([[control, runs - control], [arm, runs - arm]])[1])  # pyright: ignore[reportArgumentType]
