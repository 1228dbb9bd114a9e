"""Several runs trained as one stacked model, from one checkpoint of each to a later one.

    first step: by itself -> checkpoint -> steps and validations: stacked -> checkpoint -> final evaluation: by itself

A stack does nothing but bring the checkpoints of its runs forward, in the format that a run by itself reads and writes,
with the rows between. So a run can leave a stack at any checkpoint, interrupted or not, and go on by itself or in
another stack; and how a run begins and ends is said in one place, `training.run`.
"""

from __future__ import annotations

import copy
import dataclasses
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor

from normlab.config import InputError, RunConfig, run_id
from normlab.data.batches import Batch
from normlab.data.prepared import PreparedText, prepare
from normlab.models.recurrent import Recurrent
from normlab.records.record import Outcome, RunRecord
from normlab.records.wandb_mirror import WandbMirror
from normlab.training.datamodule import TextDataModule, WholeRun
from normlab.training.facts import prefix_norms, run_facts
from normlab.training.faults import belongs_to, failure, require_accelerator, require_same_text
from normlab.training.module import TextModule
from normlab.training.optim import rate_factor
from normlab.training.reading import read_checkpoint
from normlab.training.run import train
from normlab.training.stackable import may_stack, obstacle
from normlab.training.stacked_model import StackedModel, StepNumbers
from normlab.training.stopping import Checkpoints, DivergenceGuard, StopSignals, is_validation_due
from normlab.training.stopwatch import Stopwatch
from normlab.training.watching import LINE_SECONDS, Activations, Recorder
from normlab.training.writing import write_checkpoint

__all__ = ["advance_stacked", "train_stacked"]

STOPPED = (signal.SIGINT.name, signal.SIGTERM.name)


def train_stacked(configs: Sequence[RunConfig]) -> list[RunRecord]:
    """Train runs that differ in seed and learning rate alone, as one stacked model; returns their records.

    Each ends with the numbers that `train` gives it, within rounding. Runs that have ended are left as they are; those
    that were interrupted go on from their last checkpoints, in one stack if they have done equally many steps.

    Raises:
        InputError: they cannot be stacked (`stackable.obstacle` says why); or what `train` raises.
    """
    going_on = advance_stacked(configs)
    begun = [dataclasses.replace(config, output=dataclasses.replace(config.output, fresh=False)) for config in configs]
    return [train(config) if going_on else _record(config) for config in begun]


def advance_stacked(configs: Sequence[RunConfig]) -> bool:
    """Bring runs to the checkpoint at their last step, stacked; what is left is their final evaluation, by `train`.

    A run for which that fails is left at its last checkpoint, for `train` to go on with.

    Returns:
        False if a signal stopped them.

    Raises:
        InputError: they cannot be stacked.
    """
    for config in configs:
        why = obstacle(config)
        if why or not may_stack(config, configs[0]):
            raise InputError(f"runs cannot be stacked: {why or 'they differ in more than seed and learning rate'}")
    text = prepare(configs[0].data)
    begun: list[tuple[RunRecord, dict[str, Any]]] = []
    for config in configs:
        try:
            if _takes_first_step(config):
                return False
            stored = _last_checkpoint(_record(config), text)
        except InputError:
            continue  # it is said when the run is trained by itself
        if stored is not None and stored["global_step"] < config.training.steps:
            begun.append((_record(config), stored))
    for step in sorted({stored["global_step"] for _, stored in begun}):
        alike = [(record, stored) for record, stored in begun if stored["global_step"] == step]
        if len(alike) > 1 and not _advance(text, alike):
            return False
    return True


def _record(config: RunConfig) -> RunRecord:
    return RunRecord(Path(config.output.runs_dir) / run_id(config), config)


def _takes_first_step(config: RunConfig) -> bool:
    """Begin the run by itself, if it was not begun; whether a signal stopped it."""
    record = _record(config)
    if record.outcome().state in ("finished", "diverged") and not config.output.fresh:
        return False
    if (record.checkpoints / "last.ckpt").exists() and not config.output.fresh:
        return False
    return train(config, pause_at=1).outcome().reason in STOPPED


def _last_checkpoint(record: RunRecord, text: PreparedText) -> dict[str, Any] | None:
    """What the run goes on from; None if it has ended, or has no checkpoint."""
    path = record.checkpoints / "last.ckpt"
    if record.outcome().state != "interrupted" or not path.exists():
        return None
    require_same_text(record, text)
    stored = read_checkpoint(path, "train it by itself")
    return stored if "global_step" in stored else None


