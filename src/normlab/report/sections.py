"""What the report shows, as tables of text and pictures; templates only lay it out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from normlab.claims.base import TUNING
from normlab.claims.figures import ByX, Curves
from normlab.claims.rows import Row
from normlab.records.checks import ExactCheck
from normlab.records.progress import duration
from normlab.report.judged import Argument, Exact, Measured, Shown
from normlab.report.numbers import interval, mean_std, plain, probability
from normlab.report.sentences import (
    changes,
    label,
    margin,
    pair,
    provenance,
    setting_of,
    why,
    why_exact,
)
from normlab.stats.divergence import divergence_rate
from normlab.stats.effects import Arm

__all__ = [
    "OVERVIEW",
    "CurvePlot",
    "EffectPlot",
    "LinePlot",
    "Part",
    "Picture",
    "Plot",
    "Section",
    "Table",
    "VerdictRow",
    "overview",
    "section",
]

OVERVIEW = ("argument", "verdict", "effect [95 % interval]", "margin", "scale", "seeds", "why")
BAND = "mean and standard deviation over seeds"


@dataclass(frozen=True)
class Table:
    """Rows of text under a title; `note` says how to read them."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""
    folded: bool = False


@dataclass(frozen=True)
class EffectPlot:
    """The effects of all comparisons in one unit, with their margins."""

    part: Measured
    unit: str


@dataclass(frozen=True)
class CurvePlot:
    """A metric of all arms of a setting over "step" or "seconds"."""

    part: Measured
    setting: str
    metric: str
    axis: str


@dataclass(frozen=True)
class LinePlot:
    """A quantity of a probe by `figure.x` of all arms of a setting, where `figure.by` has the value `by`."""

    part: Measured
    setting: str
    figure: ByX
    by: str
    quantity: str


Plot = EffectPlot | CurvePlot | LinePlot


@dataclass(frozen=True)
class Picture:
    """A figure that is still to be drawn: the name of its file without suffix, and what is seen."""

    name: str
    caption: str
    plot: Plot


@dataclass(frozen=True)
class Part:
    """The exact part of an argument, or its measured part at one scale."""

    title: str
    verdict: Shown
    why: str
    tables: Sequence[Table]
    pictures: Sequence[Picture] = ()
    changes: Sequence[str] = ()
    provenance: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """One argument."""

    anchor: str
    label: str
    sentence: str
    source: str
    how: Sequence[str]
    parts: Sequence[Part]


@dataclass(frozen=True)
class VerdictRow:
    """A row of the first table; the fields after `sentence` are its columns."""

    anchor: str
    label: str
    sentence: str
    verdict: Shown
    suffix: str
    effects: Sequence[str] = ()
    margins: Sequence[str] = ()
    scale: str = ""
    seeds: str = ""
    why: str = ""


def overview(arguments: Iterable[Argument]) -> list[VerdictRow]:
    """The table of verdicts: a row for the exact part of an argument and one per scale."""
    rows: list[VerdictRow] = []
    for argument in arguments:
        claim, exact = argument.claim, argument.exact
        about = (claim.id, label(claim), claim.sentence)
        if exact is not None:
            held = f"{sum(check.holds for check in exact.checks)} of {len(claim.checks)} checks hold"
            suffix = "" if exact.verdict == "not yet run" else "exact"
            rows.append(VerdictRow(*about, exact.verdict, suffix, (held,), (), "exact", "", why_exact(exact)))
        for part in argument.measured:
            rows.append(
                VerdictRow(
                    *about,
                    part.verdict,
                    "",
                    [interval(found.verdict, found.measurement.lower_is_better) for found in part.deciding],
                    list(dict.fromkeys(f"{margin(found)} {found.verdict.unit}" for found in part.deciding)),
                    part.scale,
                    str(len(claim.verdict_seeds)),
                    why(part),
                )
            )
        if claim.settings and not argument.measured:
            scales = ", ".join(claim.scales())
            rows.append(VerdictRow(*about, "not yet run", "", (), (), scales, str(len(claim.verdict_seeds)), "no runs"))
    return rows


def section(argument: Argument) -> Section:
    """All that there is to say about one argument."""
    claim = argument.claim
    parts = [_exact_part(argument.exact)] if argument.exact is not None else []
    parts += [_measured_part(argument, part) for part in argument.measured]
    return Section(claim.id, label(claim), claim.sentence, claim.source, _how(argument), parts)


