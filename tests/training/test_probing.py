"""A probe on a finished run: from the command line to the file in the run's folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from normlab.__main__ import main
from normlab.config import InputError, RunConfig, available_probes
from normlab.execution.jobs import Job
from normlab.execution.worker import perform
from normlab.probes.base import Measurement
from normlab.probes.gradient_flow import GradientFlow
from normlab.probes.sphere import Sphere
from normlab.records import wandb_mirror
from normlab.records.record import RunRecord
from normlab.records.wandb_mirror import WandbMirror
from normlab.training import probing
from normlab.training.module import TextModule
from normlab.training.probing import open_run, run_probe
from normlab.training.run import train


@pytest.fixture
def record(tiny_run: Callable[..., RunConfig]) -> RunRecord:
    return train(tiny_run(model__norm="bn_step", data__length=6, training__steps=4, training__valid_every=2))


def test_the_command_writes_what_it_prints(record: RunRecord, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in record.folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["probe", "sphere", str(record.folder), "--tokens", "30"]) == 0
    said = capsys.readouterr().out
    stored = record.probe("sphere")
    assert stored["options"] == {"tokens": 30, "split": "valid"}
    assert (stored["probe"], stored["runs"]) == ("sphere", [record.id])
    assert stored["rows"][0]["tokens"] == 30
    assert {"git", "machine", "versions", "threads"} <= set(stored["environment"])
    for name, value in stored["summary"].items():
        assert name in said
        assert f"{value:.4g}" in said
    assert str(record.folder / "probes" / "sphere.json") in said
    after = {path: path.read_bytes() for path in record.folder.rglob("*") if path.is_file()}
    assert set(after) - set(before) == {record.folder / "probes" / "sphere.json"}
    assert all(after[path] == content for path, content in before.items())


def test_an_id_and_the_folder_of_runs_will_do(record: RunRecord) -> None:
    runs_dir = record.folder.parent
    assert main(["probe", "sphere", record.id, "--runs_dir", str(runs_dir), "--tokens", "9"]) == 0
    assert record.probe("sphere")["options"]["tokens"] == 9
    again = run_probe(Sphere(tokens=9), [record.id], runs_dir=runs_dir)
    assert again["summary"] == record.probe("sphere")["summary"]


def test_without_a_name_the_probes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in available_probes())
    assert main(["probe", "--help"]) == 0
    assert capsys.readouterr().out == said


def test_without_a_run_a_file_per_question(tmp_path: Path) -> None:
    options = {"length": 4, "width": 4, "batch": 3}
    values = run_probe("gradient_flow", options=options, runs_dir=tmp_path)
    other = run_probe("gradient_flow", options={**options, "gain": "1"}, runs_dir=tmp_path)
    stored = json.loads(Path(values["path"]).read_text())
    assert stored["summary"] == values["summary"]
    assert stored["runs"] == []
    assert values["path"] != other["path"]
    assert Path(values["path"]).parent == tmp_path / "untrained" / "probes"


def test_weights_of_each_checkpoint(record: RunRecord) -> None:
    _, subject = open_run(record.folder)
    torch.manual_seed(record.config.seed)
    fresh = TextModule(record.config, subject.text).model.state_dict()
    initial = subject.checkpoint("initial").state_dict()
    assert all(torch.equal(value, initial[name]) for name, value in fresh.items())
    state = torch.get_rng_state()
    final = subject.model.state_dict()
    stored = torch.load(record.checkpoints / "final.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, stored[f"model.{name}"]) for name, value in final.items())
    assert torch.equal(state, torch.get_rng_state())
    best = subject.checkpoint("best").state_dict()
    means = [name for name in final if name.endswith("running_mean")]
    assert means
    assert not all(torch.equal(final[name], best[name]) for name in means)
    (record.checkpoints / "final.ckpt").unlink()
    best_again = open_run(record.folder)[1].model.state_dict()
    assert all(torch.equal(value, best_again[name]) for name, value in best.items())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("spheer", "did you mean 'sphere'"),
        ("--bogus", "unknown probe '--bogus'"),
        ("sphere", "the probe sphere takes 1 run(s), not 0"),
        ("sphere nowhere", "no run 'nowhere'"),
        ("sphere RUN --token 3", "unknown flag '--token' (did you mean '--tokens'?)"),
        ("sphere RUN --tokens many", "tokens must be int, not 'many'"),
        ("sphere RUN --tokens 0", "--tokens of the probe sphere is 0"),
        ("bias_variance RUN", "takes 2 or more run(s), not 1"),
        ("gradient_flow --norm none", "the norm none has no gain to set; add --gain="),
        ("gradient_flow --norm lnn", "unknown norm 'lnn' (did you mean 'ln'?)"),
        ("gradient_flow --seed 99999999999999999999999", "it must be from 0 to 2^63 - 1"),
        ("gradient_flow RUN --width 4", "--width of the probe gradient_flow is for an untrained net"),
    ],
)
def test_a_mistake_gets_one_line(
    arguments: str, said: str, record: RunRecord, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["probe", *arguments.replace("RUN", str(record.folder)).split()]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_runs_that_cannot_be_measured(record: RunRecord, tiny_text: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message) as error:
            run_probe("sphere", [record.folder])
        assert "\n" not in str(error.value)

    for name in ("final.ckpt", "best.ckpt"):
        (record.checkpoints / name).write_bytes(b"torn")
        refused("cannot read the checkpoint")
        (record.checkpoints / name).unlink()
    refused(r"has no best\.ckpt")
    before = tiny_text.read_bytes()
    try:
        tiny_text.write_bytes(before + b"More of it.\n")
        refused("has changed since")
    finally:
        tiny_text.write_bytes(before)
    outcome = record.folder / "outcome.json"
    outcome.write_text(outcome.read_text().replace('"finished"', '"interrupted"'))
    refused("has not ended")


def test_a_folder_that_cannot_be_written_is_refused_before_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "afile").write_text("")
    monkeypatch.setattr(GradientFlow, "measure", lambda self: pytest.fail("measured"))
    assert main(["probe", "gradient_flow", "--runs_dir", str(tmp_path / "afile")]) == 2
    error = capsys.readouterr().err
    assert f"cannot write the measurement to {tmp_path / 'afile' / 'untrained' / 'probes'}: Not a directory" in error
    assert error.count("\n") == 1


def test_ctrl_c_promises_no_checkpoint(
    record: RunRecord, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Sphere, subject: object) -> Measurement:
        raise KeyboardInterrupt

    monkeypatch.setattr(Sphere, "measure", stop)
    capsys.readouterr()
    assert main(["probe", "sphere", str(record.folder)]) == 130
    assert capsys.readouterr().err == "normlab: stopped; the same command measures anew\n"


def test_a_measurement_cut_short_leaves_the_one_before(record: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    run_probe("sphere", [record.folder], {"tokens": 9})
    before = record.probe("sphere")

    def broken(*args: object, **kwargs: object) -> Measurement:
        raise KeyboardInterrupt

    monkeypatch.setattr(probing, "collect_environment", broken)
    with pytest.raises(KeyboardInterrupt):
        run_probe("sphere", [record.folder], {"tokens": 8})
    assert record.probe("sphere") == before


def test_the_command_and_a_job_send_what_was_found_to_wandb(
    record: RunRecord, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[tuple[list[str], list[str]]] = []

    def mirror_probes(names: list[str], records: list[RunRecord]) -> WandbMirror:
        sent.append((list(names), [each.id for each in records]))
        assert all(each.probe(name) for name in names for each in records), "sent before it was measured"
        mirror = WandbMirror(None, (), print)
        mirror.where = lambda: "W&B: somewhere"
        return mirror

    monkeypatch.setattr(wandb_mirror, "mirror_probes", mirror_probes)
    assert main(["probe", "sphere", str(record.folder), "--tokens", "9"]) == 0
    assert capsys.readouterr().out.endswith("W&B: somewhere\n")
    job = Job(record.config, {"sphere": {"tokens": 9}, "leak": {}, "companions": {"draws": 2}})
    assert perform(job)
    assert perform(job)
    assert sent == [(["sphere"], [record.id]), (["leak", "companions"], [record.id])]
