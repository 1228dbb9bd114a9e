"""What does the work of a recurrence's time steps, decided once for a whole run: C kernels or torch operators."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytorch_lightning as pl
import torch

from normlab.models.recurrent import Recurrent
from normlab.recurrence import kernels
from normlab.training.facts import recurrence_facts
from normlab.training.module import TextModule

__all__ = ["one_engine"]

log = logging.getLogger(__name__)


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
    if not recurrent or trainer.strategy.root_device.type != "cpu":
        yield None
        return
    if begun_with is False:
        with kernels.left_out("as this run began"):
            yield False
        return
    facts = recurrence_facts(module, trainer)
    built = None
    if facts["backend"] == "fast" and any(part.uses_kernels() for part in recurrent):
        layers = sum(part.num_layers * (2 if part.bidirectional else 1) for part in recurrent)
        updates = trainer.max_steps * trainer.accumulate_grad_batches
        short = not kernels.worth_building(updates * module.text.length * layers)
        if begun_with is None and short and kernels.find(torch.float32) is None and kernels.compiler() is not None:
            with kernels.left_out("a run this short is not worth compiling for"):
                yield False
            return
        built = kernels.load(torch.float32) is not None
    elif facts["reason"] == kernels.absence(torch.float32):
        # Without a compiler some layers are left to the plain loop: that is another engine too.
        built = False
    if begun_with and not built:
        log.warning("this run began on C kernels, which can not be had now; it goes on, with other rounding")
    yield built
