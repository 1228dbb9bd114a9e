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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

from normlab.execution.engine import Ended
from normlab.execution.gpus import Gpu
from normlab.execution.jobs import Job, write_job
from normlab.execution.sharing import CoreSharing, GpuSharing, Needs, Sharing
from normlab.records.environment import available_cores

__all__ = ["LocalWorkers", "Method"]

Method = Literal["forkserver", "spawn"]

WORKER = ("-m", "normlab.execution.worker")
PRELOADED = ["normlab.execution.preloaded"]
STOP_SECONDS = 60.0
"""How long a worker has to end its step and write a checkpoint before it is killed."""

LOST = 255
"""What multiprocessing says of a worker whose server is gone."""

# What the server starts with.
SERVER_ENVIRONMENT = {
    # A pool of threads would not survive a fork; each worker makes its own.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # Whether there is a GPU is then asked without CUDA, which would not survive a fork either.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}

METHOD: Method = "forkserver" if sys.platform == "linux" else "spawn"


@dataclass
class _Worker:
    """`place` is one of `Sharing.entries`, `beside` the most workers that were there while it ran, itself included."""

    jobs: list[Job]
    process: BaseProcess
    log: Path
    place: int
    beside: int = 1


class LocalWorkers:
    """Worker processes on this machine. As a context it stops those that still run, with a checkpoint each.

    By default a study has one on each core, with one thread. The rule is the fewest workers beyond which runs per hour
    no longer rise, as `make bench-runs` measures it (docs/running.md): a run waits for nothing but its core, threads
    wait for each other. Fewer workers share out the cores as threads. These stay as they are when memory allows fewer
    workers, or the last few runs are left: their number decides the last bits of a result, which must not depend on
    what else runs.

    On GPUs each worker has one, and its share of the cores. How many are together there is asked for or measured
    (`GpuSharing`). A run that did not get the memory it wanted beside others runs again, beside fewer.

    A worker that hangs is left alone: how long a step may take is not known here.

    Args:
        size: the most workers; 0 for one per core, and not fewer than `runs_per_gpu` on each GPU.
        folder: for job files and logs of workers, by run id, and `needs.json`, what runs need.
        gpus: that workers use; none if they need none.
        runs_per_gpu: workers on each GPU; 0 has it measured.
        cores: that they share; 0 takes all that this process may use.
        say: told in one line how many are together, and why, when that changes.
        method: of starting a process: forked from a server that has torch imported, or afresh.
    """

    def __init__(
        self,
        size: int,
        folder: Path,
        *,
        gpus: Sequence[Gpu] = (),
        runs_per_gpu: int = 0,
        cores: int = 0,
        say: Callable[[str], None] = print,
        method: Method = METHOD,
    ) -> None:
        self.folder = folder
        self.gpus = gpus
        self.runs_per_gpu = runs_per_gpu
        self.cores = cores or available_cores()
        self.size = size or max(self.cores, len(gpus) * max(1, runs_per_gpu))
        self._say = say
        self._method: Method = method
        self._sharing: Sharing | None = None
        self._workers: list[_Worker] = []

    def __enter__(self) -> LocalWorkers:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "needs.json"
        if self.gpus:
            needs = Needs(path, " + ".join(sorted({gpu.model for gpu in self.gpus})))
            self._sharing = GpuSharing(self.gpus, self.runs_per_gpu, needs, self.cores, self._say)
        else:
            self._sharing = CoreSharing(self.size, Needs(path, "cores"), self._say)
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def sharing(self) -> Sharing:
        if self._sharing is None:
            raise RuntimeError("LocalWorkers start in a with statement")
        return self._sharing

    @property
    def jobs(self) -> list[Job]:
        """Those under way."""
        return [job for worker in self._workers for job in worker.jobs]

    @property
    def free(self) -> int:
        at_once = self.sharing.at_once()
        on_places = sum(max(0, at_once - len(self._on(place))) for place in range(len(self.sharing.entries)))
        return max(0, min(self.size - len(self._workers), on_places))

    def start(self, groups: Sequence[Sequence[Job]]) -> None:
        """Start a worker for each group, on the place with the fewest; it writes into one log."""
        for group in groups:
            paths = []
            for job in group:
                self.sharing.needs.want(job.config)
                paths.append(self.folder / f"{job.id}.yaml")
                write_job(paths[-1], job)
            log = self.log(group[0])
            for job in group:
                self.log(job).unlink(missing_ok=True)  # may lead to that of an earlier group
            log.write_bytes(b"")
            for job in group[1:]:  # who looks for the log of one finds that of the group
                self.log(job).symlink_to(log.name)
            place = min(range(len(self.sharing.entries)), key=lambda place: len(self._on(place)))
            process = _start(paths, log, self._environment(place), self._method)
            self._workers.append(_Worker(list(group), process, log, place))
            together = self._on(place)
            for each in together:
                each.beside = max(each.beside, len(together))

    def log(self, job: Job) -> Path:
        return self.folder / f"{job.id}.log"

    def ended(self) -> list[Ended]:
        """Those that ended since the last call."""
        alone = {worker.place: worker.jobs[0] for worker in self._workers if worker.beside == len(worker.jobs) == 1}
        self.sharing.look(alone)
        over = [worker for worker in self._workers if worker.process.exitcode is not None]
        self._workers = [worker for worker in self._workers if worker not in over]
        return [ended for worker in over for ended in self._close(worker)]

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

    def _on(self, place: int) -> list[_Worker]:
        return [worker for worker in self._workers if worker.place == place]

    def _environment(self, place: int) -> dict[str, str]:
        entries = self.sharing.entries
        together = min(self.size, len(entries) * self.sharing.at_once()) if self.gpus else self.size
        threads = str(max(1, self.cores // together))
        entry = entries[place]
        visible = {} if entry is None else {"CUDA_VISIBLE_DEVICES": entry}
        return {**SERVER_ENVIRONMENT, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **visible}

    def _close(self, worker: _Worker) -> list[Ended]:
        code = worker.process.exitcode
        # If the server was killed its workers are said to have ended. This takes their connection to us away, upon
        # which one that lives saves a checkpoint and ends.
        worker.process.close()
        reason = _reason(code, worker.log)
        if not reason and len(worker.jobs) == 1:
            self.sharing.note(worker.jobs[0])
        says_so = code != -signal.SIGKILL and "out of memory" in reason
        again = False
        if says_so or code == -signal.SIGKILL:
            job = next((job for job in worker.jobs if not job.is_done()), worker.jobs[-1])
            again = self.sharing.lower(job, worker.beside, is_sure=says_so)
        return [Ended(job, reason, again) for job in worker.jobs]


def _start(paths: Sequence[Path], log: Path, changes: Mapping[str, str], method: Method) -> BaseProcess:
    environment = {**os.environ, **changes}
    arguments = (WORKER, [str(path) for path in paths], str(log), os.getcwd(), environment)
    if method == "forkserver":
        forked = multiprocessing.get_context("forkserver")
        forked.set_forkserver_preload(PRELOADED)
        process, starts_with = forked.Process(target=_begin, args=arguments), SERVER_ENVIRONMENT
    else:
        process, starts_with = multiprocessing.get_context("spawn").Process(target=_begin, args=arguments), changes
    before = dict(os.environ)
    os.environ.update(starts_with)  # the server, or the process
    try:
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return process


def _begin(worker: Sequence[str], paths: Sequence[str], log: str, folder: str, environment: Mapping[str, str]) -> None:
    """In the new process: run the program `worker` as Python would with these arguments, in the caller's surroundings,
    which may have changed since the server began."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND)  # a worker of another study may have the same log
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.setsid()  # Ctrl-C in the terminal is the parent's to pass on
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # the server may have it blocked
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if "torch" in sys.modules:  # it read the server's number of threads
        sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = [worker[-1], *paths]
    if worker[0] == "-m":
        runpy.run_module(worker[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(worker[0], run_name="__main__")


def _reason(code: int | None, log: Path) -> str:
    """Say in one line why the worker did not do its job; empty if it did."""
    if code == 0:
        return ""
    if code in (-signal.SIGTERM, 128 + signal.SIGTERM):
        return "stopped"
    if code == LOST:
        return "lost: the server that workers are forked from ended"
    if code is not None and code < 0:
        hint = "; out of memory?" if code == -signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{hint}"
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    last = next((line for line in reversed(lines) if line), f"exit code {code}")
    return last.removeprefix("normlab: error: ")