def _how(argument: Argument) -> list[str]:
    claim, lines = argument.claim, []
    if claim.checks:
        lines.append(f"Exact: {len(claim.checks)} computations without training, each with a bound.")
    if claim.settings:
        tuning, verdict = (", ".join(map(str, seeds)) for seeds in (claim.tuning_seeds, claim.verdict_seeds))
        sweeps = any(len(setting.learning_rates) > 1 for setting in claim.settings.values())
        swept = f"; rates are chosen on seeds {tuning} by {TUNING.name}, by one sweep for all arms" if sweeps else ""
        lines.append(f"Measured: runs paired by seed, seeds {verdict}{swept}.")
        of_margin: dict[tuple[float, str], dict[str, None]] = {}
        for each in claim.comparisons:
            of_margin.setdefault((each.margin, each.margin_reason), {})[each.measurement] = None
        lines += [f"Margin {size:g} on {', '.join(names)}: {reason}." for (size, reason), names in of_margin.items()]
        run = {part.scale for part in argument.measured}
        lines += [f"Not yet run at scale {scale}." for scale in claim.scales() if scale not in run]
    return lines


def _exact_part(exact: Exact) -> Part:
    def rows(checks: Sequence[ExactCheck], holds: str, broken: str) -> list[tuple[str, ...]]:
        return [(c.name, c.statement, plain(c.value), c.bound, holds if c.holds else broken) for c in checks]

    header = ("check", "statement", "value", "bound", "result")
    missing = [(name, "", "", "", "not yet run") for name in exact.missing]
    tables = [Table("What was computed", header, rows(exact.checks, "holds", "broken") + missing)]
    if exact.limits:
        limits = rows(exact.limits, "so it is", "not so")
        tables.append(Table("Where it ends", header, limits, note="These decide nothing."))
    suffix = (
        "a check that does not keep its bound" if exact.verdict == "supported" else "all checks within their bounds"
    )
    return Part("Exact", exact.verdict, why_exact(exact), tables, changes=[suffix])


def _measured_part(argument: Argument, part: Measured) -> Part:
    claim = argument.claim
    tables = [_comparisons(part)] if part.found else []
    tables += [_settings(part)]
    tables += [_arms(part, setting) for setting in claim.settings]
    tables += [_sweep(part, setting) for setting, has in claim.settings.items() if len(has.learning_rates) > 1]
    tables += [_runs(part)]
    return Part(
        f"Measured, scale {part.scale}",
        part.verdict,
        why(part),
        tables,
        _pictures(part),
        changes(argument, part),
        provenance(part),
    )


def _comparisons(part: Measured) -> Table:
    rows = []
    for found in part.found:
        verdict = found.verdict
        control, arm = verdict.divergence
        rows.append(
            (
                found.setting,
                pair(found.comparison),
                found.comparison.predicted,
                interval(verdict, found.measurement.lower_is_better),
                "lower" if found.measurement.lower_is_better else "higher",
                margin(found),
                verdict.finding,
                verdict.kind,
                probability(verdict.p),
                f"{arm.diverged} of {arm.runs}; {control.diverged} of {control.runs}",
            )
        )
    header = ("setting", "comparison", "predicted", "effect [95 % interval]", "better is", "margin", "found", "verdict")
    note = (
        "Effect: arm minus control, mean over pairs of seeds. p: of the test behind the finding, before the correction "
        "over all arguments. A diverged run counts with a stand-in value; where more than half of an arm's runs "
        "diverged, the numbers of diverged runs decide."
    )
    return Table("What decides", (*header, "p", "diverged (arm; control)"), rows, note)


def _settings(part: Measured) -> Table:
    rows: list[tuple[str, ...]] = []
    for name, setting in part.claim.settings.items():
        of_arm = {arm: setting_of(setting.config(part.scale, arm)) for arm in setting.arms}
        for said in dict.fromkeys(of_arm.values()):
            arms = [arm for arm, own in of_arm.items() if own == said]
            rows.append((name, "all" if len(arms) == len(of_arm) else ", ".join(arms), *said))
    header = ("setting", "arms", "model", "text", "batch", "training", "losses are taken over")
    return Table("Settings", header, rows)


def _of(rows: Iterable[Row], setting: str, arm: str, measurement: str) -> list[Row]:
    """Verdict rows."""
    wanted = ("verdict", setting, arm, measurement)
    return [row for row in rows if (row.phase, row.setting, row.arm, row.measurement) == wanted]


