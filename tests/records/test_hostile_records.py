"""A record that somebody else made is read without running anything, waiting for anything, or writing elsewhere."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from normlab.__main__ import main, parse_run
from normlab.config import InputError, config_from_dict
from normlab.records.disk import append, parse_json, read_bytes, read_yaml, write_atomically
from normlab.records.record import Outcome, RunRecord
from normlab.records.wandb_mirror import _wandb_id

SMALL = {"model": {"width": 8}, "training": {"steps": 4}}


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    config = config_from_dict({**SMALL, "output": {"runs_dir": str(tmp_path / "runs"), "wandb": "off"}})
    made = RunRecord.create(config)
    made.write_environment({"machine": "a", "versions": {}, "git": {}})
    made.start()
    made.log(1, 0.5, {"train_loss_nats": 2.0})
    made.finish(Outcome("interrupted", step=1))
    return made


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Something that no run may touch."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "file").write_text("as it was")
    return folder


def commands(record: RunRecord) -> list[list[str]]:
    return [
        ["show", str(record.folder)],
        ["train", "--resume", str(record.folder)],
        ["probe", "sphere", str(record.folder)],
    ]


LINKS: dict[str, Callable[[Path, Path], None]] = {
    "metrics": lambda folder, outside: _link(folder / "metrics.jsonl", outside / "file"),
    "lock": lambda folder, outside: _link(folder / "lock", outside / "file"),
    "checkpoints": lambda folder, outside: _link(folder / "checkpoints", outside),
    "probes": lambda folder, outside: _link(folder / "probes", outside),
    "a checkpoint": lambda folder, outside: _link(folder / "checkpoints" / ".last.ckpt.tmp", outside / "file"),
    "to nothing": lambda folder, outside: _link(folder / "wandb_id", outside / "new"),
    "another record": lambda folder, outside: _link(folder / "lock", Path("../other/outcome.json")),
    "upwards": lambda folder, outside: _link(folder / "probes", Path("../../outside")),
    "the record": lambda folder, outside: _link(folder, folder.rename(outside / "record")),
}


def _link(path: Path, target: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize("link", LINKS)
def test_a_link_is_refused(link: str, record: RunRecord, outside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LINKS[link](record.folder, outside)
    before = {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}
    for command in commands(record):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert re.search("is a link,? (to|out of) ", error)
        assert error.count("\n") == 1
    # Nor by those who know where it is without looking.
    for write in (lambda: RunRecord.create(record.config), record.start, record.archive):
        with pytest.raises(InputError, match=r"is a link,? (to|out of) "):
            write()
    assert {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()} == before


def test_links_to_whole_records_and_runs_are_the_users_own_order(record: RunRecord, outside: Path) -> None:
    (record.folder.parent / "best").symlink_to(record.folder)
    assert RunRecord.open("best", record.folder.parent).outcome().state == "interrupted"
    (outside / "runs").symlink_to(record.folder.parent)  # all runs on another disk
    assert RunRecord.open(record.id, outside / "runs").outcome().state == "interrupted"


def test_a_write_does_not_follow_a_link(tmp_path: Path, outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    guessed = uuid.uuid4()
    monkeypatch.setattr(uuid, "uuid4", lambda: guessed)
    (tmp_path / f".file.json.{guessed.hex[:12]}.tmp").symlink_to(outside / "file")
    with pytest.raises(FileExistsError):
        write_atomically(path, "new")
    write_atomically(path, "new")
    assert path.read_text() == "new"
    (tmp_path / "rows").symlink_to(outside / "file")
    with pytest.raises(OSError, match="rows"):
        append(tmp_path / "rows", b"row\n")
    assert (outside / "file").read_text() == "as it was"


@pytest.mark.parametrize("name", ["outcome.json", "metrics.jsonl", "environment.json", "lock", "checkpoints/best.ckpt"])
def test_a_pipe_is_refused_and_not_waited_for(name: str, record: RunRecord, capsys: pytest.CaptureFixture[str]) -> None:
    (record.folder / name).unlink(missing_ok=True)
    os.mkfifo(record.folder / name)
    for command in commands(record):
        assert main(command) == 2
        assert f"{record.folder / name} is neither a file nor a folder" in capsys.readouterr().err
    if name.endswith(".json"):
        with pytest.raises(InputError, match="is not a plain file"):
            read_bytes(record.folder / name)


def test_an_id_is_a_name_and_a_path_is_a_place(record: RunRecord, tmp_path: Path) -> None:
    # Both are the user's to name; neither makes a folder.
    before = sorted(tmp_path.rglob("*"))
    for asked in ("../../etc", "/etc", "a" * 300, "a\0b", "~nobody/x", "line\nline", ""):
        with pytest.raises(InputError):
            RunRecord.open(asked, tmp_path / "runs")
    assert sorted(tmp_path.rglob("*")) == before
    assert RunRecord.open(f"../runs/{record.id}", tmp_path / "runs").config == record.config


def test_what_its_config_says_of_places_is_not_followed(record: RunRecord, outside: Path) -> None:
    path = record.folder / "config.yaml"
    values = yaml.safe_load(path.read_text())
    values["output"]["runs_dir"] = str(outside)
    path.write_text(yaml.safe_dump(values))
    resumed = parse_run(["--resume", str(record.folder)])
    assert Path(resumed.output.runs_dir) == record.folder.parent
    assert main(["show", str(record.folder)]) == 0
    assert [path.name for path in outside.iterdir()] == ["file"]


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
)
HOSTILE_YAML = {
    "names an object": "model: !!python/object/apply:os.mkdir [{mark}]",
    "names a class": "model: !!python/name:os.system",
    "stands for more than": BOMB + "seed: *a29",
    "nested too deeply": "seed: " + "[" * 400,
    "or contains itself": "model: &m {name: lstm, sites: *m}",
    "unhashable": "? {a: 1}\n: 1",
    "month": "seed: 2020-13-01",
    "a tab": "seed:\t\x01",
}


@pytest.mark.parametrize("what", HOSTILE_YAML)
def test_hostile_yaml_is_refused_in_one_line(
    what: str, record: RunRecord, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "it_ran"
    path = record.folder / "config.yaml"
    path.write_text(HOSTILE_YAML[what].replace("{mark}", str(mark)))
    for command in (["show", str(record.folder)], ["train", "--config", str(path)]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert len(error) < 2000
    assert not mark.exists()


def test_aliases_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("one: &one {a: 1}\ntwo: {<<: *one, b: 2}\nthree: [*one, *one]\n")
    assert read_yaml(path) == {"one": {"a": 1}, "two": {"a": 1, "b": 2}, "three": [{"a": 1}, {"a": 1}]}
    path.write_text("")
    assert read_yaml(path) is None


def test_deep_json_is_refused() -> None:
    with pytest.raises(InputError, match="is not JSON"):
        parse_json(b"[" * 100_000, "here")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("outcome.json", {"state": "finished", "step": "many"}),
        ("outcome.json", {"state": "finished", "seconds": [1]}),
        ("outcome.json", {"state": "finished", "reason": None}),
        ("outcome.json", {"state": "finished", "results": {"test_loss_nats": "low"}}),
        ("environment.json", {"sites": ["ln"]}),
        ("environment.json", {"data": {"splits": 3}}),
        ("environment.json", {"leaks": "all"}),
    ],
)
def test_values_of_other_kinds_are_refused_in_one_line(
    name: str, values: dict, record: RunRecord, capsys: pytest.CaptureFixture[str]
) -> None:
    (record.folder / name).write_text(json.dumps({"version": 1, **values}))
    assert main(["show", str(record.folder)]) == 2
    error = capsys.readouterr().err
    assert "cannot read" in error or "is damaged" in error
    assert error.count("\n") == 1


def test_a_newer_version_is_said_before_its_fields_are_missed(
    record: RunRecord, capsys: pytest.CaptureFixture[str]
) -> None:
    (record.folder / "outcome.json").write_text(json.dumps({"version": 2, "ended": "well"}))
    with (record.folder / "config.yaml").open("a") as file:
        file.write("field_to_come: 1\n")
    for command in commands(record):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "has format version 2, this normlab reads 1: use the one that wrote it" in error
        assert error.count("\n") == 1


def test_nothing_in_it_steers_the_terminal(record: RunRecord, capsys: pytest.CaptureFixture[str]) -> None:
    steering = "\x1b]0;title\x07\x1b[31m[bold]\x9b2J\u202e"
    values = {"version": 1, "state": "failed", "reason": steering, "results": {"best_step": steering}}
    (record.folder / "outcome.json").write_text(json.dumps(values))
    environment = {"version": 1, "machine": steering, "sites": {steering: "ln(pool=x)"}, "leaks": {steering: steering}}
    (record.folder / "environment.json").write_text(json.dumps(environment))
    renamed = record.folder.rename(record.folder.with_name(f"a{steering}b"))
    assert main(["show", str(renamed)]) == 0
    assert main(["show", "nothing", "--runs_dir", str(renamed.parent)]) == 2
    said = "".join(capsys.readouterr())
    assert r"\x1b]0;title\x07\x1b[31m[bold]\x9b2J" in said.replace("\n", "")
    assert not set(said) & {"\x1b", "\x07", "\x9b", "\u202e"}


@pytest.mark.parametrize("kept", ["../../elsewhere", "of-somebody-else-123456", "a\nb", ""])
def test_a_wandb_id_of_another_form_is_replaced(kept: str, record: RunRecord) -> None:
    (record.folder / "wandb_id").write_text(kept)
    own = _wandb_id(record.folder)
    assert own.startswith(f"{record.id}-")
    assert len(own) == len(record.id) + 7
    assert _wandb_id(record.folder) == own
