"""Runs from config to record, on tiny texts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

import normlab
from normlab.config import (
    DataConfig,
    HuggingFaceConfig,
    InputError,
    LSTMConfig,
    MLPConfig,
    OptimConfig,
    RunConfig,
    TrainingConfig,
    TransformerConfig,
    available_norms,
)
from normlab.records.record import RunRecord
from normlab.training import stopping
from normlab.training.run import train

Build = Callable[..., RunConfig]


def numbers(record: RunRecord) -> list[dict[str, Any]]:
    """The rows of a record without what depends on the clock."""
    timed = {"seconds", "tokens_per_second"}
    return [{k: v for k, v in row.items() if k not in timed} for row in record.metrics()]


@pytest.mark.parametrize("model", ["lstm", "transformer", "mlp"])
@pytest.mark.parametrize("norm", available_norms())
def test_every_norm_trains_in_every_model(tiny_run: Build, model: str, norm: str):
    once = {"training__valid_every": 30, "training__checkpoint_every": 30, "training__activations_every": 30}
    record = train(tiny_run(model=model, model__norm=norm, training__steps=30, optim__lr=1e-2, **once))
    outcome = record.outcome()
    assert outcome.state == "finished"
    losses = [row["train_loss_nats"] for row in record.metrics() if "train_loss_nats" in row]
    assert losses[-1] < losses[0] - 0.2
    for split in ("train", "valid", "test"):
        nats = outcome.results[f"{split}_loss_nats"]
        assert outcome.results[f"{split}_bits_per_char"] == pytest.approx(nats / math.log(2), rel=0.01)


def test_same_seed_same_numbers_other_seed_others(tiny_run: Build, tmp_path: Path):
    runs = [
        train(tiny_run(model__dropout=0.1, seed=seed, output__runs_dir=str(tmp_path / place)))
        for place, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert numbers(runs[0]) == numbers(runs[1])
    assert runs[0].outcome().results["test_loss_nats"] == runs[1].outcome().results["test_loss_nats"]
    assert numbers(runs[0]) != numbers(runs[2])


RESUMED = {
    "lstm, stateful, bn_step": {"model__norm": "bn_step", "data__stream": "stateful", "data__batch_size": 4},
    "lstm, stateful, inorm": {"model__norm": "inorm", "data__stream": "stateful", "data__batch_size": 4},
    "gru, stateful, inorm": {
        "model__cell": "gru",
        "model__norm": "inorm",
        "data__stream": "stateful",
        "data__batch_size": 4,
    },
    "lstm, dropout": {"model__dropout": 0.2, "model__layers": 2},
    "lstm, a sample of the text": {"data__resample": True},
    "lstm, accumulation": {"training__accumulate": 2},
    "transformer, bn, warm-up": {
        "model": "transformer",
        "model__norm": "bn",
        "optim__warmup_steps": 4,
        "optim__schedule": "cosine",
    },
    "mlp, bn, dropout": {"model": "mlp", "model__norm": "bn", "model__dropout": 0.2},
}


class StopAt(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
                if isinstance(callback, stopping.StopSignals):
                    callback.received = 2


@pytest.mark.parametrize(
    ("name", "stop_at"),
    # Dropout's run is stopped in every kind of place: first step, between, at a validation, last but one.
    [(name, 7) for name in RESUMED] + [("lstm, dropout", step) for step in (1, 10, 23)],
)
def test_a_stopped_run_goes_on_to_the_same_numbers(
    tiny_run: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stop_at: int
):
    changes = {"training__steps": 24, "data__length": 20, **RESUMED[name]}
    whole = train(tiny_run(**changes, output__runs_dir=str(tmp_path / "whole")))
    pieces = tiny_run(**changes, output__runs_dir=str(tmp_path / "pieces"))
    init = pl.Trainer.__init__

    def stopping_trainer(self: pl.Trainer, **options: Any) -> None:
        init(self, **options, callbacks=[StopAt(stop_at)])

    with monkeypatch.context() as patch:
        patch.setattr(pl.Trainer, "__init__", stopping_trainer)
        stopped = train(pieces)
    assert stopped.outcome().state == "interrupted"
    assert stopped.outcome().step == stop_at
    resumed = train(pieces)
    assert resumed.outcome().state == "finished"

    def evaluated(record: RunRecord) -> list[dict[str, Any]]:
        return [row for row in numbers(record) if "valid_loss_nats" in row]

    assert evaluated(resumed) == evaluated(whole)
    expected, got = whole.outcome().results, resumed.outcome().results
    assert ("test_running_loss_nats" in expected) == ("bn" in pieces.model.norm)
    timed = ("tokens_per_second", "peak_memory_mib")
    assert {n: v for n, v in got.items() if n not in timed} == {n: v for n, v in expected.items() if n not in timed}
    assert resumed.statistics_gap() == whole.statistics_gap()
    assert resumed.environment()["begun_with"]["threads"] == 1, "they decide the last bits"


def test_a_run_without_a_checkpoint_to_go_on_from_begins(tiny_run: Build):
    config = tiny_run(training__steps=2)
    RunRecord.create(config).write_environment({"threads": 99, "kernels": True, "begun_with": {"threads": 98}})
    assert "begun_with" not in train(config).environment(), "nothing of it rests on what was there before"


def test_a_finished_run_is_not_trained_again_unless_asked(tiny_run: Build, capsys: pytest.CaptureFixture[str]):
    config = tiny_run()
    first = train(config)
    assert train(config).outcome() == first.outcome()
    assert "has ended already; --output.fresh true trains it again" in capsys.readouterr().out
    fresh = dataclasses.replace(config, output=dataclasses.replace(config.output, fresh=True))
    again = train(fresh)
    aside = RunRecord.open(again.folder.with_name(again.id + ".1"))
    assert aside.outcome().results["test_loss_nats"] == again.outcome().results["test_loss_nats"]


def test_divergence_is_an_outcome(tiny_run: Build):
    record = train(tiny_run(model__norm="none", optim__name="sgd", optim__lr=1e6, optim__clip=0.0, training__steps=40))
    outcome = record.outcome()
    assert outcome.state == "diverged"
    assert outcome.step <= 20
    assert "not below the bound of 20" in outcome.reason
    assert train(record.config).outcome() == outcome


def test_early_stopping_says_so(tiny_run: Build):
    record = train(tiny_run(optim__lr=1e-9, training__steps=100, training__valid_every=1, training__early_stop=2))
    assert record.outcome().state == "finished"
    assert record.outcome().step < 100
    assert "stopped early" in record.outcome().reason


def test_the_last_step_competes_for_the_best_weights(tiny_run: Build):
    record = train(tiny_run(training__steps=13, training__valid_every=5, optim__lr=1e-2))
    assert record.outcome().results["best_step"] == 13
    assert [row["step"] for row in record.metrics() if "valid_loss_nats" in row] == [5, 10, 13]
    for name in ("best", "last"):
        stored = torch.load(record.checkpoints / f"{name}.ckpt", weights_only=True)
        assert stored["global_step"] == 13


def test_classification_learns_and_stands_beside_its_baseline(tiny_run: Build, tiny_labels: Path):
    for model in ("lstm", "transformer", "mlp"):
        changes = {"data__corpus": str(tiny_labels), "training__steps": 150, "optim__lr": 1e-2, "data__length": 0}
        changes |= {"training__valid_every": 150, "training__checkpoint_every": 150, "training__activations_every": 0}
        results = train(tiny_run(model=model, **changes)).outcome().results
        assert float(results["majority_test_accuracy"]) < 0.7
        assert float(results["test_accuracy"]) > 0.9


def test_language_model_beats_the_unigram_baseline(tiny_run: Build):
    results = train(tiny_run(training__steps=60, optim__lr=1e-2)).outcome().results
    assert float(results["test_loss_nats"]) < float(results["unigram_test_loss_nats"]) - 0.2


def test_module_and_datamodule_work_in_a_trainer_of_ones_own(tiny_run: Build, tmp_path: Path):
    config = tiny_run(model__norm="bn_step")
    data = normlab.TextDataModule(config.data, seed=1)
    module = normlab.TextModule(config, data.text)
    trainer = pl.Trainer(
        max_epochs=1,
        limit_train_batches=5,
        logger=pl.loggers.CSVLogger(tmp_path),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, datamodule=data)
    metrics = trainer.test(module, datamodule=data, verbose=False)[0]
    assert trainer.global_step == 5
    assert 0 < metrics["test_loss_nats"] < 5
    header = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()[0]
    assert {"train_loss_nats", "valid_loss_nats", "gradient_norm"} <= set(header.split(","))


def test_the_evaluated_part_of_train_is_spread_over_it(tiny_run: Build, tiny_labels: Path):
    config = tiny_run(data__corpus=str(tiny_labels))
    data = normlab.TextDataModule(config.data)
    part = data.train_part_dataloader()
    assert len(list(part)) == len(part) == len(part.taken)
    rows = sum(len(batch.tokens_BT) for batch in part)
    valid = sum(len(batch.tokens_BT) for batch in data.val_dataloader())
    assert valid <= rows <= 2 * valid
    lengths = [batch.tokens_BT.shape[1] for batch in part]
    assert lengths[0] <= 3
    assert lengths[-1] >= 8


def test_no_norm_means_no_norm(tiny_run: Build, tiny_text: Path):
    torch_norms = (torch.nn.LayerNorm, torch.nn.RMSNorm, torch.nn.GroupNorm, torch.nn.modules.batchnorm._NormBase)
    for model in ("lstm", "transformer", "mlp"):
        config = tiny_run(model=model, model__norm="none")
        module = normlab.TextModule(config, normlab.TextDataModule(config.data).text)
        norms = [part for part in module.modules() if isinstance(part, normlab.Norm)]
        assert norms
        assert all(not list(norm.parameters()) and not list(norm.buffers()) for norm in norms)
        assert not any(isinstance(part, torch_norms) for part in module.modules())
        x_BTF = torch.randn(2, 3, 16)
        assert all(norm(x_BTF) is x_BTF for norm in norms)


def test_a_batch_norm_needs_two_rows(tiny_run: Build):
    with pytest.raises(InputError, match="bn takes its statistics over the rows of a batch, and a batch has one row"):
        train(tiny_run(model__norm="bn", data__batch_size=1))
    assert train(tiny_run(model__norm="ln", data__batch_size=1)).outcome().state == "finished"


def test_accumulation_with_a_batch_norm_is_recorded(tiny_run: Build, capsys: pytest.CaptureFixture[str]):
    record = train(tiny_run(model__norm="bn", training__accumulate=4, output__progress=True))
    assert record.environment()["statistics_batch_rows"] == 8
    assert "batch statistics still see 8 rows, the gradient 32" in " ".join(capsys.readouterr().out.split())
    assert "statistics_batch_rows" not in train(tiny_run(model__norm="ln")).environment()


def test_a_changed_text_is_refused_on_resume(tiny_run: Build, tiny_text: Path, tmp_path: Path):
    text = tmp_path / "mine.txt"
    text.write_text(tiny_text.read_text())
    config = tiny_run(data__corpus=str(text))
    train(config)
    text.write_text(tiny_text.read_text().replace("norm", "form"))
    with pytest.raises(InputError, match="has changed since"):
        train(config)


# Every field does something: no dead knobs.

OTHER = {
    OptimConfig: {
        "name": "sgd",
        "lr": 1e-3,
        "weight_decay": 0.5,
        "schedule": "linear",
        "warmup_steps": 3,
        "clip": 1e-3,
    },
    TrainingConfig: {
        "steps": 6,
        "valid_every": 2,
        "checkpoint_every": 1,
        "accumulate": 2,
        "precision": "bf16",
        "accelerator": "gpu",
        "devices": 2,
        "threads": 2,
        "early_stop": 1,
        "divergence_nats": 0.5,
        "activations_every": 2,
    },
    DataConfig: {
        "corpus": "other.txt",
        "tokens": "word",
        "vocabulary": 5,
        "batch_size": 4,
        "length": 7,
        "stream": "stateful",
        "text_column": "nothing",
        "label_column": "nothing",
        "resample": True,
    },
}
ELSEWHERE = {
    (TrainingConfig, "devices"): "test_two_processes in tests/training/test_two_processes.py",
    (TrainingConfig, "checkpoint_every"): "changes files, not numbers: test_a_checkpoint_every_so_many_steps",
    (TrainingConfig, "early_stop"): "test_early_stopping_says_so",
    (TrainingConfig, "valid_batches"): "test_a_validation_of_a_few_batches",
    (TrainingConfig, "recompute_batches"): "tests/training/test_recompute_run.py",
    (DataConfig, "corpus"): "every test with another corpus",
    (DataConfig, "vocabulary"): "tests/data/test_tokens.py",
    (DataConfig, "text_column"): "tests/data/test_own_text.py",
    (DataConfig, "label_column"): "tests/data/test_own_text.py",
}
FIELDS = [(cls, field.name) for cls in OTHER for field in dataclasses.fields(cls)]


SHORT = {"training__steps": 8, "training__valid_every": 4, "model__width": 8}


@pytest.fixture(scope="module")
def short_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the run that `test_every_field_changes_a_run` compares with, which is trained once."""
    return tmp_path_factory.mktemp("short")


