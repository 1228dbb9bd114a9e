"""A study from its first run to its tables, with real runs: killed on the way, and gone on with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_study import tiny_study

from normlab.claims.rows import read_rows
from normlab.records.record import RunRecord, record_ids

pytestmark = pytest.mark.slow
SECONDS = 240  # of a busy machine


def started(tiny_text: Path, folder: Path) -> subprocess.Popen[str]:
    program = [sys.executable, str(Path(__file__).with_name("tiny_study.py")), str(tiny_text), str(folder)]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def records(folder: Path) -> list[RunRecord]:
    return [RunRecord.open(name, folder / "runs") for name in record_ids(folder / "runs")]


def test_a_killed_study_goes_on_and_ends(tiny_text: Path, tmp_path: Path, request: pytest.FixtureRequest):
    study = started(tiny_text, tmp_path)
    request.addfinalizer(study.kill)
    wait_for(lambda: any(len(record.metrics()) > 3 for record in records(tmp_path)))
    os.kill(study.pid, signal.SIGKILL)
    study.wait()
    # The workers notice, save and end: no run is left alone with the machine.
    wait_for(lambda: all(record.outcome().state != "running" for record in records(tmp_path)))
    stopped = {record.id: record.outcome() for record in records(tmp_path)}
    assert any(outcome.reason == "SIGTERM" and outcome.step > 0 for outcome in stopped.values())

    study = started(tiny_text, tmp_path)
    request.addfinalizer(study.kill)
    output, _ = study.communicate(timeout=SECONDS)
    states = [record.outcome().state for record in records(tmp_path)]
    assert states == ["finished"] * 4, output
    assert output.count(": step 200/200") == 4, "each run once, though three arguments want it"
    assert output.count(": bias_variance of 2 runs together") == 2
    plan = tiny_study(tiny_text, tmp_path)
    for claim in plan.claims:
        assert f"{claim.id} (small): " in output
        rows = read_rows(plan.table(claim))
        assert [(row.arm, row.seed) for row in rows] == [(arm, seed) for arm in ("ln", "bn_step") for seed in (1, 2)]
        assert all(row.value == row.value and row.seconds > 0 for row in rows)
        assert plan.state(claim).missing == []
        before = plan.table(claim).read_bytes()
        plan.write(plan.state(claim))
        assert plan.table(claim).read_bytes() == before
    of_seed = {row.run_id: row.value for row in read_rows(plan.table(plan.claims[-1]))}
    measured = [record.probe("bias_variance", [record.id, record.at_seed(2).id]) for record in records(tmp_path)]
    found = [each for each in measured if each]
    assert [len(each["runs"]) for each in found] == [2, 2], "in the folders of seed 1"
    assert {row["run"]: row["variance_nats"] for each in found for row in each["rows"]} == of_seed
    for record in records(tmp_path):
        assert record.environment()["threads"] == 1
        assert record.probe("discrepancy")["options"]["batches"] == 2
