"""Which runs can be trained as one stacked model, and whether that was found to be faster. No torch: studies ask too.

runs/.study/stacks/<like>.json   what was measured for runs that differ in seed and learning rate alone
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from normlab.config import LSTMConfig, OptimConfig, OutputConfig, RunConfig, config_hash
from normlab.records.disk import parse_json, to_json, write_atomically

__all__ = ["MOST", "Gains", "like", "may_stack", "obstacle", "read_gains", "write_gains"]

MOST = 16
"""Runs of one stack, unless the user says another number."""

WORTHWHILE = 1.25
"""A stack must be so many times as fast: what is measured on a busy machine is noisy, and a tie is no reason."""


def obstacle(config: RunConfig) -> str:
    """Why this run can not be part of a stack; empty if it can."""
    model, data, training = config.model, config.data, config.training
    if model.name == "hf":
        return "an architecture of transformers is not written for a run axis"
    if model.dropout:
        return "dropout draws random numbers, which each run draws in an order of its own"
    if isinstance(model, LSTMConfig) and model.state_noise:
        return "state_noise draws random numbers, which each run draws in an order of its own"
    if isinstance(model, LSTMConfig) and model.recompute:
        return "recompute takes time steps anew in a way of its own"
    if data.stream == "stateful":
        return "a stateful stream carries a state from batch to batch"
    if training.accumulate > 1:
        return "gradients are accumulated over micro-batches"
    if training.devices > 1:
        return "it has several processes"
    if training.precision != "fp32":
        return "it trains in bfloat16"
    if training.early_stop:
        return "it may stop early"
    wandb = config.output.wandb
    if not (wandb == "off" or (wandb == "auto" and os.getenv("WANDB_MODE") == "disabled")):
        return "W&B mirrors one run at a time"
    return ""


def like(config: RunConfig) -> str:
    """A key that runs share if they differ in seed, learning rate and output alone."""
    optim = dataclasses.replace(config.optim, lr=OptimConfig.lr)
    return config_hash(dataclasses.replace(config, seed=0, optim=optim, output=OutputConfig()))[:16]


def may_stack(a: RunConfig, b: RunConfig) -> bool:
    """Whether the two can be trained in one stack: they differ in seed and learning rate, and nothing is in the way."""
    return not obstacle(a) and not obstacle(b) and like(a) == like(b)


@dataclass
class Gains:
    """What was measured for runs of one likeness.

    Args:
        where: machine, device and versions of the worker that measured; a worker elsewhere measures anew.
        by_runs: seconds of one run's step by itself, as a multiple of its share of a step of a stack of so many runs.
    """

    where: str
    by_runs: dict[int, float]

    def is_worthwhile(self, runs: int) -> bool | None:
        """Whether a stack of so many is; None if it was not measured. A larger stack gains no less than a smaller."""
        found = {measured: gain >= WORTHWHILE for measured, gain in self.by_runs.items()}
        if runs in found:
            return found[runs]
        if any(good and measured < runs for measured, good in found.items()):
            return True
        return False if any(not good and measured > runs for measured, good in found.items()) else None


def _gains_path(config: RunConfig) -> Path:
    return Path(config.output.runs_dir) / ".study" / "stacks" / f"{like(config)}.json"


def read_gains(config: RunConfig) -> Gains:
    """What was measured for runs like this one; nothing, if the file is not there or can not be read."""
    path = _gains_path(config)
    try:
        values = parse_json(path.read_bytes(), str(path))
        return Gains(str(values["where"]), {int(runs): float(gain) for runs, gain in values["by_runs"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Gains("", {})


def write_gains(config: RunConfig, gains: Gains) -> None:
    path = _gains_path(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, to_json(dataclasses.asdict(gains)) + "\n")
