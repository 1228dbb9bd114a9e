"""What the numbers say, in words; nothing here is written for one argument."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePath

from normlab.claims.base import Claim, Comparison
from normlab.claims.rules import rule_sha256
from normlab.config import DataConfig, HuggingFaceConfig, RunConfig, model_label
from normlab.data.corpora import ENTRIES
from normlab.report.judged import Argument, Exact, Found, Measured
from normlab.report.numbers import as_measured, effect_places, fixed, interval, plain, probability
from normlab.stats.divergence import divergence_decides
from normlab.stats.effects import ALPHA
from normlab.stats.power import MOST_SEEDS, seeds_needed

__all__ = [
    "changes",
    "described",
    "evaluation",
    "label",
    "margin",
    "pair",
    "provenance",
    "rates_at_an_end",
    "setting_of",
    "why",
    "why_exact",
]


def label(claim: Claim) -> str:
    """Such as D2."""
    return claim.id.partition("_")[0].upper()


def pair(comparison: Comparison) -> str:
    """Such as "ln against none on test_loss_nats"."""
    return f"{comparison.arm} against {comparison.control} on {comparison.measurement}"


def margin(found: Found) -> str:
    return fixed(found.verdict.margin, effect_places(found.verdict))


def described(found: Found) -> str:
    """What one comparison found, and by which rule."""
    verdict, comparison = found.verdict, found.comparison
    if divergence_decides(*verdict.divergence):
        control, arm = verdict.divergence
        shares = f"{arm.diverged} of {arm.runs} runs of {arm.arm} diverged, {control.diverged} of {control.runs} of"
        return f"{shares} {control.arm}{_against(found)}"
    _, low, high = as_measured(verdict, found.measurement.lower_is_better)
    if verdict.finding == "same":
        where = f"within the margin {margin(found)}"
    elif verdict.finding != "open":
        where = f"beyond the margin {margin(found)}"
    elif low > 0 or high < 0:
        where = f"not 0, but neither beyond the margin {margin(found)} nor surely within"
    else:
        where = f"0 and the margin {margin(found)} cannot be told apart"
    return f"{pair(comparison)}: {interval(verdict, found.measurement.lower_is_better)}, {where}{_against(found)}"


def _against(found: Found) -> str:
    return f" ({found.comparison.predicted} was predicted)" if found.verdict.kind == "refuted" else ""


def why(part: Measured) -> str:
    """One line from the comparison that decided."""
    if part.alone is None or part.corrected is None:
        return f"unfinished: {part.unfinished}"
    several = len(part.claim.settings) > 1
    said = [f"{f'in {found.setting}, ' if several else ''}{described(found)}" for found in part.deciding]
    if part.alone.kind == "mixed":
        kinds = [found.verdict.kind for found in part.found]
        line = "; ".join(
            f"{found.verdict.kind} in {kinds.count(found.verdict.kind)} of {len(kinds)}, such as {text}"
            for found, text in zip(part.deciding, said, strict=True)
        )
    else:
        line = f"the least certain of {len(part.found)} comparisons: {said[0]}" if len(part.found) > 1 else said[0]
    if part.is_lost:
        before = f"{part.alone.kind} on its own (p = {probability(part.alone.p)}) but not among {part.among} arguments"
        line = f"{before} (Holm: p = {probability(part.corrected.p)}); {line}"
    return line


def why_exact(exact: Exact) -> str:
    """One line: how many checks hold, and one that does not or is missing."""
    broken = [check for check in exact.checks if not check.holds]
    line = f"{len(exact.checks) - len(broken)} of {len(exact.checks) + len(exact.missing)} checks hold"
    if broken:
        line += f"; broken: {broken[0].statement}: {plain(broken[0].value)}, not {broken[0].bound}"
    elif exact.checks:
        line += f", such as: {exact.checks[0].statement}: {plain(exact.checks[0].value)} ({exact.checks[0].bound})"
    return line + (f"; not computed: {', '.join(exact.missing)}" if exact.missing else "")


def changes(argument: Argument, part: Measured) -> list[str]:
    """What would change the verdict at that scale, as far as its numbers tell."""
    lines = [line for found in part.deciding for line in _changes_of(found, part)]
    lines += [f"scale {scale} is not yet run" for scale in _scales_left(argument)]
    for other in argument.measured:
        if other is not part and part.verdict != "not yet run" and other.verdict not in (part.verdict, "not yet run"):
            lines.append(f"scale {other.scale} says {other.verdict}")
    return lines + [
        f"in {setting} the best rate of {arm}, {rate:g}, is at the end of the sweep: a wider one may change its loss"
        for setting, arm, rate in rates_at_an_end(part)
    ]


def _changes_of(found: Found, part: Measured) -> Iterable[str]:
    verdict, name = found.verdict, f"{pair(found.comparison)} ({found.setting})"
    places = effect_places(verdict)
    if verdict.finding == "open":
        if verdict.seeds_needed is None:
            yield f"{name}: no number of seeds decides between such shares of diverged runs"
        else:
            needed = _count(verdict.seeds_needed)
            yield f"{name}: {needed} would decide (80 % power at this spread); there are {verdict.seeds}"
    elif divergence_decides(*verdict.divergence):
        yield f"{name}: another share of diverged runs (Fisher: p = {probability(verdict.p)})"
    elif verdict.finding == "same":
        _, low, high = as_measured(verdict, found.measurement.lower_is_better)
        yield f"{name}: a margin below about {fixed(max(abs(low), abs(high)), places)}; it is {margin(found)}"
    else:
        yield f"{name}: a margin above {fixed(abs(verdict.effect), places)}; it is {margin(found)}"
    if part.is_lost and not divergence_decides(*verdict.divergence):
        needed = max(verdict.seeds + 1, seeds_needed(verdict.sd, verdict.margin, ALPHA / part.among))
        yield f"{name}: {_count(needed)} to stand among {part.among} arguments; there are {verdict.seeds}"


def _count(seeds: int) -> str:
    return f"{seeds} seeds" if seeds < MOST_SEEDS else f"{MOST_SEEDS} seeds or more"


def _scales_left(argument: Argument) -> list[str]:
    run = {part.scale for part in argument.measured}
    return [scale for scale in argument.claim.scales() if argument.claim.settings and scale not in run]


def rates_at_an_end(part: Measured) -> list[tuple[str, str, float]]:
    """Setting, arm and rate where the best rate of a sweep is its first or last."""
    return [
        (setting, arm, rate)
        for (setting, arm), rate in part.claim.choose_rates(part.rows).items()
        if part.claim.settings[setting].is_end_of_sweep(rate)
    ]


def provenance(part: Measured) -> list[str]:
    """Which code and which rule the numbers come from."""
    rows = part.rows
    runs = {row.run_id: row.seconds for row in rows}
    commits = sorted({row.commit for row in rows})
    machines = ", ".join(sorted({row.machine or "unknown" for row in rows}))
    lines = [
        f"{len(runs)} runs, trained at commit {', '.join(map(_short, commits))} on {machines}",
        f"the rule: src/normlab/claims/{part.claim.id}.py, {_rule(part)}",
    ]
    if part.drawn_from:
        lines.append(f"figures are drawn from tables with SHA-256 {part.drawn_from}")
    return lines


def _rule(part: Measured) -> str:
    if part.rule is None:
        return "how it stood when the verdict runs began was not written down"
    fixed_at = f"fixed at commit {_short(part.rule.rule_commit)}"
    if part.rule.verdict_runs_before:
        fixed_at += f" (when other arguments had made {part.rule.verdict_runs_before} of its verdict runs)"
    if part.rule.rule_sha256 == rule_sha256(part.claim, part.scale):
        return f"{fixed_at}, unchanged since its verdict runs began"
    return f"{fixed_at}, CHANGED after its verdict runs began"


def _short(commit: str) -> str:
    """Seven digits; files that differed from the commit are said to."""
    if not commit:
        return "unknown"
    return commit[:7] + (" with changes" if commit.endswith("+") else "")


def evaluation(data: DataConfig) -> str:
    """Over what losses are taken: evaluation length, and whether the state is carried over."""
    entry = ENTRIES.get(data.corpus)
    labelled = entry.kind == "labelled" if entry else PurePath(data.corpus).suffix in (".csv", ".tsv", ".jsonl")
    if labelled:
        return f"whole texts, cut at {data.length or 400} tokens"
    if data.stream == "stateful":
        return "contiguous rows, the state carried over"
    return f"windows of {data.length or 100} tokens, the state restarted with each"


def setting_of(config: RunConfig) -> tuple[str, ...]:
    """Model, text, batch, training and evaluation of a run."""
    model, data, training = config.model, config.data, config.training
    if isinstance(model, HuggingFaceConfig):
        shape = f"{model.architecture} of transformers"
    else:
        shape = f"{model_label(model)}, {model.layers} x {model.width}"
    clip = f", clip {config.optim.clip:g}" if config.optim.clip else ""
    return (
        shape,
        f"{PurePath(data.corpus).name}, {data.tokens} tokens",
        f"{data.batch_size} rows",
        f"{training.steps} steps of {config.optim.name}{clip}",
        evaluation(data),
    )
