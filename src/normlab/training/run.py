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
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.utilities.rank_zero import rank_zero_only
from pytorch_lightning.callbacks import EarlyStopping

from normlab.config import HuggingFaceConfig, InputError, RunConfig, run_id
from normlab.data.corpora import require_corpus
from normlab.data.prepared import PreparedText, prepare
from normlab.machine import products
from normlab.machine.precision import cudnn_as_cublas
from normlab.machine.processes import Place, ProcessError, place_in_run
from normlab.machine.terminal import PlainConsole
from normlab.models.huggingface import require_architecture
from normlab.records.environment import available_cores, collect_environment
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
    failure,
    other_process_ended,
    require_accelerator,
    require_rows,
    require_same_text,
)
from normlab.training.final import evaluate_best
from normlab.training.module import TextModule
from normlab.training.reading import CheckpointError, read_checkpoint
from normlab.training.stopping import Checkpoints, DivergenceGuard, StopSignals
from normlab.training.stopwatch import Stopwatch
from normlab.training.watching import Activations, ProgressBar, Recorder
from normlab.training.writing import PlainFiles

__all__ = ["train"]


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
    place = place_in_run(config.training.devices)
    require_corpus(config.data)
    if isinstance(config.model, HuggingFaceConfig):
        require_architecture(config.model)  # before the text is prepared
    rank_zero_only.rank = place.rank  # Lightning takes it from the environment, where it may be that of a batch job
    console = PlainConsole(quiet=not place.is_first)
    text = prepare(config.data)
    name = run_id(config)
    if name in record_ids(config.output.runs_dir):
        existing = RunRecord(Path(config.output.runs_dir) / name, config)
        if not config.output.fresh:
            require_same_text(existing, text)
            if existing.outcome().state in ("finished", "diverged"):
                console.print(f"this run has ended already{_older(existing)}; --output.fresh true trains it again")
                return existing
        elif place.is_first:
            existing.archive()
    pl.seed_everything(config.seed, verbose=False)
    _set_threads(config.training.threads, place.local_world)
    try:
        module = TextModule(config, text)
    except (MemoryError, RuntimeError) as error:
        message = explain(error, None, config)
        if message is None:
            raise
        raise InputError(message) from error
    datamodule = TextDataModule(config.data, config.seed, text)
    accelerator = require_accelerator(config.training.accelerator, place.local_world)
    batch_size = datamodule.train_dataloader().batch_size
    require_rows(module, batch_size, config)
    record = RunRecord(Path(config.output.runs_dir) / name, config)
    if place.is_first:
        try:
            record = RunRecord.create(config)
            record.start()
        except OSError as error:
            raise InputError(explain(error, record, config)) from error
    run = None
    try:
        run = _Run(config, text, datamodule, module, record, console, place, accelerator, batch_size, pause_at)
        outcome = run.train()
        if place.is_first:
            record.finish(outcome)
    except BaseException as error:  # whatever ends a run is recorded, and raised again
        if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
            error = error.__context__  # Lightning exits on Ctrl-C; how to exit is the caller's to say
        if place.is_first:
            _finish_quietly(record, _failed(error, run))
        if run is not None:
            run.end_others()
            run.mirror.finish(1)
        if not place.is_first and other_process_ended(error):
            raise SystemExit(2) from error  # the first one to end has said why
        message = explain(error, record, config)
        if message is None:
            raise error from None
        if not place.is_first:
            raise ProcessError(f"process {place.rank}: {message}") from error
        raise InputError(message) from error
    run.mirror.summary({"outcome": outcome.state, **outcome.results})
    run.mirror.finish(0)
    if run.mirror.where():
        run._say(run.mirror.where())
    return record


def _set_threads(threads: int, processes: int) -> None:
    """Threads of this process; 0 leaves them, or gives each of several processes on this node its share.

    Now, and not by Lightning when the processes start: the products that are recorded are those of a number of threads.
    """
    if processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        threads = threads or max(1, available_cores() // processes)
        os.environ["OMP_NUM_THREADS"] = str(threads)
    if threads:
        torch.set_num_threads(threads)


def _cluster(place: Place) -> ClusterEnvironment:
    """What Lightning is to know of the other processes: never more than was asked for.

    Left to itself it takes any process inside a batch job for a task of a parallel program.
    """
    if place.by == "torchrun":
        return TorchElasticEnvironment()
    if place.by == "srun":
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(place.local_world))  # it asks for that flag
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment()


