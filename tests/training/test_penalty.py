"""A norm's penalty is trained on, logged beside the loss, and costs nothing where there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import normlab
from normlab.config import RunConfig
from normlab.norms.base import GatheredPenalties
from normlab.records.wandb_mirror import WandbMirror
from normlab.training import module as module_file
from normlab.training.run import train

Build = Callable[..., RunConfig]
STRONG = {"model__norm": "rbn", "model__norm_options__penalty_mean": 2.0}


def gradients(config: RunConfig, backward: Callable[[Any, Any], None]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    data = normlab.TextDataModule(config.data, config.seed)
    module = normlab.TextModule(config, data.text).double()
    backward(module, next(iter(data.train_dataloader())))
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def test_the_gradient_is_that_of_loss_and_penalty(tiny_run: Build):
    def step(module: Any, batch: Any) -> None:
        module.training_step(batch, 0).backward()

    def loss(module: Any, batch: Any) -> None:
        module.losses(batch).mean_nats.backward()

    def penalty(module: Any, batch: Any) -> None:
        with GatheredPenalties(module.model) as penalties:
            module.losses(batch)
        total = penalties.total()
        assert total is not None
        total.backward()

    config = tiny_run(**STRONG)
    whole, of_loss, of_penalty = (gradients(config, backward) for backward in (step, loss, penalty))
    assert set(whole) == set(of_loss)
    for name, grad in whole.items():
        torch.testing.assert_close(grad, of_loss[name] + of_penalty.get(name, torch.zeros_like(grad)))
    assert max(float(grad.abs().max()) for grad in of_penalty.values()) > 1e-3


def test_a_penalty_changes_training_and_is_logged(tiny_run: Build, monkeypatch: pytest.MonkeyPatch):
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(WandbMirror, "log", lambda self, metrics, step, seconds: sent.append(dict(metrics)))
    none = {"model__norm_options__penalty_mean": 0.0, "model__norm_options__penalty_var": 0.0}
    strong, free, bn = (train(tiny_run(**c)) for c in (STRONG, {**STRONG, **none}, {"model__norm": "bn"}))

    def of(record: Any, name: str) -> list[float]:
        return [row[name] for row in record.metrics() if name in row]

    assert of(strong, "penalty_nats")[0] > 0
    assert len(of(strong, "penalty_nats")) == len(of(strong, "train_loss_nats")) == 2
    assert set(of(free, "penalty_nats")) == {0.0}
    assert of(bn, "penalty_nats") == []
    assert [row["penalty_nats"] for row in sent if row.get("penalty_nats")] == of(strong, "penalty_nats")
    # The loss itself is comparable: the same before the first update, without the penalty; then others.
    assert of(strong, "train_loss_nats")[0] == of(free, "train_loss_nats")[0]
    # bn runs on the fast recurrence, which is equal within rounding.
    assert of(free, "train_loss_nats") == pytest.approx(of(bn, "train_loss_nats"), rel=1e-5)
    assert of(strong, "train_loss_nats")[1] != of(free, "train_loss_nats")[1]


def test_the_penalty_of_a_step_is_the_mean_over_its_micro_batches(tiny_run: Build, monkeypatch: pytest.MonkeyPatch):
    totals: list[float] = []
    total = GatheredPenalties.total

    def spy(self: GatheredPenalties) -> Any:
        value = total(self)
        assert value is not None
        totals.append(value.item())
        return value

    monkeypatch.setattr(GatheredPenalties, "total", spy)
    record = train(tiny_run(**STRONG, training__accumulate=3))
    logged = [row["penalty_nats"] for row in record.metrics() if "penalty_nats" in row]
    assert logged == pytest.approx([sum(totals[:3]) / 3, sum(totals[-3:]) / 3])


def test_without_a_penalty_only_the_first_batch_asks_for_one(tiny_run: Build, monkeypatch: pytest.MonkeyPatch):
    asked: list[torch.nn.Module] = []

    class Counted(GatheredPenalties):
        def __init__(self, model: torch.nn.Module) -> None:
            asked.append(model)
            super().__init__(model)

    monkeypatch.setattr(module_file, "GatheredPenalties", Counted)
    train(tiny_run(model__norm="bn"))
    assert len(asked) == 1
    train(tiny_run(model__norm="rbn"))
    assert len(asked) == 1 + 10
