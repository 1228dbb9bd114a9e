"""What does the work of a recurrence's time steps, decided once for a whole run: C kernels or torch operators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytorch_lightning as pl
import torch

from normlab.models.recurrent import Recurrent
from normlab.recurrence import kernels
from normlab.training.facts import recurrence_facts
from normlab.training.module import TextModule

__all__ = ["one_engine"]


@contextmanager
def one_engine(module: TextModule, trainer: pl.Trainer, begun_with: bool | None) -> Iterator[bool | None]:
    """While open, the engine is the one decided here; yields whether it is the C kernels (None: neither is wanted).

    Kernels that are built already are used. Else they are built, before the first step, unless the run is too short for
    that to pay. A run that goes on from a checkpoint stays with the engine it began with, whatever was built meanwhile:
    the other one rounds differently, and the numbers would not be those of a run without interruption.

    Args:
        begun_with: what this yielded when the run began; None for a run that begins.
    """
    recurrent = [part for part in module.modules() if isinstance(part, Recurrent)]
    on_cpu = trainer.strategy.root_device.type == "cpu"
    if not recurrent or not on_cpu or recurrence_facts(module, trainer)["backend"] != "fast":
        yield None
        return
    if begun_with is False:
        with kernels.left_out("as this run began"):
            yield False
        return
    layers = sum(part.num_layers * (2 if part.bidirectional else 1) for part in recurrent)
    updates = trainer.max_steps * trainer.accumulate_grad_batches
    short = not kernels.worth_building(updates * module.text.length * layers)
    if begun_with is None and short and kernels.find(torch.float32) is None and kernels.compiler() is not None:
        with kernels.left_out("a run this short is not worth compiling for"):
            yield False
        return
    yield kernels.load(torch.float32) is not None
