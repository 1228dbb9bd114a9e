"""Runs a study, wherever its runs happen, until nothing is missing.

A study that was killed goes on where it was. Two studies at once share the work: a run that another process trains is
left to it, and waited for at the end.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from rich.console import Console

from normlab.config import InputError
from normlab.execution.engine import Ended, Engine
from normlab.execution.jobs import Job
from normlab.study.plan import ClaimState, Study
from normlab.study.showing import Display, summary

__all__ = ["run_study"]

ATTEMPTS = 2
"""A failed run is tried once more: its worker may have been killed for memory that others took."""

POLL_SECONDS = 0.5
ELSEWHERE_SECONDS = 2.0
"""Between two looks at runs of another process."""


def run_study(study: Study, engine: Engine, console: Console) -> int:
    """Run what is missing, and write the tables; a line per argument at the end.

    Returns:
        The number of arguments that are not complete: some of their runs failed.
    """
    study.require_corpora()
    study.fix_rules()
    runner = _Runner(study, console)
    try:
        with engine, Display(study, console) as display:
            runner.run(engine, display)
    finally:
        # Also after Ctrl-C: a table holds what is there, and the next study adds to it.
        states = runner.write()
    for id_, reason in runner.failed.items():
        console.print(f"failed twice: {id_}: {reason}", highlight=False, markup=False, soft_wrap=True)
    for state in states:
        console.print(summary(study, state), highlight=False, markup=False, soft_wrap=True)
    return sum(bool(state.missing) for state in states)


class _Runner:
    """What happened so far in this process; all else is on disk."""

    def __init__(self, study: Study, console: Console) -> None:
        self.study = study
        self.console = console
        self.attempts: Counter[str] = Counter()
        self.failed: dict[str, str] = {}
        self.written: set[str] = set()
        self.unwritten: dict[str, str] = {}

    def run(self, engine: Engine, display: Display) -> None:
        states, looked = self._look(), time.monotonic()
        while True:
            elsewhere = self._fill(engine, states)
            wanted = {run.id for state in states for run in state.missing} | self.attempts.keys()
            busy = [job for job in engine.jobs if job.id in wanted]  # it may know of jobs of other studies
            display.show(states, busy, elsewhere)
            if not busy and not elsewhere and (engine.free or not self._left(states)):
                return
            time.sleep(POLL_SECONDS)
            over = [ended for ended in engine.ended() if ended.job.id in wanted]
            if over or (elsewhere and time.monotonic() - looked > ELSEWHERE_SECONDS):
                states, looked = self._look(), time.monotonic()
            for ended in over:
                self._note(ended, engine)
                display.ended(ended, states)

    def write(self) -> list[ClaimState]:
        """Write the tables of all arguments as far as they are."""
        states = [self.study.state(claim) for claim in self.study.claims]
        for state in states:
            self._write(state)
        return states

    def _look(self) -> list[ClaimState]:
        states = [self.study.state(claim) for claim in self.study.claims]
        for state in states:
            if not state.missing and state.claim.id not in self.written:
                self._write(state)
        return states

    def _write(self, state: ClaimState) -> None:
        self.written.add(state.claim.id)
        try:
            self.study.write(state)
        except InputError as error:
            if self.unwritten.get(state.claim.id) != str(error):  # in the end all are written once more
                self.console.print(f"{state.claim.id}: {error}", highlight=False, markup=False, soft_wrap=True)
            self.unwritten[state.claim.id] = str(error)

    def _fill(self, engine: Engine, states: Sequence[ClaimState]) -> list[Job]:
        """Give the engine as many jobs as it takes; returns those that another process has in hand, or just had."""
        busy = {job.id for job in engine.jobs}
        free, elsewhere, chosen = engine.free, [], []
        for job in self._left(states):
            if len(chosen) == free:
                break
            if job.id in busy:
                continue
            if job.record.outcome().state == "running" or job.is_done():  # done since the last look
                elsewhere.append(job)
            else:
                chosen.append(job)
        self.attempts.update(job.id for job in chosen)
        if chosen:
            engine.start([[job] for job in chosen])
        return elsewhere

    def _left(self, states: Sequence[ClaimState]) -> list[Job]:
        """Jobs that may be tried, now or once there is room."""
        return [job for job in self.study.jobs(states) if job.id not in self.failed]

    def _note(self, ended: Ended, engine: Engine) -> None:
        job = ended.job
        if job.is_done():
            return
        if ended.again or job.record.outcome().state == "running":
            self.attempts[job.id] -= 1  # not its fault; or another process was faster
        elif self.attempts[job.id] >= ATTEMPTS:
            self.failed[job.id] = f"{ended.reason or 'it left no result'}; its log: {engine.log(job)}"
