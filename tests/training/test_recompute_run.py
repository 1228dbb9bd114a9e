"""Before the final test stored statistics are re-estimated; both numbers are recorded."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

import normlab
from normlab.config import RunConfig, run_id
from normlab.data.batches import Batch
from normlab.models.output import ModelOutput
from normlab.norms.batch_statistics import BatchStatisticsNorm
from normlab.records.record import RunRecord
from normlab.records.summary import summary_rows
from normlab.records.wandb_mirror import WandbMirror
from normlab.training import final
from normlab.training.module import TextModule
from normlab.training.run import train

Build = Callable[..., RunConfig]

RUNS: dict[str, dict[str, Any]] = {
    "lstm, bn_step": {"model__norm": "bn_step"},
    "lstm, stateful, bn_step": {"model__norm": "bn_step", "data__stream": "stateful", "data__batch_size": 4},
    "transformer, bn, best weights before the end": {
        "model": "transformer",
        "model__norm": "bn",
        "model__norm_options__momentum": 1.0,
        "optim__lr": 1e-6,
        "training__valid_every": 1,
    },
    "lstm, words, rbn, bf16": {"model__norm": "rbn", "data__tokens": "word", "training__precision": "bf16"},
}
"""What the cases differ in; in the third one validation says how lucky the last batch was."""


def metrics_of(record: RunRecord, checkpoint: str) -> dict[str, float]:
    """Test metrics of a stored checkpoint, in a trainer of its own."""
    config = record.config
    data = normlab.TextDataModule(config.data, config.seed)
    module = normlab.TextModule(config, data.text)
    stored = torch.load(record.checkpoints / checkpoint, weights_only=True)
    assert stored["global_step"] == record.outcome().results["best_step"]
    module.load_state_dict(stored["state_dict"])
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    precision = "bf16-mixed" if config.training.precision == "bf16" else "32-true"
    trainer = pl.Trainer(**quiet, enable_model_summary=False, accelerator="cpu", precision=precision)
    return dict(trainer.test(module, datamodule=data, verbose=False)[0])


@pytest.mark.parametrize("name", RUNS)
def test_both_numbers_are_recorded_and_belong_to_their_checkpoints(tiny_run: Build, name: str):
    record = train(tiny_run(**RUNS[name]))
    results = record.outcome().results
    fits = {"loss_nats", "bits_per_char", "word_perplexity"}
    for checkpoint, prefix in (("best.ckpt", "test_running"), ("final.ckpt", "test")):
        stored = metrics_of(record, checkpoint)
        for unit in fits:
            assert results[f"{prefix}_{unit}"] == stored[f"test_{unit}"]
    for split in ("test", "valid"):
        assert all(results[f"{split}_{unit}"] != results[f"{split}_running_{unit}"] for unit in fits)
    best_step = results["best_step"]
    (row,) = [row for row in record.metrics() if "valid_loss_nats" in row and row["step"] == best_step]
    assert results["valid_running_loss_nats"] == row["valid_loss_nats"]
    assert (int(best_step) < 10) == ("best weights" in name)
    assert "train_running_loss_nats" not in results


def test_in_classification_too(tiny_run: Build, tiny_labels: Path):
    record = train(tiny_run(model__norm="bn_step", data__corpus=str(tiny_labels), data__length=0))
    results = record.outcome().results
    for unit in ("loss_nats", "accuracy"):
        assert results[f"test_running_{unit}"] == metrics_of(record, "best.ckpt")[f"test_{unit}"]
        assert results[f"test_{unit}"] == metrics_of(record, "final.ckpt")[f"test_{unit}"]
    assert results["test_running_loss_nats"] != results["test_loss_nats"]
    assert "test_running_bits_per_char" not in results


@pytest.mark.parametrize("stream", ["windows", "stateful"])
def test_the_statistics_are_those_of_the_first_training_batches(tiny_run: Build, stream: str):
    config = tiny_run(
        model__norm="bn_step",
        model__dropout=0.5,
        data__stream=stream,
        data__batch_size=4,
        training__recompute_batches=7,
    )
    record = train(config)
    data = normlab.TextDataModule(config.data, config.seed)
    module = normlab.TextModule(config, data.text)
    module.load_state_dict(torch.load(record.checkpoints / "best.ckpt", weights_only=True)["state_dict"])
    batches = [batch for batch, _ in zip(data.train_dataloader(), range(7), strict=False)]
    state = None

    def forward(batch: Batch) -> None:
        nonlocal state
        state = module.model(batch.tokens_BT, None, state if stream == "stateful" else None).state

    gaps = normlab.recompute_statistics(module.model, batches, forward)
    stored = torch.load(record.checkpoints / "final.ckpt", weights_only=True)["state_dict"]
    assert stored.keys() == module.state_dict().keys()
    for key, value in module.state_dict().items():
        torch.testing.assert_close(stored[key], value)
    results, written = record.outcome().results, record.statistics_gap()
    assert results["recomputed_batches"] == written["batches"] == 7
    assert set(written["norms"]) == set(gaps)
    assert len(gaps) == 3
    for name, gap in gaps.items():
        assert written["norms"][name]["mean"] == pytest.approx(gap.mean, rel=1e-4)
        assert written["norms"][name]["entries"] == gap.entries
    assert results["statistics_gap_mean"] == pytest.approx(max(gap.mean for gap in gaps.values()), rel=1e-4)
    assert results["statistics_gap_std"] == pytest.approx(max(gap.std for gap in gaps.values()), rel=1e-4)
    assert results["statistics_gap_mean"] > 0


def test_no_more_than_one_pass(tiny_run: Build):
    config = tiny_run(model__norm="bn", training__recompute_batches=10**6)
    epoch = len(normlab.TextDataModule(config.data, config.seed).train_dataloader())
    assert train(config).outcome().results["recomputed_batches"] == epoch


def test_zero_switches_it_off(tiny_run: Build):
    on, off = (tiny_run(model__norm="bn_step", training__recompute_batches=batches) for batches in (64, 0))
    # A run recorded before there was re-estimation keeps its id.
    assert run_id(on) == run_id(tiny_run(model__norm="bn_step")) != run_id(off)
    with_both, with_one = train(on), train(off)
    results = with_one.outcome().results
    for split in ("test", "valid"):
        assert results[f"{split}_loss_nats"] == with_both.outcome().results[f"{split}_running_loss_nats"]
    assert not any("running" in name or "statistics" in name or "recomputed" in name for name in results)
    assert with_one.statistics_gap() == {}
    assert not (with_one.checkpoints / "final.ckpt").exists()
    assert "running" not in dict(summary_rows(with_one))


def test_a_model_without_stored_statistics_is_left_alone(tiny_run: Build, monkeypatch: pytest.MonkeyPatch):
    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(final, "reestimate", never)
    record = train(tiny_run(model__norm="ln"))
    results = record.outcome().results
    assert not any("running" in name or "statistics" in name for name in results)
    (row,) = [row for row in record.metrics() if "valid_loss_nats" in row and row["step"] == results["best_step"]]
    assert results["valid_loss_nats"] == row["valid_loss_nats"]
    assert not (record.checkpoints / "final.ckpt").exists()


def test_the_precision_is_that_of_training_and_nothing_else_changes(tiny_run: Build, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[bool, bool, bool]] = []
    outputs = TextModule.outputs

    def spy(self: TextModule, batch: Batch) -> ModelOutput:
        norm = next(part for part in self.model.modules() if isinstance(part, BatchStatisticsNorm))
        seen.append((norm.collected is not None, self.model.training, torch.is_autocast_enabled("cpu")))
        return outputs(self, batch)

    monkeypatch.setattr(TextModule, "outputs", spy)
    train(tiny_run(model__norm="bn", training__precision="bf16", training__recompute_batches=3))
    assert [call for call in seen if call[0]] == [(True, False, True)] * 3


def test_the_carried_state_is_put_back(tiny_run: Build):
    config = tiny_run(model__norm="bn_step", data__stream="stateful", data__batch_size=4)
    data = normlab.TextDataModule(config.data, config.seed)
    module = normlab.TextModule(config, data.text)
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    batch = next(iter(data.train_dataloader()))
    module.outputs(batch)
    before = module.carried
    final.reestimate(trainer, module, [batch])
    assert module.carried is before
    with pytest.raises(normlab.InputError, match="no batches"):
        final.reestimate(trainer, module, [])
    assert module.carried is before


@pytest.mark.parametrize("when", [0, 2], ids=["before it", "in the middle"])
def test_ctrl_c_during_it_stops_at_once_and_the_run_can_be_resumed(
    tiny_run: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: int
):
    changes = {"model__norm": "bn_step", "data__stream": "stateful", "data__batch_size": 4}
    whole = train(tiny_run(**changes, output__runs_dir=str(tmp_path / "whole"))).outcome().results
    config = tiny_run(**changes)
    told = final._told

    def interrupted(batches: Any, *rest: Any) -> Any:
        for number, batch in enumerate(told(batches, *rest)):
            if number == when:
                signal.raise_signal(signal.SIGINT)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(final, "_told", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    record = RunRecord.open(run_id(config), config.output.runs_dir)
    assert (record.outcome().state, record.outcome().reason) == ("interrupted", "stopped at once")
    assert not (record.checkpoints / "final.ckpt").exists()
    results = train(config).outcome().results
    timed = {"tokens_per_second", "peak_memory_mib"}
    assert {k: v for k, v in results.items() if k not in timed} == {k: v for k, v in whole.items() if k not in timed}


def test_a_slow_one_says_what_it_does(tiny_run: Build, capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    line = "re-estimating stored statistics over 5 batches"
    config = tiny_run(model__norm="bn", training__recompute_batches=5)
    train(config)
    assert line not in capsys.readouterr().out
    monkeypatch.setattr(final, "SLOW_SECONDS", 0.0)
    train(tiny_run(model__norm="bn", training__recompute_batches=5, seed=2))
    assert capsys.readouterr().out.count(line) == 1


def test_table_and_mirror_show_both(tiny_run: Build, monkeypatch: pytest.MonkeyPatch):
    sent: dict[str, Any] = {}
    monkeypatch.setattr(WandbMirror, "summary", lambda self, results: sent.update(results))
    record = train(tiny_run(model__norm="bn"))
    results, rows = record.outcome().results, dict(summary_rows(record))
    assert f"{float(results['test_loss_nats']):.4f} nats" in rows["test"]
    running = rows["running"]
    assert f"with running averages: test {float(results['test_running_loss_nats']):.4f} nats" in running
    assert f"mean {float(results['statistics_gap_mean']):.2g} sigma" in running
    assert f"std {float(results['statistics_gap_std']):.2%}" in running
    assert f"{results['recomputed_batches']} training batches" in running
    for name in ("test_loss_nats", "test_running_loss_nats", "statistics_gap_mean", "statistics_gap_std"):
        assert sent[name] == results[name]
    assert json.loads((record.folder / "statistics_gap.json").read_text())["norms"]
