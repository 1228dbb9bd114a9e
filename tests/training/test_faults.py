"""Ctrl-C, SIGTERM, SIGKILL, a full disk, no W&B: the record stays readable and the run goes on where it was."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as pl

from normlab.config import InputError, RunConfig
from normlab.records.record import RunRecord, record_ids
from normlab.training import watching
from normlab.training.module import TextModule
from normlab.training.run import train

Build = Callable[..., RunConfig]
FLAGS = "--model.width 16 --data.length 12 --data.batch_size 8 --optim.lr 1e-2 --output.wandb off --training.threads 1"
LONG = "--training.steps 4000 --training.valid_every 1000 --training.checkpoint_every 20"


def start(tiny_text: Path, runs: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "normlab", "train", "--data", str(tiny_text), "--output.runs_dir", str(runs)]
    return subprocess.Popen(
        [*command, *FLAGS.split(), *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_steps(runs: Path, steps: int) -> RunRecord:
    """The record, once it has rows of that many steps."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if ids := record_ids(runs):
            record = RunRecord.open(ids[0], runs)
            rows = record.metrics()
            if rows and rows[-1]["step"] >= steps:
                return record
        time.sleep(0.05)
    raise AssertionError("the run did not get under way")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_a_checkpoint(tiny_text: Path, tmp_path: Path, number: int, code: int):
    process = start(tiny_text, tmp_path, *LONG.split())
    record = wait_for_steps(tmp_path, 25)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in err
    outcome = record.outcome()
    assert outcome.state == "interrupted"
    assert f"--resume {record.folder}" in " ".join(out.split())
    # Nothing is lost: the checkpoint is of the very last step.
    assert record.metrics()[-1]["step"] == outcome.step
    again = start(tiny_text, tmp_path, *LONG.split())
    assert again.stdout is not None
    lines = again.stdout.readline() + again.stdout.readline()
    again.kill()
    again.communicate()
    assert f"going on from step {outcome.step} of" in lines


@pytest.mark.slow
def test_a_kill_leaves_a_record_that_goes_on(tiny_text: Path, tmp_path: Path):
    process = start(tiny_text, tmp_path, *LONG.split())
    record = wait_for_steps(tmp_path, 45)
    assert record.outcome().state == "running"
    process.kill()
    process.communicate()
    assert (record.outcome().state, record.outcome().reason) == ("interrupted", "killed")
    resumed = subprocess.Popen(
        [sys.executable, "-m", "normlab", "train", "--resume", str(record.folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    before = record.metrics()[-1]["step"]
    deadline = time.monotonic() + 120
    while record.metrics()[-1]["step"] <= before + 20:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    resumed.send_signal(signal.SIGINT)
    out, _ = resumed.communicate(timeout=60)
    assert resumed.returncode == 130
    assert "going on from step" in out
    steps = [row["step"] for row in record.metrics() if "train_loss_nats" in row]
    assert steps == sorted(set(steps))
    assert record.environment()["begun_with"]["threads"] == 1, "they decide the last bits"


@pytest.mark.slow
def test_two_processes_do_not_train_one_run(tiny_text: Path, tmp_path: Path):
    process = start(tiny_text, tmp_path, *LONG.split())
    wait_for_steps(tmp_path, 1)
    other = start(tiny_text, tmp_path, *LONG.split())
    _, err = other.communicate(timeout=60)
    process.kill()
    process.communicate()
    assert other.returncode == 2
    assert f"is being trained by process {process.pid}" in err
    assert err.count("\n") == 1


def test_ctrl_c_in_the_final_evaluation_keeps_the_training(tiny_run: Build, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    config = tiny_run()
    with monkeypatch.context() as patch:
        patch.setattr(TextModule, "test_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    record = RunRecord.open(record_ids(config.output.runs_dir)[0], config.output.runs_dir)
    assert record.outcome().state == "interrupted"
    rows, seconds = record.metrics(), record.outcome().seconds
    outcome = train(config).outcome()
    assert outcome.state == "finished"
    assert record.metrics() == rows
    assert outcome.seconds == pytest.approx(seconds, rel=0.2)
    assert 0 < float(outcome.results["tokens_per_second"]) < 1e7


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_said_in_one_line(tiny_run: Build, monkeypatch: pytest.MonkeyPatch):
    config = tiny_run()
    with monkeypatch.context() as patch:
        patch.setattr(pl.Trainer, "save_checkpoint", full_disk)
        with pytest.raises(InputError, match=r"the disk of .* is full; free some space, then run the same command"):
            train(config)
    record = RunRecord.open(record_ids(config.output.runs_dir)[0], config.output.runs_dir)
    assert record.outcome().state == "failed"
    assert "No space left" in record.outcome().reason
    assert train(config).outcome().state == "finished"


def test_a_disk_too_full_for_the_outcome_reads_as_killed(tiny_run: Build, monkeypatch: pytest.MonkeyPatch):
    config = tiny_run()
    with monkeypatch.context() as patch:
        patch.setattr(RunRecord, "log", full_disk)
        patch.setattr(RunRecord, "finish", full_disk)
        with pytest.raises(InputError, match="is full"):
            train(config)
    record = RunRecord.open(record_ids(config.output.runs_dir)[0], config.output.runs_dir)
    assert record.outcome().state == "interrupted"
    assert train(config).outcome().state == "finished"


def test_out_of_memory_is_said_in_one_line(tiny_run: Build, monkeypatch: pytest.MonkeyPatch):
    def hungry(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(watching.Recorder, "on_train_batch_end", hungry)
    with pytest.raises(InputError, match=r"out of memory; lower data\.batch_size \(now 8\), model\.width \(now 16\)"):
        train(tiny_run())


def test_a_bug_is_not_dressed_up_as_a_mistake(tiny_run: Build, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    config = tiny_run()
    monkeypatch.setattr(watching.Recorder, "on_train_batch_end", broken)
    with pytest.raises(ZeroDivisionError):
        train(config)
    record = RunRecord.open(record_ids(config.output.runs_dir)[0], config.output.runs_dir)
    assert record.outcome().reason == "ZeroDivisionError: a bug"


def test_nothing_else_is_missing_without_wandb(tiny_run: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    off = train(tiny_run())
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setenv("WANDB_MODE", "offline")
    without = train(tiny_run(output__wandb="auto", output__runs_dir=str(tmp_path / "without")))
    assert without.outcome().results["test_loss_nats"] == off.outcome().results["test_loss_nats"]
    assert {path.name for path in without.folder.iterdir()} == {path.name for path in off.folder.iterdir()}


def test_an_offline_run_reaches_wandb_with_steps_seconds_and_sites(tiny_run: Build, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = tiny_run(output__wandb="auto", output__claim="d1")
    record = train(config)
    folder = next(Path(config.output.runs_dir, "wandb").glob("offline-run-*"))
    assert record.id in folder.name
    stored = next(folder.glob("*.wandb")).read_bytes()
    for name in (b"train_loss_nats", b"seconds", b"gradient_norm", b"learning_rate", b"tokens_per_second", b"d1"):
        assert name in stored
    assert b"input_to_hidden/p85" in stored
