"""Verdicts on data of which the truth is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import SHAPES, comparison, differences, effects_in_parts

from normlab.stats.effects import paired_effects
from normlab.stats.multiplicity import holm
from normlab.stats.power import POWER, seeds_needed
from normlab.stats.verdicts import Prediction, Verdict, combine, correct, findings, judge

CLEAR = [0.05, 0.06, 0.04, 0.055, 0.05]
NOTHING = [-0.001, 0.002, -0.0014, 0.0015, 0.0]
VAGUE = [0.3, -0.2, 0.1, 0.05, -0.15]
MARGIN = 0.02


def shares(differences_DS: np.ndarray, margin: float) -> dict[str, float]:
    """How often each finding is made."""
    found = np.concatenate([findings(part, margin)[0] for part in effects_in_parts(differences_DS)])
    return {name: float((found == name).mean()) for name in ("better", "worse", "same", "open")}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("margin", [0.01, 0.5, 1.0, 3.0])
def test_false_verdicts_on_null_data(shape: str, margin: float):
    found = shares(differences(shape, 3000, 5, draw=1), margin)
    assert found["better"] + found["worse"] <= 0.05
    assert found["same"] + found["open"] >= 0.95


def test_an_effect_of_the_margin_is_seldom_called_none():
    for shape, bound in (("normal", 0.05), ("skewed", 0.07)):
        for sign in (-1, 1):
            assert shares(differences(shape, 3000, 5, mean=2.0 * sign, draw=2), 2.0)["same"] <= bound


@pytest.mark.parametrize("margin", [2.5, 1.2, 0.8])
def test_the_seeds_needed_reach_the_power(margin: float):
    seeds = seeds_needed(1.0, margin)
    slack = 0.036  # two standard errors of 500 data sets
    assert shares(differences("normal", 500, seeds), margin)["same"] >= POWER - slack
    at_margin = differences("normal", 500, seeds, mean=margin)
    told = np.concatenate([part.low_D > 0 for part in effects_in_parts(at_margin)])
    assert told.mean() >= POWER - slack
    planted = differences("normal", 500, seeds, mean=1.5 * margin)
    assert shares(planted, margin)["better"] >= POWER - slack
    assert shares(-planted, margin)["worse"] >= POWER - slack


def test_fewer_seeds_than_needed_do_not_reach_the_power():
    seeds = seeds_needed(1.0, 1.2)
    assert shares(differences("normal", 1000, seeds - 4), 1.2)["same"] < POWER


def test_seeds_needed_grow_with_the_square_of_the_spread():
    assert seeds_needed(10.0, 1.0) == pytest.approx(4 * seeds_needed(5.0, 1.0), rel=0.05)
    assert seeds_needed(0.0, 1.0) == seeds_needed(1e-9, 1.0) == 5
    assert seeds_needed(1e9, 1.0) == seeds_needed(1.0, 0.0) == 10_000
    assert seeds_needed(1.0, 1.0, alpha=0.005) > seeds_needed(1.0, 1.0)


@pytest.mark.parametrize(
    ("values", "predicted", "kind"),
    [
        (CLEAR, "better", "supported"),
        (CLEAR, "worse", "refuted"),
        (CLEAR, "same", "refuted"),
        (NOTHING, "better", "refuted"),
        (NOTHING, "worse", "refuted"),
        (NOTHING, "same", "supported"),
        (VAGUE, "better", "inconclusive"),
        (VAGUE, "worse", "inconclusive"),
        (VAGUE, "same", "inconclusive"),
        (CLEAR, "not worse", "supported"),
        (NOTHING, "not worse", "supported"),
        ([-value for value in CLEAR], "not worse", "refuted"),
        (VAGUE, "not worse", "inconclusive"),
    ],
)
def test_findings_become_verdicts(values: list[float], predicted: Prediction, kind: str):
    verdict = judge(comparison(values), predicted, MARGIN)
    assert verdict.kind == kind
    assert (verdict.seeds_needed is not None) == (kind == "inconclusive")


def test_an_effect_smaller_than_the_margin_supports_nothing():
    # Surely above 0, and neither the margin's size nor surely below it.
    verdict = judge(comparison([0.015, 0.016, 0.01, 0.023, 0.016]), "better", MARGIN)
    assert verdict.low > 0
    assert verdict.kind == "inconclusive"
    assert "not 0, but neither as large as the margin" in verdict.why
    assert verdict.seeds_needed is not None
    assert verdict.seeds_needed > 5


def test_why_in_plain_words():
    assert judge(comparison(CLEAR), "better", MARGIN).why == (
        "ln is 0.051 nats better than none (95 % interval 0.0411 to 0.0605): "
        "as large as the margin of 0.02 nats or larger; 5 seeds, p = 0.0001"
    )
    worse = judge(comparison([-value for value in CLEAR]), "better", MARGIN)
    assert worse.why.startswith("ln is 0.051 nats worse than none (95 % interval 0.0411 to 0.0605)")
    vague = judge(comparison(VAGUE), "better", MARGIN)
    assert f"5 seeds, needs {vague.seeds_needed} seeds" in vague.why


@settings(max_examples=30)  # a verdict takes milliseconds
@given(st.lists(st.floats(-0.1, 0.1), min_size=5, max_size=6), st.integers(-10, 10))
def test_verdicts_turn_with_the_arms_and_scale_with_the_unit(values: list[float], power: int):
    factor = 2.0**power
    zeros = [0.0] * len(values)
    verdict = judge(comparison(values), "better", MARGIN)
    scaled = judge(comparison([factor * value for value in values]), "better", factor * MARGIN)
    turned = judge(comparison(zeros, values), "worse", MARGIN)
    lower = judge(comparison([-value for value in values], better="lower"), "better", MARGIN)
    assert scaled.kind == turned.kind == lower.kind == verdict.kind
    assert scaled.p == pytest.approx(verdict.p)
    assert (turned.effect, turned.low, turned.high) == (-verdict.effect, -verdict.high, -verdict.low)
    assert replace(lower, why="") == replace(verdict, why="")


def test_a_margin_of_zero_is_refused():
    with pytest.raises(ValueError, match="above 0, got 0"):
        judge(comparison(CLEAR), "better", 0.0)


def test_holm_against_numbers_worked_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert holm({"a": 0.7, "b": 0.9}) == {"a": 1.0, "b": 1.0}


def test_false_verdicts_among_ten_claims():
    """Null effects all, half of them with margins so wide that equivalence is found, half so narrow that it is not."""
    reports, claims = 600, 10
    found, p = [], []
    for claim in range(claims):
        effects = paired_effects(differences("normal", reports, 5, draw=10 + claim))
        found_D, p_D = findings(effects, 0.01 if claim % 2 else 2.5)
        found.append(found_D)
        p.append(np.where(found_D == "open", 1.0, p_D))
    wrong = np.isin(np.stack(found, 1), ["better", "worse"])
    adjusted = [list(holm(dict(enumerate(row))).values()) for row in np.stack(p, 1).tolist()]  # type: ignore[arg-type]
    assert wrong.any(1).mean() > 0.1
    assert (wrong & (np.array(adjusted) <= 0.05)).any(1).mean() <= 0.05


def clear(p: float) -> Verdict:
    return replace(judge(comparison(CLEAR), "better", MARGIN), p=p)


def test_settings_that_agree_and_settings_that_do_not():
    supported = judge(comparison(CLEAR), "better", MARGIN)
    refuted = judge(comparison(NOTHING), "better", MARGIN)
    vague = judge(comparison(VAGUE), "better", MARGIN)
    alone = combine({"lstm": supported})
    assert (alone.kind, alone.p, alone.why) == ("supported", supported.p, supported.why)
    agreed = combine({"lstm": supported, "transformer": clear(0.03)})
    assert (agreed.kind, agreed.p) == ("supported", 0.03)
    assert agreed.why.startswith("in all 2 settings; weakest in transformer: ln is")
    mixed = combine({"lstm": supported, "transformer": refuted, "cnn": vague})
    assert (mixed.kind, mixed.why) == (
        "mixed",
        "supported in lstm; refuted in transformer; inconclusive in cnn",
    )
    assert mixed.p == pytest.approx(3 * min(supported.p, refuted.p))
    assert combine({"lstm": vague, "cnn": vague}).kind == "inconclusive"
    with pytest.raises(ValueError, match="at least one setting"):
        combine({})


def test_a_verdict_that_does_not_survive_among_others():
    vague = combine({"lstm": judge(comparison(VAGUE), "better", MARGIN)})
    corrected = correct({"d1": combine({"lstm": clear(0.001)}), "d2": combine({"lstm": clear(0.03)}), "d3": vague})
    assert (corrected["d1"].kind, corrected["d1"].p) == ("supported", pytest.approx(0.003))
    assert corrected["d2"].kind == "inconclusive"
    assert corrected["d2"].p == pytest.approx(0.06)
    assert corrected["d2"].why.startswith(
        "supported on its own (p = 0.03) but not among 3 claims (Holm: p = 0.06); needs"
    )
    assert corrected["d3"] == vague
    assert correct({"d2": combine({"lstm": clear(0.03)})})["d2"].kind == "supported"
