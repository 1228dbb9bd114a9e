"""Runs on a SLURM cluster: they go into its queue as job arrays, and come back through the disk.

    start   the batch's folder -> sbatch of an array -> each task of it: `LocalWorkers` on what SLURM gave it
    ended   what the tasks wrote; then, of tasks that SLURM does not list any more, what became of them

A batch is one array. Its folder, `<runs_dir>/.study/slurm/<name>/`, is there before SLURM hears of it, and has the
name of the SLURM job: any study finds in the queue what an earlier one put there, however that one ended.
The only importer of submitit, when jobs are sent and in the task. No torch.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from normlab.config import InputError
from normlab.execution.engine import Ended, SlurmOptions
from normlab.execution.gpus import visible_gpus
from normlab.execution.jobs import Job, read_job, write_job
from normlab.execution.local import STOP_SECONDS, LocalWorkers
from normlab.records.disk import append, parse_json, to_json, write_atomically
from normlab.records.environment import available_cores
from normlab.records.lock import has_locks

__all__ = ["ArrayTask", "SlurmEngine"]

LOOK_SECONDS = 5.0
"""Between two looks at the queue: the controller of a cluster serves many."""
SAVE_SECONDS = int(STOP_SECONDS) + 60
"""Before the end of its time a task is told to save; with room for slow disks after the workers have ended."""
QUIET_SECONDS = 2.0
"""A signal for all processes of a task reaches one a little before the other."""
ANSWER_SECONDS = 120.0
"""For a command of SLURM; they wait some seconds for a controller that is down by themselves."""

TOOLS = ("sbatch", "squeue", "scontrol", "scancel")
PREFIX = "normlab-"
BATCH_FILE = "batch.json"

NOT_THE_JOBS_FAULT = ("PREEMPTED", "NODE_FAIL", "BOOT_FAIL")
NO_ANSWER = ("Unable to contact slurm controller", "Socket timed out", "Zero Bytes were transmitted", "Connection ")
NEVER_BY_ITSELF = ("held", "JobHeld", "BadConstraints", "DependencyNeverSatisfied")
"""Reasons of a job that waits, after which it would wait for ever."""


@dataclass
class _Task:
    """One task of an array: `left` are its jobs, by id, of which nothing was heard yet."""

    groups: list[list[Job]]
    left: dict[str, Job]
    unseen: int = 0


@dataclass
class _Batch:
    """One array; `number` is what SLURM calls it, empty as long as it may not have got it."""

    folder: Path
    tasks: list[_Task]
    number: str = ""

    def name(self, index: int) -> str:
        """What SLURM calls a task."""
        return f"{self.number}_{index}" if len(self.tasks) > 1 else self.number


@dataclass(frozen=True)
class _Queued:
    number: str
    reason: str


class SlurmEngine:
    """The queue of a cluster. Leaving the context leaves the jobs there: the next study goes on with them.

    Args:
        folder: for job files and logs of runs, as of `LocalWorkers`, on a disk that all nodes see.
        options: what to ask for.
        workers: runs at once in each SLURM job, at most; 0 takes one per core of it.
        runs_per_gpu: of them on each GPU of a job that has some; 0 has it measured.
    """

    def __init__(self, folder: Path, options: SlurmOptions, workers: int = 0, runs_per_gpu: int = 0) -> None:
        self.folder = folder
        self.options = options
        self.workers = workers
        self.runs_per_gpu = runs_per_gpu
        self._batches: dict[str, _Batch] = {}
        self._looked = -LOOK_SECONDS
        self._is_silent = False
        self._noted: set[str] = set()

    def __enter__(self) -> SlurmEngine:
        """Take over what earlier studies left in the queue.

        Raises:
            InputError: there is no SLURM here, no submitit, or the folder has no locks.
        """
        missing = [tool for tool in TOOLS if shutil.which(tool) is None]
        if missing:
            raise InputError(f"--where slurm needs {missing[0]}, which is not here; run it on a cluster's login node")
        try:
            import submitit  # noqa: F401
        except ImportError:
            raise InputError("--where slurm needs submitit: pip install -c constraints.txt -e '.[slurm]'") from None
        self._batches_folder.mkdir(parents=True, exist_ok=True)
        if not has_locks(self._batches_folder):
            why = "is on a disk without locks (flock), so that killed runs could not be told from others"
            raise InputError(f"{self.folder.parent} {why}; give --runs_dir a place on another")
        while (queue := self._queue()) is None:
            time.sleep(LOOK_SECONDS)
        self._adopt(queue)
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def jobs(self) -> list[Job]:
        """Those in the queue or at work, of other studies in the same folder too."""
        return [job for task in self._tasks for job in task.left.values()]

    @property
    def free(self) -> int:
        """No group while as many jobs as asked for are under way: SLURM bounds one array alone, and a study sends many
        as its runs become ready."""
        if self.options.array_parallelism and self._tasks_left >= self.options.array_parallelism:
            return 0
        under_way = sum(any(job.id in task.left for job in group) for task in self._tasks for group in task.groups)
        return max(0, self.options.max_queued - under_way)

    def start(self, groups: Sequence[Sequence[Job]]) -> None:
        """Send the groups as one array.

        Raises:
            InputError: SLURM does not take them; the message has its words.
        """
        size = self.options.runs_per_job
        tasks = [[list(group) for group in groups[first : first + size]] for first in range(0, len(groups), size)]
        folder = self._batches_folder / f"{PREFIX}{uuid.uuid4().hex[:12]}"
        folder.mkdir()
        for group in groups:
            for job in group:
                write_job(self._job_file(job.id), job)
        ids = [[[job.id for job in group] for group in task] for task in tasks]
        batch = {"tasks": ids, "workers": self.workers, "runs_per_gpu": self.runs_per_gpu}
        write_atomically(folder / BATCH_FILE, to_json(batch) + "\n")
        self._batches[folder.name] = _Batch(folder, [_task(task) for task in tasks])
        self._send(self._batches[folder.name])

    def log(self, job: Job) -> Path:
        return self.folder / f"{job.id}.log"

    def ended(self) -> list[Ended]:
        """Those that ended since the last call, seen every few seconds."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return []
        # Before the disk: what is not in the queue any more has written all it will.
        queue = self._queue()
        if queue is not None:
            self._adopt(queue)
        over: list[Ended] = []
        for name, batch in list(self._batches.items()):
            if queue is not None and not batch.number:
                self._send(batch)
            for index, task in enumerate(batch.tasks):
                over += _reported(batch, index, task)
                # A job that is requeued, or just sent, may be missing for an instant.
                is_seen = queue is None or not batch.number or (name, index) in queue
                task.unseen = 0 if is_seen else task.unseen + 1
                if task.left and task.unseen > 1:
                    over += _lost(batch, index, task)
            if not any(task.left for task in batch.tasks):
                del self._batches[name]
        self._looked = time.monotonic()
        return over

    def stop(self) -> None:
        """Let go: SLURM keeps the jobs. How to cancel them is said on standard error."""
        if self.jobs:
            numbers = " ".join(batch.number for batch in self._batches.values() if batch.number)
            _say(
                f"{len(self.jobs)} runs stay in SLURM's queue or at work; the same command goes on with them, "
                f"scancel {numbers or '--me'} ends them, with a checkpoint each"
            )
        self._batches = {}

    @property
    def _tasks_left(self) -> int:
        return sum(bool(task.left) for task in self._tasks)

    @property
    def _batches_folder(self) -> Path:
        return self.folder.absolute() / "slurm"

    @property
    def _tasks(self) -> list[_Task]:
        return [task for batch in self._batches.values() for task in batch.tasks]

    def _job_file(self, job_id: str) -> Path:
        return self.folder / f"{job_id}.yaml"

    def _queue(self) -> dict[tuple[str, int], _Queued] | None:
        """What is in the queue or at work of this user's batches, by name and index; None if SLURM does not answer."""
        found: dict[tuple[str, int], _Queued] = {}
        # SQUEUE_... would hide some.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
        try:
            answer = _ask("squeue", "--me", "--array", "--noheader", "--format=%j|%K|%F|%r", environment=environment)
        except _NoAnswerError as error:
            if not self._is_silent:
                _say(f"SLURM does not answer ({error}); waiting, nothing is lost")
            self._is_silent = True
            return None
        if self._is_silent:
            _say("SLURM answers again")
        self._is_silent = False
        for line in answer.splitlines():
            if line.startswith(PREFIX) and line.count("|") == 3:
                name, index, number, reason = line.split("|")
                found[name, int(index) if index.isdigit() else 0] = _Queued(number, reason)
        return found

    def _adopt(self, queue: dict[tuple[str, int], _Queued]) -> None:
        """Learn of batches that other studies with this folder sent, and of the number of one that was sent without an
        answer; say which jobs wait for the user."""
        for (name, index), queued in queue.items():
            folder = self._batches_folder / name
            if name not in self._batches and (folder / BATCH_FILE).exists():
                here = {index for listed, index in queue if listed == name}
                self._batches[name] = _Batch(folder, self._read_tasks(folder, here))
            if name in self._batches:
                self._batches[name].number = queued.number
                waits_for_ever = any(word in queued.reason for word in NEVER_BY_ITSELF)
                job = self._batches[name].name(index)
                if waits_for_ever and job not in self._noted:
                    self._noted.add(job)
                    _say(f"SLURM job {job} waits ({queued.reason}): scontrol release {job}, or scancel {job}")

    def _read_tasks(self, folder: Path, here: set[int]) -> list[_Task]:
        """Tasks of a batch as another study sent them. Of one that is not in the queue nothing is left: what it did not
        do is missing again; nor what was said to have ended, which may be under way anew."""
        tasks = []
        for index, ids in enumerate(_read_batch(folder)["tasks"]):
            ended = _ended_rows(folder, index)
            left = [[job_id for job_id in group if index in here and job_id not in ended] for group in ids]
            tasks.append(_task([[read_job(self._job_file(job_id)) for job_id in group] for group in left]))
        return tasks

    def _send(self, batch: _Batch) -> None:
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        options, count = self.options, len(batch.tasks)
        others = self._tasks_left - count
        at_once = max(1, options.array_parallelism - others) if options.array_parallelism else count
        given = {name: getattr(options, name) for name in ("partition", "account", "qos", "gres", "mem", "constraint")}
        given = {name: value for name, value in given.items() if value}
        hidden = [name for name in os.environ if _is_in_the_way(name, {*given, "time", *options.sbatch})]
        refusal = io.StringIO()  # submitit prints what it raises
        with _without(hidden), contextlib.redirect_stderr(refusal):
            executor = submitit.SlurmExecutor(batch.folder, max_num_timeout=options.requeues)
            executor.update_parameters(
                **given,
                job_name=batch.folder.name,
                time=options.minutes,
                nodes=1,
                ntasks_per_node=1,
                cpus_per_task=options.cpus,
                srun_args=["--cpus-per-task", str(options.cpus)],  # since 22.05 srun does not have it from sbatch
                signal_delay_s=SAVE_SECONDS,
                array_parallelism=at_once,
                setup=[options.setup] if options.setup else None,
                wckey=None,
                additional_parameters={"requeue": True, **options.sbatch},
            )
            try:
                sent = executor.map_array(ArrayTask(), [str(batch.folder)] * count, range(count))
            except (FailedJobError, FailedSubmissionError) as error:
                if any(words in str(error) for words in NO_ANSWER):
                    return  # it may have got them all the same: the queue will tell
                del self._batches[batch.folder.name]
                why = " ".join(str(error).replace("sbatch: error: ", "").split()) or "sbatch failed"
                raise InputError(f"SLURM does not take the jobs: {why}; options: --slurm.partition, ...") from None
        batch.number = sent[0].job_id.split("_")[0]


