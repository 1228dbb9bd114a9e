"""What is read from a run's record: a result, the tail of a curve, when a loss is reached, what a probe measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from normlab.config import InputError
from normlab.records.record import RunRecord

__all__ = [
    "AcrossSeeds",
    "Difference",
    "Log2",
    "Measurement",
    "Probed",
    "Reach",
    "Read",
    "Result",
    "Tail",
    "across_seeds",
    "parts",
    "probe",
    "result",
]

TIMED_RESULTS = frozenset({"tokens_per_second", "peak_memory_mib"})
TIMED_PROBES = frozenset({"cost"})
"""Those whose class says so (`Probe.timed`), by name: to ask the class takes torch."""

Peers = Mapping[str, RunRecord]
"""Records of the other arms at the same setting and seed, by arm."""


class Read(Protocol):
    """A place in a record. NaN if a diverged run has no such number.

    Raises:
        InputError: a finished run lacks it.
    """

    def __call__(self, record: RunRecord, peers: Peers) -> float: ...


@dataclass(frozen=True)
class Measurement:
    """One number per run.

    Args:
        name: with its unit, such as test_loss_nats; a column of the results.
        unit: for the report.
        lower_is_better: which direction is better.
        read: where it stands.
    """

    name: str
    unit: str
    lower_is_better: bool
    read: Read

    def is_readable(self, peers: Peers) -> bool:
        """Whether the record of every arm that it looks at is there."""
        return all(read.of in peers for read in parts(self.read) if isinstance(read, Reach))

    @property
    def is_timed(self) -> bool:
        """Whether it reads seconds, speed or memory, of which a run in a stack has a share alone."""
        return any(_is_timed(read) for read in parts(self.read))

    @property
    def is_across_seeds(self) -> bool:
        """Whether it stands in a measurement of the runs at all seeds together."""
        return any(isinstance(read, AcrossSeeds) for read in parts(self.read))


@dataclass(frozen=True)
class Result:
    """A number of `outcome.json`: the first of `names` that stands there; `result` makes one."""

    names: tuple[str, ...]

    def __call__(self, record: RunRecord, peers: Peers) -> float:
        outcome = record.outcome()
        for name in self.names:
            if name in outcome.results:
                return float(outcome.results[name])
        return _missing(record, " or ".join(self.names))


@dataclass(frozen=True)
class Tail:
    """Mean of the last `rows` values of a metric, such as the training loss in training mode, of single batches."""

    metric: str
    rows: int = 10

    def __call__(self, record: RunRecord, peers: Peers) -> float:
        values = [float(row[self.metric]) for row in record.metrics() if self.metric in row]
        if not values or record.outcome().state == "diverged":
            return _missing(record, self.metric)
        return math.fsum(values[-self.rows :]) / len(values[-self.rows :])


@dataclass(frozen=True)
class Reach:
    """Optimizer steps, or seconds of training, until a loss is as low as the best one of arm `of` at the same seed.

    A run that never gets there counts with its last value on that axis: too little, never too much. The axis "reached"
    says whether it got there: 1 or 0.
    """

    axis: Literal["step", "seconds", "reached"]
    of: str
    metric: str = "valid_loss_nats"

    def __call__(self, record: RunRecord, peers: Peers) -> float:
        rows = [row for row in record.metrics() if self.metric in row]
        best = [float(row[self.metric]) for row in peers[self.of].metrics() if self.metric in row]
        # An arm that diverged before its first validation is reached by the first of any other.
        goal = min(best, default=math.inf if peers[self.of].outcome().state == "diverged" else math.nan)
        if not rows or record.outcome().state == "diverged" or math.isnan(goal):
            return _missing(record, self.metric)
        reached = next((row for row in rows if row[self.metric] <= goal), None)
        if self.axis == "reached":
            return float(reached is not None)
        return float((reached or rows[-1])[self.axis])


@dataclass(frozen=True)
class Probed:
    """A number in the summary of a probe with `options` beyond its defaults; `probe` makes one."""

    probe: str
    key: str
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, record: RunRecord, peers: Peers) -> float:
        summary = record.probe(self.probe).get("summary", {})
        return float(summary[self.key]) if self.key in summary else _missing(record, f"{self.probe}: {self.key}")


@dataclass(frozen=True)
class AcrossSeeds:
    """A number that a probe, which measures an arm's runs at all `seeds` together, has in its row of one of them;
    `across_seeds` makes one.

    Diverged runs are left out of the measurement: NaN for them, and for a run that is the only one left.
    """

    probe: str
    key: str
    seeds: tuple[int, ...]
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, record: RunRecord, peers: Peers) -> float:
        runs = [each for each in map(record.at_seed, self.seeds) if each.outcome().state == "finished"]
        ids = [each.id for each in runs]
        if ids == [record.id]:
            return math.nan
        rows = runs[0].probe(self.probe, ids).get("rows", []) if runs else []
        row = next((row for row in rows if row["run"] == record.id), {})
        return float(row[self.key]) if self.key in row else _missing(record, f"{self.probe}: {self.key}")


@dataclass(frozen=True)
class Difference:
    """One number less another one of the same run, such as a loss with stored statistics less that with the batch's."""

    read: Read
    less: Read

    def __call__(self, record: RunRecord, peers: Peers) -> float:
        return self.read(record, peers) - self.less(record, peers)


@dataclass(frozen=True)
class Log2:
    """Binary logarithm of a positive number, so that differences are ratios: 1 is twice as much, -1 half."""

    read: Read

    def __call__(self, record: RunRecord, peers: Peers) -> float:
        value = self.read(record, peers)
        if value <= 0:
            raise InputError(f"run {record.id} has {value}, of which there is no logarithm")
        return math.log2(value)


def parts(read: Read) -> list[Read]:
    """What a reading reads: itself, or what it is made of."""
    if isinstance(read, Difference):
        return [*parts(read.read), *parts(read.less)]
    return parts(read.read) if isinstance(read, Log2) else [read]


def result(*names: str) -> Result:
    """What the outcome says under the first of `names` that it has.

    Further names say what counts for a run that lacks the first: a norm without stored statistics has no loss with
    running averages but its own; a diverged language model is given the loss of the unigram distribution.
    """
    return Result(names)


def probe(name: str, key: str, **options: Any) -> Probed:
    """What the probe `name` says under `key`; the probe is run on each verdict run of a claim that measures it."""
    return Probed(name, key, tuple(sorted(options.items())))


def across_seeds(name: str, key: str, seeds: tuple[int, ...], **options: Any) -> AcrossSeeds:
    """What the probe `name` says under `key` in the row of each run; it is run on those of an arm at all `seeds` (the
    verdict seeds of the claim) together."""
    return AcrossSeeds(name, key, seeds, tuple(sorted(options.items())))


def _is_timed(read: Read) -> bool:
    match read:
        case Result():
            return not TIMED_RESULTS.isdisjoint(read.names)
        case Tail():
            return read.metric in TIMED_RESULTS
        case Reach():
            return read.axis == "seconds"
        case Probed() | AcrossSeeds():
            return read.probe in TIMED_PROBES
    return False


def _missing(record: RunRecord, what: str) -> float:
    if record.outcome().state == "diverged":
        return math.nan
    raise InputError(f"run {record.id} has no {what}; move its folder away and run the study again")
