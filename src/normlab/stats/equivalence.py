"""The two questions put to an effect, as p-values by Student's t: is there any, and is it within the margin.

Intervals decide with the bootstrap; these p-values serve Holm's correction. The bootstrap's own would not do: five
seeds have 126 different resamples, the rarest of probability 1/3125, so that no effect however large would pass the
correction over 20 claims.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from normlab.stats.effects import Effects

__all__ = ["p_equivalence", "p_no_effect", "within"]


def p_no_effect(effects: Effects) -> np.ndarray:
    """Two-sided p-values (D) of "the mean difference is 0"."""
    return np.minimum(1.0, 2 * _p_above(np.abs(effects.mean_D), effects))


def p_equivalence(effects: Effects, margin: float) -> np.ndarray:
    """p-values (D) of "the mean difference is the margin or more, either way".

    The larger of the two one-sided tests (TOST, Schuirmann 1987), which is that of the nearer margin.
    """
    return _p_above(margin - np.abs(effects.mean_D), effects)


def within(effects: Effects, margin: float) -> np.ndarray:
    """Whether (D) the 90 % interval lies inside the margin.

    90 and not 95 %: each end is a one-sided test of level 5 %, and an effect as large as the margin is near one end
    only, so that it passes for none in 5 % of cases.
    """
    return (-margin < effects.low_90_D) & (effects.high_90_D < margin)


def _p_above(distance_D: np.ndarray, effects: Effects) -> np.ndarray:
    """One-sided p-values of "the distance is 0 or less"; without spread they are 0 or 1."""
    t_D = distance_D / np.where(effects.sd_D > 0, effects.error, 1.0)
    return np.where(effects.sd_D > 0, stats.t.sf(t_D, effects.seeds - 1), (distance_D <= 0).astype(float))
