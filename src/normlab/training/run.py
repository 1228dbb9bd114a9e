"""One run, from config to record."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.utilities.exceptions import SIGTERMException

from normlab.config import HuggingFaceConfig, InputError, RunConfig, run_id
from normlab.data.corpora import require_corpus
from normlab.data.prepared import PreparedText, prepare
from normlab.machine import products
from normlab.machine.terminal import PlainConsole
from normlab.models.huggingface import require_architecture
from normlab.records.environment import collect_environment
from normlab.records.record import Outcome, RunRecord, record_ids
from normlab.records.wandb_mirror import WandbMirror
from normlab.training.datamodule import TextDataModule, WholeRun
from normlab.training.engine import one_engine
from normlab.training.facts import (
    data_facts,
    device_names,
    leak_facts,
    leak_warning,
    prefix_facts,
    product_facts,
    recurrence_facts,
    run_facts,
    site_facts,
    statistics_rows,
)
from normlab.training.faults import (
    belongs_to,
    explain,
    one_line,
    require_accelerator,
    require_rows,
    require_same_text,
)
from normlab.training.final import evaluate_best
from normlab.training.module import TextModule
from normlab.training.reading import read_checkpoint
from normlab.training.stopping import Checkpoints, DivergenceGuard, StopSignals
from normlab.training.stopwatch import Stopwatch
from normlab.training.watching import Activations, ProgressBar, Recorder

__all__ = ["is_first_process", "train"]


def train(config: RunConfig, *, pause_at: int | None = None) -> RunRecord:
    """Train the run that `config` describes and return its record.

    The record lives in `<output.runs_dir>/<id>`, where the id is a hash of everything that decides the numbers. A
    run that is already finished (or diverged) is not trained again; one that was interrupted goes on from its
    last checkpoint; `output.fresh` keeps the old record beside it and starts anew.

    Args:
        pause_at: a step before the last one, where the run is left interrupted, with a checkpoint.

    Raises:
        InputError: the config asks for something that cannot be done; one line says what and how to mend it.
    """
    require_corpus(config.data)
    if isinstance(config.model, HuggingFaceConfig):
        require_architecture(config.model)  # before the text is prepared
    first = is_first_process()
    console = PlainConsole(quiet=not first)
    text = prepare(config.data)
    name = run_id(config)
    if first and name in record_ids(config.output.runs_dir):
        existing = RunRecord(Path(config.output.runs_dir) / name, config)
        if config.output.fresh:
            existing.archive()
        else:
            require_same_text(existing, text)
            if existing.outcome().state in ("finished", "diverged"):
                console.print(f"this run has ended already{_older(existing)}; --output.fresh true trains it again")
                return existing
    pl.seed_everything(config.seed, verbose=False)
    _set_threads(config.training.threads, config.training.devices)
    try:
        module = TextModule(config, text)
    except (MemoryError, RuntimeError) as error:
        message = explain(error, None, config)
        if message is None:
            raise
        raise InputError(message) from error
    datamodule = TextDataModule(config.data, config.seed, text)
    accelerator = require_accelerator(config.training.accelerator, config.training.devices)
    batch_size = datamodule.train_dataloader().batch_size
    require_rows(module, batch_size, config)
    record = RunRecord.create(config)
    if first:
        record.start()
    run = None
    try:
        run = _Run(config, text, datamodule, module, record, console, first, accelerator, batch_size, pause_at)
        outcome = run.train()
        if first:
            record.finish(outcome)
    except BaseException as error:  # whatever ends a run is recorded, and raised again
        if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
            error = error.__context__  # Lightning exits on Ctrl-C; how to exit is the caller's to say
        if first:
            _finish_quietly(record, _failed(error, run))
        if run is not None:
            run.mirror.finish(1)
        message = explain(error, record, config)
        if message is None:
            raise error from None
        raise InputError(message) from error
    run.mirror.summary({"outcome": outcome.state, **outcome.results})
    run.mirror.finish(0)
    if run.mirror.where():
        run._say(run.mirror.where())
    return record


def is_first_process() -> bool:
    """Whether this is the process that writes the record: Lightning and torchrun number theirs in the environment."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0