class ArrayTask:
    """What an array task does, as submitit calls it; when its time is up, `checkpoint`, and back into the queue.

    Its arguments are all that is pickled: the batch's folder and the task's index in it.
    """

    _workers: LocalWorkers | None = None

    def __call__(self, folder: str, index: int) -> None:
        batch = Path(folder)
        values = _read_batch(batch)
        ended = _ended_rows(batch, index)
        ids = [[job_id for job_id in group if job_id not in ended] for group in values["tasks"][index]]
        study = batch.parent.parent
        groups = [[read_job(study / f"{job_id}.yaml") for job_id in group] for group in ids if group]
        received: list[int] = []
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's: it comes when the time is up
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, lambda number, _: received.append(number))
        with _workers(values["workers"], values["runs_per_gpu"], study) as workers:
            self._workers = workers
            while (groups or workers.jobs) and not received:
                free = workers.free
                now, groups = groups[:free], groups[free:]
                if now:
                    with _for_workers():
                        workers.start(now)
                time.sleep(0.1)
                over = workers.ended()
                if any(each.reason == "stopped" for each in over):
                    time.sleep(QUIET_SECONDS)
                if not received:
                    _report(batch, index, over)
            if signal.SIGUSR2 in received and callable(requeue):
                requeue(signal.SIGUSR2, None)
        if received:  # preempted, requeued or cancelled: SLURM knows which
            sys.exit(128 + signal.SIGTERM)

    def checkpoint(self, folder: str, index: int) -> Any:
        """End all runs with a checkpoint each; returns what is to be done next time."""
        from submitit.helpers import DelayedSubmission

        if self._workers is not None:
            self._workers.stop()
        return DelayedSubmission(ArrayTask(), folder, index)


