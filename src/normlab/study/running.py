"""Runs a study, wherever its runs happen, until nothing is missing.

A study that was killed goes on where it was. Two studies at once share the work: a run that another process trains is
left to it, and waited for at the end.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Sequence

from rich.console import Console

from normlab.config import InputError
from normlab.execution.engine import Ended, Engine
from normlab.execution.jobs import Job
from normlab.study.plan import ClaimState, Study
from normlab.study.showing import Display, summary
from normlab.training.stackable import MOST, like, obstacle, read_gains

__all__ = ["run_study"]

ATTEMPTS = 2
"""A failed run is tried once more: its worker may have been killed for memory that others took."""

POLL_SECONDS = 0.5
ELSEWHERE_SECONDS = 2.0
"""Between two looks at runs of another process."""


def run_study(study: Study, engine: Engine, console: Console, stack: int = 1) -> int:
    """Run what is missing, and write the tables; a line per argument at the end.

    Args:
        stack: as in `ExecutionOptions`.

    Returns:
        The number of arguments that are not complete: some of their runs failed.
    """
    study.require_corpora()
    study.fix_rules()
    runner = _Runner(study, console, stack)
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

    def __init__(self, study: Study, console: Console, stack: int) -> None:
        self.study = study
        self.console = console
        self.stack = stack
        self._keys: dict[str, str] = {}
        self._offered: dict[str, int] = {}
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
                if self._was_left(ended.job):
                    self.attempts[ended.job.id] -= 1  # it was not begun
                    continue
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
        """Give the engine as many groups as it takes, of jobs that can be stacked, or of one; returns the jobs that
        another process has in hand, or just had."""
        busy = {job.id for job in engine.jobs}
        free, elsewhere = engine.free, []
        jobs = [job for job in self._left(states) if job.id not in busy]
        # No worker is to wait for want of jobs that are stacked elsewhere.
        largest = min(self.stack or MOST, math.ceil(len(jobs) / max(1, free)))
        groups: list[list[Job]] = []
        for job in jobs:
            group = next((group for group in groups if len(group) < largest and self._may_join(group[0], job)), None)
            if group is None and len(groups) == free:
                if largest == 1:
                    break
                continue
            if job.record.outcome().state == "running" or job.is_done():  # done since the last look
                elsewhere.append(job)
            elif group is None:
                groups.append([job])
            else:
                group.append(job)
        self._start(engine, groups)
        return elsewhere

    def _left(self, states: Sequence[ClaimState]) -> list[Job]:
        """Jobs that may be tried, now or once there is room."""
        return [job for job in self.study.jobs(states) if job.id not in self.failed]

    def _may_join(self, first: Job, job: Job) -> bool:
        if self.attempts[first.id] or self.attempts[job.id]:
            return False  # what failed in a group is tried by itself: it may not have been its own fault
        one, other = (self._key(each) for each in (first, job))
        return bool(one) and one == other

    def _key(self, job: Job) -> str:
        """What jobs have in common that can be stacked; empty for one that cannot."""
        if job.id not in self._keys:
            can = not (job.seeds or job.alone or obstacle(job.config))
            self._keys[job.id] = like(job.config) if can else ""
        return self._keys[job.id]

    def _start(self, engine: Engine, groups: list[list[Job]]) -> None:
        """Groups that are known to be slower stacked shrink to their first job; where it is not known, the worker
        measures, and leaves the others if so."""
        for group in groups:
            if len(group) > 1 and not self.stack and read_gains(group[0].config).is_worthwhile(len(group)) is False:
                del group[1:]
            if len(group) > 1:
                how = "always" if self.stack else "if faster"
                group[:] = [dataclasses.replace(job, stack=how) for job in group]
            self.attempts.update(job.id for job in group)
        self._offered = {**self._offered, **{job.id: len(group) for group in groups for job in group[1:]}}
        if groups:
            engine.start(groups)

    def _was_left(self, job: Job) -> bool:
        """Whether the job was offered as part of a stack, and left because that would be slower."""
        runs = self._offered.pop(job.id, 1)
        return runs > 1 and not job.is_done() and not self.stack and read_gains(job.config).is_worthwhile(runs) is False

    def _note(self, ended: Ended, engine: Engine) -> None:
        job = ended.job
        if job.is_done():
            return
        if ended.again or job.record.outcome().state == "running":
            self.attempts[job.id] -= 1  # not its fault; or another process was faster
        elif self.attempts[job.id] >= ATTEMPTS:
            self.failed[job.id] = f"{ended.reason or 'it left no result'}; its log: {engine.log(job)}"