def _advance(text: PreparedText, alike: Sequence[tuple[RunRecord, dict[str, Any]]]) -> bool:
    """As `advance_stacked`, of runs that have done equally many steps."""
    clock, runs = Stopwatch(), []
    ours: list[tuple[RunRecord, dict[str, Any]]] = []
    try:
        for record, stored in alike:
            if _is_ours(record):
                ours.append((record, stored))
        runs = [_Run(record, text, stored, clock) for record, stored in ours]
        runs = [run for run in runs if belongs_to(run.stored, run.module)]
        return len(runs) < 2 or _Stack(text, runs, clock).train()
    except RuntimeError as error:  # out of memory, or an operator that knows no run axis
        print(f"the stack failed, its runs go on one by one: {failure(error)}", file=sys.stderr)
        return True
    finally:
        for run in runs:
            run.leave()
        for record, _ in ours:
            record.release()


def _is_ours(record: RunRecord) -> bool:
    """Claim the record; False if another process has it by now, or had it and ended the run."""
    if record.outcome().state != "interrupted":
        return False
    try:
        record.start()
    except InputError:
        return False
    return True


class _Share(Stopwatch):
    """Seconds of one run: its share of those of the stack, whose clock it holds where a run by itself holds its own."""

    def __init__(self, clock: Stopwatch) -> None:
        super().__init__()
        self._clock = clock

    def start(self) -> None: ...

    def stop(self) -> None: ...

    @contextmanager
    def held(self) -> Iterator[None]:
        with self._clock.held():
            yield


class _StandIn:
    """What the callbacks of a run ask of its Trainer, which in a stack it has not."""

    world_size = 1
    is_global_zero = True

    def __init__(
        self, global_step: int, max_steps: int, save: Callable[[Path, bool], None], device: torch.device
    ) -> None:
        self.global_step, self.max_steps = global_step, max_steps
        self.should_stop = False
        self.limit_val_batches = 1.0
        self.callback_metrics: dict[str, Any] = {}
        self.state = SimpleNamespace(fn="fit")
        self.strategy = SimpleNamespace(
            root_device=device, barrier=lambda: None, reduce_boolean_decision=lambda decision, all: decision
        )
        self._save = save

    def save_checkpoint(self, path: Path, weights_only: bool) -> None:
        self._save(path, weights_only)


