"""A checkpoint of somebody else runs nothing, wherever it is read."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from normlab.__main__ import main
from normlab.config import config_from_dict
from normlab.records.record import RunRecord
from normlab.training.run import train


class Touch:
    """What pickle makes of it on reading: the file `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="module")
def trained(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    values = {"runs_dir": str(tmp_path_factory.mktemp("hostile") / "runs"), "wandb": "off", "progress": False}
    training = {"steps": 4, "valid_every": 2, "checkpoint_every": 2, "activations_every": 0, "threads": 1}
    config = config_from_dict(
        {
            "model": {"name": "lstm", "norm": "bn_step", "width": 8},
            "data": {"corpus": str(tiny_text), "batch_size": 8, "length": 6},
            "training": training,
            "output": values,
        }
    )
    return train(config)


@pytest.fixture
def record(trained: RunRecord, tmp_path: Path) -> RunRecord:
    """A copy of its own, as somebody may have sent it."""
    shutil.copytree(trained.folder, tmp_path / "runs" / trained.id)
    return RunRecord.open(tmp_path / "runs" / trained.id)


def unended(record: RunRecord) -> None:
    text = (record.folder / "outcome.json").read_text()
    (record.folder / "outcome.json").write_text(text.replace('"finished"', '"interrupted"'))


def zipped(path: Path, mark: Path) -> None:
    """A checkpoint of this very run, with something in it that acts."""
    stored = torch.load(path, weights_only=True) if path.exists() else {"state_dict": {}}
    torch.save({**stored, "extra": Touch(mark)}, path)


def bare(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps({"state_dict": Touch(mark)}))


def resume(record: RunRecord) -> int:
    return main(["train", "--resume", str(record.folder)])


def evaluate(record: RunRecord) -> int:
    """Go on after the last step, with the best weights from before it."""
    last = record.checkpoints / "last.ckpt"
    stored = torch.load(last, weights_only=True)
    (checkpoints,) = (state for state in stored["callbacks"].values() if "best_step" in state)
    checkpoints["best_step"] = 2
    torch.save(stored, last)
    return resume(record)


def probe(record: RunRecord) -> int:
    return main(["probe", "sphere", str(record.folder), "--tokens", "9"])


def drift(record: RunRecord) -> int:
    return main(["probe", "drift", str(record.folder), "--batches", "1", "--last", "last"])


@pytest.mark.parametrize("hostile", [zipped, bare])
@pytest.mark.parametrize(
    ("name", "act"),
    [("last", resume), ("best", evaluate), ("final", probe), ("last", drift)],
)
def test_it_is_refused_in_one_line(
    name: str,
    act: Callable[[RunRecord], int],
    hostile: Callable[[Path, Path], None],
    record: RunRecord,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if act in (resume, evaluate):
        unended(record)
    mark, path = tmp_path / "it_ran", record.checkpoints / f"{name}.ckpt"
    hostile(path, mark)
    assert act(record) == 2
    assert not mark.exists()
    error = capsys.readouterr().err
    assert f"cannot read the checkpoint {path}" in error
    assert error.count("\n") == 1
    with contextlib.suppress(RuntimeError):
        torch.load(path, weights_only=False)
    assert mark.exists(), "it was not hostile at all"


def test_a_checkpoint_of_other_shapes_is_refused_in_one_line(
    record: RunRecord, capsys: pytest.CaptureFixture[str]
) -> None:
    # So did an early version store one set of statistics less.
    unended(record)
    for path in record.checkpoints.glob("*.ckpt"):
        stored = torch.load(path, weights_only=True)
        for key, value in stored["state_dict"].items():
            if "running" in key:
                stored["state_dict"][key] = value[:-1].clone()
        torch.save(stored, path)
    assert resume(record) == 2
    error = capsys.readouterr().err
    assert "last.ckpt is not a checkpoint of this run to resume from" in error
    (record.checkpoints / "last.ckpt").unlink()
    text = (record.folder / "outcome.json").read_text()
    (record.folder / "outcome.json").write_text(text.replace('"failed"', '"finished"'))
    assert probe(record) == 2
    error = capsys.readouterr().err
    assert "final.ckpt is not a checkpoint of this run" in error
    assert error.count("\n") == 1
