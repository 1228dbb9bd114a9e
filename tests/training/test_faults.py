"""Ctrl-C, SIGTERM, SIGKILL, a full disk, no W&B: the record stays readable and the run goes on where it was."""

from __future__ import annotations

import errno
import itertools
import os
import re
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from forked import Program, begin, train_config

from normlab.config import InputError, RunConfig
from normlab.data.batches import Batch
from normlab.data.prepared import prepare
from normlab.records import record as records
from normlab.records.record import OUT_OF_MEMORY, RunRecord, record_ids
from normlab.training import watching
from normlab.training.module import TextModule
from normlab.training.run import train
from normlab.training.stopping import DivergenceGuard

Build = Callable[..., RunConfig]
LONG = {"training__steps": 100_000, "training__valid_every": 100_000, "training__checkpoint_every": 20}


def record_of(config: RunConfig) -> RunRecord:
    return RunRecord.open(record_ids(config.output.runs_dir)[0], config.output.runs_dir)


def wait_for(program: Program, happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline, program.said
        assert program.process.exitcode is None, program.said
        time.sleep(0.02)


def is_at(config: RunConfig, step: int) -> bool:
    """Whether the run has rows of that many steps."""
    if not record_ids(config.output.runs_dir):
        return False
    rows = record_of(config).metrics()
    return bool(rows) and rows[-1]["step"] >= step


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_a_checkpoint(tiny_run: Build, tmp_path: Path, number: int, code: int):
    config = tiny_run(**LONG)
    program = begin(train_config(config, tmp_path), tmp_path / "log")
    wait_for(program, lambda: is_at(config, 25))
    os.kill(program.process.pid or 0, number)
    assert program.wait() == code
    assert "Traceback" not in program.said
    record = record_of(config)
    outcome = record.outcome()
    assert outcome.state == "interrupted"
    assert f"--resume {record.folder}" in " ".join(program.said.split())
    # Nothing is lost: the checkpoint is of the very last step.
    assert record.metrics()[-1]["step"] == outcome.step
    again = begin(train_config(config, tmp_path), tmp_path / "again")
    wait_for(again, lambda: f"going on from step {outcome.step} of" in again.said)
    again.process.kill()


@pytest.mark.slow
def test_one_of_two_that_start_one_run_at_once_yields(tiny_run: Build, tmp_path: Path):
    for round_number in range(4):
        config = tiny_run(**LONG, seed=round_number)
        (tmp_path / str(round_number)).mkdir()
        arguments = train_config(config, tmp_path / str(round_number))
        programs = [begin(arguments, tmp_path / str(round_number) / name) for name in ("a", "b")]
        wait_for_one = time.monotonic() + 120
        while all(program.process.exitcode is None for program in programs) and time.monotonic() < wait_for_one:
            time.sleep(0.02)
        loser, winner = sorted(programs, key=lambda program: program.process.exitcode is None)
        wait_for(winner, lambda config=config: is_at(config, 1))
        winner.process.kill()
        assert loser.wait() == 2
        yields = (
            f"normlab: error: run .* is being trained by process {winner.process.pid}; wait for it or change the seed"
        )
        assert re.fullmatch(yields, loser.said.strip()), loser.said


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGINT, "stopped at once"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_in_the_final_evaluation_keeps_the_training(
    tiny_run: Build, monkeypatch: pytest.MonkeyPatch, number: int, reason: str
):
    def interrupted(*_: object) -> None:
        os.kill(os.getpid(), number)

    config = tiny_run()
    with monkeypatch.context() as patch:
        patch.setattr(TextModule, "test_step", interrupted)
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit, match=r"143|^$"):
            train(config)
    record = record_of(config)
    assert (record.outcome().state, record.outcome().reason) == ("interrupted", reason)
    rows, seconds = record.metrics(), record.outcome().seconds
    outcome = train(config).outcome()
    assert outcome.state == "finished"
    assert record.metrics() == rows
    assert outcome.seconds == pytest.approx(seconds, rel=0.2)
    assert 0 < float(outcome.results["tokens_per_second"]) < 1e7


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_written(trainer: pl.Trainer, path: Path, **_: object) -> None:
    path.write_bytes(b"half")
    full_disk()


