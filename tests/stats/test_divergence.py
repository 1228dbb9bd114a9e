"""Diverged runs: they count, and where they are the majority they decide."""

from __future__ import annotations

import pytest
from planted import comparison

from normlab.stats.divergence import divergence_rate
from normlab.stats.effects import Arm
from normlab.stats.verdicts import Prediction, judge

FINE = [0.5, 0.52, 0.51, 0.49, 0.5]


def test_rate_and_its_interval():
    rate = divergence_rate(Arm("ln", {0: None, 1: 0.5, 2: 0.5, 3: 0.5, 4: 0.5}))
    assert (rate.arm, rate.diverged, rate.runs) == ("ln", 1, 5)
    # Wilson's formula with z = 1.96: (0.2 + z^2/10 +- z sqrt(0.032 + z^2/100)) / (1 + z^2/5)
    assert (rate.low, rate.high) == pytest.approx((0.0362, 0.6245), abs=1e-4)


def test_a_single_diverged_run_stays_in_the_effect():
    verdict = judge(comparison([*FINE[:4], None], FINE, diverged_value=-3.0), "worse", 0.02)
    assert verdict.effect == pytest.approx(-0.7)
    assert verdict.kind == "inconclusive"
    assert verdict.why.endswith("1 of 5 runs of ln and 0 of 5 of none diverged")


@pytest.mark.parametrize(
    ("arm", "control", "predicted", "kind", "needed"),
    [
        ([None] * 5, FINE, "worse", "supported", None),
        ([None] * 5, FINE, "better", "refuted", None),
        (FINE, [None] * 5, "better", "supported", None),
        (FINE, [None] * 4 + [0.5], "same", "refuted", None),  # p = 0.048
        ([None] * 3 + FINE[3:], FINE, "worse", "inconclusive", 8),  # p = 0.17; 5 of 8 against none: 0.026
        ([None] * 5, [None] * 5, "same", "inconclusive", None),
    ],
)
def test_most_runs_diverged(arm: list, control: list, predicted: Prediction, kind: str, needed: int | None):
    verdict = judge(comparison(arm, control, diverged_value=-3.0), predicted, 0.02)
    assert (verdict.kind, verdict.seeds_needed) == (kind, needed)
    assert "Fisher" in verdict.why
    assert ("needs 8 seeds at these shares" in verdict.why) == (needed == 8)
    assert ("no number of seeds" in verdict.why) == (kind == "inconclusive" and needed is None)
