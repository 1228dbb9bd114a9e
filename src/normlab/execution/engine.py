"""What all ways of running jobs have in common, and how they are asked for. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, Self

from normlab.config import InputError
from normlab.execution.jobs import Job

__all__ = ["Ended", "Engine", "ExecutionOptions"]

Where = Literal["local"]


@dataclass(frozen=True)
class ExecutionOptions:
    """Where the runs of a study happen, and how many at once.

    Args:
        where: local (processes on this machine).
        workers: worker processes at once, at most; 0 takes one per core, at scale full as many as the GPUs have room
            for.
        runs_per_gpu: of them on each GPU; 0 has it measured.
        stack: runs that are trained as one model, which differ in seed and learning rate alone: 0 takes several where
            that was measured to be faster, 1 none, any other number up to so many.
    """

    where: Where = "local"
    workers: int = 0
    runs_per_gpu: int = 0
    stack: int = 0

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise InputError(f"workers is {self.workers}; it must be at least 1, or 0 for one per core")
        if self.runs_per_gpu < 0:
            raise InputError(f"runs-per-gpu is {self.runs_per_gpu}; it must be at least 1, or 0 to have it measured")
        if self.stack < 0:
            raise InputError(f"stack is {self.stack}; it must be at least 1, or 0 to stack where that is faster")


@dataclass(frozen=True)
class Ended:
    """How a job ended: `reason` is one line, empty if it is done.

    Args:
        again: it failed for the company it was in, and does not count as tried.
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