@dataclass
class _Run:
    """Everything one run holds while it lasts."""

    config: RunConfig
    text: PreparedText
    datamodule: TextDataModule
    module: TextModule
    record: RunRecord
    console: PlainConsole
    place: Place
    accelerator: str
    batch_size: int
    pause_at: int | None

    def __post_init__(self) -> None:
        training = self.config.training
        self.stopwatch = Stopwatch()
        self.signals = StopSignals(training.valid_every, self.pause_at, speaks=self.place.is_first)
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
                devices=self.place.local_world,
                num_nodes=self.place.nodes,
                strategy=strategy,
                plugins=[_cluster(self.place), PlainFiles()],
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
        # StopSignals does what is to be done. Lightning's handler speaks to the other processes from within a signal,
        # whatever they are speaking of at that moment.
        self.trainer._signal_connector.register_signal_handlers = lambda: None
        self.datamodule.trainer = self.trainer
        if self.accelerator == "gpu":
            cudnn_as_cublas()
            torch.cuda.reset_peak_memory_stats()
        output = self.config.output if self.place.is_first else dataclasses.replace(self.config.output, wandb="off")
        self.mirror = WandbMirror.start(dataclasses.replace(self.config, output=output), self.record.folder, self._say)
        self.recorder = Recorder(self.record if self.place.is_first else None, self.mirror, self.stopwatch)

    @property
    def step(self) -> int:
        return self.trainer.global_step

    def _say(self, line: str) -> None:
        self.console.print(line, soft_wrap=True)

    def train(self) -> Outcome:
        """Fit, then evaluate the weights with the best validation loss."""
        resume = self._resume_path()
        # A run that goes on keeps the products and the engine it began with, whatever this machine's are by now.
        begun = self.record.environment() if resume else {}
        # None: it began on a GPU, and nothing was decided. Nothing is written: there were no kernels yet.
        begun_with = begun.get("kernels", False) if begun else None
        with (
            products.kept(begun.get("products", {}).get("onednn")),
            one_engine(self.module, self.trainer, begun_with) as on_kernels,
        ):
            if self.place.is_first:
                self._write_environment(on_kernels, begun)
                self.text.tokenizer.save(self.record.tokenizer_path)
            outcome = self._train(resume)
        if self.place.is_first and outcome.state != "interrupted":
            self.checkpoints.previous.unlink(missing_ok=True)
        return outcome

    def end_others(self) -> None:
        """End the processes that Lightning started from this one, which has failed or was stopped at once."""
        others = getattr(self.trainer.strategy.launcher, "procs", [])
        for process in others:
            process.kill()
        for process in others:
            process.wait()
        others.clear()  # Lightning watches this list, and kills this process too once it sees that one has ended

    def _train(self, resume: Path | None) -> Outcome:
        self._add_callbacks()
        with _quiet_lightning(), self.signals:
            self.trainer.fit(
                self.module,
                self._whole_run(),
                self.datamodule.val_part_dataloader(self.config.training.valid_batches),
                ckpt_path=resume,
                weights_only=True,
            )
            if self.guard.diverged:
                return self._outcome("diverged", self.guard.reason, self._results(evaluated={}))
            is_stopped = self.signals.is_received(self.trainer)  # a signal may have come after the last step
            if self.signals.is_paused and not is_stopped:
                return self._outcome("interrupted", "paused", {})
            if not is_stopped:
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
            ProgressBar(PlainConsole(quiet=not (self.place.is_first and self.config.output.progress)), self.stopwatch),
        ]
        if training.early_stop:
            callbacks.append(EarlyStopping("valid_loss_nats", patience=training.early_stop, check_finite=False))
        # Last, so that a checkpoint holds the state of all others.
        self.trainer.callbacks.extend([*callbacks, self.checkpoints])  # pyright: ignore[reportAttributeAccessIssue]

    def _resume_path(self) -> Path | None:
        """The newest whole checkpoint, if there is any, with the record rewound to it."""
        if self.config.output.fresh and not self.place.is_first:
            return None  # what may still be there is about to be moved aside
        damaged: list[str] = []
        for path in (self.checkpoints.last, self.checkpoints.previous):
            try:
                stored = read_checkpoint(path, "")
            except FileNotFoundError:
                continue
            except CheckpointError as error:
                damaged.append(f"cannot read the checkpoint {path} ({error.why})")
                continue
            if not belongs_to(stored, self.module):
                damaged.append(f"{path} is not a checkpoint of this run to resume from")
                continue
            step = stored["global_step"]
            if self.place.is_first:
                self.record.rewind(step)
            if damaged:
                self.checkpoints.last_is_damaged = True
                self._say(f"warning: {damaged[0]}; taking the one before it")
            self._say(f"going on from step {step} of {self.record.folder}")
            return path
        if damaged:
            raise InputError(
                f"{' and '.join(damaged)}; delete what is in {self.checkpoints.folder} to train from the beginning"
            )
        if self.place.is_first:
            self.record.rewind(-1)
        return None

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

    def _write_environment(self, on_kernels: bool | None, before: dict[str, Any]) -> None:
        """Record what the run rests on; what the user must know of it at once is said too.

        Args:
            before: what is recorded of a run that goes on from a checkpoint; empty for one that begins.
        """
        environment = collect_environment(device_names(self.trainer))
        environment["data"] = data_facts(self.text, self.config)
        environment["sites"] = site_facts(self.module)
        environment["threads"] = torch.get_num_threads()
        if self.accelerator == "gpu":
            environment["tf32"] = torch.backends.cudnn.allow_tf32
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
        if before:
            kept = ("machine", "versions", "git", "threads")
            begun_with = {name: before[name] for name in kept if name in before}
            environment["begun_with"] = before.get("begun_with", begun_with)
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
        is_term = isinstance(error, SystemExit) and error.code == 128 + signal.SIGTERM
        return Outcome("interrupted", "SIGTERM" if is_term else "stopped at once", step, seconds)
    return Outcome("failed", failure(error), step, seconds)


def _finish_quietly(record: RunRecord, outcome: Outcome) -> None:
    try:
        record.finish(outcome)
    except OSError:
        record.release()  # the disk is full or gone: a reader finds "running" without a process, so "killed"
