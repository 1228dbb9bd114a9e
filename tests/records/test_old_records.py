"""Records that earlier commits wrote (`old/<commit>/<id>`; of the interrupted one, the first rows) are read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from normlab.__main__ import main, parse_run
from normlab.config import config_from_dict, config_to_dict, run_id
from normlab.execution.jobs import Job
from normlab.records.record import RunRecord

OLD = Path(__file__).parent / "old"
RECORDS = {path.parent.parent.name: path.parent for path in sorted(OLD.glob("*/*/config.yaml"))}
FINISHED, INTERRUPTED = ("7b5a03d", "dc92f72"), "7cd88b1"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All of them with their text, where they name it."""
    shutil.copy(OLD / "text.txt", tmp_path)
    monkeypatch.chdir(tmp_path)
    for commit, folder in RECORDS.items():
        shutil.copytree(folder, tmp_path / commit / folder.name)
    return tmp_path


def test_there_are_some() -> None:
    assert set(RECORDS) == {*FINISHED, INTERRUPTED}


@pytest.mark.parametrize("commit", sorted(RECORDS))
def test_they_are_shown_and_have_the_same_id_today(commit: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = RunRecord.open(RECORDS[commit].name, runs / commit)
    assert record.id == run_id(record.config)
    assert record.metrics()[0]["step"] == 1
    assert record.environment()["data"]["corpus"] == "text.txt"
    assert main(["show", str(record.folder)]) == 0
    shown = capsys.readouterr().out
    assert record.id in shown
    assert record.outcome().state in shown


@pytest.mark.parametrize("commit", FINISHED)
def test_a_finished_one_is_not_trained_again_and_counts_for_a_study(
    commit: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = RunRecord.open(RECORDS[commit].name, runs / commit)
    before = {path: path.read_bytes() for path in record.folder.iterdir() if path.is_file()}
    assert main(["train", "--resume", str(record.folder)]) == 0
    assert "this run has ended already" in capsys.readouterr().out
    values = config_to_dict(record.config)
    values["output"]["runs_dir"] = str(runs / commit)
    job = Job(config_from_dict(values))
    assert job.is_done()
    assert job.seconds() == record.outcome().seconds > 0
    # Its weights were not kept with it.
    assert main(["probe", "sphere", str(record.folder)]) == 2
    assert "has no best.ckpt; train it again" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in record.folder.iterdir() if path.is_file()} == before


def test_an_interrupted_one_goes_on_with_its_own_config(runs: Path) -> None:
    record = RunRecord.open(RECORDS[INTERRUPTED].name, runs / INTERRUPTED)
    resumed = parse_run(["--resume", str(record.folder)])
    assert (resumed.model, resumed.data, resumed.training) == (
        record.config.model,
        record.config.data,
        record.config.training,
    )


@pytest.mark.parametrize("commit", FINISHED)
def test_a_field_that_is_no_more_is_named(commit: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs / commit / RECORDS[commit].name
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("  width:", "  hidden_units:"))
    assert main(["show", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "config.yaml: unknown field 'model.hidden_units'" in error
    assert error.count("\n") == 1
