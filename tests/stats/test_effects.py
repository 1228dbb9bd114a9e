"""Paired differences and their intervals; what holds for them is checked by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted import SHAPES, comparison, differences, effects_in_parts
from scipy import stats

from normlab.stats.effects import Arm, Comparison, bootstrap_t, paired_effects

VALUES = st.lists(st.floats(-10, 10), min_size=5, max_size=8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("seeds", "data_sets"), [(5, 4000), (8, 1000), (10, 1000), (20, 1000)])
def test_coverage_is_between_93_and_97_percent(shape: str, seeds: int, data_sets: int):
    parts = list(effects_in_parts(differences(shape, data_sets, seeds)))
    covered = np.concatenate([(part.low_D <= 0) & (part.high_D >= 0) for part in parts]).mean()
    assert 0.93 <= covered <= 0.97
    covered_90 = np.concatenate([(part.low_90_D <= 0) & (part.high_90_D >= 0) for part in parts]).mean()
    assert 0.875 <= covered_90 <= 0.925


def test_interval_is_the_bootstrap_of_the_book():
    """Against a plain loop over all ordered resamples of five values."""
    values = np.array([0.3, -1.2, 0.8, 2.5, 0.1])
    resampled = values[np.stack(np.meshgrid(*[range(5)] * 5), -1).reshape(-1, 5)]
    with np.errstate(divide="ignore"):
        t = (resampled.mean(1) - values.mean()) / (resampled.std(1, ddof=1) / 5**0.5)
    constant = np.ptp(resampled, 1) == 0
    t[constant] = np.copysign(np.inf, resampled.mean(1) - values.mean())[constant]
    t = np.sort(t)
    error = values.std(ddof=1) / 5**0.5
    [(low, high)] = bootstrap_t(values[None], 0.95)
    # The 0.025 quantile of 3125 values is number 79, the 0.975 quantile number 3047.
    assert low[0] == pytest.approx(values.mean() - t[3046] * error)
    assert high[0] == pytest.approx(values.mean() - t[78] * error)


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0, 0.0, 0.1], [1.0, 2.0, 4.0], [1.0, 2.0]])
def test_students_interval_where_the_resamples_have_no_quantile(values: list[float]):
    [(low, high)] = bootstrap_t(np.array([values]), 0.95)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (low[0], high[0]) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("value", [0.0, 0.1, 1e9 / 3])
def test_equal_differences_have_no_interval(value: float):
    effects = paired_effects(np.full((1, 7), value))
    assert effects.sd_D[0] == 0
    assert effects.low_D[0] == effects.high_D[0] == pytest.approx(value)


@given(VALUES)
def test_interval_turns_with_the_sign(values: list[float]):
    row = np.array([values])
    [(low, high)] = bootstrap_t(row, 0.95)
    [(turned_low, turned_high)] = bootstrap_t(-row, 0.95)
    assert low[0] == -turned_high[0]
    assert high[0] == -turned_low[0]


@given(VALUES, st.integers(-20, 20))
def test_interval_scales_with_the_unit(values: list[float], power: int):
    # Powers of two, for which the scaled numbers are exact.
    factor = 2.0**power
    row = np.array([values])
    [(low, high)] = bootstrap_t(row, 0.95)
    [(scaled_low, scaled_high)] = bootstrap_t(factor * row, 0.95)
    assert (scaled_low[0], scaled_high[0]) == pytest.approx((factor * low[0], factor * high[0]), rel=1e-9, abs=1e-12)


def test_lower_is_better_turns_the_sign_and_pairs_go_by_seed():
    control, arm = Arm("none", {3: 1.0, 1: 2.0}), Arm("ln", {1: 1.5, 3: 1.25})
    assert Comparison(control, arm, "nats").differences() == pytest.approx([0.5, -0.25])
    assert Comparison(control, arm, "share", better="higher").differences() == pytest.approx([-0.5, 0.25])


def test_diverged_runs_count_as_the_value_given():
    both = comparison([None, 1.0, None], [2.0, None, None], better="lower", diverged_value=7.0)
    assert both.differences() == pytest.approx([-5.0, 6.0, 0.0])


@pytest.mark.parametrize(
    ("arm", "control", "said"),
    [
        ([1.0, 2.0], [1.0, 2.0, 3.0], r"seeds \[2\] were run for one arm alone"),
        ([1.0], [1.0], "at least 2 seeds"),
        ([1.0, float("nan")], [1.0, 2.0], "ln, seed 1: nan is no measurement"),
        ([1.0, 2.0], [1.0, float("inf")], "none, seed 1: inf is no measurement"),
        ([1.0, None], [1.0, 2.0], "give diverged_value"),
    ],
)
def test_what_cannot_be_compared_is_said(arm: list, control: list, said: str):
    with pytest.raises(ValueError, match=said):
        comparison(arm, control)
