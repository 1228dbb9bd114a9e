"""The optimizer, its parameter groups and its schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from normlab.config import OptimConfig
from normlab.norms.base import Norm

__all__ = ["build_optimizer", "build_schedule", "decayed_parameters", "rate_factor"]


def decayed_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay touches: the matrices of linear maps and recurrences.

    Gains and biases of norms, all other biases, embeddings and initial states are left alone: decaying a
    gain would be a second, hidden experiment on the norm.
    """
    spared = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, Norm | nn.Embedding)
        for name, _ in module.named_parameters(recurse=False)
    }
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and name not in spared and "initial_" not in name.rsplit(".", 1)[-1]
    }


def build_optimizer(
    model: nn.Module, config: OptimConfig, parameters: Mapping[str, nn.Parameter] | None = None
) -> torch.optim.Optimizer:
    """The optimizer that `config` names, with weight decay on `decayed_parameters` alone.

    Args:
        parameters: to be optimized in the place of the model's own, by their names there.
    """
    decayed = decayed_parameters(model)
    own = dict(model.named_parameters()) if parameters is None else parameters
    named = [(name, parameter) for name, parameter in own.items() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in named if name in decayed], "weight_decay": config.weight_decay},
        {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    match config.name:
        case "adamw":
            return torch.optim.AdamW(groups, lr=config.lr)
        case "adam":
            return torch.optim.Adam(groups, lr=config.lr)
        case "sgd":
            return torch.optim.SGD(groups, lr=config.lr)


def rate_factor(config: OptimConfig, steps: int, step: int) -> float:
    """Learning rate at optimizer step `step` (from 0) of `steps`, as a fraction of `config.lr`."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0 - progress


def build_schedule(
    optimizer: torch.optim.Optimizer, config: OptimConfig, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """`rate_factor` as a torch scheduler, stepped once per optimizer step."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(config, steps, step))
