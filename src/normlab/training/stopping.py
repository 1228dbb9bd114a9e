"""What ends a run before its last step, and what it leaves behind: signals, divergence, checkpoints."""

from __future__ import annotations

import signal
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint

from normlab.training.module import TextModule
from normlab.training.reading import read_best
from normlab.training.stopwatch import Stopwatch
from normlab.training.writing import write_checkpoint

__all__ = ["Checkpoints", "DivergenceGuard", "StopSignals"]

CHECK_EVERY = 10
"""Optimizer steps between looks at the loss: each look waits for the device."""

ONE_CTRL_C_SECONDS = 1.0
"""torchrun passes Ctrl-C on to processes that have it from the terminal already: within this time it is one."""


def is_validation_due(trainer: pl.Trainer, every: int) -> bool:
    """Whether this step ends in a validation: every so many steps, and the last one always."""
    return trainer.global_step % every == 0 or trainer.global_step >= trainer.max_steps


class StopSignals(pl.Callback):
    """Ctrl-C or SIGTERM ends the run after the current step, with a checkpoint; a second Ctrl-C ends it at once.

    As a context it gives the signals back at the end. They are taken once all processes of the run are there: until
    then there is nothing to save, and a process that waits for the others must be free to end.

    Args:
        valid_every: optimizer steps between validations; one that is due is still done, because a resumed run would
            not go back to it.
        pause_at: a step at which the run ends as if a signal had come.
        speaks: whether this process says that it is stopping.

    Attributes:
        received: the signal's number, or None.
        is_paused: it ended at `pause_at`.
        at_once: the training is over, so that there is no step to wait for.
    """

    def __init__(self, valid_every: int, pause_at: int | None = None, *, speaks: bool = True) -> None:
        self.valid_every = valid_every
        self.pause_at = pause_at
        self.is_paused = False
        self.speaks = speaks
        self.received: int | None = None
        self.at_once = False
        self._received_at = 0.0
        self._step = -1
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if not self._previous:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        again = self.received is not None and time.monotonic() - self._received_at > ONE_CTRL_C_SECONDS
        if number == signal.SIGINT and (self.at_once or again):
            raise KeyboardInterrupt
        if self.at_once:
            raise SystemExit(128 + number)
        if self.received is None:
            self.received, self._received_at = number, time.monotonic()
            if self.speaks:
                print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        step, before = trainer.global_step, self._step
        self._step = step
        if step == before:  # a half accumulated gradient is in no checkpoint
            return
        if step >= trainer.max_steps:
            trainer.should_stop = True  # so that Lightning validates after the last step too
        elif self.is_received(trainer) or step == self.pause_at:
            self.is_paused = step == self.pause_at
            trainer.should_stop = True
            if not is_validation_due(trainer, self.valid_every):
                trainer.limit_val_batches = 0  # else Lightning validates at any early end

    def is_received(self, trainer: pl.Trainer) -> bool:
        """Whether any process of the run has received a signal; all of them must ask."""
        if trainer.world_size == 1:
            return self.received is not None
        # Processes must stop at the same step. They wait for each other at every step as it is.
        received = trainer.strategy.reduce_boolean_decision(self.received is not None, all=False)
        if received and self.received is None:
            self.received = signal.SIGTERM
        return received


