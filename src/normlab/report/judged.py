"""From the tables in `results/` to judged arguments; nothing but those files decides.

<scale>/<claim>.csv -> verdict of each comparison -> verdict of the claim -> Holm over the claims of the scale
exact.json -> verdict of the exact part
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from normlab.claims.base import SCALES, Claim, Comparison, Scale
from normlab.claims.figure_tables import CurveRow, ProbeRow, curves_path, probes_path, read_table
from normlab.claims.measurements import Measurement
from normlab.claims.rows import Row, read_rows
from normlab.claims.rules import Rule, read_rule, rule_path
from normlab.config import InputError
from normlab.records.checks import ExactCheck, read_checks
from normlab.stats.verdicts import ClaimVerdict, Verdict, correct

__all__ = ["Argument", "Exact", "Found", "Measured", "Shown", "judge_all"]

Shown = Literal["supported", "refuted", "mixed", "inconclusive", "not yet run"]


@dataclass(frozen=True)
class Exact:
    """The exact part of an argument.

    Args:
        checks: those of its checks that were computed.
        missing: names of the others.
        limits: checks that show where the argument ends; they decide nothing.
    """

    checks: Sequence[ExactCheck]
    missing: Sequence[str]
    limits: Sequence[ExactCheck]

    @property
    def verdict(self) -> Shown:
        if not all(check.holds for check in self.checks):
            return "refuted"
        return "not yet run" if self.missing else "supported"


@dataclass(frozen=True)
class Found:
    """What one comparison found in one setting."""

    comparison: Comparison
    setting: str
    measurement: Measurement
    verdict: Verdict


@dataclass(frozen=True)
class Measured:
    """The measured part of an argument at one scale.

    Args:
        rows: of its table.
        alone: what its comparisons say together; None if the table is not complete.
        corrected: the same among all arguments of the scale.
        unfinished: what is missing, in one line; empty if nothing is.
        among: how many arguments were judged at that scale.
        rule: as it was when the verdict runs began.
        curves, probes: what figures are drawn from.
        drawn_from: beginning of the hash of those tables, so that a report with old figures is seen to be old.
    """

    claim: Claim
    scale: Scale
    rows: Sequence[Row]
    alone: ClaimVerdict | None
    corrected: ClaimVerdict | None
    unfinished: str
    among: int
    rule: Rule | None
    curves: Sequence[CurveRow]
    probes: Sequence[ProbeRow]
    drawn_from: str

    @property
    def verdict(self) -> Shown:
        return "not yet run" if self.corrected is None else self.corrected.kind

    @property
    def found(self) -> list[Found]:
        """Every comparison in each of its settings; empty if the table is not complete."""
        if self.alone is None:
            return []
        measurements = {measurement.name: measurement for measurement in self.claim.measurements}
        return [
            Found(comparison, setting, measurements[comparison.measurement], verdict)
            for (comparison, setting), verdict in zip(self.claim.pairs(), self.alone.by_setting.values(), strict=True)
        ]

    @property
    def deciding(self) -> list[Found]:
        """The comparison furthest from certain, which speaks for all; where they disagree, the surest of each kind."""
        if self.alone is None:
            return []
        if self.alone.kind != "mixed":
            return [max(self.found, key=lambda found: found.verdict.p)]
        surest: dict[str, Found] = {}
        for found in sorted(self.found, key=lambda found: found.verdict.p):
            surest.setdefault(found.verdict.kind, found)
        return list(surest.values())

    @property
    def is_lost(self) -> bool:
        """Whether its verdict did not survive the correction over all arguments."""
        return self.alone is not None and self.alone.kind != self.verdict


@dataclass(frozen=True)
class Argument:
    """A claim with what was found; `measured` has the scales at which there is a table."""

    claim: Claim
    exact: Exact | None
    measured: Sequence[Measured]


def judge_all(claims: Sequence[Claim], results: Path) -> list[Argument]:
    """All arguments as the files below `results` say.

    Raises:
        InputError: a file there is damaged.
    """
    checks = {check.name: check for check in read_checks(results / "exact.json")}
    measured = [part for scale in SCALES for part in _at_scale(claims, scale, results / scale)]
    return [
        Argument(
            claim,
            _exact(claim, checks) if claim.checks else None,
            [part for part in measured if part.claim.id == claim.id],
        )
        for claim in claims
    ]


def _exact(claim: Claim, checks: dict[str, ExactCheck]) -> Exact:
    def found(names: Iterable[str]) -> list[ExactCheck]:
        return [checks[name] for name in names if name in checks]

    missing = [name for name in (*claim.checks, *claim.limits) if name not in checks]
    return Exact(found(claim.checks), missing, found(claim.limits))


def _at_scale(claims: Sequence[Claim], scale: Scale, folder: Path) -> list[Measured]:
    rows = {claim.id: read_rows(folder / f"{claim.id}.csv") for claim in claims}
    there = [claim for claim in claims if rows[claim.id] and scale in claim.scales()]
    alone: dict[str, ClaimVerdict] = {}
    unfinished: dict[str, str] = {}
    for claim in there:
        try:
            _require_its_runs(claim, scale, rows[claim.id])
            alone[claim.id] = claim.judge(rows[claim.id])
        except InputError as error:
            unfinished[claim.id] = str(error)
    corrected = correct(alone)
    tables = {claim.id: folder / f"{claim.id}.csv" for claim in there}
    return [
        Measured(
            claim,
            scale,
            rows[claim.id],
            alone.get(claim.id),
            corrected.get(claim.id),
            unfinished.get(claim.id, ""),
            len(alone),
            read_rule(rule_path(tables[claim.id])),
            read_table(curves_path(tables[claim.id]), CurveRow),
            read_table(probes_path(tables[claim.id]), ProbeRow),
            _sha256(curves_path(tables[claim.id]), probes_path(tables[claim.id])),
        )
        for claim in there
    ]


def _require_its_runs(claim: Claim, scale: Scale, rows: Sequence[Row]) -> None:
    """Raise `InputError` if the verdict runs are not those that the argument plans."""
    planned = {run.id for run in claim.verdict_runs(scale, claim.choose_rates(rows))}
    strange = {row.run_id for row in rows if row.phase == "verdict"} - planned
    if strange:
        raise InputError(
            f"argument {claim.id}: its settings changed: {len(strange)} verdict runs of the table are not those that "
            f"it plans now; make study CLAIM={claim.id} SCALE={scale}"
        )


def _sha256(*paths: Path) -> str:
    there = [path.read_bytes() for path in paths if path.exists()]
    return hashlib.sha256(b"".join(there)).hexdigest()[:12] if there else ""