def test_a_full_disk_is_said_in_one_line(tiny_run: Build, monkeypatch: pytest.MonkeyPatch):
    config = tiny_run()
    with monkeypatch.context() as patch:
        patch.setattr(pl.Trainer, "save_checkpoint", half_written)
        with pytest.raises(InputError, match=r"the disk of .* is full; free some space, then run the same command"):
            train(config)
    record = record_of(config)
    assert record.outcome().state == "failed"
    assert "No space left" in record.outcome().reason
    assert not list(record.checkpoints.iterdir()), "half a checkpoint takes the room that the outcome needs"
    assert train(config).outcome().state == "finished"


def test_a_disk_too_full_for_the_outcome_reads_as_killed(tiny_run: Build, monkeypatch: pytest.MonkeyPatch):
    config = tiny_run()
    with monkeypatch.context() as patch:
        patch.setattr(RunRecord, "log", full_disk)
        patch.setattr(RunRecord, "finish", full_disk)
        with pytest.raises(InputError, match="is full"):
            train(config)
    record = record_of(config)
    assert record.outcome().state == "interrupted"
    assert train(config).outcome().state == "finished"


def leave_no_memory() -> None:
    """From the fifth step on this process gets no more memory: the validation that is due then needs some."""
    after_batch = watching.Recorder.on_train_batch_end

    def limited(self: watching.Recorder, trainer: pl.Trainer, *others: object) -> None:
        after_batch(self, trainer, *others)  # pyright: ignore[reportArgumentType]
        if trainer.global_step == 5:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**20, resource.RLIM_INFINITY))

    watching.Recorder.on_train_batch_end = limited  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS binds on Linux alone")
def test_out_of_memory_is_said_in_one_line_and_the_next_run_goes_on(tiny_run: Build, tmp_path: Path):
    config = tiny_run(training__checkpoint_every=4, model__width=256, data__batch_size=32)
    starved = begin(train_config(config, tmp_path), tmp_path / "log", before=leave_no_memory)
    assert starved.wait() == 2, starved.said
    line = "normlab: error: out of memory; lower data.batch_size (now 32), model.width (now 256) or data.length\n"
    assert starved.err.read_text() == line
    outcome = record_of(config).outcome()
    assert (outcome.state, outcome.step) == ("failed", 5)
    assert outcome.reason.startswith(f"{OUT_OF_MEMORY}: ")
    again = begin(train_config(config, tmp_path), tmp_path / "again")
    assert again.wait() == 0, again.said
    assert "going on from step 4 of" in again.said
    assert record_of(config).outcome().state == "finished"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_memory_runs_out_in_several_ways(tiny_run: Build, monkeypatch: pytest.MonkeyPatch, error: Exception):
    def hungry(*_: object) -> None:
        raise error

    config = tiny_run()
    monkeypatch.setattr(watching.Recorder, "on_train_batch_end", hungry)
    with pytest.raises(InputError, match=r"out of memory; lower data\.batch_size \(now 8\), model\.width \(now 16\)"):
        train(config)
    assert record_of(config).outcome().reason.startswith(OUT_OF_MEMORY)


def test_a_validation_loss_that_is_no_number_is_a_divergence(tiny_run: Build, monkeypatch: pytest.MonkeyPatch):
    evaluate = TextModule._evaluate

    def spoiled(self: TextModule, batch: Batch) -> None:
        """One batch of the split is lost."""
        evaluate(self, batch)
        if batch.mask_BT is not None:
            self.nats.update(torch.tensor(float("nan")), 1)

    monkeypatch.setattr(TextModule, "_evaluate", spoiled)
    outcome = train(tiny_run()).outcome()
    assert (outcome.state, outcome.step) == ("diverged", 5)
    assert outcome.reason == "validation loss inf nats at or before step 5 is not below the bound of 20"