class DivergenceGuard(pl.Callback):
    """Ends the run when the training loss is not finite or above a bound; that is an outcome, not an error.

    Args:
        bound_nats: the largest loss that still counts as training.
    """

    def __init__(self, bound_nats: float) -> None:
        self.bound_nats = bound_nats
        self.reason = ""
        self._worst: torch.Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        # A loss since the last look counts after a resume too.
        return {"worst": None if self._worst is None else float(self._worst)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        worst = state_dict["worst"]
        self._worst = None if worst is None else torch.tensor(worst)

    @property
    def diverged(self) -> bool:
        return bool(self.reason)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        loss = cast(TextModule, module).last_loss_nats
        # maximum keeps a NaN, so no step between two looks is missed
        self._worst = loss if self._worst is None else torch.maximum(self._worst.to(loss.device), loss)
        if trainer.global_step % CHECK_EVERY == 0 or trainer.global_step >= trainer.max_steps:
            self._look(trainer, float(self._worst), "training")
            self._worst = None

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            loss = float(trainer.callback_metrics["valid_loss_nats"])
            # Only a loss that is no number ends a run here: a large finite one in evaluation mode, where stored
            # statistics may be off, is a measurement.
            self._look(trainer, loss if loss != loss or loss == float("inf") else 0.0, "validation")

    def _look(self, trainer: pl.Trainer, loss_nats: float, kind: str) -> None:
        # One process that diverges ends the run in all of them.
        diverged = trainer.strategy.reduce_boolean_decision(not loss_nats <= self.bound_nats, all=False)
        if diverged and not self.diverged:
            self.reason = (
                f"{kind} loss {loss_nats:g} nats at or before step {trainer.global_step} "
                f"is not below the bound of {self.bound_nats:g}"
            )
            trainer.should_stop = True
            trainer.limit_val_batches = 0


class Checkpoints(Checkpoint):
    """`last.ckpt` to resume from, and `best.ckpt`: the weights with the best validation loss.

    Validation while training is in evaluation mode, with the running averages of norms that store statistics; so the
    choice of the best weights rests on those. `final.ckpt` holds the same weights with re-estimated statistics, if a
    run was tested with them.

    A checkpoint that falls on a validation step is written after the validation, so that a resumed run never
    misses a validation and the choice of the best one is the same as in an uninterrupted run. A checkpoint is written
    beside the one before and then takes its place, so that a kill or a full disk leaves the one before. That one stays
    as `previous.ckpt` until the run has ended, for the case that the last one is found damaged.

    `best.ckpt` may be of a later step than the checkpoint that a run goes on from. It does not matter: the validations
    since then are done again with the same results, and write it again or, as before, do not. Where results are not
    the same each time, and it does matter, `load_best` refuses.

    Args:
        folder: where they go.
        every: optimizer steps between two `last.ckpt`.
        valid_every: optimizer steps between validations.
        stopwatch: is held while writing, so that seconds are seconds of training.
    """

    def __init__(self, folder: Path, every: int, valid_every: int, stopwatch: Stopwatch) -> None:
        self.folder = folder
        self.every = every
        self.valid_every = valid_every
        self.stopwatch = stopwatch
        self.best_loss_nats = float("inf")
        self.best_step = -1
        self.saved_step = -1
        self.last_is_damaged = False

    @property
    def last(self) -> Path:
        return self.folder / "last.ckpt"

    @property
    def previous(self) -> Path:
        return self.folder / "previous.ckpt"

    @property
    def best(self) -> Path:
        return self.folder / "best.ckpt"

    @property
    def final(self) -> Path:
        return self.folder / "final.ckpt"

    def state_dict(self) -> dict[str, Any]:
        return {"best_loss_nats": self.best_loss_nats, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_loss_nats, self.best_step = state_dict["best_loss_nats"], state_dict["best_step"]

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self.saved_step:  # a micro-batch that did not complete a step
            return
        if not is_validation_due(trainer, self.valid_every) and (trainer.should_stop or step % self.every == 0):
            self._save_last(trainer)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        loss_nats = float(trainer.callback_metrics["valid_loss_nats"])
        if loss_nats < self.best_loss_nats:
            self.best_loss_nats, self.best_step = loss_nats, trainer.global_step
            self._save(trainer, self.best, weights_only=True)
        self._save_last(trainer)

    def _save_last(self, trainer: pl.Trainer) -> None:
        self._save(trainer, self.last, weights_only=False)
        self.saved_step = trainer.global_step

    def load_best(self) -> dict[str, Any]:
        """What `best.ckpt` holds; an `InputError` if it is damaged, or not that of the best step."""
        return read_best(self.best, self.best_step)

    def save_final(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write `final.ckpt`: `best.ckpt` with the values that `module`, which had them from there, has by now."""

        def write(path: Path) -> None:
            if trainer.is_global_zero:
                stored = self.load_best()
                stored["state_dict"] = {name: value.cpu() for name, value in module.state_dict().items()}
                write_checkpoint(stored, path)

        self._replace(trainer, self.final, write)

    def _save(self, trainer: pl.Trainer, path: Path, *, weights_only: bool) -> None:
        self._replace(trainer, path, lambda beside: trainer.save_checkpoint(beside, weights_only=weights_only))

    def _replace(self, trainer: pl.Trainer, path: Path, write: Callable[[Path], None]) -> None:
        with self.stopwatch.held():
            beside = path.with_name(f".{path.name}.tmp")
            try:
                write(beside)
            except BaseException:
                if trainer.is_global_zero:
                    beside.unlink(missing_ok=True)  # on a full disk it would leave no room for the outcome
                raise
            if trainer.is_global_zero:
                if path == self.last and path.exists() and not self.last_is_damaged:
                    path.replace(self.previous)
                beside.replace(path)
            self.last_is_damaged = self.last_is_damaged and path != self.last
            trainer.strategy.barrier()
