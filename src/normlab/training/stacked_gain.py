"""Whether a stack is faster than its runs by themselves, on the machine at hand: measured, once for runs of a kind.

It depends on what a single run leaves idle: much on a large GPU, or where a small model runs operator by operator;
nothing where C kernels or large products fill the processor already.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence

import torch

from normlab.config import RunConfig
from normlab.data.prepared import prepare
from normlab.machine.cache import processor
from normlab.training.datamodule import TextDataModule
from normlab.training.faults import require_accelerator
from normlab.training.module import TextModule
from normlab.training.optim import build_optimizer
from normlab.training.stackable import Gains, read_gains, write_gains
from normlab.training.stacked_model import StackedModel

__all__ = ["is_worth_stacking", "measure_gain"]

ROUNDS = 3
LONGEST_STEP_SECONDS = 0.5
"""A single step that takes longer leaves nothing idle; what a stack would do in that time is not tried."""

SETUP_SECONDS = 1.0
"""That a run of a stack is begun twice, by itself and by its stack: beside reading the text, which is measured."""


def is_worth_stacking(configs: Sequence[RunConfig]) -> bool:
    """Whether these runs, which may be stacked, are done sooner in one stack; measured if it is not known."""
    config, runs = configs[0], len(configs)
    device = require_accelerator(config.training.accelerator, config.training.devices)
    name = torch.cuda.get_device_name() if device == "gpu" else processor()
    where = f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    gains = read_gains(config)
    if gains.where != where:
        gains = Gains(where, {})
    known = gains.is_worthwhile(runs)
    if known is not None:
        return known
    gains.by_runs[runs] = round(measure_gain(configs), 3)
    write_gains(config, gains)
    return bool(gains.is_worthwhile(runs))


def measure_gain(configs: Sequence[RunConfig]) -> float:
    """Seconds of a run by itself, as a multiple of its share of a stack of all `configs`; 0 if they cannot be stacked.

    Validations are left out: they gain as steps do. So is the final evaluation, which is the same either way.
    """
    config = configs[0]
    began = time.process_time()
    text = prepare(config.data)
    device = "cuda" if require_accelerator(config.training.accelerator, config.training.devices) == "gpu" else "cpu"
    module = TextModule(config, text).to(device).train()
    setup = time.process_time() - began + SETUP_SECONDS
    loaders = [TextDataModule(each.data, each.seed, text).train_dataloader() for each in configs]
    batches = [list(itertools.islice(loader, ROUNDS + 1)) for loader in loaders]
    of_step = [[of_run[step % len(of_run)] for of_run in batches] for step in range(ROUNDS + 1)]
    models = [copy.deepcopy(module.model) for _ in configs]
    optimizer = build_optimizer(module.model, dataclasses.replace(config.optim, lr=1e-6))

    def single(step: int) -> None:
        batch = module.transfer_batch_to_device(of_step[step][0], module.device, 0)
        module.losses(batch).mean_nats.backward()
        torch.nn.utils.clip_grad_norm_(module.model.parameters(), config.optim.clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()

    try:
        alone = _seconds(single, device)
        if alone > LONGEST_STEP_SECONDS:
            return 0.0
        stack = StackedModel(models, config.optim, text)
        together = _seconds(lambda step: stack.step(of_step[step], [1e-6] * len(configs)) and None, device)
    except RuntimeError:  # out of memory, or an operator that knows no run axis
        return 0.0
    steps = config.training.steps
    return steps * alone / (steps * together / len(configs) + setup)


def _seconds(take_step: Callable[[int], None], device: str) -> float:
    """Of the fastest step after one to warm up; on a CPU, which other workers share, seconds of this process alone."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    taken: list[float] = []
    for step in range(ROUNDS + 1):
        began = clock()
        take_step(step)
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(clock() - began)
    return min(taken[1:])