class _Run:
    """One run of a stack: its record, its batches, and the callbacks that it has by itself too."""

    def __init__(self, record: RunRecord, text: PreparedText, stored: dict[str, Any], clock: Stopwatch) -> None:
        self.record, self.config, self.stored = record, record.config, stored
        config = self.config
        training = config.training
        gpu = require_accelerator(training.accelerator, training.devices) == "gpu"
        self.module = TextModule(config, text).to("cuda" if gpu else "cpu")
        data = TextDataModule(config.data, config.seed, text)
        self.loader = WholeRun(data.train_dataloader(), training.steps)
        self.batches: Iterator[Batch] = iter(())
        self.seconds = _Share(clock)
        self.trainer = _StandIn(stored["global_step"], training.steps, self._save, self.module.device)
        off = dataclasses.replace(config, output=dataclasses.replace(config.output, wandb="off"))
        self.recorder = Recorder(record, WandbMirror.start(off, record.folder), self.seconds)
        self.guard = DivergenceGuard(training.divergence_nats)
        batch = next(iter(data.val_dataloader()))
        self.activations = Activations(self.recorder, batch, training.activations_every)
        self.checkpoints = Checkpoints(
            record.checkpoints, training.checkpoint_every, training.valid_every, self.seconds
        )
        self.outcome: Outcome | None = None
        self.stack: StackedModel | None = None
        self.place = 0

    @property
    def step(self) -> int:
        return self.trainer.global_step

    def begin(self) -> None:
        """Go on from the checkpoint."""
        stored = self.stored
        self.module.load_state_dict(stored.pop("state_dict"))
        self.loader.load_state_dict(_loops(stored)["state_dict"]["combined_loader"][0])
        self.batches = iter(self.loader)
        for callback in self._remembering():
            callback.load_state_dict(stored["callbacks"][callback.state_key])
        self.record.rewind(self.step)
        trainer = cast(pl.Trainer, self.trainer)
        self.recorder.on_train_start(trainer, self.module)

    def _remembering(self) -> list[pl.Callback]:
        """Callbacks with a state in the checkpoint."""
        every = (self.guard, self.recorder, self.activations, self.checkpoints)
        return [callback for callback in every if callback.state_key in self.stored["callbacks"]]

    def rate(self, step: int) -> float:
        """Learning rate after `step` steps."""
        optim = self.config.optim
        return optim.lr * rate_factor(optim, self.config.training.steps, step)

    def after_step(self, batch: Batch, numbers: Mapping[str, Tensor | float], stopping: bool) -> None:
        """What is recorded, watched and saved at the end of a step."""
        trainer = cast(pl.Trainer, self.trainer)
        self.trainer.global_step += 1
        self.trainer.should_stop = stopping
        self.trainer.callback_metrics.update(numbers)
        self.module.last_loss_nats = cast(Tensor, numbers["train_loss_nats"])
        every = self.config.training.activations_every
        if every and (self.step % every == 0 or self.step == 1):
            self._fetch_weights()
        for callback in (self.guard, self.recorder, self.activations, self.checkpoints):
            callback.on_train_batch_end(trainer, self.module, None, batch, 0)

    def after_validation(self, metrics: Mapping[str, float]) -> None:
        trainer = cast(pl.Trainer, self.trainer)
        self.trainer.callback_metrics.update(metrics)
        for callback in (self.guard, self.recorder, self.checkpoints):
            callback.on_validation_end(trainer, self.module)

    def leave(self) -> None:
        """Write how the run ended, or that it is to go on, and give the record free."""
        pending = Outcome("interrupted", "trained in a stack; to be gone on with", self.step, self.seconds.seconds)
        try:
            if self.outcome is not None and self.outcome.state == "diverged":
                self.checkpoints.previous.unlink(missing_ok=True)  # of use to a run that goes on
            self.record.finish(self.outcome or pending)
        except OSError:
            self.record.release()  # the disk is full or gone: a reader finds "running" without a process, so "killed"

    def _fetch_weights(self) -> None:
        assert self.stack is not None
        self.stack.write(self.place, self.module.model)

    def _save(self, path: Path, weights_only: bool) -> None:
        """Write the checkpoint that Lightning would write here: the one that was read, brought forward."""
        assert self.stack is not None
        self._fetch_weights()
        stored, step = copy.deepcopy(self.stored), self.step
        stored["global_step"] = step
        stored["state_dict"] = self.module.state_dict()
        loops = _loops(stored)
        loops["state_dict"]["combined_loader"] = [self.loader.state_dict()]
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] = step
        progress = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        for counters in (
            loops["epoch_loop.batch_progress"],
            loops["epoch_loop.scheduler_progress"],
            progress["step"],
            progress["zero_grad"],
        ):
            for part in ("total", "current"):
                counters[part] = dict.fromkeys(counters[part], step)
        loops["epoch_loop.batch_progress"]["is_last_batch"] = step >= self.trainer.max_steps
        if weights_only:
            for part in ("callbacks", "optimizer_states", "lr_schedulers"):
                stored.pop(part, None)
        else:
            for callback in self._remembering():
                stored["callbacks"][callback.state_key] = callback.state_dict()
            rate = self.rate(step)
            (optimizer,), (scheduler,) = stored["optimizer_states"], stored["lr_schedulers"]
            optimizer["state"] = self.stack.optimizer_state(self.place)
            for group in optimizer["param_groups"]:
                group["lr"] = rate
            scheduler |= {"last_epoch": step, "_step_count": step + 1, "_last_lr": [rate] * len(scheduler["_last_lr"])}
        write_checkpoint(stored, path)


def _loops(stored: Mapping[str, Any]) -> dict[str, Any]:
    return stored["loops"]["fit_loop"]


