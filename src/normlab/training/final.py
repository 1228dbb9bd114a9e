"""The last evaluation of a finished run: with running averages, and with statistics re-estimated on training data.

Stored statistics that are running averages lag behind the weights they belong to. Before the final test they are
estimated anew over training batches, each normalized with its own statistics as while training; both numbers are kept.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator

import pytorch_lightning as pl

from normlab.config import InputError
from normlab.data.batches import Batch
from normlab.norms.recompute import StatisticsGap, recompute_statistics, stores_statistics
from normlab.records.record import RunRecord
from normlab.training.datamodule import TextDataModule
from normlab.training.module import TextModule
from normlab.training.reading import MEND_BEST
from normlab.training.stopping import Checkpoints

__all__ = ["evaluate_best", "reestimate"]

SLOW_SECONDS = 3.0
"""Re-estimation that takes longer says what it is doing."""


def evaluate_best(
    trainer: pl.Trainer,
    module: TextModule,
    datamodule: TextDataModule,
    checkpoints: Checkpoints,
    record: RunRecord,
    recompute_batches: int,
    saw_all: bool,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Losses of the weights with the best validation loss on a part of train, on valid and on test, in evaluation mode.

    If the model stores statistics, those on valid and test are taken twice: with the running averages
    (`test_running_loss_nats`, ...), and with the re-estimated statistics of `recompute_batches` training batches
    (`test_loss_nats`, ...). The latter weights go into `final.ckpt`, the gap of each norm into `statistics_gap.json`,
    the largest ones into `statistics_gap_mean` and `statistics_gap_std`, the number of batches into
    `recomputed_batches`.

    Args:
        record: holds the validation loss of the best step; the first process writes the gaps to it.
        recompute_batches: at most so many, and at most one pass; 0 keeps the running averages.
        saw_all: validations while training saw the whole split, so that the best one need not be done again.
        say: takes one line for the user.
    """
    if checkpoints.best_step != trainer.global_step:
        try:
            module.load_state_dict(checkpoints.load_best()["state_dict"])
        except RuntimeError:  # a run that was resumed may find another file than it wrote
            raise InputError(f"{checkpoints.best} is not a checkpoint of this run; {MEND_BEST}") from None
    best_step = checkpoints.best_step
    if saw_all:
        best_row = [row for row in record.metrics() if row["step"] == best_step and "valid_loss_nats" in row][-1]
        valid = {name: value for name, value in best_row.items() if name.startswith("valid_")}
    else:
        valid = dict(trainer.validate(module, datamodule.val_dataloader(), verbose=False)[0])
    results: dict[str, float] = {}
    if recompute_batches and stores_statistics(module.model):
        results |= {name.replace("valid_", "valid_running_", 1): value for name, value in valid.items()}
        module.statistics = "running"
        results |= trainer.test(module, datamodule.test_dataloader(), verbose=False)[0]
        module.statistics = ""
        results |= _recompute(trainer, module, datamodule, record, recompute_batches, say)
        checkpoints.save_final(trainer, module)
        valid = dict(trainer.validate(module, datamodule.val_dataloader(), verbose=False)[0])
    module.evaluated_split = "train"
    results |= trainer.validate(module, datamodule.train_part_dataloader(), verbose=False)[0]
    module.evaluated_split = "valid"
    results |= valid
    results |= trainer.test(module, datamodule.test_dataloader(), verbose=False)[0]
    results["best_step"] = best_step
    return results


def reestimate(trainer: pl.Trainer, module: TextModule, batches: Iterable[Batch]) -> dict[str, StatisticsGap]:
    """`recompute_statistics` on the trainer's device and in its precision, with the state of a stateful stream carried.

    All processes must give the same number of batches. The state that `module` carries is put back afterwards.
    """
    module.to(trainer.strategy.root_device)  # Lightning leaves it on the CPU once a fit or a test is over
    before, module.carried = module.carried, None
    placed = (module.transfer_batch_to_device(batch, module.device, 0) for batch in batches)
    try:
        with trainer.precision_plugin.forward_context():
            return recompute_statistics(module.model, placed, module.outputs)
    finally:
        module.carried = before


def _recompute(
    trainer: pl.Trainer,
    module: TextModule,
    datamodule: TextDataModule,
    record: RunRecord,
    most: int,
    say: Callable[[str], None],
) -> dict[str, float]:
    # A loader of its own, from the beginning: which batches are taken depends on the seed alone, not on where the
    # training stopped or was resumed.
    loader = datamodule.train_dataloader()
    count = min(most, len(loader))
    gaps = reestimate(trainer, module, _told(itertools.islice(loader, count), count, say))
    if trainer.is_global_zero:
        record.write_statistics_gap(count, {name: dataclasses.asdict(gap) for name, gap in gaps.items()})
    return {
        "statistics_gap_mean": max(gap.mean for gap in gaps.values()),
        "statistics_gap_std": max(gap.std for gap in gaps.values()),
        "recomputed_batches": count,
    }


def _told(batches: Iterable[Batch], count: int, say: Callable[[str], None]) -> Iterator[Batch]:
    """The batches; one line is said once they have taken longer than a moment."""
    since, told = time.monotonic(), False
    for batch in batches:
        if not told and time.monotonic() - since > SLOW_SECONDS:
            say(f"re-estimating stored statistics over {count} batches")
            told = True
        yield batch