@pytest.mark.parametrize(("cls", "name"), [f for f in FIELDS if f not in ELSEWHERE], ids=lambda value: str(value))
def test_every_field_changes_a_run(tiny_run: Build, short_runs: Path, cls: type, name: str):
    part = {OptimConfig: "optim", TrainingConfig: "training", DataConfig: "data"}[cls]
    base = train(tiny_run(**SHORT, output__runs_dir=str(short_runs)))
    config = tiny_run(**{**SHORT, f"{part}__{name}": OTHER[cls][name]})
    if name == "accelerator" and not torch.cuda.is_available():
        with pytest.raises(InputError, match="torch sees none"):
            train(config)
        return
    other = train(config)
    changed = (numbers(base), base.outcome().state, base.environment()["threads"])
    assert changed != (numbers(other), other.outcome().state, other.environment()["threads"])


def test_a_validation_of_a_few_batches(tiny_run: Build):
    """While training it sees a part of the split; the final losses are those of the whole."""
    short = {"training__steps": 8, "training__valid_every": 8, "model__norm": "bn"}
    whole = train(tiny_run(**short))
    part = train(tiny_run(**short, training__valid_batches=1))
    of_whole, of_part = (
        next(row["valid_loss_nats"] for row in record.metrics() if "valid_loss_nats" in row) for record in (whole, part)
    )
    assert of_part != of_whole
    same = ("valid_loss_nats", "valid_running_loss_nats", "test_loss_nats", "train_loss_nats")
    assert {name: part.outcome().results[name] for name in same} == {
        name: whole.outcome().results[name] for name in same
    }


