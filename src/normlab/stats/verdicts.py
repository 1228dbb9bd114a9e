"""Verdicts: of one comparison, of the settings of one claim, and of all claims of a report together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast

import numpy as np

from normlab.stats.divergence import (
    DivergenceRate,
    divergence_decides,
    divergence_rate,
    p_same_divergence,
    seeds_to_separate,
)
from normlab.stats.effects import ALPHA, Comparison, Effects, paired_effects
from normlab.stats.equivalence import p_equivalence, p_no_effect, within
from normlab.stats.multiplicity import holm
from normlab.stats.power import MOST_SEEDS, seeds_needed

__all__ = ["ClaimVerdict", "Kind", "Prediction", "Verdict", "combine", "correct", "findings", "judge"]

Kind = Literal["supported", "refuted", "inconclusive"]
Prediction = Literal["better", "worse", "same", "not worse"]
Finding = Literal["better", "worse", "same", "open"]


@dataclass(frozen=True)
class Verdict:
    """What one comparison says about a prediction.

    Args:
        kind: supported, refuted or inconclusive.
        finding: what the arm was found to be against the control; "open" is neither.
        effect, low, high: mean paired difference and 95 % interval in `unit`, positive where the arm is better.
        sd: of the differences.
        margin: the smallest effect worth calling one.
        seeds: how many pairs.
        p: of the test behind the finding (no effect; effect of the margin or more; equal divergence). Where nothing
            was found, that of no effect.
        seeds_needed: for an inconclusive verdict; None where no number would do or the verdict stands.
        divergence: of the control and of the arm.
        why: one line.
    """

    kind: Kind
    finding: Finding
    effect: float
    low: float
    high: float
    sd: float
    margin: float
    unit: str
    seeds: int
    p: float
    seeds_needed: int | None
    divergence: tuple[DivergenceRate, DivergenceRate]
    why: str


@dataclass(frozen=True)
class ClaimVerdict:
    """What all settings of a claim say together.

    Args:
        kind: as in each setting where all agree, else mixed.
        p: of the statement made, adjusted once `correct` was applied.
        by_setting: the verdicts it is made of, never changed.
        why: one line; for mixed, which setting says what.
    """

    kind: Kind | Literal["mixed"]
    p: float
    by_setting: Mapping[str, Verdict]
    why: str


def judge(comparison: Comparison, predicted: Prediction, margin: float) -> Verdict:
    """The verdict of one comparison on "the arm is `predicted` against the control".

    Supported is the finding predicted (see `findings`; "not worse" is better or the same), refuted any other finding,
    inconclusive an open matter. Where
    more than half of an arm's runs diverged, Fisher's exact test on the numbers of diverged runs takes the place of
    the intervals.

    Args:
        margin: in the unit of the measurement, above 0.

    Raises:
        ValueError: the margin is not above 0.
    """
    if not margin > 0:
        raise ValueError(f"the margin is the smallest effect worth calling one and above 0, got {margin}")
    effects = paired_effects(comparison.differences()[None])
    divergence = divergence_rate(comparison.control), divergence_rate(comparison.arm)
    if divergence_decides(*divergence):
        finding, p = _divergence_finding(*divergence)
    else:
        finding_D, p_D = findings(effects, margin)
        finding, p = cast(Finding, str(finding_D[0])), float(p_D[0])
    verdict = Verdict(
        kind="inconclusive" if finding == "open" else "supported" if _agrees(finding, predicted) else "refuted",
        finding=finding,
        effect=float(effects.mean_D[0]),
        low=float(effects.low_D[0]),
        high=float(effects.high_D[0]),
        sd=float(effects.sd_D[0]),
        margin=margin,
        unit=comparison.unit,
        seeds=effects.seeds,
        p=p,
        seeds_needed=None,
        divergence=divergence,
        why="",
    )
    if finding == "open":
        verdict = replace(verdict, seeds_needed=_seeds_needed(verdict, ALPHA))
    return replace(verdict, why=_why_divergence(verdict) if divergence_decides(*divergence) else _why(verdict))


def _agrees(finding: Finding, predicted: Prediction) -> bool:
    return finding in ("better", "same") if predicted == "not worse" else finding == predicted


def findings(effects: Effects, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """What each of D arms was found to be, and the p-value of the test behind it.

    Better (worse): the 95 % interval lies above (below) 0, p <= 0.05 and the mean difference is at least the margin.
    The same: the 90 % interval lies within the margin, and p <= 0.05. Else the matter is open.

    False findings, simulated (5, 8, 10 and 20 seeds, normal and skewed as in `bootstrap_t`). No effect at all, margins
    down to 0.001 of the spread: one given direction in up to 2.3 % (normal) and 4.2 % (skewed), either in up to 4.4
    and 5.1 %; fewer with wider margins. An effect of exactly the margin, 5 seeds, is called the same in up to 3.3 %
    (normal) and, with its long tail away from 0, 5.9 % (skewed).

    Returns:
        `Finding`s (D) and p-values (D); for an open matter that of no effect.
    """
    p_D, p_same_D = p_no_effect(effects), p_equivalence(effects, margin)
    effect_D = ((effects.low_D > 0) | (effects.high_D < 0)) & (p_D <= ALPHA) & (np.abs(effects.mean_D) >= margin)
    same_D = within(effects, margin) & (p_same_D <= ALPHA) & ~effect_D
    named_D = np.where(effect_D, np.where(effects.mean_D > 0, "better", "worse"), np.where(same_D, "same", "open"))
    return named_D, np.where(same_D, p_same_D, p_D)


def combine(by_setting: Mapping[str, Verdict]) -> ClaimVerdict:
    """One verdict for a claim from those of its settings: theirs where all agree, else mixed.

    Where all agree the statement is true of every setting, and p is the largest; mixed states that some setting shows
    something, and p is the smallest of the decided settings times the number of settings (Bonferroni).

    Raises:
        ValueError: no setting.
    """
    if not by_setting:
        raise ValueError("a claim needs at least one setting")
    verdicts = list(by_setting.values())
    kinds = {verdict.kind for verdict in verdicts}
    if len(kinds) > 1:
        decided = [verdict.p for verdict in verdicts if verdict.kind != "inconclusive"]
        which = "; ".join(f"{verdict.kind} in {setting}" for setting, verdict in by_setting.items())
        return ClaimVerdict("mixed", min(1.0, len(verdicts) * min(decided)), dict(by_setting), which)
    p = max(verdict.p for verdict in verdicts)
    if len(verdicts) == 1:
        return ClaimVerdict(verdicts[0].kind, p, dict(by_setting), verdicts[0].why)
    # The setting furthest from certain speaks for all.
    setting, weakest = max(by_setting.items(), key=lambda item: item[1].p)
    why = f"in all {len(verdicts)} settings; weakest in {setting}: {weakest.why}"
    return ClaimVerdict(verdicts[0].kind, p, dict(by_setting), why)


def correct(by_claim: Mapping[str, ClaimVerdict]) -> dict[str, ClaimVerdict]:
    """The verdicts of a report with Holm's correction across its claims.

    Each claim's p is adjusted; one that is supported, refuted or mixed and whose adjusted p is above 0.05 becomes
    inconclusive, and its `why` says so. Inconclusive claims state nothing and enter with p = 1, but they count.
    """
    adjusted = holm({name: 1.0 if claim.kind == "inconclusive" else claim.p for name, claim in by_claim.items()})
    return {name: _corrected(claim, adjusted[name], len(by_claim)) for name, claim in by_claim.items()}


def _corrected(claim: ClaimVerdict, p: float, claims: int) -> ClaimVerdict:
    if claim.kind == "inconclusive":
        return claim
    if p <= ALPHA:
        return replace(claim, p=p)
    needed = [_seeds_needed(verdict, ALPHA / claims) for verdict in claim.by_setting.values()]
    lost = f"{claim.kind} on its own (p = {claim.p:.2g}) but not among {claims} claims (Holm: p = {p:.2g})"
    seeds = f"needs {_count(max(filter(None, needed)))}; " if any(needed) else ""
    return replace(claim, kind="inconclusive", p=p, why=f"{lost}; {seeds}{claim.why}")


def _divergence_finding(control: DivergenceRate, arm: DivergenceRate) -> tuple[Finding, float]:
    p = p_same_divergence(control, arm)
    if p > ALPHA:
        return "open", p
    return ("better" if arm.diverged < control.diverged else "worse"), p


def _seeds_needed(verdict: Verdict, alpha: float) -> int | None:
    """Seeds to resolve the margin; if there are as many already, to tell the observed mean from the margin.

    Where divergence decides: to tell the shares that diverged apart; None if no number would.
    """
    if divergence_decides(*verdict.divergence):
        return seeds_to_separate(*verdict.divergence, alpha)
    needed = seeds_needed(verdict.sd, verdict.margin, alpha)
    if needed <= verdict.seeds:
        needed = seeds_needed(verdict.sd, abs(verdict.margin - abs(verdict.effect)), alpha)
    return max(needed, verdict.seeds + 1)


def _count(seeds: int) -> str:
    return f"{seeds} seeds" if seeds < MOST_SEEDS else f"{MOST_SEEDS} seeds or more"


def _why(verdict: Verdict) -> str:
    control, arm = verdict.divergence
    # Bounds are written in the direction of the effect, so that a reader need not turn signs.
    better = verdict.effect >= 0
    low, high = (verdict.low, verdict.high) if better else (-verdict.high, -verdict.low)
    margin = f"the margin of {verdict.margin:.3g} {verdict.unit}"
    if verdict.finding == "same":
        found = f"within {margin}"
    elif verdict.finding != "open":
        found = f"as large as {margin} or larger"
    elif low > 0 and abs(verdict.effect) < verdict.margin:
        found = f"not 0, but neither as large as {margin} nor surely smaller"
    else:
        found = f"0 and an effect as large as {margin} cannot be told apart"
    line = (
        f"{arm.arm} is {abs(verdict.effect):.3g} {verdict.unit} {'better' if better else 'worse'} than {control.arm} "
        f"(95 % interval {low:.3g} to {high:.3g}): {found}; {verdict.seeds} seeds"
    )
    line += f", needs {_count(verdict.seeds_needed)}" if verdict.seeds_needed else f", p = {verdict.p:.2g}"
    return f"{line}; {_diverged(verdict)}" if arm.diverged + control.diverged else line


def _why_divergence(verdict: Verdict) -> str:
    line = f"{_diverged(verdict)} (Fisher: p = {verdict.p:.2g})"
    if verdict.finding != "open":
        return line
    if verdict.seeds_needed is None:
        return f"{line}; no number of seeds decides between such shares"
    return f"{line}; needs {_count(verdict.seeds_needed)} at these shares"


def _diverged(verdict: Verdict) -> str:
    control, arm = verdict.divergence
    counts = [
        f"{arm.diverged} of {arm.runs} runs of {arm.arm}",
        f"{control.diverged} of {control.runs} of {control.arm}",
    ]
    return f"{' and '.join(counts)} diverged"
