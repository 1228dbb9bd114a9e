"""Every committed config runs through the real entry point, on a tiny text of its kind."""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from normlab.__main__ import main, parse_run
from normlab.config import MODELS
from normlab.records.record import RunRecord, record_ids

SWEEP = Path(__file__).parent.parent / "configs" / "sweep.yaml"
CONFIGS = sorted(set(SWEEP.parent.glob("*.yaml")) - {SWEEP})  # single runs


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


def sweep_commands() -> list[list[str]]:
    """What the agent of a grid runs, made by its own code; `python` is this one."""
    from wandb.sdk.launch.sweeps import utils as sweeps

    sweep = yaml.safe_load(SWEEP.read_text())
    assert sweep["method"] == "grid"
    values = [[(name, value) for value in each["values"]] for name, each in sweep["parameters"].items()]
    commands = []
    for chosen in itertools.product(*values):
        filled: dict[str, Any] = sweeps.create_sweep_command_args(
            {"args": {name: {"value": value} for name, value in chosen}}
        )
        filled |= {"env": ["/usr/bin/env"], "interpreter": [sys.executable], "program": [sweep["program"]]}
        command = sweeps.create_sweep_command(list(sweep["command"]))
        macros = [re.fullmatch(r"\$\{(\w+)\}", part) for part in command]
        commands.append(
            [
                word
                for part, macro in zip(command, macros, strict=True)
                for word in ([part] if macro is None else filled[macro[1]])
            ]
        )
    return commands


def test_runs_of_the_sweep_are_runs_of_ours(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(SWEEP.parent.parent)
    values = {name: each["values"] for name, each in yaml.safe_load(SWEEP.read_text())["parameters"].items()}
    fields = {"model.norm": lambda c: c.model.norm, "optim.lr": lambda c: c.optim.lr, "seed": lambda c: c.seed}
    assert fields.keys() == values.keys()
    commands = sweep_commands()
    assert len(commands) == math.prod(map(len, values.values()))
    most = max(map(len, values.values()))
    diagonal = commands[:: (len(commands) - 1) // (most - 1)]  # all values; a parser takes long
    found = []
    for command in diagonal:
        head = command.index("train") + 1
        assert command[:head] == ["/usr/bin/env", sys.executable, "-m", "normlab", "train"]
        found.append(parse_run(command[head:]))
    for name, of_run in fields.items():
        assert {of_run(config) for config in found} == set(values[name])


def test_a_run_of_the_sweep_is_the_agents(tiny_text: Path, tmp_path: Path):
    command = sweep_commands()[-1]
    smaller = f"--data {tiny_text} --model.width 8 --training.steps 2 --training.valid_every 2 --data.length 8 "
    smaller += "--data.batch_size 8 --training.recompute_batches 1 --training.activations_every 0"
    agent = {"WANDB_MODE": "offline", "WANDB_SWEEP_ID": "abcd1234", "WANDB_RUN_ID": "wxyz5678"}
    environment = os.environ | agent | {"PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(tmp_path)}
    done = subprocess.run(
        [*command, *smaller.split(), "--output.runs_dir", str(tmp_path / "runs")],
        env=environment,
        cwd=SWEEP.parent.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    metric = yaml.safe_load(SWEEP.read_text())["metric"]["name"]
    record = RunRecord.open(record_ids(tmp_path / "runs")[0], tmp_path / "runs")
    assert metric in record.outcome().results
    assert (record.folder / "wandb_id").read_text().strip() == "wxyz5678"
    (written,) = (tmp_path / "runs" / "wandb").glob("offline-run-*")
    assert written.name.endswith("-wxyz5678")