def _set_threads(threads: int, devices: int) -> None:
    """Threads of this process; 0 leaves them, or gives each of several processes its share.

    Now, and not by Lightning when the processes start: the products that are recorded are those of a number of threads.
    """
    if devices > 1 and "OMP_NUM_THREADS" not in os.environ:
        threads = threads or max(1, (os.cpu_count() or 1) // devices)
        os.environ["OMP_NUM_THREADS"] = str(threads)
    if threads:
        torch.set_num_threads(threads)


@dataclass
class _Run:
    """Everything one run holds while it lasts."""

    config: RunConfig
    text: PreparedText
    datamodule: TextDataModule
    module: TextModule
    record: RunRecord
    console: PlainConsole
    first: bool
    accelerator: str
    batch_size: int
    pause_at: int | None

    def __post_init__(self) -> None:
        training = self.config.training
        self.stopwatch = Stopwatch()
        self.signals = StopSignals(training.valid_every, self.pause_at)
        self.guard = DivergenceGuard(training.divergence_nats)
        self.checkpoints = Checkpoints(
            self.record.checkpoints, training.checkpoint_every, training.valid_every, self.stopwatch
        )
        devices = training.devices
        strategy = "auto" if devices == 1 else "ddp"
        if devices > 1 and self.module.carries_state:
            strategy = "ddp_find_unused_parameters_true"  # the learned initial state, in all batches but the first
        with _quiet_lightning():
            self.trainer = pl.Trainer(
                max_steps=training.steps,
                max_epochs=-1,
                accelerator=self.accelerator,
                devices=devices,
                strategy=strategy,
                precision="bf16-mixed" if training.precision == "bf16" else "32-true",
                accumulate_grad_batches=training.accumulate,
                check_val_every_n_epoch=None,
                val_check_interval=training.valid_every * training.accumulate,
                num_sanity_val_steps=0,
                logger=False,
                enable_checkpointing=False,  # ours is added below
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
                default_root_dir=self.record.folder,
            )
        self.datamodule.trainer = self.trainer
        if self.accelerator == "gpu":
            torch.cuda.reset_peak_memory_stats()
        output = self.config.output if self.first else dataclasses.replace(self.config.output, wandb="off")
        self.mirror = WandbMirror.start(dataclasses.replace(self.config, output=output), self.record.folder, self._say)
        self.recorder = Recorder(self.record if self.first else None, self.mirror, self.stopwatch)

    @property
    def step(self) -> int:
        return self.trainer.global_step

    def _say(self, line: str) -> None:
        self.console.print(line, soft_wrap=True)

    def train(self) -> Outcome:
        """Fit, then evaluate the weights with the best validation loss."""
        # A run that goes on keeps the products and the engine it began with, whatever this machine's are by now.
        begun = self.record.environment() if self.checkpoints.last.exists() else {}
        begun_with = bool(begun.get("kernels")) if begun else None
        with (
            products.kept(begun.get("products", {}).get("onednn")),
            one_engine(self.module, self.trainer, begun_with) as on_kernels,
        ):
            return self._train(on_kernels)

    def _train(self, on_kernels: bool | None) -> Outcome:
        if self.first:
            self._write_environment(on_kernels)
            self.text.tokenizer.save(self.record.tokenizer_path)
        self._add_callbacks()
        resume = self._resume_path()
        with _quiet_lightning(), self.signals:
            try:
                self.trainer.fit(
                    self.module,
                    self._whole_run(),
                    self.datamodule.val_part_dataloader(self.config.training.valid_batches),
                    ckpt_path=resume,
                    weights_only=True,
                )
            except SIGTERMException:
                self.signals.received = signal.SIGTERM
            if self.guard.diverged:
                return self._outcome("diverged", self.guard.reason, self._results(evaluated={}))
            if self.signals.received is None and self.signals.is_paused:
                return self._outcome("interrupted", "paused", {})
            if self.signals.received is None:
                self.signals.at_once = True
                return self._outcome("finished", self._why_finished(), self._results(self._evaluate()))
        return self._outcome("interrupted", signal.Signals(self.signals.received).name, {})

    def _whole_run(self) -> WholeRun:
        training = self.config.training
        return WholeRun(self.datamodule.train_dataloader(), training.steps * training.accumulate)

    def _add_callbacks(self) -> None:
        training = self.config.training
        batch = next(iter(self.datamodule.val_dataloader()))
        callbacks: list[pl.Callback] = [
            self.signals,
            self.guard,
            self.recorder,
            Activations(self.recorder, batch, training.activations_every),
            ProgressBar(PlainConsole(quiet=not (self.first and self.config.output.progress)), self.stopwatch),
        ]
        if training.early_stop:
            callbacks.append(EarlyStopping("valid_loss_nats", patience=training.early_stop, check_finite=False))
        # Last, so that a checkpoint holds the state of all others.
        self.trainer.callbacks.extend([*callbacks, self.checkpoints])  # pyright: ignore[reportAttributeAccessIssue]

    def _resume_path(self) -> str | None:
        """`last.ckpt` if there is one, with the record rewound to it."""
        path = self.checkpoints.last
        if not path.exists():
            if self.first:
                self.record.rewind(-1)
            return None
        mend = "delete it, or train anew with --output.fresh true"
        stored = read_checkpoint(path, mend)
        if not belongs_to(stored, self.module):
            raise InputError(f"{path} is not a checkpoint of this run to resume from; {mend}")
        step = stored["global_step"]
        if self.first:
            self.record.rewind(step)
        self._say(f"going on from step {step} of {self.record.folder}")
        return str(path)

    def _evaluate(self) -> dict[str, float]:
        return evaluate_best(
            self.trainer,
            self.module,
            self.datamodule,
            self.checkpoints,
            self.record,
            self.config.training.recompute_batches,
            self.config.training.valid_batches == 0,
            self._say,
        )

    def _results(self, evaluated: dict[str, float]) -> dict[str, float | int | str]:
        return {**evaluated, **run_facts(self.module, self.recorder.tokens_per_second, self.trainer)}

    def _why_finished(self) -> str:
        if self.step < self.config.training.steps:
            return f"stopped early: no better validation loss in {self.config.training.early_stop} validations"
        return ""

    def _outcome(self, state: Any, reason: str, results: dict[str, float | int | str]) -> Outcome:
        return Outcome(state, reason, self.step, self.stopwatch.seconds, results)

    def _write_environment(self, on_kernels: bool | None) -> None:
        environment = collect_environment(device_names(self.trainer))
        environment["data"] = data_facts(self.text, self.config)
        environment["sites"] = site_facts(self.module)
        environment["threads"] = torch.get_num_threads()
        recurrence = recurrence_facts(self.module, self.trainer)
        if recurrence:
            environment["recurrence"] = recurrence
            self._say("recurrence: {backend} ({reason})".format(**recurrence))
        running = prefix_facts(self.module, self.trainer)
        if running:
            environment["prefix_statistics"] = running
            self._say(f"statistics over a prefix: {running}")
        if recurrence or running:
            environment["kernels"] = on_kernels
        chosen = product_facts(self.trainer)
        if chosen:
            environment["products"] = chosen
        devices, accumulate = self.config.training.devices, self.config.training.accumulate
        rows = statistics_rows(self.module, self.batch_size, devices)
        if rows is not None:
            environment["statistics_batch_rows"] = rows
            own_rows = self.batch_size * devices
            gradient_rows = own_rows * accumulate
            if accumulate > 1 and rows != gradient_rows:
                # Accumulation does not add to the rows that share a statistic; processes and memory do.
                more = (
                    f"model.norm_options.memory_batches {accumulate - 1} adds earlier ones (bn_step, pool=batch_time)"
                )
                self._say(
                    f"warning: with training.accumulate {accumulate} the batch statistics still see {rows} rows, "
                    f"the gradient {gradient_rows}{f'; {more}' if rows == own_rows else ''}"
                )
        longest = max((getattr(part, "warmup", 0) for part in self.module.modules()), default=0)
        if longest >= self.config.training.steps:
            self._say(
                f"warning: the norm warms up for {longest} updates (model.norm_options.warmup), and this run has "
                f"{self.config.training.steps} steps: it never does what it is for"
            )
        leaks = leak_facts(self.module)
        if leaks:
            environment["leaks"] = leaks
            self._say(leak_warning(self.module))
        before = self.record.environment()
        if before:
            kept = ("machine", "versions", "git")
            environment["begun_with"] = before.get("begun_with", {name: before[name] for name in kept})
        if "stacked" in before:
            environment["stacked"] = before["stacked"]
        self.record.write_environment(environment)


def _older(record: RunRecord) -> str:
    """What an ended record lacks that this version would have written; empty if nothing."""
    wanted = record.config.training.recompute_batches and "statistics_batch_rows" in record.environment()
    if wanted and record.outcome().state == "finished" and "recomputed_batches" not in record.outcome().results:
        return ", and was tested with running averages alone"
    return ""


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Lightning speaks of devices, tips and epochs; a run of ours says what it does itself."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="pytorch_lightning")
            warnings.filterwarnings("ignore", module="lightning_fabric")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _failed(error: BaseException, run: _Run | None) -> Outcome:
    step, seconds = (0, 0.0) if run is None else (run.step, run.stopwatch.seconds)
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return Outcome("interrupted", "stopped at once", step, seconds)
    return Outcome("failed", f"{type(error).__name__}: {one_line(error)}", step, seconds)


def _finish_quietly(record: RunRecord, outcome: Outcome) -> None:
    try:
        record.finish(outcome)
    except OSError:
        record.release()  # the disk is full or gone: a reader finds "running" without a process, so "killed"