def _task(groups: list[list[Job]]) -> _Task:
    return _Task(groups, {job.id: job for group in groups for job in group})


def _read_batch(folder: Path) -> dict[str, Any]:
    return parse_json((folder / BATCH_FILE).read_bytes(), str(folder / BATCH_FILE))


def _ended_file(batch: Path, index: int) -> Path:
    return batch / f"{index}.ended.jsonl"


def _report(batch: Path, index: int, over: Sequence[Ended]) -> None:
    for ended in over:
        row = to_json({"id": ended.job.id, "reason": ended.reason, "again": ended.again})
        append(_ended_file(batch, index), row.encode() + b"\n")


def _ended_rows(batch: Path, index: int) -> dict[str, dict[str, Any]]:
    """What `_report` wrote of the jobs of a task, by id."""
    path = _ended_file(batch, index)
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return {}
    return {row["id"]: row for row in (parse_json(line, str(path)) for line in lines)}


def _reported(batch: _Batch, index: int, task: _Task) -> list[Ended]:
    if not task.left:
        return []
    rows = _ended_rows(batch.folder, index)
    return [
        Ended(task.left.pop(job_id), row["reason"], row["again"]) for job_id, row in rows.items() if job_id in task.left
    ]


def _lost(batch: _Batch, index: int, task: _Task) -> list[Ended]:
    """What a task left undone that is in the queue no more."""
    number = batch.name(index)
    try:
        shown = _ask("scontrol", "show", "job", "-o", number)
    except _NoAnswerError:  # it was long ago
        shown = ""
    facts = dict(part.split("=", 1) for part in shown.split() if "=" in part)
    state = facts.get("JobState", "")
    said = [f"SLURM job {number}: {state or 'left the queue without a result'}"]
    if state in ("FAILED", "OUT_OF_MEMORY"):
        said.append(f"exit code {facts.get('ExitCode')}")
    log = next(iter(batch.folder.glob(f"{number}_*_log.err")), None)
    if log is not None:
        said.append(f"its log: {log}")
    jobs, task.left = list(task.left.values()), {}
    return [Ended(job, "" if job.is_done() else ", ".join(said), again=state in NOT_THE_JOBS_FAULT) for job in jobs]


