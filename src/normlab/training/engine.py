"""What computes recurrences and running statistics, decided once for a whole run: C kernels or torch operators."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytorch_lightning as pl
import torch

from normlab.machine.c_kernels import Kernels, compiler, left_out
from normlab.models.recurrent import Recurrent
from normlab.norms.kernels import PREFIX
from normlab.norms.kernels import SAVED_SECONDS as SAVED_SECONDS_PER_ENTRY
from normlab.recurrence.kernels import LSTM, SAVED_SECONDS
from normlab.training.facts import prefix_norms, recurrence_facts
from normlab.training.module import TextModule

__all__ = ["one_engine"]

log = logging.getLogger(__name__)


@contextmanager
def one_engine(module: TextModule, trainer: pl.Trainer, begun_with: bool | None) -> Iterator[bool | None]:
    """While open, the engine is the one decided here; yields whether it is the C kernels (None: none are wanted).

    Kernels that are built already are used. Else they are built, before the first step, unless the run is too short for
    that to pay. A run that goes on from a checkpoint stays with the engine it began with, whatever was built meanwhile:
    the other one rounds differently, and the numbers would not be those of a run without interruption.

    Args:
        begun_with: whether the run began on C kernels; None for a run that begins, or did so on a GPU.
    """
    if trainer.strategy.root_device.type != "cpu":
        yield None
        return
    recurrence = recurrence_facts(module, trainer)
    wanted = _wanted(module, trainer, recurrence.get("backend") == "fast")
    # Without a compiler some layers are left to the plain loop: that is another engine too.
    if not wanted and recurrence.get("reason") != LSTM.absence(torch.float32):
        yield None
        return
    if begun_with is False:
        with left_out("as this run began"):
            yield False
        return
    missing = [kernels for kernels in wanted if kernels.find(torch.float32) is None]
    short = sum(wanted[kernels] for kernels in missing) <= sum(kernels.build_seconds for kernels in missing)
    if begun_with is None and missing and short and compiler() is not None:
        with left_out("a run this short is not worth compiling for"):
            yield False
        return
    if wanted and all(kernels.load(torch.float32) is not None for kernels in wanted):
        yield True
        return
    if begun_with:
        log.warning("this run began on C kernels, which can not be had now; it goes on, with other rounding")
    with left_out("no C compiler that works"):
        yield False


def _wanted(module: TextModule, trainer: pl.Trainer, fast: bool) -> dict[Kernels, float]:
    """The kernels that serve this run, and the seconds that each saves it.

    Args:
        fast: the recurrence runs on its fast backend.
    """
    wanted: dict[Kernels, float] = {}
    time_steps = trainer.max_steps * trainer.accumulate_grad_batches * module.text.length
    recurrent = [part for part in module.modules() if isinstance(part, Recurrent)]
    if fast and any(part.uses_kernels() for part in recurrent):
        layers = sum(part.num_layers * (2 if part.bidirectional else 1) for part in recurrent)
        wanted[LSTM] = time_steps * layers * SAVED_SECONDS
    if features := sum(norm.dim for norm in prefix_norms(module)):
        wanted[PREFIX] = time_steps * module.config.data.batch_size * features * SAVED_SECONDS_PER_ENTRY
    return wanted
