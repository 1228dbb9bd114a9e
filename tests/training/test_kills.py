"""SIGKILL at any moment, and `--resume`: the numbers and the weights are those of a run that was left alone."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Program, begin, train_config
from test_damaged_checkpoints import results
from test_run import numbers

from normlab.config import RunConfig
from normlab.records.record import RunRecord, record_ids

pytestmark = pytest.mark.slow

KILLS = 20
MOMENTS = [
    ("open", ".last.ckpt.tmp"),
    ("os.rename", "previous.ckpt"),
    ("os.rename", "last.ckpt"),
    ("open", ".best.ckpt.tmp"),
]
"""The second time that a file is written or takes its place, one kill each; the other kills come when they come."""


def kill_at(event: str, name: str) -> None:
    """Have this process killed the second time that it is about to open, or to rename to, a file of that name."""
    left = [2]

    def hook(happened: str, arguments: tuple[Any, ...]) -> None:
        if happened == event and os.path.basename(str(arguments[1 if event == "os.rename" else 0])) == name:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def processor_seconds(pid: int) -> float:
    """Of a process; infinite once it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("inf")
    return float("inf") if fields[0] == "Z" else (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def kill_after(program: Program, seconds: float) -> None:
    """Kill it once it has worked for so long, whatever else the machine does."""
    while processor_seconds(program.process.pid or 0) < seconds:
        time.sleep(0.002)
    program.process.kill()


def contents(record: RunRecord) -> dict[str, Any]:
    stored = {}
    for path in record.checkpoints.iterdir():
        stored[path.name] = torch.load(path, weights_only=True)
    assert stored.keys() == {"last.ckpt", "best.ckpt", "final.ckpt"}, "nothing else is left of a kill"
    return stored


def require_same(record: RunRecord, whole: RunRecord) -> None:
    assert record.outcome().state == "finished"
    assert numbers(record) == numbers(whole)
    assert results(record) == results(whole)
    assert record.statistics_gap() == whole.statistics_gap()
    assert not list(record.folder.glob(".*.tmp"))
    for name, expected in contents(whole).items():
        found = contents(record)[name]
        torch.testing.assert_close(found["state_dict"], expected["state_dict"], rtol=0, atol=0)
        if name == "last.ckpt":
            torch.testing.assert_close(found["optimizer_states"], expected["optimizer_states"], rtol=0, atol=0)


@pytest.mark.skipif(sys.platform != "linux", reason="processor time of another process is read from /proc")
def test_killed_twenty_times(tiny_run: Callable[..., RunConfig], tmp_path: Path):
    config = tiny_run(
        model__norm="bn_step",
        model__dropout=0.1,
        optim__lr=1e-2,
        training__steps=40,
        training__valid_every=10,
        training__checkpoint_every=2,
        training__recompute_batches=2,
    )
    log = tmp_path / "log"
    whole_program = begin(train_config(config, tmp_path), log)
    worked = 0.0
    while (now := processor_seconds(whole_program.process.pid or 0)) != float("inf"):
        worked = now
        time.sleep(0.002)
    assert whole_program.wait() == 0
    runs = Path(config.output.runs_dir)
    (name,) = record_ids(runs)
    shutil.move(runs / name, tmp_path / "whole")
    whole = RunRecord(tmp_path / "whole", config)

    draw = random.Random(0)
    record = RunRecord(runs / name, config)
    kills, finished, moments, from_steps = 0, 0, list(MOMENTS), []
    while kills < KILLS:
        resume = ["train", "--resume", str(record.folder)] if record.folder.exists() else train_config(config, tmp_path)
        if moments:
            program = begin(resume, log, before=partial(kill_at, *moments.pop(0)))
        else:
            program = begin(resume, log)
            kill_after(program, draw.random() * worked)
        code = program.wait()
        from_steps += [int(step) for step in re.findall(r"going on from step (\d+) of", program.said)]
        if code == 0:
            finished += 1
            require_same(record, whole)
            shutil.rmtree(record.folder)
            continue
        assert code == -signal.SIGKILL, program.said
        kills += 1
        assert kills < len(MOMENTS) or not moments
        if record.folder.exists() and record.outcome().state != "finished":  # then it was killed on its way out
            assert record.outcome().state == "interrupted"
            assert record.outcome().reason in ("killed", "never started")
    if record.folder.exists():
        resume = begin(["train", "--resume", str(record.folder)], log)
        assert resume.wait() == 0, resume.said
        require_same(record, whole)
        finished += 1
    assert finished
    # Some fell into the training, early and late, with checkpoints between them.
    assert len({step for step in from_steps if 0 < step < 40}) >= 5, from_steps