def test_a_checkpoint_every_so_many_steps(tiny_run: Build, monkeypatch: pytest.MonkeyPatch):
    saved: list[int] = []
    save = stopping.Checkpoints._save_last

    def spy(self: stopping.Checkpoints, trainer: pl.Trainer) -> None:
        saved.append(trainer.global_step)
        save(self, trainer)

    monkeypatch.setattr(stopping.Checkpoints, "_save_last", spy)
    train(tiny_run(training__steps=12, training__checkpoint_every=3, training__valid_every=4))
    assert saved == [3, 4, 6, 8, 9, 12]


def test_the_models_fields_are_covered_by_their_own_tests():
    for cls, file in (
        (LSTMConfig, "test_lstm"),
        (TransformerConfig, "test_transformer"),
        (MLPConfig, "test_mlp"),
        (HuggingFaceConfig, "test_huggingface"),
    ):
        text = "".join(path.read_text() for path in Path("tests/models").glob(f"{file}*.py"))
        missing = [field.name for field in dataclasses.fields(cls) if field.name not in text and field.name != "name"]
        assert not missing


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("norm", ["none", "ln"])
def test_a_run_on_a_gpu_has_one_precision(
    tiny_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, norm: str
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # PyTorch's default
    record = train(tiny_run(model__norm=norm, training__accelerator="gpu"))
    environment = record.environment()
    assert (record.outcome().state, environment["tf32"]) == ("finished", False)
    assert environment["devices"] == [torch.cuda.get_device_name()]


def test_a_run_on_a_cpu_leaves_a_gpu_alone(tiny_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking CUDA for anything takes memory on the GPU, and fails where the GPU is another program's alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # Torch's own optimizers ask whether a graph is being captured; built for a GPU, it can not answer without one.
    monkeypatch.setattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda self: None)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: pytest.fail("CUDA was asked"))
    record = train(tiny_run(training__accelerator="cpu", training__steps=2))
    assert record.outcome().state == "finished"
