"""Several processes train one model: they learn what one learns from the joined batch, and write one record."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked import Program, begin, torchrun, train_config
from test_run import numbers

from normlab.config import InputError, RunConfig
from normlab.machine.processes import Place, place_in_run
from normlab.records.record import RunRecord, record_ids
from normlab.training.module import TextModule
from normlab.training.run import train

pytestmark = pytest.mark.slow

Build = Callable[..., RunConfig]
SHORT = {
    "training__steps": 20,
    "training__valid_every": 7,
    "training__recompute_batches": 8,
    "training__activations_every": 0,  # they are those of the first one's part of a batch
    "training__accelerator": "cpu",
}
LONG = {"training__steps": 100_000, "training__valid_every": 100_000, "training__checkpoint_every": 20}


@pytest.fixture
def pair(tiny_run: Build, tmp_path: Path) -> Callable[..., RunConfig]:
    """Builds the config of a run of two processes."""

    def build(**changes: object) -> RunConfig:
        fixed = {"data__batch_size": 4, "training__devices": 2, "output__runs_dir": str(tmp_path / "two")}
        return tiny_run(**{**SHORT, **fixed, **changes})

    return build


def record_of(config: RunConfig) -> RunRecord:
    runs = config.output.runs_dir
    return RunRecord.open(record_ids(runs)[0], runs)


def codes(programs: list[Program]) -> list[int]:
    return [program.wait() for program in programs]


def wait_for_step(config: RunConfig, step: int, programs: list[Program]) -> RunRecord:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert all(program.process.exitcode is None for program in programs), [program.said for program in programs]
        if record_ids(config.output.runs_dir):
            record = record_of(config)
            rows = record.metrics()
            if rows and rows[-1]["step"] >= step:
                return record
        time.sleep(0.05)
    raise AssertionError("the run did not get under way")


def compare(one: RunRecord, two: RunRecord) -> None:
    """What they learnt, step by step."""
    assert two.outcome().state == one.outcome().state == "finished"
    assert len(numbers(two)) == len(numbers(one)) == 6
    # What a batch norm takes out of the loss, such as an initial state that all rows share, moves along rounding under
    # Adam; running averages lag behind that.
    lagging = 1e-4 if one.config.model.norm == "ln" else 2e-3
    for row, other in zip(numbers(one), numbers(two), strict=True):
        assert other["step"] == row["step"]
        for name in ("train_loss_nats", "gradient_norm", "valid_loss_nats"):
            if name in row:
                within = lagging if name == "valid_loss_nats" else 1e-4
                assert other[name] == pytest.approx(row[name], rel=within), (row["step"], name)
    # That on the training split is of a part of it, and the parts differ.
    for name in ("valid_loss_nats", "test_loss_nats", "valid_running_loss_nats", "test_running_loss_nats"):
        if name in one.outcome().results:
            found = [float(record.outcome().results[name]) for record in (one, two)]
            assert found[1] == pytest.approx(found[0], rel=lagging), name
    if one.config.model.norm == "ln":
        weights = [torch.load(each.checkpoints / "best.ckpt", weights_only=True)["state_dict"] for each in (one, two)]
        torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("norm", ["ln", "bn", "bn_step"])
def test_two_processes_equal_one_on_the_joined_batch(tiny_run: Build, pair: Build, tmp_path: Path, norm: str):
    config = pair(model__norm=norm)
    programs = torchrun(train_config(config, tmp_path), tmp_path / "log")
    one = train(tiny_run(**SHORT, model__norm=norm))
    assert codes(programs) == [0, 0], [program.said for program in programs]
    two = record_of(config)
    compare(one, two)
    if norm != "ln":
        assert two.environment()["statistics_batch_rows"] == one.environment()["statistics_batch_rows"] == 8
        entries = [[gap["entries"] for gap in record.statistics_gap()["norms"].values()] for record in (one, two)]
        assert entries[0] == entries[1]  # of all processes together
    assert programs[0].said.count("outcome") == 1
    assert programs[1].said == ""
    if norm == "ln":  # Once more: all of them see that there is nothing to do.
        again = torchrun(train_config(config, tmp_path), tmp_path / "again")
        assert codes(again) == [0, 0]
        assert "has ended already" in again[0].said


def test_lightning_starts_the_second(pair: Build, tmp_path: Path):
    """A stateful stream, as `make train ARGS="--training.devices 2"` runs it."""
    config = pair(data__stream="stateful", model__norm="bn_step", training__steps=6)
    program = begin(train_config(config, tmp_path), tmp_path / "log")
    assert program.wait() == 0, program.said
    assert program.said.count("outcome") == 1
    assert record_of(config).outcome().state == "finished"


def test_torchrun(pair: Build, tmp_path: Path):
    config = pair(training__steps=6)
    program = Path(sys.executable).with_name("torchrun")
    command = [str(program), "--standalone", "--nproc-per-node", "2", "-m", "normlab"]
    done = subprocess.run(
        [*command, *train_config(config, tmp_path)], capture_output=True, text=True, timeout=240, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("outcome") == 1
    assert record_of(config).outcome().state == "finished"


def test_a_mistake_is_said_once(pair: Build, tmp_path: Path):
    config = pair(training__devices=3)
    programs = torchrun(train_config(config, tmp_path), tmp_path / "log")
    assert codes(programs) == [2, 2]
    line = (
        "normlab: error: torchrun started 2 processes but training.devices, which counts those of all nodes, is 3; "
        "make them the same\n"
    )
    assert [program.said for program in programs] == [line, ""]
    config = pair(data__corpus=str(tmp_path / "nowhere.txt"))
    programs = torchrun(train_config(config, tmp_path), tmp_path / "log")
    assert codes(programs) == [2, 2]
    assert programs[0].said.count("\n") == 1
    assert "nowhere.txt" in programs[0].said
    assert programs[1].said == ""


@pytest.mark.parametrize(("number", "to", "code"), [(signal.SIGTERM, 1, 143), (signal.SIGINT, 2, 130)])
def test_a_signal_saves_one_checkpoint_and_ends_all(pair: Build, tmp_path: Path, number: int, to: int, code: int):
    """SIGTERM to the second process alone; Ctrl-C to both, twice, as torchrun passes it on."""
    config = pair(**LONG, model__norm="bn")
    programs = torchrun(train_config(config, tmp_path), tmp_path / "log")
    record = wait_for_step(config, 25, programs)
    for program in programs[-to:] * to:
        os.kill(program.process.pid or 0, number)
    assert codes(programs) == [code, 0]
    assert "Traceback" not in programs[0].said + programs[1].said
    outcome = record.outcome()
    assert outcome.state == "interrupted"
    stored = torch.load(record.checkpoints / "last.ckpt", weights_only=True)
    assert stored["global_step"] == outcome.step == record.metrics()[-1]["step"]
    # And both go on.
    programs = torchrun(train_config(config, tmp_path), tmp_path / "again")
    wait_for_step(config, outcome.step + 5, programs)
    for program in programs:
        program.process.kill()
    assert f"going on from step {outcome.step} of" in programs[0].said


def signal_in_the_last_validation() -> None:
    """This process alone gets SIGTERM when there is no step left after which all would stop."""
    end = TextModule.on_validation_epoch_end

    def late(self: TextModule) -> None:
        end(self)
        if self.trainer.state.fn == "fit" and self.trainer.global_step == self.trainer.max_steps:
            os.kill(os.getpid(), signal.SIGTERM)

    TextModule.on_validation_epoch_end = late


def test_a_signal_after_the_last_step_ends_all(pair: Build, tmp_path: Path):
    config = pair(training__steps=6)
    arguments = train_config(config, tmp_path)
    programs = torchrun(arguments, tmp_path / "log", before=(None, signal_in_the_last_validation))
    assert codes(programs) == [143, 0], [program.said for program in programs]
    outcome = record_of(config).outcome()
    assert (outcome.state, outcome.reason, outcome.step) == ("interrupted", "SIGTERM", 6)
    assert codes(torchrun(arguments, tmp_path / "again")) == [0, 0]
    assert record_of(config).outcome().state == "finished"


def test_a_killed_process_does_not_leave_the_other_hanging(pair: Build, tmp_path: Path):
    config = pair(**LONG)
    programs = torchrun(train_config(config, tmp_path), tmp_path / "log")
    record = wait_for_step(config, 25, programs)
    programs[1].process.kill()
    assert codes(programs) == [2, -signal.SIGKILL]
    assert programs[0].err.read_text() == (
        "normlab: error: another process of this run has ended; run the same command again to go on from the last "
        "checkpoint\n"
    )
    assert record.outcome().state == "failed"
    programs = torchrun(train_config(config, tmp_path), tmp_path / "again")
    wait_for_step(config, record.metrics()[-1]["step"] + 5, programs)
    programs[0].process.kill()
    assert codes(programs) == [-signal.SIGKILL, 2]
    assert programs[1].said == ""
    assert (record.outcome().state, record.outcome().reason) == ("interrupted", "killed")


def test_a_process_of_lightning_that_is_killed(pair: Build, tmp_path: Path):
    """Lightning would kill the first one too, without a word."""
    config = pair(**LONG)
    program = begin(train_config(config, tmp_path), tmp_path / "log")
    record = wait_for_step(config, 25, [program])
    children = Path(f"/proc/{program.process.pid}/task/{program.process.pid}/children").read_text().split()
    command = [Path(f"/proc/{child}/cmdline").read_text() for child in children]
    (second,) = [int(child) for child, text in zip(children, command, strict=True) if "normlab" in text]
    os.kill(second, signal.SIGKILL)
    assert program.wait() == 2
    assert "another process of this run has ended" in program.said
    assert record.outcome().state == "failed"


def slurm_task(rank: int, tasks: int, port: int) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "1234",
        "SLURM_JOB_NAME": "a_study",
        "SLURM_NTASKS": str(tasks),
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def test_tasks_of_one_srun(pair: Build, tiny_run: Build, tmp_path: Path, free_port: int):
    config = pair(training__steps=6)
    two = [
        begin(train_config(config, tmp_path), tmp_path / f"log{rank}", slurm_task(rank, 2, free_port))
        for rank in range(2)
    ]
    # One task of many that are runs of their own; Lightning would wait for the others.
    alone = tiny_run(**{**SHORT, "training__steps": 6})
    (tmp_path / "alone").mkdir()
    one = begin(train_config(alone, tmp_path / "alone"), tmp_path / "one", slurm_task(3, 4, free_port))
    assert codes([*two, one]) == [0, 0, 0], [program.said for program in [*two, one]]
    assert record_of(config).outcome().state == record_of(alone).outcome().state == "finished"
    assert (record_of(alone).checkpoints / "last.ckpt").exists()


def test_the_place_of_a_process():
    batch_job = {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1"}
    assert place_in_run(1, batch_job) == Place()
    assert place_in_run(2, batch_job) == Place("lightning", 0, 0, 2, 2)
    assert place_in_run(1, slurm_task(3, 4, 1)) == Place()
    assert place_in_run(4, slurm_task(3, 4, 1)) == Place("srun", 3, 3, 4, 4)
    assert place_in_run(1, {"LOCAL_RANK": "1"}) == Place()
    assert place_in_run(2, {"LOCAL_RANK": "1"}) == Place("lightning", 1, 1, 2, 2)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")

    def nodes(*values: int) -> dict[str, str]:
        return {"TORCHELASTIC_RUN_ID": "x", **{name: str(value) for name, value in zip(names, values, strict=True)}}

    place = place_in_run(8, nodes(5, 1, 8, 4))
    assert (place, place.nodes) == (Place("torchrun", 5, 1, 8, 4), 2)
    for devices, environment, said in (
        (1, nodes(0, 0, 2, 2), "torchrun started 2 processes but"),
        (3, nodes(0, 0, 3, 2), "give each node as many"),
        (2, slurm_task(0, 4, 1), "srun started 4 processes but"),
        (4, {**slurm_task(0, 4, 1), "SLURM_STEP_NUM_NODES": "3"}, "4 tasks on 3 nodes"),
    ):
        with pytest.raises(InputError, match=said):
            place_in_run(devices, environment)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs for NCCL")
@pytest.mark.parametrize("norm", ["ln", "bn", "bn_step"])
def test_two_gpus_equal_one(tiny_run: Build, pair: Build, tmp_path: Path, norm: str):
    config = pair(model__norm=norm, training__accelerator="gpu")
    programs = torchrun(train_config(config, tmp_path), tmp_path / "log")
    assert codes(programs) == [0, 0], [program.said for program in programs]
    compare(train(tiny_run(**{**SHORT, "training__accelerator": "gpu"}, model__norm=norm)), record_of(config))
