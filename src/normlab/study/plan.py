"""What the chosen arguments want and what of it is missing, and their rows in `results/<scale>/<claim>.csv`.

    tuning runs -> the rate of each arm, as soon as its sweep is complete -> its verdict runs
                                                          -> probes of these together, if it measures any -> rows

The state is on disk: records in the runs folder, and the rows of runs whose records are elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from normlab.claims.base import TUNING, Claim, PlannedRun, Rates, Scale
from normlab.claims.figure_tables import curve_rows, curves_path, probe_rows, probes_path, write_table
from normlab.claims.measurements import Measurement
from normlab.claims.rows import Phase, Row, read_rows, write_rows
from normlab.claims.rules import rule_now, rule_path, write_rule
from normlab.config import DataConfig, InputError, OutputConfig, config_hash, run_id
from normlab.data.corpora import require_corpus
from normlab.execution.durations import Durations
from normlab.execution.jobs import Job
from normlab.records.environment import commit_label
from normlab.records.record import RunRecord

__all__ = ["ClaimState", "Study"]


@dataclass(frozen=True)
class ClaimState:
    """How far one argument is.

    Args:
        rates: chosen so far.
        runs: all that it wants, probes of an arm's runs together as one more (`PlannedRun.seeds`); verdict runs of arms
            without a rate are planned with the first of the sweep.
        ready: those to be run now.
        waiting: verdict runs to be run once their arm has a rate, and probes once all runs of their arm are done.
    """

    claim: Claim
    rates: Rates
    runs: list[PlannedRun]
    ready: list[PlannedRun]
    waiting: list[PlannedRun]

    @property
    def missing(self) -> list[PlannedRun]:
        return [*self.ready, *self.waiting]

    @property
    def tuned(self) -> list[PlannedRun]:
        """Verdict runs of the arms that have a rate, each by itself."""
        runs = [run for run in self.runs if run.phase == "verdict" and not run.seeds]
        return [run for run in runs if (run.setting, run.arm) in self.rates]


@dataclass
class Study:
    """The runs that some arguments want at one scale, and which of them are done.

    Args:
        claims: the arguments.
        scale: small or full.
        output: where records go, and who watches.
        results: folder of the tables.

    Raises:
        InputError: an argument does not have that scale, its corpus is not here, or two want a probe of one run with
            different options.
    """

    claims: Sequence[Claim]
    scale: Scale
    output: OutputConfig = field(default_factory=lambda: OutputConfig(wandb="off", progress=False))
    results: Path = Path("results")

    def __post_init__(self) -> None:
        for claim in self.claims:
            if self.scale not in claim.scales():
                scales = ", ".join(claim.scales())
                raise InputError(f"argument {claim.id} has no scale {self.scale!r}; it has: {scales}")
        self.durations = Durations()
        self._kept = {claim.id: self._table_rows(claim) for claim in self.claims}
        self._tuning = {claim.id: claim.tuning_runs(self.scale) for claim in self.claims}
        self._records: dict[tuple[str, ...], RunRecord] = {}
        self._read: dict[tuple[str, ...], Row] = {}
        self._texts: dict[tuple[str, str, str], tuple[RunRecord, str]] = {}
        everything = [(claim, run) for claim in self.claims for run in self.state(claim).runs]
        self._jobs(everything)

    def require_corpora(self) -> None:
        """Raise `InputError` unless the corpora of all arguments are here."""
        for claim in self.claims:
            wanted = {setting.base[self.scale].data for setting in claim.settings.values()}
            if any(read.probe == "senses" for read in claim.probes):
                wanted.add(DataConfig(corpus="wic"))
            for data in wanted:
                try:
                    require_corpus(data)
                except InputError as error:
                    raise InputError(f"argument {claim.id}: {error}") from None

    def table(self, claim: Claim) -> Path:
        return self.results / self.scale / f"{claim.id}.csv"

    def state(self, claim: Claim) -> ClaimState:
        """As the disk says it now."""
        tuning = self._tuning[claim.id]
        rates = claim.choose_rates(self._rows(claim, tuning, (TUNING,)))
        first = {
            (name, arm): setting.learning_rates[0] for name, setting in claim.settings.items() for arm in setting.arms
        }
        verdict = claim.verdict_runs(self.scale, {**first, **rates})
        ready = [run for run in tuning if not self._has(claim, run)]
        tuned = [run for run in verdict if (run.setting, run.arm) in rates]
        ready += [run for run in tuned if not self._has(claim, run)]
        waiting = [run for run in verdict if (run.setting, run.arm) not in rates]
        of_first_seed = [run for run in verdict if run.config.seed == claim.verdict_seeds[0]]
        together = [claim.together(run) for run in of_first_seed] if claim.across_seeds else []
        missing = {(run.setting, run.arm) for run in [*ready, *waiting] if run.phase == "verdict"}
        for run in together:
            if (run.setting, run.arm) in missing:
                waiting.append(run)
            elif not self._has(claim, run):
                ready.append(run)
        return ClaimState(claim, rates, [*tuning, *verdict, *together], ready, waiting)

    def jobs(self, states: Sequence[ClaimState]) -> list[Job]:
        """What is to be run now, each run once: tuning runs first, then verdict runs seed by seed, so that pairs are
        complete early; the arguments take turns."""
        wanted = [(state.claim, run, turn) for state in states for turn, run in enumerate(state.ready)]
        seeds = {claim.id: claim.verdict_seeds for claim in self.claims}

        def order(item: tuple[Claim, PlannedRun, int]) -> tuple[bool, int]:
            claim, run, turn = item
            is_verdict = run.phase == "verdict"
            return is_verdict, seeds[claim.id].index(run.config.seed) if is_verdict else turn

        return self._jobs([(claim, run) for claim, run, _ in sorted(wanted, key=order)])

    def rows(self, state: ClaimState) -> list[Row]:
        """All rows there are, in the order of the plan: from records, and from the table for runs without one."""
        tuning = [run for run in state.runs if run.phase == "tuning"]
        claim = state.claim
        return [*self._rows(claim, tuning, (TUNING,)), *self._rows(claim, state.tuned, claim.measurements)]

    def fix_rules(self) -> None:
        """Write down the rule of each argument whose table has no verdict run yet, so that later changes are seen."""
        for claim in self.claims:
            if any(phase == "verdict" for phase, *_ in self._kept[claim.id]):
                continue
            state, path = self.state(claim), rule_path(self.table(claim))
            missing = {run.key for run in state.missing}
            before = sum(run.phase == "verdict" and run.key not in missing for run in state.runs)
            if not before or not path.exists():
                write_rule(path, rule_now(claim, self.scale, before))

    def write(self, state: ClaimState) -> None:
        """Write the argument's table, if there is a row, and what its figures need, if all records are here."""
        rows = self.rows(state)
        if not rows:
            return
        table = self.table(state.claim)
        write_rows(table, rows)
        found = {(run.setting, run.arm, run.config.seed): self._record(state.claim, run) for run in state.tuned}
        records = {where: record for where, record in found.items() if record is not None}
        # Rows of a table whose records are elsewhere have their figures from there.
        if {(row.setting, row.arm, row.seed) for row in rows if row.phase == "verdict"} <= set(records):
            write_table(curves_path(table), curve_rows(state.claim.figures, records))
            write_table(probes_path(table), probe_rows(state.claim.figures, records))

    def seconds(self, runs: Sequence[PlannedRun]) -> float | None:
        """Estimated seconds of one worker for all `runs`, each once; None if nothing like them was ever run."""
        estimates = [self.durations.estimate(config) for config in {run.id: run.config for run in runs}.values()]
        known = [seconds for seconds in estimates if seconds is not None]
        return sum(known) / len(known) * len(estimates) if known else (None if estimates else 0.0)

    def _table_rows(self, claim: Claim) -> dict[tuple[Phase, str, str, int], list[Row]]:
        found = read_rows(self.table(claim))
        seeds: dict[tuple[str, str, str], set[int]] = {}
        for row in found:
            seeds.setdefault((row.setting, row.arm, row.measurement), set()).add(row.seed)
        together = {measurement.name for measurement in claim.measurements if measurement.is_across_seeds}
        rows: dict[tuple[Phase, str, str, int], list[Row]] = {}
        for row in found:
            # What was measured together with other seeds than are wanted now is another number.
            same_seeds = seeds[row.setting, row.arm, row.measurement] == set(claim.verdict_seeds)
            if row.measurement not in together or same_seeds:
                rows.setdefault((row.phase, row.setting, row.arm, row.seed), []).append(row)
        return rows

    def _jobs(self, wanted: Sequence[tuple[Claim, PlannedRun]]) -> list[Job]:
        jobs: dict[str, Job] = {}
        for claim, run in wanted:
            job = self._job(claim, run)
            jobs[run.id] = jobs[run.id].joined(job) if run.id in jobs else job
        return list(jobs.values())

    def _job(self, claim: Claim, run: PlannedRun) -> Job:
        config = dataclasses.replace(run.config, output=dataclasses.replace(self.output, claim=claim.id))
        probes = claim.across_seeds if run.seeds else claim.probes if run.phase == "verdict" else []
        alone = claim.is_timed and run.phase == "verdict" and not run.seeds
        return Job(config, {read.probe: dict(read.options) for read in probes}, run.seeds, alone)

    def _record(self, claim: Claim, run: PlannedRun) -> RunRecord | None:
        """The record of a run that is done, probes and all. What is done stays so: disk is asked until then."""
        key = (claim.id, run.phase, run.id)
        if key not in self._records:
            job = self._job(claim, run)
            if not job.is_done():
                return None
            self._require_one_text(claim, run, job.record)
            self._records[key] = job.record
            self.durations.add(run.config, job.seconds())
        return self._records[key]

    def _require_one_text(self, claim: Claim, run: PlannedRun, record: RunRecord) -> None:
        """Raise `InputError` if a run that `record` is compared with was trained on another text of the same name."""
        text = record.environment().get("data", {}).get("sha256")
        if text is None:
            return
        key = (claim.id, run.setting, run.config.data.corpus)
        first, its_text = self._texts.setdefault(key, (record, text))
        if its_text != text:
            raise InputError(
                f"argument {claim.id} compares {first.folder} and {record.folder}, but the text of "
                f"{run.config.data.corpus} changed between them; move away the record of the wrong text"
            )

    def _has(self, claim: Claim, run: PlannedRun) -> bool:
        """Whether its numbers are there. Those of a table count if all arms at that seed are in it: a measurement may
        look at the record of another arm, and a pair is best from one machine. If the runs of an arm are measured
        together all seeds must be in it, too: one that is missing would need the weights of the others."""
        if self._record(claim, run) is not None:
            return True
        rows = [row for row in self._kept_rows(claim, run, run.arm) if row.run_id == run_id(run.config)]
        if rows:
            self.durations.add(run.config, rows[0].seconds)
        if run.phase == "tuning":
            return bool(rows)
        wanted = {measurement.name for measurement in claim.measurements}
        arms = claim.settings[run.setting].arms
        seeds = claim.verdict_seeds if claim.across_seeds else (run.config.seed,)
        return bool(rows) and all(
            wanted <= {row.measurement for row in self._kept_rows(claim, run, arm, seed)}
            for arm in arms
            for seed in seeds
        )

    def _kept_rows(self, claim: Claim, run: PlannedRun, arm: str, seed: int | None = None) -> list[Row]:
        """Rows of the table as it was found, of `arm` where `run` is, at its seed or another."""
        seed = run.config.seed if seed is None else seed
        return self._kept[claim.id].get((run.phase, run.setting, arm, seed), [])

    def _rows(self, claim: Claim, runs: Sequence[PlannedRun], measurements: Sequence[Measurement]) -> list[Row]:
        records = [(run, self._record(claim, run)) for run in runs]
        peers: dict[tuple[str, int], dict[str, RunRecord]] = {}
        for run, record in records:
            if record is not None:
                peers.setdefault((run.setting, run.config.seed), {})[run.arm] = record
        rows: list[Row] = []
        for run, record in records:
            others = peers.get((run.setting, run.config.seed), {})
            kept = self._kept_rows(claim, run, run.arm)
            for measurement in measurements:
                key = (claim.id, measurement.name, *run.key)
                readable = measurement.is_readable(others) and (
                    not measurement.is_across_seeds or self._record(claim, claim.together(run)) is not None
                )
                if key not in self._read and record is not None and readable:
                    self._read[key] = _row(run, measurement, record, measurement.read(record, others))
                row = self._read.get(key) or next(
                    (row for row in kept if (row.run_id, row.measurement) == (run.id, measurement.name)), None
                )
                if row is not None:
                    rows.append(row)
        return rows


def _row(run: PlannedRun, measurement: Measurement, record: RunRecord, value: float) -> Row:
    outcome, environment = record.outcome(), record.environment()
    return Row(
        setting=run.setting,
        arm=run.arm,
        seed=run.config.seed,
        phase=run.phase,
        learning_rate=run.config.optim.lr,
        measurement=measurement.name,
        value=value,
        diverged=outcome.state == "diverged",
        run_id=run.id,
        config_hash=config_hash(run.config),
        commit=commit_label(environment.get("git", {})),
        machine=str(environment.get("machine", "")),
        seconds=round(outcome.seconds, 3),
    )
