"""What a study says: the list of arguments, the runs to come, one progress display, a line per argument at the end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from normlab.claims.base import Claim
from normlab.config import InputError
from normlab.execution.engine import Ended
from normlab.execution.jobs import Job
from normlab.machine.terminal import PlainConsole
from normlab.records.notice import NoticeBoard, PlannedJob, StudyNotice
from normlab.records.progress import duration, progress
from normlab.study.plan import ClaimState, Study

__all__ = ["Display", "list_claims", "print_plan", "study_console", "summary"]


def study_console() -> Console:
    """In a pipe nothing is cut off."""
    return PlainConsole(width=None if os.isatty(1) else 140)


def list_claims(studies: Sequence[Study], exact: Sequence[Claim], console: Console) -> None:
    """All arguments: id, kind, scale, runs done and missing, time that the missing ones take one worker."""
    table = Table(box=None, pad_edge=False)
    for name in ("argument", "kind", "scale"):
        table.add_column(name, no_wrap=True)
    for name in ("done", "missing", "time on 1 core"):
        table.add_column(name, justify="right", no_wrap=True)
    rows: list[tuple[str, ...]] = [(claim.id, claim.kind, "", "", "", "make exact") for claim in exact]
    for study in studies:
        for claim in study.claims:
            state = study.state(claim)
            ids, missing = {run.id for run in state.runs}, {run.id for run in state.missing}
            time = duration(study.seconds(state.missing))
            rows.append((claim.id, claim.kind, study.scale, str(len(ids - missing)), str(len(missing)), time))
    for row in sorted(rows, key=lambda row: row[0]):
        table.add_row(*row)
    console.print(table, highlight=False, markup=False)


def print_plan(study: Study, workers: int, console: Console) -> None:
    """The runs that the study would do."""
    states = [study.state(claim) for claim in study.claims]
    users: dict[str, list[str]] = {}
    for state in states:
        for run in state.ready:
            users.setdefault(run.id, []).append(f"{state.claim.id} {run.phase} {run.setting}/{run.arm}")
    width = max(map(len, users), default=0)
    for job in study.jobs(states):
        about = f"rate {job.config.optim.lr:<6g} seed {job.config.seed:<4} {', '.join(users[job.id])}"
        console.print(f"{job.id:{width}}  {about}", highlight=False, markup=False, soft_wrap=True)
    waiting = {run.id: run for state in states for run in state.waiting}.values()
    untuned, together = sum(not run.seeds for run in waiting), sum(bool(run.seeds) for run in waiting)
    if untuned:
        console.print(f"then {untuned} verdict runs, at rates that tuning chooses", highlight=False)
    if together:
        console.print(f"then {together} times the verdict runs of an arm are measured together", highlight=False)
    left = _time_left(study, states, workers)
    console.print(f"{len(users)} runs to do now; about {left} for all with {workers} workers", highlight=False)


def summary(study: Study, state: ClaimState) -> str:
    """How far an argument is, in one line."""
    claim = state.claim
    where = f"{claim.id} ({study.scale})"
    if state.missing:
        return f"{where}: {len(state.missing)} of {len(state.runs)} runs missing"
    try:
        verdict = claim.judge(study.rows(state))
    except InputError as error:
        return f"{where}: {error}"
    return f"{where}: {verdict.kind}: {verdict.why}; rates: {_rates(state)}; {study.table(claim)}"


class Display:
    """Runs done of all, time left, losses of those under way; without a terminal, a line per ended run.

    Also puts up the notice from which `python -m normlab status` knows of the study.
    """

    def __init__(self, study: Study, console: Console) -> None:
        self.study = study
        self.console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._board = NoticeBoard(Path(study.output.runs_dir))
        self._noticed: tuple[Sequence[ClaimState], list[str]] | None = None
        self._reasons: dict[str, str] = {}

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()
        self._board.close()

    def show(self, states: Sequence[ClaimState], jobs: Sequence[Job], elsewhere: Sequence[Job]) -> None:
        self._notice(states, jobs)
        if not self.console.is_terminal:
            return
        done, total = _counts(states)
        left = _time_left(self.study, states, len(jobs))
        head = Table.grid(padding=(0, 1))
        head.add_row(Text("runs"), ProgressBar(total, done, width=30), Text(f"{done}/{total}, about {left} left"))
        lines = [Text(f"  {job.id}  {_progress(job)}", overflow="ellipsis", no_wrap=True) for job in jobs]
        if elsewhere:
            lines.append(Text(f"  {len(elsewhere)} more in another process"))
        self._live.update(Group(head, *lines), refresh=True)

    def ended(self, ended: Ended, states: Sequence[ClaimState]) -> None:
        """Say that a run ended; in a terminal only if it did not do what it should."""
        if ended.reason:
            self._reasons[ended.job.id] = ended.reason
        if ended.reason or not self.console.is_terminal:
            done, total = _counts(states)
            how = ended.reason or _progress(ended.job)
            self.console.print(f"{done}/{total} {ended.job.id}: {how}", highlight=False, markup=False, soft_wrap=True)

    def _notice(self, states: Sequence[ClaimState], jobs: Sequence[Job]) -> None:
        ids = [job.id for job in jobs]
        if self._noticed is not None and self._noticed[0] is states and self._noticed[1] == ids:
            return  # this is asked twice a second
        self._noticed = states, ids
        for id_ in ids:
            self._reasons.pop(id_, None)
        self._board.put(
            StudyNotice(
                claims=[state.claim.id for state in states],
                scale=self.study.scale,
                done=_counts(states)[0],
                total=_counts(states)[1],
                seconds_left=_seconds_left(self.study, states, len(jobs)),
                under_way=[self._planned(job) for job in jobs],
                waiting=[self._planned(job) for job in self.study.jobs(states) if job.id not in ids],
                later=len({run.id for state in states for run in state.waiting}),
            )
        )

    def _planned(self, job: Job) -> PlannedJob:
        reason = self._reasons.get(job.id, "")
        return PlannedJob.of(job.id, job.config, reason or (_together(job) if job.seeds else ""), bool(reason))


def _counts(states: Sequence[ClaimState]) -> tuple[int, int]:
    """Runs done and wanted, each once. One whose rate is not chosen counts by its arm: it may turn out to be shared."""
    ids = {run.id for state in states for run in state.runs}
    missing = {run.id for state in states for run in state.missing}
    return len(ids - missing), len(ids)


def _time_left(study: Study, states: Sequence[ClaimState], workers: int) -> str:
    return duration(_seconds_left(study, states, workers))


def _seconds_left(study: Study, states: Sequence[ClaimState], workers: int) -> float | None:
    seconds = study.seconds([run for state in states for run in state.missing])
    return None if seconds is None else seconds / max(1, workers)


def _rates(state: ClaimState) -> str:
    """The chosen rates; one at the end of its sweep may not be the best there is."""
    parts = []
    for (setting, arm), rate in state.rates.items():
        edge = " (end of the sweep)" if state.claim.settings[setting].is_end_of_sweep(rate) else ""
        parts.append(f"{arm} {rate:g}{edge}")
    return ", ".join(parts)


def _progress(job: Job) -> str:
    """Step and last losses of a run; for runs together, what measures them."""
    return _together(job) if job.seeds else progress(job.record.folder).line(job.config.training.steps)


def _together(job: Job) -> str:
    return f"{', '.join(job.probes)} of {len(job.measured())} runs together"
