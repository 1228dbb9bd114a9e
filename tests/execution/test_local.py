"""Worker processes, from the server that they are forked from."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing.forkserver
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from normlab.config import RunConfig
from normlab.execution import local
from normlab.execution.engine import Ended
from normlab.execution.gpus import Gpu
from normlab.execution.jobs import Job
from normlab.execution.local import LocalWorkers

SCRIPT = """
import json, os, sys
if os.environ["WHERE"] == "fails":
    sys.exit("the disk is full")
seen = {"cwd": os.getcwd(), "where": os.environ["WHERE"], "leads its group": os.getpgrp() == os.getpid()}
had = {"torch", "normlab.training.run", "normlab.probes.senses", "normlab.norms.pnv", "normlab.execution.jobs"}
seen |= {"job": sys.argv[1], "lacks": sorted(had - set(sys.modules))}
print(json.dumps(seen))
"""

THREADS = """
import json, os, torch
seen = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
print(json.dumps(seen | {"torch": torch.get_num_threads(), "CUDA was used": torch.cuda.is_initialized()}))
"""

WAITS = """
import pathlib, signal, sys, threading, time
from normlab.execution.worker import _stop_with_parent
def stop(*_):
    pathlib.Path(sys.argv[1]).with_suffix(".saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
threading.Thread(target=_stop_with_parent, daemon=True).start()
print("ready", flush=True)
time.sleep(600)
"""

IGNORES = WAITS.replace(".touch()\n    sys.exit(143)", ".touch()")

SHORT_OF_MEMORY = """
import sys
sys.exit("normlab: error: out of memory; lower data.batch_size (now 32), model.width (now 8) or data.length")
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has workers run this text."""

    def runs(text: str) -> None:
        script = tmp_path / "worker.py"
        script.write_text(text)
        monkeypatch.setattr(local, "WORKER", (str(script),))

    return runs


@pytest.fixture
def jobs() -> list[Job]:
    return [Job(dataclasses.replace(RunConfig(), seed=seed)) for seed in range(4)]


def test_a_worker_stands_where_its_caller_does(
    worker: Callable[[str], None], jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also a later one, when directory and environment are others than when the server began."""
    worker(SCRIPT)
    job = jobs[0]
    for place in ("first", "second"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        monkeypatch.setenv("WHERE", place)
        with LocalWorkers(1, tmp_path / "jobs") as pool:
            pool.start([[job]])
            (ended,) = _wait(pool)
        assert ended.reason == ""
        assert _printed(pool, job) == {
            "cwd": str(tmp_path / place),
            "where": place,
            "leads its group": True,
            "lacks": [],
            "job": str(tmp_path / "jobs" / f"{job.id}.yaml"),
        }
    monkeypatch.setenv("WHERE", "fails")
    with LocalWorkers(1, tmp_path / "jobs") as pool:
        pool.start([[job]])
        (ended,) = _wait(pool)
    assert (ended.reason, ended.again) == ("the disk is full", False)


@pytest.mark.parametrize(
    ("cores", "size", "method", "threads"), [(6, 2, "forkserver", 3), (2, 4, "forkserver", 1), (4, 2, "spawn", 2)]
)
def test_workers_share_the_cores(
    cores: int,
    size: int,
    method: local.Method,
    threads: int,
    worker: Callable[[str], None],
    jobs: list[Job],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    worker(THREADS)
    monkeypatch.setattr(local, "available_cores", lambda: cores)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with LocalWorkers(size, tmp_path / "jobs", method=method) as pool:
        pool.start([[jobs[0]]])  # one alone has no more than its share: what else runs does not decide
        _wait(pool)
        assert _printed(pool, jobs[0]) == {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "CUDA_VISIBLE_DEVICES": "",
            "torch": threads,
            "CUDA was used": False,
        }
    assert os.environ["OMP_NUM_THREADS"] == "7", "the caller's own is left alone"


def test_each_worker_sees_one_gpu(
    worker: Callable[[str], None], jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    worker(THREADS)
    monkeypatch.setattr(local, "available_cores", lambda: 9)
    said: list[str] = []
    gpus = [Gpu("3"), Gpu("GPU-b")]
    with LocalWorkers(64, tmp_path / "jobs", gpus=gpus, runs_per_gpu=2, say=said.append) as pool:
        assert pool.free == 4
        pool.start([[jobs[0]], [jobs[1]], [jobs[2]]])
        assert pool.free == 1
        pool.start([[jobs[3]]])
        assert pool.free == 0
        while pool.jobs:
            _wait(pool)
        assert pool.free == 4
        seen = [_printed(pool, job) for job in jobs]
    assert sorted(each["CUDA_VISIBLE_DEVICES"] for each in seen) == ["3", "3", "GPU-b", "GPU-b"]
    assert {(each["torch"], each["CUDA was used"]) for each in seen} == {(2, False)}
    assert said == []
    with LocalWorkers(3, tmp_path / "jobs", gpus=gpus, runs_per_gpu=2) as pool:
        assert pool.free == 3, "never more than there may be workers"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (SHORT_OF_MEMORY, "out of memory; lower"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL; out of memory?"),
        ("raise RuntimeError('CUDA out of memory. Tried to allocate 2 MiB.')", "RuntimeError: CUDA out of memory."),
    ],
)
def test_a_run_without_memory_has_another_try_beside_fewer(
    text: str, reason: str, worker: Callable[[str], None], jobs: list[Job], tmp_path: Path
):
    worker(text)
    said: list[str] = []
    tries: list[tuple[int, bool]] = []
    with LocalWorkers(4, tmp_path / "jobs", say=said.append) as pool:
        left = list(jobs)
        while left:
            together, left = left[: pool.free], left[pool.free :]
            pool.start([[job] for job in together])
            while pool.jobs:
                for ended in _wait(pool):
                    assert ended.reason.startswith(reason)
                    tries.append((len(together), ended.again))
                    if ended.again:
                        left.append(ended.job)
    # 4 together, then 2 and 2, then each alone, which nobody else is to blame for.
    assert tries == [(4, True)] * 4 + [(2, True)] * 2 + [(1, False)] * 4
    assert [line.partition(": ")[2].partition(" with ")[2] for line in said] == [
        "4 at once: 2 from now on, and it runs again",
        "2 at once: 1 from now on, and it runs again",
    ]


def test_workers_outlive_their_server_just_to_save(worker: Callable[[str], None], jobs: list[Job], tmp_path: Path):
    worker(WAITS)
    with LocalWorkers(2, tmp_path / "jobs") as pool:
        pool.start([[jobs[0]]])
        _until(lambda: pool.log(jobs[0]).read_text() == "ready\n")
        server = multiprocessing.forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
        os.kill(server, signal.SIGKILL)
        (ended,) = _wait(pool)
        assert ended.job is jobs[0]
        assert ended.reason == "lost: the server that workers are forked from ended"
        _until((tmp_path / "jobs" / f"{jobs[0].id}.saved").exists)
        pool.start([[jobs[1]]])  # from another server
        _until(lambda: pool.log(jobs[1]).read_text() == "ready\n")
        assert multiprocessing.forkserver._forkserver._forkserver_pid != server  # type: ignore[attr-defined]


def test_ctrl_c_while_workers_save_kills_them(
    worker: Callable[[str], None], jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    worker(IGNORES)
    pool = LocalWorkers(1, tmp_path / "jobs")
    with pool:
        pool.start([[jobs[0]]])
        _until(lambda: pool.log(jobs[0]).read_text() == "ready\n")
        process = pool._workers[0].process

        def ctrl_c(*_: object) -> None:
            _until((tmp_path / "jobs" / f"{jobs[0].id}.saved").exists)  # it was asked to end
            monkeypatch.undo()
            raise KeyboardInterrupt

        monkeypatch.setattr(process, "join", ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            pool.stop()
    assert process.exitcode == -signal.SIGKILL


def _printed(pool: LocalWorkers, job: Job) -> dict[str, Any]:
    return json.loads(pool.log(job).read_text())


def _wait(pool: LocalWorkers) -> list[Ended]:
    found: list[Ended] = []

    def ended() -> bool:
        found.extend(pool.ended())
        return bool(found)

    _until(ended)
    return found


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120  # a server that starts on a busy machine
    while not holds():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)
