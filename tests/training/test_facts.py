"""What a record says of a run's norms: rows per training statistic, and what leaks from later text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import normlab
from normlab.config import InputError, RunConfig
from normlab.machine.products import KINDS, VARIABLE
from normlab.records.summary import summary_rows
from normlab.training.facts import leak_facts, leak_warning, statistics_rows
from normlab.training.faults import require_rows
from normlab.training.module import TextModule
from normlab.training.run import train

Build = Callable[..., RunConfig]


def module_of(config: RunConfig) -> TextModule:
    return normlab.TextModule(config, normlab.TextDataModule(config.data).text)


GHOSTS = {"model__norm": "bn", "model__norm_options__ghost_rows": 3}
MEMORY = {"model__norm": "bn_step", "model__norm_options__memory_batches": 2}


@pytest.mark.parametrize(
    ("changes", "processes", "rows"),
    [
        ({"model__norm": "ln"}, 2, None),
        ({"model__norm": "inorm"}, 2, None),
        ({"model__norm": "pn", "model__norm_options__warmup": 0}, 2, None),
        ({"model__norm": "bn"}, 1, 8),
        ({"model__norm": "bn"}, 2, 16),
        (GHOSTS, 1, 3),
        (GHOSTS, 2, 3),
        ({**GHOSTS, "model__norm_options__ghost_rows": 20}, 2, 8),  # ghosts do not reach over processes
        (MEMORY, 1, 24),
        (MEMORY, 2, 48),
        ({"model__norm": "ln", "model__sites": {"cell": {"norm": "bn"}}}, 1, 8),
    ],
)
def test_rows_of_a_training_statistic(tiny_run: Build, changes: dict[str, Any], processes: int, rows: int | None):
    assert statistics_rows(module_of(tiny_run(**changes)), 8, processes) == rows


def test_they_are_recorded(tiny_run: Build):
    for changes, rows in ((GHOSTS, 3), (MEMORY, 24)):
        assert train(tiny_run(**changes, training__steps=2)).environment()["statistics_batch_rows"] == rows


def test_the_sample_that_a_run_is_trained_on_is_recorded(tiny_run: Build):
    data = train(tiny_run(data__resample=True, training__steps=2)).environment()["data"]
    other = train(tiny_run(data__resample=True, training__steps=2, seed=2)).environment()["data"]
    assert data["resample"]["unit"] == "tokens, in blocks of 1000"
    assert 0.4 < data["resample"]["distinct"] / data["splits"]["train"]["tokens"] < 0.9
    assert data["resample"]["sha256"] != other["resample"]["sha256"]
    assert data["sha256"] == other["sha256"], "of the corpus"
    assert "resample" not in train(tiny_run(training__steps=2)).environment()["data"]


def test_the_matrix_products_are_recorded_and_kept(tiny_run: Build, monkeypatch: pytest.MonkeyPatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    config = tiny_run(training__steps=4)
    monkeypatch.setenv(VARIABLE, "onednn")
    record = train(config)
    assert record.environment()["products"] == {"onednn": sorted(KINDS), "reason": f"{VARIABLE}=onednn"}
    assert record.checkpoints.joinpath("last.ckpt").exists()
    record.folder.joinpath("outcome.json").unlink()  # as if it had been stopped
    monkeypatch.setenv(VARIABLE, "torch")
    kept = train(config).environment()["products"]
    assert kept == {"onednn": sorted(KINDS), "reason": "as the run began"}


def test_the_warning_of_accumulation(tiny_run: Build, capsys: pytest.CaptureFixture[str]):
    def said(**changes: Any) -> str:
        train(tiny_run(**changes, training__steps=2, training__accumulate=3))
        return " ".join(capsys.readouterr().out.split())

    warning = "the batch statistics still see {} rows, the gradient 24"
    hint = "model.norm_options.memory_batches 2 adds earlier ones"
    plain = said(model__norm="bn_step")
    assert warning.format(8) in plain
    assert hint in plain
    ghosts = said(**GHOSTS)
    assert warning.format(3) in ghosts
    assert hint not in ghosts  # not with ghosts
    assert "warning" not in said(**MEMORY)  # 8 rows and those of 2 batches before


def test_one_row_in_each_process_has_no_ghosts(tiny_run: Build):
    for changes, refused in (({"model__norm": "bn"}, False), (GHOSTS, True)):
        config = tiny_run(**changes, data__batch_size=1, training__devices=2)
        if not refused:
            require_rows(module_of(config), 1, config)
            continue
        with pytest.raises(InputError, match="a batch has one row"):
            require_rows(module_of(config), 1, config)


LEAKY = {"model": "transformer", "model__norm": "bn", "model__norm_options__pool": "batch_time"}
WARNING = (
    "warning: attention, ffn, final: in training each output depends on later time steps of every row of the batch; "
    "losses in training mode are not those of a language model"
)


def test_what_leaks_is_said_and_recorded(tiny_run: Build, capsys: pytest.CaptureFixture[str]):
    record = train(tiny_run(**LEAKY))
    assert capsys.readouterr().out.splitlines().count(WARNING) == 1
    leak = "in training each output depends on later time steps of every row of the batch"
    assert record.environment()["leaks"] == dict.fromkeys(("attention", "ffn", "final"), leak)
    assert ("leaks", f"ffn: {leak}") in summary_rows(record)
    causal = train(tiny_run(model="transformer", model__norm="bn"))
    assert "leaks" not in causal.environment()
    assert "leaks" not in dict(summary_rows(causal))
    assert "warning" not in capsys.readouterr().out


def test_a_leak_in_evaluation_says_so(tiny_run: Build):
    config = tiny_run(model="transformer", model__norm="inorm", model__norm_options__pool="time")
    assert leak_warning(module_of(config)).endswith(
        "in training and in evaluation each output depends on later time steps of its row; "
        "losses, in evaluation too, are not those of a language model"
    )


def test_only_a_language_model_leaks(tiny_run: Build, tiny_labels: Path):
    assert leak_facts(module_of(tiny_run(**LEAKY, data__corpus=str(tiny_labels), data__length=0))) == {}
    # Inside a recurrence later time steps are not computed yet.
    lstm = module_of(tiny_run(**{**LEAKY, "model": "lstm"}))
    assert set(leak_facts(lstm)) == {"input_to_hidden"}


def test_ghosts_larger_than_a_batch_are_refused(tiny_run: Build):
    with pytest.raises(InputError, match="ghost_rows is 9, but a batch has 8 rows per process"):
        train(tiny_run(model__norm="bn", model__norm_options__ghost_rows=9))


def test_a_warm_up_that_outlasts_the_run_is_said(tiny_run: Build, capsys: pytest.CaptureFixture[str]):
    train(tiny_run(model__norm="brn"))
    said = "warning: the norm warms up for 100 updates (model.norm_options.warmup), and this run has 10 steps"
    assert said in " ".join(capsys.readouterr().out.split())
    train(tiny_run(model__norm="brn", model__norm_options__warmup=2))
    assert "warms up" not in capsys.readouterr().out


def test_a_record_from_before_re_estimation_says_so(tiny_run: Build, capsys: pytest.CaptureFixture[str]):
    record = train(tiny_run(model__norm="bn"))
    outcome = json.loads((record.folder / "outcome.json").read_text())
    train(tiny_run(model__norm="bn"))
    assert "running averages alone" not in capsys.readouterr().out
    del outcome["results"]["recomputed_batches"]
    (record.folder / "outcome.json").write_text(json.dumps(outcome))
    train(tiny_run(model__norm="bn"))
    said = "this run has ended already, and was tested with running averages alone; --output.fresh true trains it again"
    assert said in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("changes", "backend", "reason"),
    [
        ({"model__norm": "none"}, "fused", "every site is bare"),
        ({"model__norm": "ln"}, "fast", ""),
        ({"model__norm": "none", "model__cell": "gru"}, "fused", "every site is bare"),
        ({"model__norm": "ln", "model__cell": "rnn_tanh"}, "fast", ""),
        ({"model__norm": "lrn"}, "reference", "lrn at hidden_to_hidden has no fast form"),
        ({"model__norm": "ln", "training__precision": "bf16"}, "reference", "autocast is on"),
        ({"model": "transformer"}, None, ""),
    ],
)
def test_the_backend_of_the_recurrence_is_recorded_and_said(
    tiny_run: Build, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], backend: str | None, reason: str
):
    found = train(tiny_run(**changes, training__steps=2)).environment().get("recurrence")
    said = capsys.readouterr().out
    if backend is None:
        assert found is None
        assert "recurrence:" not in said
        return
    assert found["backend"] == backend
    assert not reason or found["reason"] == reason
    assert f"recurrence: {backend} ({found['reason']})" in " ".join(said.split())
