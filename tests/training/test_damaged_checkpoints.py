"""A checkpoint that is cut short or changed: the one before takes its place, and the run ends as if nothing were."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from test_run import StopAt, numbers

from normlab.config import InputError, RunConfig
from normlab.records.record import RunRecord
from normlab.training.reading import CheckpointError, read_checkpoint
from normlab.training.run import train
from normlab.training.writing import write_checkpoint

Build = Callable[..., RunConfig]
TIMED = ("tokens_per_second", "peak_memory_mib")


def results(record: RunRecord) -> dict[str, Any]:
    return {name: value for name, value in record.outcome().results.items() if name not in TIMED}


def weights(record: RunRecord, name: str) -> dict[str, torch.Tensor]:
    return torch.load(record.checkpoints / f"{name}.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


@pytest.fixture
def config(tiny_run: Build, place: Path) -> RunConfig:
    changes = {"training__steps": 14, "training__valid_every": 5, "training__checkpoint_every": 2}
    return tiny_run(model__norm="bn_step", **changes, optim__lr=1e-2, output__runs_dir=str(place / "runs"))


@pytest.fixture
def whole(config: RunConfig, place: Path) -> RunRecord:
    """The same run without a fault."""
    folder = place / "whole"
    if not folder.exists():
        train(config).folder.rename(folder)
    return RunRecord(folder, config)


@pytest.fixture
def stopped(config: RunConfig, place: Path, whole: RunRecord, monkeypatch: pytest.MonkeyPatch) -> RunRecord:
    """Stopped after the validation of step 10, where `best.ckpt` was written; the checkpoint before is of step 8."""
    kept = place / "stopped"
    record = RunRecord(place / "runs" / RunRecord.create(config).id, config)
    if not kept.exists():
        init = pl.Trainer.__init__

        def stopping_trainer(self: pl.Trainer, **options: Any) -> None:
            init(self, **options, callbacks=[StopAt(10)])

        with monkeypatch.context() as patch:
            patch.setattr(pl.Trainer, "__init__", stopping_trainer)
            assert train(config).outcome().state == "interrupted"
        shutil.copytree(record.folder, kept)
    shutil.rmtree(record.folder)
    shutil.copytree(kept, record.folder)
    steps = {path.stem: torch.load(path, weights_only=True)["global_step"] for path in record.checkpoints.iterdir()}
    assert steps == {"last": 10, "previous": 8, "best": 10}
    return record


def cut(at: float) -> Callable[[bytes], bytes]:
    return lambda whole: whole[: int(at * len(whole))]


def changed(at: float) -> Callable[[bytes], bytes]:
    def change(whole: bytes) -> bytes:
        place = int(at * len(whole))
        return whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]

    return change


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut(0), "it is empty"),
        (cut(0.5), "it is cut short"),
        (cut(0.999), "it is cut short"),
        (changed(0.5), "differs from its checksum"),
    ],
)
def test_the_one_before_takes_its_place(
    whole: RunRecord,
    stopped: RunRecord,
    damage: Callable[[bytes], bytes],
    said: str,
    capsys: pytest.CaptureFixture[str],
):
    last = stopped.checkpoints / "last.ckpt"
    last.write_bytes(damage(last.read_bytes()))
    resumed = train(stopped.config)
    out = capsys.readouterr().out
    assert re.search(
        rf"^warning: cannot read the checkpoint .*last\.ckpt \(.*{said}\); taking the one before it$", out, re.M
    )
    assert "going on from step 8 of" in out
    assert numbers(resumed) == numbers(whole)
    assert results(resumed) == results(whole)
    assert resumed.statistics_gap() == whole.statistics_gap()
    for name in ("last", "best", "final"):
        torch.testing.assert_close(weights(resumed, name), weights(whole, name), rtol=0, atol=0)
    assert not (resumed.checkpoints / "previous.ckpt").exists()  # of no use to a run that has ended


def test_a_kill_between_two_renames(whole: RunRecord, stopped: RunRecord, capsys: pytest.CaptureFixture[str]):
    (stopped.checkpoints / "last.ckpt").unlink()
    resumed = train(stopped.config)
    out = capsys.readouterr().out
    assert "going on from step 8 of" in out
    assert "warning" not in out
    assert numbers(resumed) == numbers(whole)


def test_a_damaged_one_does_not_push_out_the_one_before(stopped: RunRecord, monkeypatch: pytest.MonkeyPatch):
    (stopped.checkpoints / "last.ckpt").write_bytes(b"")
    init = pl.Trainer.__init__

    def stopping_trainer(self: pl.Trainer, **options: Any) -> None:
        init(self, **options, callbacks=[StopAt(9)])

    monkeypatch.setattr(pl.Trainer, "__init__", stopping_trainer)
    assert train(stopped.config).outcome().step == 9
    steps = [torch.load(stopped.checkpoints / f"{name}.ckpt")["global_step"] for name in ("previous", "last")]
    assert steps == [8, 9]


def test_two_damaged_ones_are_named_and_stay(stopped: RunRecord):
    for name in ("last", "previous"):
        (stopped.checkpoints / f"{name}.ckpt").write_bytes(b"PK")
    rows = stopped.metrics()
    with pytest.raises(InputError, match=r"last\.ckpt \(it is cut short\) and cannot read .*previous\.ckpt \(it is"):
        train(stopped.config)
    assert (stopped.checkpoints / "last.ckpt").read_bytes() == b"PK"
    assert stopped.metrics() == rows


@pytest.mark.parametrize("odd", [{"state_dict": {}}, {"global_step": "8"}])
def test_a_checkpoint_of_another_model_is_not_gone_on_from(stopped: RunRecord, odd: dict[str, object]):
    for name in ("last", "previous"):
        path = stopped.checkpoints / f"{name}.ckpt"
        torch.save({**torch.load(path, weights_only=True), **odd}, path)
    with pytest.raises(InputError, match=r"last\.ckpt is not a checkpoint of this run to resume from"):
        train(stopped.config)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda best: best.write_bytes(best.read_bytes()[:1000]), r"cannot read .*best\.ckpt.*\(it is cut short\)"),
        (lambda best: best.unlink(), r"best\.ckpt, which holds the best weights, is gone"),
        (
            lambda best: torch.save({"global_step": 5, "state_dict": {}}, best),
            r"is of step 5, the best weights are of step 10",
        ),
    ],
)
def test_damaged_best_weights_are_said(stopped: RunRecord, damage: Callable[[Path], object], said: str):
    damage(stopped.checkpoints / "best.ckpt")
    # From here on no validation is better, so that the weights of step 10 are wanted.
    last = stopped.checkpoints / "last.ckpt"
    stored = torch.load(last, weights_only=True)
    stored["callbacks"]["Checkpoints"]["best_loss_nats"] = 0.0
    torch.save(stored, last)
    with pytest.raises(InputError, match=said + ".*--output.fresh true"):
        train(stopped.config)


def test_no_byte_can_change_unnoticed(tmp_path: Path):
    path, draw = tmp_path / "some.ckpt", random.Random(0)
    stored = {"state_dict": {"weight": torch.randn(50)}, "global_step": 3}
    write_checkpoint(stored, path)
    whole = path.read_bytes()
    noticed = 0
    for _ in range(300):
        place = draw.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :])
        try:
            found = read_checkpoint(path, "mend it")
        except CheckpointError:
            noticed += 1
        else:  # between the parts of the archive
            assert found["global_step"] == 3
            assert torch.equal(found["state_dict"]["weight"], stored["state_dict"]["weight"])
    assert noticed > 100
    for size in range(0, len(whole), 37):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"it is cut short|it is empty"):
            read_checkpoint(path, "mend it")
