"""Several runs at once on this machine, each in a process of its own, so that none can take another down."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from normlab.execution.jobs import Job, write_job

__all__ = ["Ended", "LocalWorkers", "available_cores"]

WORKER = ("-m", "normlab.execution.worker")
STOP_SECONDS = 60.0
"""How long a worker has to end its step and write a checkpoint before it is killed."""

# One thread each: workers on all cores would only fight. Read by OpenMP and MKL before torch is there to be asked.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Ended:
    """How a job ended: `reason` is one line, empty if it is done."""

    job: Job
    reason: str


@dataclass
class _Worker:
    job: Job
    process: subprocess.Popen[bytes]
    log: Path


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LocalWorkers:
    """At most `size` worker processes. As a context it stops those that still run, with a checkpoint each.

    Args:
        size: number of workers.
        folder: for job files and logs of workers, by run id.
    """

    def __init__(self, size: int, folder: Path) -> None:
        self.size = size
        self.folder = folder
        self._workers: list[_Worker] = []

    def __enter__(self) -> LocalWorkers:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def jobs(self) -> list[Job]:
        """Those under way."""
        return [worker.job for worker in self._workers]

    @property
    def free(self) -> int:
        return self.size - len(self._workers)

    def start(self, job: Job) -> None:
        path, log = self.folder / f"{job.id}.yaml", self.folder / f"{job.id}.log"
        write_job(path, job)
        with log.open("wb") as file:
            process = _start_worker(path, file)
        self._workers.append(_Worker(job, process, log))

    def ended(self) -> list[Ended]:
        """Those that ended since the last call."""
        over = [worker for worker in self._workers if worker.process.poll() is not None]
        self._workers = [worker for worker in self._workers if worker not in over]
        return [Ended(worker.job, _close(worker)) for worker in over]

    def stop(self) -> None:
        """Ask all workers to save and end; kill those that do not, or all of them on a second Ctrl-C."""
        try:
            for worker in self._workers:
                worker.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + STOP_SECONDS
            for worker in self._workers:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
        except (KeyboardInterrupt, subprocess.TimeoutExpired):
            for worker in self._workers:
                worker.process.kill()
        finally:
            for worker in self._workers:
                worker.process.wait()
                _close(worker)
            self._workers = []


def _start_worker(path: Path, log: BinaryIO) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, *WORKER, str(path)],
        stdin=subprocess.PIPE,  # closes when this process ends, however it ends
        stdout=log,
        stderr=log,
        env={**os.environ, **ONE_THREAD},
        start_new_session=True,  # Ctrl-C in the terminal is the parent's to pass on
    )


def _close(worker: _Worker) -> str:
    """Close the pipe, and say in one line why the worker did not do its job."""
    assert worker.process.stdin is not None
    worker.process.stdin.close()
    code = worker.process.returncode
    if code == 0:
        return ""
    if code in (-signal.SIGTERM, 128 + signal.SIGTERM):
        return "stopped"
    if code < 0:
        hint = "; out of memory?" if code == -signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{hint}"
    lines = [line.strip() for line in worker.log.read_text(encoding="utf-8", errors="replace").splitlines()]
    last = next((line for line in reversed(lines) if line), f"exit code {code}")
    return last.removeprefix("normlab: error: ")
