"""Every committed config runs through the real entry point, on a tiny text of its kind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from normlab.__main__ import main, parse_run
from normlab.config import MODELS
from normlab.records.record import RunRecord, record_ids

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_trains(
    path: Path, tiny_text: Path, tiny_labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    given = yaml.safe_load(path.read_text())
    own = given["data"]["corpus"]
    text = tiny_labels if own == "sst2" else tiny_text
    shorter = "--training.steps 2 --training.valid_every 2 --training.activations_every 1 --data.batch_size 4 "
    shorter += "--model.overrides.n_embd 16" if given["model"]["name"] == "hf" else "--model.width 16"
    code = main(
        f"train --config {path} --data {text} {shorter} --output.runs_dir {tmp_path} --output.wandb off".split()
    )
    assert code == 0
    printed = capsys.readouterr().out
    record = RunRecord.open(record_ids(tmp_path)[0], tmp_path)
    assert record.id in printed
    assert "test" in printed
    assert record.outcome().state == "finished"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_header_gives_a_command_that_parses(path: Path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    commands = re.findall(r"make train CONFIG=(configs/\w+\.yaml)(.*)", "\n".join(header))
    assert commands
    for file, rest in commands:
        assert file == f"configs/{path.name}"
        flags = re.sub(r"(NORM|MODEL|DATA|SEED)=", lambda m: f"--{m[1].lower()} ", rest.split("#")[0])
        assert parse_run(["--config", str(path), *flags.split()]).model.name in MODELS
