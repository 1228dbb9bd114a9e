"""Differences with a known mean and a standard deviation of 1, and comparisons made of them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from normlab.stats.effects import Arm, Comparison, Effects, paired_effects

SHAPES = ("normal", "skewed")


def differences(shape: str, data_sets: int, seeds: int, *, mean: float = 0.0, draw: int = 0) -> np.ndarray:
    """(D, S): normal, or gamma of shape 4, whose skewness is 1."""
    rng = np.random.default_rng((draw, seeds))
    if shape == "normal":
        return mean + rng.normal(size=(data_sets, seeds))
    return mean + (rng.gamma(4, size=(data_sets, seeds)) - 4) / 2


def effects_in_parts(differences_DS: np.ndarray, rows: int = 250) -> Iterable[Effects]:
    """Effects of a few data sets at a time: the resamples of all of them would not fit into memory."""
    for start in range(0, len(differences_DS), rows):
        yield paired_effects(differences_DS[start : start + rows])


def comparison(values: Iterable[float | None], control: Iterable[float | None] | None = None, **settings) -> Comparison:
    """Arm `ln` with these values by seed against `none`; the control measures 0 unless given."""
    arm = dict(enumerate(values))
    zeros = dict.fromkeys(arm, 0.0)
    return Comparison(
        control=Arm("none", zeros if control is None else dict(enumerate(control))),
        arm=Arm("ln", arm),
        unit="nats",
        **{"better": "higher", **settings},
    )
