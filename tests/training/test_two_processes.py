"""Several processes train one model: the record is written once, and both see their part of each batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from normlab.records.record import RunRecord, record_ids


def run(tiny_text: Path, runs: Path, *flags: str) -> RunRecord:
    command = [sys.executable, "-m", "normlab", "train", "--data", str(tiny_text), "--output.runs_dir", str(runs)]
    fixed = (
        "--norm bn_step --model.width 16 --data.length 12 --training.steps 6 --training.valid_every 3 "
        "--training.accelerator cpu --output.wandb off --training.threads 1"
    )
    done = subprocess.run([*command, *fixed.split(), *flags], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("outcome") == 1
    return RunRecord.open(record_ids(runs)[0], runs)


@pytest.mark.slow
def test_two_processes_carry_a_state(tiny_text: Path, tmp_path: Path):
    record = run(tiny_text, tmp_path, "--data.batch_size", "4", "--training.devices", "2", "--data.stream", "stateful")
    assert record.outcome().state == "finished"


@pytest.mark.slow
def test_two_processes(tiny_text: Path, tmp_path: Path):
    one = run(tiny_text, tmp_path / "one", "--data.batch_size", "8")
    two = run(tiny_text, tmp_path / "two", "--data.batch_size", "4", "--training.devices", "2")
    assert two.environment()["statistics_batch_rows"] == one.environment()["statistics_batch_rows"] == 8
    for record in (one, two):
        assert record.outcome().state == "finished"
        assert [row["step"] for row in record.metrics() if "valid_loss_nats" in row] == [3, 6]
    # The same windows, dealt to two processes: the joined batch is the same, and so is what is learnt from it.
    for name in ("valid_loss_nats", "valid_running_loss_nats", "test_loss_nats", "statistics_gap_mean"):
        assert float(two.outcome().results[name]) == pytest.approx(float(one.outcome().results[name]), rel=1e-3)
    assert two.outcome().results["recomputed_batches"] == one.outcome().results["recomputed_batches"]
    entries = [[gap["entries"] for gap in record.statistics_gap()["norms"].values()] for record in (one, two)]
    assert entries[0] == entries[1]  # of all processes together
    stored = torch.load(two.checkpoints / "final.ckpt", weights_only=True)
    assert stored["global_step"] == two.outcome().results["best_step"]
