"""Workspaces and the report: built from arguments alone, written as files, saved where there is an account."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from wandb_server import ENTITY, KEY, STRANGER, serving

from normlab.claims import available_claims, load_claim
from normlab.claims.rows import read_rows
from normlab.dashboard import command, spec
from normlab.dashboard.panels import panels_of
from normlab.records.wandb_mirror import Account
from normlab.report.judged import Argument

RESULTS = Path(__file__).parents[2] / "results"
CLAIM = load_claim("d5_ln_speeds_up_lstm")

# The results of one argument: judging all of them takes long. Saved, saved again, and refused.
COMMAND = """
import sys
from pathlib import Path
from normlab.claims import load_claim
from normlab.dashboard.command import dashboard
for entity in sys.argv[2:]:
    print(dashboard([load_claim("d5_ln_speeds_up_lstm")], Path(sys.argv[1]), Path("out"), entity, "normlab"))
"""


def unjudged() -> list[Argument]:
    return [Argument(load_claim(name), None, []) for name in available_claims()]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    (folder / "small").mkdir()
    for path in (RESULTS / "small").glob(f"{CLAIM.id}.*"):
        (folder / "small" / path.name).write_bytes(path.read_bytes())
    return folder


def test_each_section_with_runs_has_a_view_of_them() -> None:
    arguments = unjudged()
    built = spec.build(arguments, "", "normlab")
    measured = [argument.claim for argument in arguments if argument.claim.settings]
    assert set(built.views) == {"all", *(claim.section for claim in measured)}
    for letter in {claim.section for claim in measured}:
        (runs,) = spec.spec_of(built.views[letter])["spec"]["section"]["runSets"]
        claims = [claim for claim in measured if claim.section == letter]
        tags, seeds = runs["filters"]["filters"]
        assert tags["key"] == {"section": "run", "name": "tags"}
        assert tags["value"] == [claim.id for claim in claims]
        assert set(seeds["value"]) == {seed for claim in claims for seed in claim.verdict_seeds}
        assert set(seeds["value"]).isdisjoint(seed for claim in claims for seed in claim.tuning_seeds)
        assert runs["grouping"][-1] == {"section": "config", "name": "model.value.norm"}
    assert spec.spec_of(built.views["all"])["spec"]["section"]["runSets"][0]["filters"]["filters"] == []


def test_curves_are_over_steps_and_seconds_with_a_band() -> None:
    view = spec.spec_of(spec.build(unjudged(), "", "normlab").views["d"])
    loss = view["spec"]["section"]["panelBankConfig"]["sections"][0]
    drawn = [panel["config"] for panel in loss["panels"]]
    assert [(each["metrics"][0], each["xAxis"]) for each in drawn] == [
        (f"{split}_loss_nats", axis) for split in ("train", "valid") for axis in ("step", "seconds")
    ]
    assert {(each["groupAgg"], each["groupArea"]) for each in drawn} == {("mean", "minmax")}


def test_activations_are_shown_where_runs_record_them() -> None:
    titles = [group.title for group in panels_of([CLAIM])]
    setting = CLAIM.settings["char_lstm"]
    base = setting.base["small"]
    training = dataclasses.replace(base.training, activations_every=10)
    recorded = dataclasses.replace(setting, base={"small": dataclasses.replace(base, training=training)})
    again = [group.title for group in panels_of([dataclasses.replace(CLAIM, settings={"char_lstm": recorded})])]
    assert "Activations per site" in again
    assert "Activations per site" not in titles


def as_sent(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_without_an_account_there_are_files(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    accounts = iter([Account(False, "no", ""), Account(True, "http://x does not answer", "http://x")])
    monkeypatch.setattr(command.Account, "find", lambda: next(accounts))
    assert command.dashboard([CLAIM], results, tmp_path / "one", "", "normlab") == 0
    said = capsys.readouterr().out
    assert "`wandb login`, then the same command" in said
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"all.json", "d.json", "report.json"}
    report = as_sent(tmp_path / "one" / "report.json")
    blocks = report["spec"]["blocks"]
    texts = [block["content"] for block in blocks if block["type"] == "markdown-block"]
    assert "come from the tables in `results/`" in texts[0]
    assert CLAIM.sentence in texts[1]
    assert "| **mixed** |" in texts[1]
    assert "](" not in texts[1]
    rows = read_rows(RESULTS / "small" / f"{CLAIM.id}.csv")
    grids = [block["metadata"] for block in blocks if block["type"] == "panel-grid"]
    assert len(grids) == len(CLAIM.settings)
    for grid, (name, setting) in zip(grids, CLAIM.settings.items(), strict=True):
        assert [runs["name"] for runs in grid["runSets"]] == list(setting.arms)
        for runs in grid["runSets"]:
            (filtered,) = runs["filters"]["filters"]
            of_arm = ("verdict", name, runs["name"])
            assert set(filtered["value"]) == {r.run_id for r in rows if (r.phase, r.setting, r.arm) == of_arm}
            assert len(filtered["value"]) == len(CLAIM.verdict_seeds)
    # Known, but out of reach: the same files, to the byte, and the reason.
    assert command.dashboard([CLAIM], results, tmp_path / "two", "", "normlab") == 1
    assert "http://x does not answer; then the same command" in capsys.readouterr().out
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_with_an_account_they_are_saved_and_then_changed_in_place(results: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path), "WANDB_API_KEY": KEY}
    with serving() as server:
        environment["WANDB_BASE_URL"] = server.url
        server.lost = True  # somebody deletes the report
        command = [sys.executable, "-c", COMMAND, str(results), "", ENTITY, STRANGER]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    first, lost, anew, refused = server.of("upsertView")
    views = server.of("UpsertView2")
    assert [view["displayName"] for view in views] == ["normlab: section D", "normlab: all runs"] * 2
    for sent in (first, lost, anew, *views):
        assert (sent["entityName"], sent["projectName"]) == (ENTITY, "normlab")
    assert [view.get("id") is not None for view in views] == [False, False, True, True]
    assert [view["name"] for view in views[:2]] == [view["name"] for view in views[2:]]
    assert [sent.get("id") is not None for sent in (first, lost, anew)] == [False, True, False]
    assert json.loads(views[0]["spec"]) == as_sent(tmp_path / "out" / "d.json")["spec"]
    assert json.loads(first["spec"]) == as_sent(tmp_path / "out" / "report.json")["spec"]
    assert refused["entityName"] == STRANGER
    assert done.stdout.count(f"{server.url}/{ENTITY}/normlab?nw=") == 4
    said = done.stdout.splitlines()
    assert [line for line in said if line.isdigit()] == ["0", "0", "1"]
    assert said[-2].startswith("W&B: ")
    assert "permission denied; then the same command saves them in W&B" in said[-2]