def _arms(part: Measured, setting: str) -> Table:
    claim = part.claim
    deciding = {comparison.measurement for comparison in claim.comparisons}
    ordered = sorted(claim.measurements, key=lambda measurement: measurement.name not in deciding)
    rows = []
    for arm in claim.settings[setting].arms:
        cells, diverged, rates = [], {}, set()
        for measurement in ordered:
            found = _of(part.rows, setting, arm, measurement.name)
            diverged |= {row.seed: None if row.diverged else 0.0 for row in found}
            rates |= {row.learning_rate for row in found}
            values = [row.value for row in found if not row.diverged]
            cells.append(mean_std(values) if values else "")
        rate = divergence_rate(Arm(arm, diverged)) if diverged else None
        share = "no runs" if rate is None else f"{rate.diverged} of {rate.runs} ({rate.low:.0%} to {rate.high:.0%})"
        rows.append((arm, ", ".join(f"{rate:g}" for rate in sorted(rates)), share, *cells))
    header = [
        f"{measurement.name} ({measurement.unit}; {'decides' if measurement.name in deciding else 'beside'})"
        for measurement in ordered
    ]
    note = (
        "Mean ± standard deviation over the seeds whose run did not diverge. Diverged: of all, with Wilson's interval."
    )
    return Table(f"Arms in {setting}", ("arm", "learning rate", "diverged", *header), rows, note)


def _sweep(part: Measured, setting: str) -> Table:
    claim = part.claim
    sweep = claim.settings[setting].learning_rates
    chosen = claim.choose_rates(part.rows)
    rows = []
    for arm in claim.settings[setting].arms:
        cells = []
        for rate in sweep:
            wanted = ("tuning", setting, arm, rate, TUNING.name)
            found = [r for r in part.rows if (r.phase, r.setting, r.arm, r.learning_rate, r.measurement) == wanted]
            diverged = sum(row.diverged for row in found)
            values = [row.value for row in found if not row.diverged]
            said = [mean_std(values)] if values else []
            said += [f"{diverged} of {len(found)} diverged"] if diverged else []
            said += ["chosen"] if chosen.get((setting, arm)) == rate else []
            cells.append(", ".join(said) or "not run")
        rows.append((arm, *cells))
    title = f"Sweep in {setting}: {TUNING.name} by learning rate"
    return Table(title, ("arm", *(f"{rate:g}" for rate in sweep)), rows)


def _runs(part: Measured) -> Table:
    runs: dict[str, Row] = {}
    for row in part.rows:
        runs.setdefault(row.run_id, row)
    rows = [
        (row.run_id, row.setting, row.arm, row.phase, f"{row.learning_rate:g}", duration(row.seconds))
        for row in runs.values()
    ]
    return Table("Runs", ("run", "setting", "arm", "phase", "learning rate", "training"), rows, folded=True)


def _pictures(part: Measured) -> list[Picture]:
    """The effects, and what the argument asks for of which there are numbers."""
    plots: list[tuple[str, Plot]] = [
        (f"Effects in {unit}: mean and 95 % interval; the margin is shaded", EffectPlot(part, unit))
        for unit in dict.fromkeys(found.verdict.unit for found in part.found)
    ]
    for figure in part.claim.figures:
        for setting in part.claim.settings:
            plots += _curves(part, setting, figure) if isinstance(figure, Curves) else _lines(part, setting, figure)
    names = (f"{part.scale}-{part.claim.id}-{number}" for number in range(1, len(plots) + 1))
    return [Picture(name, caption, plot) for name, (caption, plot) in zip(names, plots, strict=True)]


def _curves(part: Measured, setting: str, figure: Curves) -> list[tuple[str, Plot]]:
    if all((row.setting, row.metric) != (setting, figure.metric) for row in part.curves):
        return []
    return [
        (f"{figure.metric} over {along} in {setting}; {BAND}", CurvePlot(part, setting, figure.metric, axis))
        for axis, along in (("step", "optimizer steps"), ("seconds", "seconds of training"))
    ]


def _lines(part: Measured, setting: str, figure: ByX) -> list[tuple[str, Plot]]:
    wanted = (setting, figure.probe, figure.kind, figure.x)
    panels = dict.fromkeys(
        (row.by, row.quantity)
        for row in part.probes
        if (row.setting, row.probe, row.kind, row.axis) == wanted and row.quantity in figure.y
    )
    return [
        (
            f"{figure.title}: {quantity}{f', {figure.by} {by}' if by else ''}, in {setting}; {BAND}",
            LinePlot(part, setting, figure, by, quantity),
        )
        for by, quantity in panels
    ]
