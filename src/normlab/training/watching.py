"""What a run shows while it trains: rows of the record, the W&B mirror, the progress bar, activation statistics."""

from __future__ import annotations

import time
from typing import Any, cast

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from normlab.data.batches import Batch
from normlab.probes.activations import SiteActivations
from normlab.records.record import RunRecord
from normlab.records.wandb_mirror import WandbMirror
from normlab.training.module import TextModule
from normlab.training.stopwatch import Stopwatch

__all__ = ["Activations", "ProgressBar", "Recorder"]

LOG_EVERY = 10
"""Optimizer steps between rows of the record: reading the loss waits for the device."""

LINE_SECONDS = 15.0
"""Without a terminal (a log file, a pipe) a plain line replaces the bar this often."""


class Recorder(pl.Callback):
    """Writes rows of metrics to the record and its mirror, by step and by seconds of training.

    Args:
        record: where the rows go first; None in all processes but the first.
        mirror: where they go next.
        stopwatch: seconds of training; its total survives a resume in the checkpoint.
    """

    def __init__(self, record: RunRecord | None, mirror: WandbMirror, stopwatch: Stopwatch) -> None:
        self.record = record
        self.mirror = mirror
        self.stopwatch = stopwatch
        self.tokens = 0
        self._row_seconds = 0.0
        self._row_tokens = 0
        self._row_step = -1

    @property
    def tokens_per_second(self) -> float:
        """Over the whole run."""
        return self.tokens / max(self.stopwatch.seconds, 1e-9)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.stopwatch.seconds, "tokens": self.tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.stopwatch.set(state_dict["seconds"])
        self.tokens = state_dict["tokens"]

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One row, to record and mirror."""
        if self.record is not None:
            self.record.log(step, self.stopwatch.seconds, metrics)
        self.mirror.log(metrics, step, self.stopwatch.seconds)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.stopwatch.start()
        self._row_seconds, self._row_tokens = self.stopwatch.seconds, self.tokens
        self._row_step = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.stopwatch.stop()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        mask = batch.mask_BT
        count = batch.tokens_BT.numel() if mask is None else int(mask.sum())
        self.tokens += count * trainer.world_size
        step = trainer.global_step
        due = step % LOG_EVERY == 0 or step == 1 or step >= trainer.max_steps or trainer.should_stop
        if not due or step == self._row_step:
            return
        metrics = {
            name: float(trainer.callback_metrics[name])
            for name in ("train_loss_nats", "penalty_nats", "gradient_norm", "learning_rate")
            if name in trainer.callback_metrics
        }
        if trainer.world_size > 1:  # of the joined batch, as the gradient is already
            metrics["train_loss_nats"] = float(
                trainer.strategy.reduce(trainer.callback_metrics["train_loss_nats"].clone())
            )
        seconds = self.stopwatch.seconds
        metrics["tokens_per_second"] = (self.tokens - self._row_tokens) / max(seconds - self._row_seconds, 1e-9)
        self._row_seconds, self._row_tokens, self._row_step = seconds, self.tokens, step
        self.write(step, metrics)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.stopwatch.stop()

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("valid_")}
        self.write(trainer.global_step, metrics)
        self.stopwatch.start()


class Activations(pl.Callback):
    """Records per-site activation statistics of one fixed validation batch, in evaluation mode.

    Args:
        recorder: where the rows go.
        batch: the batch.
        every: optimizer steps between two records; 0 records none.
    """

    def __init__(self, recorder: Recorder, batch: Batch, every: int) -> None:
        self.recorder = recorder
        self.batch = batch
        self.every = every
        self._done_step = -1

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if self.every == 0 or step == self._done_step or not (step % self.every == 0 or step == 1):
            return
        self._done_step = step
        model = cast(TextModule, module).model
        with self.recorder.stopwatch.held():
            batch = module.transfer_batch_to_device(self.batch, module.device, 0)
            training = model.training
            model.eval()
            with torch.no_grad(), SiteActivations(model) as activations:
                model(batch.tokens_BT, batch.mask_BT)
            model.train(training)
            if summary := activations.summary():  # empty where no norm of ours stands: nothing to write
                self.recorder.write(step, summary)


class ProgressBar(pl.Callback):
    """One bar for the whole run, in optimizer steps, with loss and speed; plain lines where there is no terminal.

    Args:
        console: where it is drawn.
        stopwatch: for the speed.
    """

    def __init__(self, console: Console, stopwatch: Stopwatch) -> None:
        self.console = console
        self.stopwatch = stopwatch
        self.status = ""
        self._bar: Progress | None = None
        self._line_at = time.monotonic()
        self._start_step = 0
        self._shown_step = 0
        self._start_seconds = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._start_step, self._start_seconds = trainer.global_step, self.stopwatch.seconds
        if not self.console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task("train", total=trainer.max_steps, completed=trainer.global_step, status="")

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self._shown_step:  # a micro-batch of an accumulated step
            return
        self._shown_step = step
        if step % LOG_EVERY and step != 1:
            if self._bar is not None:
                self._bar.update(self._task, completed=step)
            return
        speed = (step - self._start_step) / max(self.stopwatch.seconds - self._start_seconds, 1e-9)
        self.status = f"loss {float(cast(TextModule, module).last_loss_nats):.3f} nats, {speed:.2f} steps/s"
        if "valid_loss_nats" in trainer.callback_metrics:
            self.status += f", valid {float(trainer.callback_metrics['valid_loss_nats']):.3f}"
        self._show(trainer, self.status)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._bar is not None:
            self._show(trainer, f"{self.status}, validating")

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _show(self, trainer: pl.Trainer, status: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step, status=status)
        elif time.monotonic() - self._line_at >= LINE_SECONDS or trainer.global_step == 1:
            self._line_at = time.monotonic()
            self.console.print(f"step {trainer.global_step}/{trainer.max_steps}: {status}", highlight=False)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
