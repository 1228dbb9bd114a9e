"""What a probe is: options, and a measurement on finished runs that leaves them as they were.

Shape suffixes: B batch, T time, V vocabulary, C classes, N predictions.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import itertools
import statistics
from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.config import InputError, RunConfig, available_probes, require_choice
from normlab.data.batches import Batch, Loader, make_loader
from normlab.data.prepared import PreparedText
from normlab.models.output import ModelOutput

__all__ = ["Measurement", "Probe", "Subject", "build_probe", "prediction_nats", "probe_class"]

Row = dict[str, Any]


class Measurement(NamedTuple):
    """What a probe found: single numbers by name, and the rows that they sum up (plain values, ready for JSON)."""

    summary: dict[str, float]
    rows: list[Row]


@dataclass(frozen=True)
class Subject:
    """A run to measure.

    Args:
        run: its id.
        config: of the run.
        text: its corpus, prepared.
        model: with the weights in question.
        checkpoint: gives the model with the weights of "initial", "best", "last" or "final".
    """

    run: str
    config: RunConfig
    text: PreparedText
    model: nn.Module
    checkpoint: Callable[[str], nn.Module]

    @property
    def is_language_model(self) -> bool:
        return self.text.task == "language_modelling"

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def loader(self, split: str, *, train: bool = False) -> Loader:
        """As in training (shuffled epochs, order by the run's seed) or, with `train` False, in evaluation."""
        require_choice("split", split, self.text.splits)
        return make_loader(self.text, self.config.data, split, train=train, seed=self.config.seed)

    def batches(self, split: str, count: int, *, train: bool = False) -> list[Batch]:
        """The first `count` batches, or as many as there are, on the model's device."""
        taken = itertools.islice(self.loader(split, train=train), count)
        return [self.place(batch) for batch in taken]

    def place(self, batch: Batch) -> Batch:
        """`batch` on the model's device."""
        return Batch._make(value if value is None else value.to(self.device) for value in batch)

    def outputs(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, ModelOutput]]:
        """Each batch with what the model says of it; in a stateful stream the state is carried from one to the next."""
        state: Any = None
        for batch in batches:
            output = self.model(batch.tokens_BT, batch.mask_BT, state)
            if batch.fresh_B is not None:
                state = output.state.detach()
            yield batch, output


@dataclass(frozen=True)
class Probe(metaclass=ABCMeta):
    """One family of quantities. A subclass is a frozen dataclass in a file of its own, and its fields are its options.

    Calling it measures: on copies of the models, handed over in evaluation mode, with random numbers of its own. The
    models themselves, their buffers, gradients and modes, and all random state are afterwards as they were, so that a
    probe in the middle of a training run changes none of its numbers. The same options and runs give the same values,
    but times.

    Attributes:
        runs: fewest and most runs that it takes; None = any number.
        timed: some of its values are times.
    """

    runs: ClassVar[tuple[int, int | None]] = (1, 1)
    timed: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """That of its file."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def options(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __call__(self, *subjects: Subject) -> Measurement:
        """Measure.

        Raises:
            InputError: too few or too many runs, or runs that it cannot measure.
        """
        self.require_runs(len(subjects))
        own = [dataclasses.replace(subject, model=copy.deepcopy(subject.model).eval()) for subject in subjects]
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(0)
            return self.measure(*own)

    def require_runs(self, count: int) -> None:
        """Raise `InputError` unless it takes so many runs."""
        fewest, most = self.runs
        if count < fewest or (most is not None and count > most):
            wanted = f"{fewest}" if most == fewest else f"{fewest} or more" if most is None else f"{fewest} to {most}"
            raise InputError(f"the probe {self.name} takes {wanted} run(s), not {count}")

    @abstractmethod
    def measure(self, *subjects: Any) -> Measurement:
        """What `__call__` does, on models that are its own to spoil."""

    def require_positive(self, *names: str) -> None:
        """Raise `InputError` if one of these options is below 1."""
        for name in names:
            if getattr(self, name) < 1:
                raise InputError(f"--{name} of the probe {self.name} is {getattr(self, name)}; it must be at least 1")


def probe_class(name: str) -> type[Probe]:
    """The probe of that name: the one subclass of `Probe` in `normlab/probes/<name>.py`."""
    require_choice("probe", name, available_probes())
    module = importlib.import_module(f"normlab.probes.{name}")
    (found,) = (
        value
        for _, value in inspect.getmembers(module, inspect.isclass)
        if issubclass(value, Probe) and value.__module__ == module.__name__
    )
    return found


def build_probe(name: str, options: Mapping[str, Any]) -> Probe:
    """The probe of that name; unknown options raise `InputError`."""
    cls = probe_class(name)
    known = [field.name for field in dataclasses.fields(cls)]
    for option in options:
        require_choice(f"option of the probe {name}", option, known)
    return cls(**options)


def prediction_nats(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of each prediction of a batch, N: of the valid tokens in reading order, or of the texts.

    Args:
        logits: B x T x V, or B x C of a classifier.
    """
    if batch.labels_B is not None:
        return F.cross_entropy(logits.float(), batch.labels_B, reduction="none")
    assert batch.targets_BT is not None
    if batch.mask_BT is not None:
        return F.cross_entropy(logits[batch.mask_BT].float(), batch.targets_BT[batch.mask_BT], reduction="none")
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.targets_BT.flatten(), reduction="none")


def site_summary(
    rows: Iterable[Row], quantities: Iterable[str], over: Callable[[list[float]], float] = statistics.fmean
) -> dict[str, float]:
    """`<quantity>.<site>`: each quantity `over` the rows of a site that have it."""
    values: dict[str, list[float]] = {}
    for row, quantity in itertools.product(rows, quantities):
        if row.get(quantity) is not None:
            values.setdefault(f"{quantity}.{row['site']}", []).append(row[quantity])
    return {key: over(found) for key, found in values.items()}