class _Stack:
    """Runs that train together, from their checkpoints on."""

    def __init__(self, text: PreparedText, runs: Sequence[_Run], clock: Stopwatch) -> None:
        self.text, self.clock = text, clock
        self.runs = list(runs)
        self._shared_seconds = 0.0  # of the clock, which the runs have their shares of
        config = runs[0].config
        self.training = config.training
        for run in runs:
            run.begin()
        self.model = StackedModel([run.module.model for run in runs], config.optim, text)
        self.model.load_optimizer_states([run.stored["optimizer_states"][0].pop("state") for run in runs])
        data = TextDataModule(config.data, config.seed, text)
        self.valid = data.val_part_dataloader(self.training.valid_batches)  # the same for every seed
        self.signals = StopSignals(self.training.valid_every)
        for place, run in enumerate(runs):
            run.stack, run.place = self.model, place
            environment = run.record.environment()
            fact: dict[str, Any] = {"runs": len(runs), "place": place, "from_step": run.step}
            if any(isinstance(part, Recurrent) for part in run.module.modules()):
                fact["recurrence"] = "reference"  # kernels do not know the run axis
            if prefix_norms(run.module):
                fact["prefix_statistics"] = "torch operators"
            environment["stacked"] = fact
            run.record.write_environment(environment)

    def train(self) -> bool:
        """To the last step; False if a signal came before."""
        first, said = self.runs[0], time.monotonic()
        print(f"{len(self.runs)} runs in one stack from step {first.step} on, {first.record.id} and others", flush=True)
        with self.signals:
            self.signals.setup(cast(pl.Trainer, first.trainer), first.module, "fit")
            self.clock.start()
            while self.runs and self.runs[0].step < self.training.steps:
                if self._step():
                    self._interrupt()
                    return False
                if self.runs and time.monotonic() - said > LINE_SECONDS:
                    said, run = time.monotonic(), self.runs[0]
                    losses = " ".join(f"{float(run.module.last_loss_nats):.3f}" for run in self.runs)
                    print(f"step {run.step}/{self.training.steps}: losses {losses} nats", flush=True)
            if self.signals.received is not None:  # it came after the last step, in the validation
                self._interrupt()
                return False
        return True

    def _step(self) -> bool:
        """One step of all runs; whether it is to be the last one, because a signal came."""
        step = self.runs[0].step
        batches = [next(run.batches) for run in self.runs]
        rates = [run.rate(step) for run in self.runs]
        numbers = self.model.step(batches, rates)
        # Since the last step, and not its beginning: a GPU is waited for where a loss is read.
        seconds = self.clock.seconds
        share, self._shared_seconds = (seconds - self._shared_seconds) / len(self.runs), seconds
        stopping = self.signals.received is not None
        for run, batch, of_run in zip(self.runs, batches, _by_run(numbers, rates), strict=True):
            run.seconds.set(run.seconds.seconds + share)
            run.after_step(batch, of_run, stopping)
        if is_validation_due(cast(pl.Trainer, self.runs[0].trainer), self.training.valid_every):
            with self.clock.held():
                self._validate()
        self._drop_diverged()
        return stopping

    def _validate(self) -> None:
        totals = torch.zeros(3, len(self.runs), dtype=torch.float64, device=self.model.device)
        for batch in self.valid:
            nats, predictions, correct = self.model.evaluate(batch)
            lost = torch.full_like(nats, float("inf"))  # as `TextModule.nats` takes a batch that is no number
            totals += torch.stack([nats.where(~nats.isnan(), lost), correct, predictions])
        nats, correct, predictions = totals.cpu()
        for place, run in enumerate(self.runs):
            if not run.guard.diverged:
                loss, accuracy = float(nats[place] / predictions[place]), float(correct[place] / predictions[place])
                run.after_validation(run.module.evaluation_metrics(loss, accuracy))

    def _drop_diverged(self) -> None:
        kept = [place for place, run in enumerate(self.runs) if not run.guard.diverged]
        if len(kept) == len(self.runs):
            return
        for run in self.runs:
            if run.guard.diverged:
                results = run_facts(run.module, run.recorder.tokens_per_second, cast(pl.Trainer, run.trainer))
                run.outcome = Outcome("diverged", run.guard.reason, run.step, run.seconds.seconds, results)
        self.runs = [self.runs[place] for place in kept]
        if self.runs:
            self.model.keep(kept)
            for place, run in enumerate(self.runs):
                run.place = place

    def _interrupt(self) -> None:
        reason = signal.Signals(cast(int, self.signals.received)).name
        for run in self.runs:
            run.outcome = Outcome("interrupted", reason, run.step, run.seconds.seconds)


def _by_run(numbers: StepNumbers, rates: Sequence[float]) -> Iterator[dict[str, Tensor | float]]:
    """The metrics of each run, by the names that they have in its record."""
    for place, rate in enumerate(rates):
        found = {
            "train_loss_nats": numbers.loss_nats[place],
            "gradient_norm": numbers.gradient_norm[place],
            "learning_rate": rate,
        }
        if numbers.penalty_nats is not None:
            found["penalty_nats"] = numbers.penalty_nats[place]
        yield found
