"""`python -m normlab study` as a user meets it."""

from __future__ import annotations

from pathlib import Path

import pytest

from normlab.__main__ import main
from normlab.claims import available_claims, load_claim
from normlab.execution import local
from normlab.execution.local import LocalWorkers
from normlab.study import command


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NORMLAB_DATA", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("normlab.data.corpora.installed", lambda: False)

    def start(*_: object) -> None:
        raise AssertionError("a run was started")

    monkeypatch.setattr(LocalWorkers, "start", start)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("d2_shared_statistic_fail", "did you mean 'd2_shared_statistics_fail'"),
        ("d2_sharde", "unknown argument 'd2_sharde'"),
        ("y", "no argument in section 'y'; there are: "),
        ("d2 --scale big", "scale must be one of small, full, not 'big'"),
        ("d2 --workers -1", "workers is -1; it must be at least 1"),
        ("d2 --runs-per-gpu -1", "runs-per-gpu is -1; it must be at least 1"),
        ("d2 --runs-per-gpu 2", "there is no GPU to share: runs of scale small use none; leave it out"),
        ("d2 --scale full --runs-per-gpu 2", "there is no GPU to share: nvidia-smi and CUDA_VISIBLE_DEVICES name none"),
        ("d2 --workers two", "workers must be int, not 'two'"),
        ("d2 --wandb yes", "wandb must be one of auto, online, offline, off"),
        ("d2 --dry", "unknown flag '--dry' (did you mean '--dry-run'?)"),
        ("d2", "argument d2_shared_statistics_fail: corpus 'ptb_char' is not here"),
    ],
)
def test_a_mistake_gets_one_line(arguments: str, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(["study", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "gpus", "size", "per_gpu"),
    [
        ("", "0,1", 6, 0),
        ("--workers 3", "", 3, 0),
        ("--scale full", "", 1, 0),
        ("--scale full", "0,1", 6, 0),
        ("--scale full --workers 3", "0,1", 3, 0),
        ("--scale full --runs-per-gpu 2", "0,1", 6, 2),
        ("--scale full --runs-per-gpu 5", "0,1", 10, 5),
    ],
)
def test_how_many_at_once(flags: str, gpus: str, size: int, per_gpu: int, monkeypatch: pytest.MonkeyPatch):
    """On a machine with 6 cores; at scale small nobody asks for its GPUs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    monkeypatch.setenv("PATH", "")  # no nvidia-smi
    monkeypatch.setattr(local, "available_cores", lambda: 6)
    found: list[LocalWorkers] = []
    monkeypatch.setattr(command, "run_study", lambda study, engine, console, stack: found.append(engine) or 0)
    assert main(["study", "d2", *flags.split()]) == 0
    (workers,) = found
    assert (workers.size, workers.runs_per_gpu) == (size, per_gpu)
    assert len(workers.gpus) == (2 if "full" in flags and gpus else 0)


def test_a_damaged_table_gets_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    table = tmp_path / "results" / "small" / "d2_shared_statistics_fail.csv"
    table.parent.mkdir(parents=True)
    table.write_text("a,b\n")
    assert main(["study", "d2"]) == 2
    assert "has other columns" in capsys.readouterr().err


def test_without_an_argument_all_are_listed(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(["study"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {line[0] for line in lines} == {"argument", *available_claims()}
    d4 = load_claim("d4_ln_solves_it")
    setting = d4.settings["char_lstm"]
    runs = len(setting.arms) * (len(setting.learning_rates) * len(d4.tuning_seeds) + len(d4.verdict_seeds))
    assert ["d4_ln_solves_it", "measured", "small", "0", str(runs), "?"] in lines
    assert not list(tmp_path.iterdir())


def test_a_dry_run_prints_shared_runs_once(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(["study", "d", "--dry-run"]) == 0
    out = capsys.readouterr().out
    names = [line.split()[0] for line in out.splitlines() if line.startswith("lstm-")]
    assert len(names) == len(set(names)) > 0
    shared = next(line for line in out.splitlines() if "d2_shared_statistics_fail tuning char_lstm/bn_step," in line)
    assert "d4_ln_solves_it tuning char_lstm/bn_step" in shared
    assert not list(tmp_path.iterdir())
