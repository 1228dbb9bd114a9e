"""What all ways of running jobs have in common, and how they are asked for. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from normlab.config import InputError
from normlab.execution.jobs import Job

__all__ = ["Ended", "Engine", "ExecutionOptions", "SlurmOptions", "Where"]

Where = Literal["local", "slurm"]

SHORTEST_MINUTES = 5
"""Of a SLURM job: the last two or three are for saving."""
MOST_QUEUED = 1000
"""SLURM's own bound of an array, where a site did not raise it."""

# Options of sbatch that the engine sets, and those that have a field of their own.
_TAKEN = {"job-name", "array", "output", "error", "open-mode", "signal", "requeue", "no-requeue", "export", "chdir"}
_TAKEN |= {"nodes", "ntasks", "ntasks-per-node", "wrap", "parsable", "hold"}
_FIELDS = {"partition", "account", "qos", "time", "gres", "mem", "constraint"}
_OTHER_NAMES = {"cpus-per-task": "cpus"}


@dataclass(frozen=True)
class SlurmOptions:
    """How a study asks SLURM for machines.

    What is empty here, sbatch takes from the environment (SBATCH_PARTITION, ...) or the cluster's defaults.

    Args:
        partition: where jobs wait, such as gpu.
        account: who is charged.
        qos: quality of service.
        time: limit of a job as SLURM writes it: minutes, H:MM:SS, D-HH or D-HH:MM. A run that is not ready by then
            saves, waits in the queue again and goes on.
        gres: generic resources, such as gpu:1.
        cpus: cores of a job; it does at most as many runs at once.
        mem: memory of a job, such as 8G.
        constraint: features that a node must have.
        runs_per_job: runs that one job does; more of them wait less, and share its start.
        array_parallelism: jobs that run at once, in all arrays of the study; 0 leaves it to SLURM.
        max_queued: runs in the queue or at work; the others wait in the study.
        requeues: how many times a job goes back into the queue when its time is up.
        setup: a line of shell before each job, such as "module load cuda".
        sbatch: further options of sbatch by their long names; true for those without a value.
    """

    partition: str = ""
    account: str = ""
    qos: str = ""
    time: str = "60"
    gres: str = ""
    cpus: int = 1
    mem: str = ""
    constraint: str = ""
    runs_per_job: int = 1
    array_parallelism: int = 0
    max_queued: int = 500
    requeues: int = 100
    setup: str = ""
    sbatch: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        bounds = {"cpus": 1, "runs_per_job": 1, "array_parallelism": 0, "max_queued": 1, "requeues": 0}
        for name, least in bounds.items():
            if getattr(self, name) < least:
                raise InputError(f"slurm.{name} is {getattr(self, name)}; it must be at least {least}")
        if self.max_queued > MOST_QUEUED:
            raise InputError(f"slurm.max_queued is {self.max_queued}; it must be at most {MOST_QUEUED}")
        if self.minutes < SHORTEST_MINUTES:
            raise InputError(f"slurm.time is {self.time!r}; it must be at least {SHORTEST_MINUTES} minutes")
        for key, value in self.sbatch.items():
            self._require_free(key, value)
        texts = {each.name: getattr(self, each.name) for each in fields(self)}
        texts |= {f"sbatch.{key}": value for key, value in self.sbatch.items()}
        for name, value in texts.items():
            if isinstance(value, str) and "\n" in value:
                raise InputError(f"slurm.{name} is more than one line; put a script in a file and name that")

    @property
    def minutes(self) -> int:
        """`time` in whole minutes."""
        forms = r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d\d))?(?::(?P<third>\d\d))?"
        found = re.fullmatch(forms, self.time)
        if found is None:
            raise InputError(f"slurm.time is {self.time!r}; it must be minutes, H:MM:SS, D-HH or D-HH:MM")
        first, second = int(found["first"]), int(found["second"] or 0)
        if found["days"]:
            return int(found["days"]) * 1440 + first * 60 + second
        if found["second"] and not found["third"]:
            # SLURM means minutes and seconds, people hours and minutes.
            raise InputError(f"slurm.time is {self.time!r}; write {self.time}:00 for hours, or minutes alone")
        return first * 60 + second if found["third"] else first

    @staticmethod
    def _require_free(key: object, value: object) -> None:
        if not isinstance(key, str):
            raise InputError(f"slurm.sbatch.{key} is no long option of sbatch; leave it out")
        if key in _FIELDS or key in _OTHER_NAMES:
            raise InputError(f"slurm.sbatch.{key} has a flag of its own: --slurm.{_OTHER_NAMES.get(key, key)}")
        if key in _TAKEN or not re.fullmatch(r"[a-z][a-z0-9-]*", key):
            what = "is decided by the study" if key in _TAKEN else "is no long option of sbatch"
            raise InputError(f"slurm.sbatch.{key} {what}; leave it out")
        if not isinstance(value, str | int | float) or value is False:
            raise InputError(f"slurm.sbatch.{key} is {value!r}; it must be text, a number, or true")


@dataclass(frozen=True)
class ExecutionOptions:
    """Where the runs of a study happen, and how many at once.

    Args:
        where: local (processes on this machine) or slurm (jobs of a cluster).
        workers: worker processes at once, at most; 0 takes one per core, at scale full as many as the GPUs have room
            for. With slurm: in each job, of what it has.
        runs_per_gpu: of them on each GPU; 0 has it measured.
        slurm: what to ask for there.
        stack: runs that are trained as one model, which differ in seed and learning rate alone: 0 takes several where
            that was measured to be faster, 1 none, any other number up to so many.
    """

    where: Where = "local"
    workers: int = 0
    runs_per_gpu: int = 0
    slurm: SlurmOptions = field(default_factory=SlurmOptions)
    stack: int = 0

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise InputError(f"workers is {self.workers}; it must be at least 1, or 0 for one per core")
        if self.runs_per_gpu < 0:
            raise InputError(f"runs-per-gpu is {self.runs_per_gpu}; it must be at least 1, or 0 to have it measured")
        if self.where != "slurm" and self.slurm != SlurmOptions():
            raise InputError(f"--slurm options need --where slurm, not --where {self.where}")
        if self.stack < 0:
            raise InputError(f"stack is {self.stack}; it must be at least 1, or 0 to stack where that is faster")


@dataclass(frozen=True)
class Ended:
    """How a job ended: `reason` is one line, empty if it is done.

    Args:
        again: what failed was the machine or the company it was in, and the job does not count as tried.
    """

    job: Job
    reason: str
    again: bool = False


class Engine(Protocol):
    """Does jobs somewhere. As a context it has what it needs, and lets go of it, as `stop` says, in the end."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...

    @property
    def jobs(self) -> list[Job]:
        """Those under way: started and not yet said to have ended, those of an earlier study included if the engine
        knows of any."""
        ...

    @property
    def free(self) -> int:
        """How many groups it takes now."""
        ...

    def start(self, groups: Sequence[Sequence[Job]]) -> None:
        """Begin so many groups of jobs, at most `free`. The jobs of a group go to one worker."""
        ...

    def ended(self) -> list[Ended]:
        """Those that ended since the last call."""
        ...

    def log(self, job: Job) -> Path:
        """The file with what the job printed."""
        ...

    def stop(self) -> None:
        """End what is under way, with a checkpoint each, or leave it to go on by itself: the engine says which."""
        ...
