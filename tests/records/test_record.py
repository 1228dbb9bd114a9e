"""Records survive kills, torn rows, full disks and two processes that want the same run."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from normlab.config import InputError, LSTMConfig, OutputConfig, RunConfig, run_id
from normlab.records.record import Outcome, RunRecord, record_ids

WRITER = """
import sys
from normlab.config import OutputConfig, RunConfig
from normlab.records.record import Outcome, RunRecord
record = RunRecord.create(RunConfig(output=OutputConfig(runs_dir=sys.argv[1])))
record.start()
print("started", flush=True)
for step in range(10**9):
    record.log(step, step / 7, {"train_loss_nats": 1 / (step + 1), "padding": "x" * (step % 997)})
    record.write_environment({"step": step})
    if step % 5 == 0:
        record.rewind(step - 2)
"""


def config_in(folder: Path, seed: int = 1) -> RunConfig:
    return RunConfig(model=LSTMConfig(norm="ln"), seed=seed, output=OutputConfig(runs_dir=str(folder)))


def start_writer(folder: Path) -> subprocess.Popen[str]:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "started\n"
    return writer


def test_a_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    record = RunRecord.create(config)
    record.start()
    assert record.outcome().state == "running"
    record.log(1, 0.5, {"train_loss_nats": 2.5, "grad_norm": math.inf, "tokens": 3})
    record.log(2, 1.0, {"train_loss_nats": math.nan})
    record.write_environment({"versions": {"torch": "2.13"}, "devices": ["NVIDIA H200"]})
    results = {"valid_loss_nats": math.nan, "a": math.inf, "b": -math.inf, "steps": 3, "corpus": "pydocs"}
    record.finish(Outcome("diverged", "loss is\nnan", 2, 1.0, results))

    again = RunRecord.open(run_id(config), runs_dir=tmp_path)
    assert again.config == config
    assert again.id == run_id(config)
    assert again.checkpoints.is_dir()
    first, second = again.metrics()
    assert first == {"step": 1, "seconds": 0.5, "train_loss_nats": 2.5, "grad_norm": math.inf, "tokens": 3}
    assert math.isnan(second["train_loss_nats"])
    assert again.environment()["devices"] == ["NVIDIA H200"]
    outcome = again.outcome()
    assert (outcome.state, outcome.reason, outcome.step, outcome.pid) == ("diverged", "loss is nan", 2, os.getpid())
    assert math.isnan(outcome.results.pop("valid_loss_nats"))  # type: ignore[arg-type]
    assert outcome.results == {"a": math.inf, "b": -math.inf, "steps": 3, "corpus": "pydocs"}
    text = (again.folder / "outcome.json").read_text() + (again.folder / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text


def test_numbers_of_other_libraries_are_logged_as_floats(tmp_path: Path) -> None:
    class Scalar:
        def __float__(self) -> float:
            return 0.25

    record = RunRecord.create(config_in(tmp_path))
    record.log(1, 0.0, {"loss_nats": Scalar()})
    assert record.metrics() == [{"step": 1, "seconds": 0.0, "loss_nats": 0.25}]


def test_kills_at_any_moment_leave_a_readable_record(tmp_path: Path) -> None:
    chance = random.Random(0)
    record = RunRecord.create(config_in(tmp_path))
    for _ in range(8):
        writer = start_writer(tmp_path)
        record = RunRecord.open(next(iter(record_ids(tmp_path))), tmp_path)
        time.sleep(chance.uniform(0.0, 0.15))
        assert record.outcome().state == "running"
        writer.kill()
        writer.wait()
        outcome = record.outcome()
        assert (outcome.state, outcome.reason) == ("interrupted", "killed")
        record.environment()
        assert all(row["train_loss_nats"] > 0 for row in record.metrics())
    (record.checkpoints / ".best.ckpt.tmp").write_bytes(b"half")
    record.start()
    assert not list(record.folder.rglob(".*.tmp"))


def test_a_torn_row_is_left_out_and_cut_before_the_next(tmp_path: Path) -> None:
    record = RunRecord.create(config_in(tmp_path))
    record.log(1, 0.0, {"loss_nats": 1.0})
    path = record.folder / "metrics.jsonl"
    with path.open("ab") as file:
        file.write(b'{"step": 2, "seco')
    assert [row["step"] for row in record.metrics()] == [1]
    record.log(3, 0.0, {})
    assert [row["step"] for row in record.metrics()] == [1, 3]
    path.write_bytes(b'{"step": 1')
    assert record.metrics() == []
    record.log(4, 0.0, {})
    assert [row["step"] for row in record.metrics()] == [4]


def test_a_damaged_row_in_the_middle_is_named(tmp_path: Path) -> None:
    record = RunRecord.create(config_in(tmp_path))
    (record.folder / "metrics.jsonl").write_bytes(b'{"step": 1, "seconds": 1}\n{"st\n{"step": 3, "seconds": 3}\n')
    with pytest.raises(InputError, match="line 2 is not JSON"):
        record.metrics()


def test_a_full_disk_leaves_the_old_files_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = RunRecord.create(config_in(tmp_path))
    record.log(1, 0.0, {})
    record.write_environment({"a": 1})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*environment.json'"):
            record.write_environment({"a": 2})
        with pytest.raises(OSError, match=r"metrics.jsonl"):
            record.rewind(0)
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, line: write(file, line[:5]))
        with pytest.raises(OSError, match=r"No space left on device: '.*metrics.jsonl'"):
            record.log(2, 0.0, {})
    assert record.environment() == {"a": 1}
    assert [row["step"] for row in record.metrics()] == [1]
    assert (record.folder / "metrics.jsonl").read_bytes().endswith(b"\n")
    assert not list(record.folder.glob(".*.tmp"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_real_full_device_is_named(tmp_path: Path) -> None:
    record = RunRecord.create(config_in(tmp_path))
    (record.folder / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"metrics.jsonl"):
        record.log(1, 0.0, {})


def test_rewind_drops_the_rows_after_the_checkpoint(tmp_path: Path) -> None:
    record = RunRecord.create(config_in(tmp_path))
    for step in range(5):
        record.log(step, step * 0.1, {"loss_nats": math.nan if step == 1 else 1.0})
    record.rewind(2)
    record.log(3, 0.9, {})
    assert [(row["step"], row["seconds"]) for row in record.metrics()] == [(0, 0.0), (1, 0.1), (2, 0.2), (3, 0.9)]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    writer = start_writer(tmp_path)
    try:
        record = RunRecord.open(record_ids(tmp_path)[0], tmp_path)
        message = f"run {record.id} is being trained by process {writer.pid}; wait for it or change the seed"
        for act in (record.start, record.archive):
            with pytest.raises(InputError) as refused:
                act()
            assert str(refused.value) == message
    finally:
        writer.kill()
        writer.wait()
    record.start()
    with pytest.raises(InputError, match=f"process {os.getpid()}"):
        RunRecord.open(record.folder).start()
    record.finish(Outcome("finished"))
    RunRecord.open(record.folder).start()


@pytest.mark.parametrize("call", ["ftruncate", "fsync"])  # of the lock's file, and of outcome.json
def test_a_record_that_could_not_start_or_move_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    record = RunRecord.create(config_in(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left"):
            record.start()
    RunRecord.open(record.folder).start()
    record = RunRecord.create(config_in(tmp_path, seed=2))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full)
        with pytest.raises(OSError, match="No space left"):
            record.archive()
    RunRecord.open(record.folder).start()


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    record = RunRecord.create(config_in(tmp_path))
    record.start()
    child = os.fork()
    if child == 0:
        time.sleep(5)
        os._exit(0)
    try:
        assert record.outcome().state == "running"
        record.release()
        assert RunRecord.open(record.folder).outcome().state == "interrupted"
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_a_file_system_without_locks_does_not_stop_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    record = RunRecord.create(config_in(tmp_path))
    record.start()
    assert RunRecord.open(record.folder).outcome().state == "running"


def test_archive_moves_the_record_aside(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    for number in (1, 2):
        record = RunRecord.create(config)
        record.start()
        record.log(number, 0.0, {})
        record.finish(Outcome("finished"))
        aside = record.archive()
        assert aside.id == f"{run_id(config)}.{number}"
        assert not record.folder.exists()
        assert aside.metrics()[0]["step"] == number
        assert aside.outcome().state == "finished"
    assert record_ids(tmp_path) == [f"{run_id(config)}.1", f"{run_id(config)}.2"]


def test_open_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there are no records"):
        RunRecord.open("lstm", tmp_path)
    record = RunRecord.create(config_in(tmp_path))
    RunRecord.create(config_in(tmp_path, seed=2))
    with pytest.raises(InputError, match=f"no run {record.id[:-1]!r}; nearest in .*{record.id}"):
        RunRecord.open(record.id[:-1], tmp_path)
    for text in ("model: [", "model: {name: lstm, widht: 3}", "- 1", "{1: 2}"):
        (record.folder / "config.yaml").write_text(text)
        with pytest.raises(InputError, match=r"cannot read .*config.yaml") as refused:
            RunRecord.open(record.folder)
        assert "\n" not in str(refused.value)


def test_runs_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(InputError, match=r"cannot make the folder .* change output\.runs_dir"):
        RunRecord.create(config_in(tmp_path / "runs"))


def test_unknown_versions_and_broken_outcomes_are_refused(tmp_path: Path) -> None:
    record = RunRecord.create(config_in(tmp_path))
    assert (record.outcome().state, record.outcome().reason, record.environment()) == (
        "interrupted",
        "never started",
        {},
    )
    path = record.folder / "outcome.json"
    for values, message in (
        ({"version": 2, "state": "finished"}, "format version 2"),
        ({"state": "finished"}, "format version None"),
        ({"version": 1, "state": "odd"}, "unknown state 'odd'"),
        ({"version": 1, "state": "finished", "odd": 1}, "cannot read"),
        ([], "not a JSON object"),
    ):
        path.write_text(json.dumps(values))
        with pytest.raises(InputError, match=message):
            record.outcome()
    path.write_text("")
    with pytest.raises(InputError, match="not JSON"):
        record.outcome()