@pytest.mark.slow
def test_divergence_is_no_error_of_the_program(tiny_run: Build, tmp_path: Path):
    config = tiny_run(model__norm="none", optim__name="sgd", optim__lr=1e30, optim__clip=0.0, training__valid_every=40)
    program = begin(train_config(config, tmp_path), tmp_path / "log")
    assert program.wait() == 0, program.said
    outcome = record_of(config).outcome()
    assert outcome.state == "diverged"
    assert "training loss nan nats" in outcome.reason


def test_a_loss_between_two_looks_is_not_forgotten_by_a_resume(tiny_run: Build):
    guard = DivergenceGuard(20.0)
    guard._worst = torch.tensor(25.0)
    resumed = DivergenceGuard(20.0)
    resumed.load_state_dict(guard.state_dict())
    config = tiny_run()
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    module = TextModule(config, prepare(config.data))
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = 10
    module.last_loss_nats = torch.tensor(2.0)
    resumed.on_train_batch_end(trainer, module)
    assert "training loss 25 nats at or before step 10" in resumed.reason


def turn_the_clock_back() -> None:
    """Each look at the clock of the wall finds it an hour earlier."""
    began, hours = time.time(), itertools.count()
    time.time = lambda: began - 3600 * next(hours)

    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return datetime.fromtimestamp(began, UTC) - timedelta(hours=next(hours))

    records.datetime = Clock  # pyright: ignore[reportPrivateImportUsage]


@pytest.mark.slow
def test_a_clock_that_goes_backwards_changes_nothing(tiny_run: Build, tmp_path: Path):
    config = tiny_run(output__wandb="auto", output__runs_dir=str(tmp_path / "back"))
    environment = {"WANDB_MODE": "offline"}
    program = begin(train_config(config, tmp_path), tmp_path / "log", environment, turn_the_clock_back)
    assert program.wait() == 0, program.said
    assert "Traceback" not in program.said
    record, usual = record_of(config), train(tiny_run())
    assert record.outcome().written_at < datetime.now(UTC).isoformat()
    assert record.outcome().results["test_loss_nats"] == usual.outcome().results["test_loss_nats"]
    seconds = [row["seconds"] for row in record.metrics()]
    assert seconds[0] > 0
    assert seconds == sorted(seconds)
    assert all(row.get("tokens_per_second", 1) > 0 for row in record.metrics())
    assert record.outcome().seconds >= seconds[-1]


@pytest.mark.slow
def test_a_wandb_server_that_never_answers_does_not_hold_up_a_run(tiny_run: Build, tmp_path: Path):
    config = tiny_run(output__wandb="online")
    key = "0123456789abcdef0123456789abcdef01234567"
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        environment = {"WANDB_MODE": "online", "WANDB_API_KEY": key, "WANDB_BASE_URL": url, "HOME": str(tmp_path)}
        program = begin(train_config(config, tmp_path), tmp_path / "log", environment)
        assert program.wait() == 0, program.said
    assert program.said.count(f"W&B records offline: {url} does not answer") == 1
    assert "upload with" in program.said
    assert record_of(config).outcome().state == "finished"
    assert key not in program.said


def test_a_bug_is_not_dressed_up_as_a_mistake(tiny_run: Build, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    config = tiny_run()
    monkeypatch.setattr(watching.Recorder, "on_train_batch_end", broken)
    with pytest.raises(ZeroDivisionError):
        train(config)
    record = record_of(config)
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
    stored = next(folder.glob("*.wandb"))
    names = (b"train_loss_nats", b"seconds", b"gradient_norm", b"learning_rate", b"tokens_per_second", b"d1")
    missing = {*names, b"input_to_hidden/p85"}
    deadline = time.monotonic() + 60  # W&B's own process writes, and may be later than this one
    while missing := {name for name in missing if name not in stored.read_bytes()}:
        assert time.monotonic() < deadline, missing
        time.sleep(0.05)
