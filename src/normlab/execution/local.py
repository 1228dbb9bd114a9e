"""Several runs at once on this machine, each in a process of its own, so that none can take another down.

Where processes may be forked they come from a server that has torch and Lightning imported: that takes seconds, which a
study of hundreds of short runs would spend on each.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from normlab.execution.engine import Ended
from normlab.execution.jobs import Job, write_job

__all__ = ["LocalWorkers"]

WORKER = ("-m", "normlab.execution.worker")
STOP_SECONDS = 60.0
"""How long a worker has to end its step and write a checkpoint before it is killed."""

# Read by OpenMP, MKL and torch when they are imported.
WORKER_ENVIRONMENT = {
    # One thread each: workers on all cores would only fight.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # Whether there is a GPU is then asked without CUDA, which would not survive a fork.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}

_processes = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
if sys.platform == "linux":
    _processes.set_forkserver_preload(["normlab.execution.preloaded"])


@dataclass
class _Worker:
    jobs: list[Job]
    process: BaseProcess
    log: Path


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
        return [job for worker in self._workers for job in worker.jobs]

    @property
    def free(self) -> int:
        return self.size - len(self._workers)

    def start(self, groups: Sequence[Sequence[Job]]) -> None:
        """Start a worker for each group; it writes into one log."""
        for group in groups:
            paths = []
            for job in group:
                paths.append(self.folder / f"{job.id}.yaml")
                write_job(paths[-1], job)
            log = self.log(group[0])
            log.write_bytes(b"")
            for job in group[1:]:  # who looks for the log of one finds that of the group
                self.log(job).unlink(missing_ok=True)
                self.log(job).symlink_to(log.name)
            self._workers.append(_Worker(list(group), _start(paths, log), log))

    def log(self, job: Job) -> Path:
        return self.folder / f"{job.id}.log"

    def ended(self) -> list[Ended]:
        """Those that ended since the last call."""
        over = [worker for worker in self._workers if worker.process.exitcode is not None]
        self._workers = [worker for worker in self._workers if worker not in over]
        return [Ended(job, _close(worker)) for worker in over for job in worker.jobs]

    def stop(self) -> None:
        """Ask all workers to save and end; kill those that do not, or all of them on a second Ctrl-C."""
        try:
            for worker in self._workers:
                if worker.process.exitcode is None:
                    worker.process.terminate()
            deadline = time.monotonic() + STOP_SECONDS
            for worker in self._workers:
                worker.process.join(max(0.0, deadline - time.monotonic()))
        finally:
            for worker in self._workers:
                worker.process.kill()  # those that still live
            for worker in self._workers:
                worker.process.join()
            self._workers = []


def _start(paths: Sequence[Path], log: Path) -> BaseProcess:
    environment = {**os.environ, **WORKER_ENVIRONMENT}
    process = _processes.Process(
        target=_begin, args=(WORKER, [str(path) for path in paths], str(log), os.getcwd(), environment)
    )
    before = dict(os.environ)
    os.environ.update(WORKER_ENVIRONMENT)  # what the server starts with
    try:
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return process


def _begin(worker: Sequence[str], paths: Sequence[str], log: str, folder: str, environment: Mapping[str, str]) -> None:
    """In the new process: run the program `worker` as Python would with these arguments, in the caller's surroundings,
    which may have changed since the server began."""
    file = os.open(log, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.setsid()  # Ctrl-C in the terminal is the parent's to pass on
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # the server may have it blocked
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [worker[-1], *paths]
    if worker[0] == "-m":
        runpy.run_module(worker[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(worker[0], run_name="__main__")


def _close(worker: _Worker) -> str:
    """Say in one line why the worker did not do its job."""
    code = worker.process.exitcode
    if code == 0:
        return ""
    if code in (-signal.SIGTERM, 128 + signal.SIGTERM):
        return "stopped"
    if code is not None and code < 0:
        hint = "; out of memory?" if code == -signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{hint}"
    lines = [line.strip() for line in worker.log.read_text(encoding="utf-8", errors="replace").splitlines()]
    last = next((line for line in reversed(lines) if line), f"exit code {code}")
    return last.removeprefix("normlab: error: ")
