"""Optimizer groups and schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch

import normlab
from normlab.config import OptimConfig, RunConfig
from normlab.training.optim import build_optimizer, build_schedule, decayed_parameters, rate_factor


@pytest.mark.parametrize("model", ["lstm", "transformer", "mlp"])
def test_weight_decay_touches_matrices_alone(tiny_run: Callable[..., RunConfig], model: str):
    config = tiny_run(model=model, model__norm="ln")
    module = normlab.TextModule(config, normlab.TextDataModule(config.data).text)
    decayed = decayed_parameters(module.model)
    shapes = {name: parameter.shape for name, parameter in module.model.named_parameters()}
    assert decayed
    assert all(len(shapes[name]) == 2 for name in decayed)
    spared = set(shapes) - decayed
    assert not any("weight_hh" in name or "ffn.up.weight" in name for name in spared)
    norms = {
        f"{prefix}.{name}"
        for prefix, part in module.model.named_modules()
        if isinstance(part, normlab.Norm)
        for name, _ in part.named_parameters()
    }
    assert norms
    assert norms <= spared
    assert any("embedding" in name for name in spared)
    assert not any("bias" in name or "initial" in name for name in decayed)


def test_decay_shrinks_a_matrix_and_leaves_its_bias():
    linear = torch.nn.Linear(3, 3)
    before = {name: parameter.detach().clone() for name, parameter in linear.named_parameters()}
    optimizer = build_optimizer(linear, OptimConfig(name="adamw", lr=0.1, weight_decay=0.5))
    for parameter in linear.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(linear.weight, before["weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(linear.bias, before["bias"])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.8535533905932737, 0.5, 0.14644660940672624]),
    ],
)
def test_schedules(schedule: Literal["constant", "cosine", "linear"], expected: list[float]):
    config = OptimConfig(schedule=schedule, warmup_steps=2, lr=0.5)
    assert [rate_factor(config, 6, step) for step in range(6)] == pytest.approx(expected)
    optimizer = build_optimizer(torch.nn.Linear(1, 1), config)
    scheduler = build_schedule(optimizer, config, 6)
    rates = []
    for _ in range(6):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.5 * factor for factor in expected])
