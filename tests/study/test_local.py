"""Worker processes, from the server that they are forked from."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from normlab.config import RunConfig
from normlab.execution import local
from normlab.execution.engine import Ended
from normlab.execution.jobs import Job
from normlab.execution.local import LocalWorkers

SCRIPT = """
import json, os, sys
if os.environ["WHERE"] == "fails":
    sys.exit("the disk is full")
seen = {"cwd": os.getcwd(), "where": os.environ["WHERE"], "threads": os.environ["OMP_NUM_THREADS"]}
seen |= {"leads its group": os.getpgrp() == os.getpid(), "job": sys.argv[1]}
had = {"torch", "normlab.training.run", "normlab.probes.senses", "normlab.norms.pnv", "normlab.execution.jobs"}
seen["lacks"] = sorted(had - set(sys.modules))
print(json.dumps(seen))
"""


def test_a_worker_stands_where_its_caller_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a later one, when directory and environment are others than when the server began."""
    script = tmp_path / "worker.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(local, "WORKER", (str(script),))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    job = Job(RunConfig())
    for place in ("first", "second"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        monkeypatch.setenv("WHERE", place)
        with LocalWorkers(1, tmp_path / "jobs") as pool:
            pool.start([[job]])
            (ended,) = _wait(pool)
        assert ended.reason == ""
        seen = json.loads((tmp_path / "jobs" / f"{job.id}.log").read_text())
        assert seen == {
            "cwd": str(tmp_path / place),
            "where": place,
            "threads": "1",
            "leads its group": True,
            "lacks": [],
            "job": str(tmp_path / "jobs" / f"{job.id}.yaml"),
        }
    assert os.environ["OMP_NUM_THREADS"] == "7", "the caller's own is left alone"
    monkeypatch.setenv("WHERE", "fails")
    with LocalWorkers(1, tmp_path / "jobs") as pool:
        pool.start([[job]])
        (ended,) = _wait(pool)
    assert ended.reason == "the disk is full"


def _wait(pool: LocalWorkers) -> list[Ended]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if ended := pool.ended():
            return ended
        time.sleep(0.02)
    raise AssertionError("it never ended")