class _NoAnswerError(Exception):
    """A command of SLURM failed, or said nothing for long."""


def _ask(*command: str, environment: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        raise _NoAnswerError(f"{command[0]} took more than {ANSWER_SECONDS:g} s") from None
    if done.returncode != 0:
        raise _NoAnswerError(" ".join(done.stderr.split()) or f"{command[0]} failed")
    return done.stdout


def _say(words: str) -> None:
    print(f"normlab: {words}", file=sys.stderr, flush=True)


def _workers(asked: int, runs_per_gpu: int, folder: Path) -> LocalWorkers:
    """On what SLURM gave this task."""
    has_gpus = bool(os.environ.get("SLURM_GPUS_ON_NODE"))
    gpus = visible_gpus() if has_gpus else []
    # Where SLURM does not bind processes to cores, it only says how many they may use.
    cores = max(1, min(available_cores(), int(os.environ.get("SLURM_CPUS_ON_NODE", available_cores()))))
    # Where nobody says which GPUs there are, one run at a time has what torch finds.
    size = asked or (1 if has_gpus and not gpus else 0)
    return LocalWorkers(size, folder, gpus=gpus, runs_per_gpu=runs_per_gpu, cores=cores, say=_say)


def _is_in_the_way(name: str, given: set[str]) -> bool:
    """Whether a variable would change what is asked of sbatch: it heeds SBATCH_... more than the script, and inherits
    the SLURM_... of a job that the study itself may run in."""
    if name.startswith("SLURM_"):
        return name not in ("SLURM_CONF", "SLURM_CLUSTERS")
    ours = {"JOB_NAME", "ARRAY_INX", "OUTPUT", "ERROR", "OPEN_MODE", "SIGNAL", "REQUEUE", "NO_REQUEUE", "EXPORT"}
    other_names = {"time": "TIMELIMIT", "mem": "MEM_PER_NODE"}
    ours |= {other_names.get(key, key.replace("-", "_").upper()) for key in given}
    return name.startswith("SBATCH_") and name.removeprefix("SBATCH_") in ours


@contextlib.contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    """These variables are not in the environment meanwhile."""
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


@contextlib.contextmanager
def _for_workers() -> Iterator[None]:
    """Processes started meanwhile do not see that they are in a SLURM job, where Lightning would train otherwise.

    SLURM sends its signals to all processes of a job. That the time is up is this one's to pass on; and the server of
    workers must outlive SIGTERM: without it nobody knows when they have saved. Each worker hears that by itself.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        resource_tracker.ensure_running()  # the server's start would start it, and Python unblocks SIGTERM with that
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        with _without([name for name in os.environ if name.startswith("SLURM_")]):
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
