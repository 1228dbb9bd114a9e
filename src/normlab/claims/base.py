"""What an argument is: a sentence, the runs that decide it, and the rule by which they do, all fixed before any run.

    base run -> arms -> tuning runs -> the rate of each arm -> verdict runs -> rows -> verdict

All arms of a setting get the same sweep of learning rates, on seeds that the verdict does not use. Runs are named by
what decides their numbers (`normlab.config.run_id`), so that arguments with runs in common share them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

from normlab.claims.figures import FIGURES_OF_PROBES, Curves, Figure
from normlab.claims.measurements import AcrossSeeds, Measurement, Probed, parts, result
from normlab.claims.rows import Phase, Row
from normlab.config import (
    InputError,
    RunConfig,
    available_probes,
    config_from_dict,
    config_to_dict,
    require_choice,
)
from normlab.execution.jobs import Job

if TYPE_CHECKING:
    from normlab.stats.verdicts import ClaimVerdict, Verdict

__all__ = ["TUNING", "Arm", "Claim", "Comparison", "PlannedRun", "Rates", "Scale", "Setting"]

Scale = Literal["small", "full"]
SCALES: tuple[Scale, ...] = get_args(Scale)
Kind = Literal["exact", "measured", "both"]

Arm = Mapping[str, Any] | Callable[[RunConfig], RunConfig]
"""What an arm changes in the base run: nested fields of the config, or a function of it."""

Rates = Mapping[tuple[str, str], float]
"""Chosen learning rate by setting and arm."""

TUNING = Measurement("valid_loss_nats", "nats", True, result("valid_loss_nats"))
"""By which rates are chosen: the validation loss in evaluation mode, with the stored statistics that the test takes."""


@dataclass(frozen=True)
class Setting:
    """One place where the arms are compared.

    Args:
        base: the run that all arms change, by scale; a scale that is not there is not run.
        arms: by name; `{}` changes nothing.
        learning_rates: the sweep, the same for all arms; a single rate needs no tuning.
    """

    base: Mapping[Scale, RunConfig]
    arms: Mapping[str, Arm]
    learning_rates: tuple[float, ...]

    def is_end_of_sweep(self, rate: float) -> bool:
        """Whether a rate next to it was not tried: the best one may lie beyond."""
        sweep = self.learning_rates
        return len(sweep) > 1 and rate in (sweep[0], sweep[-1])

    def config(self, scale: Scale, arm: str) -> RunConfig:
        """The arm's run, but for rate and seed."""
        base, change = self.base[scale], self.arms[arm]
        return change(base) if callable(change) else config_from_dict(_merged(config_to_dict(base), change))


@dataclass(frozen=True)
class Comparison:
    """`arm` against `control` in one measurement, in each setting that has both.

    Args:
        arm: of which something is said.
        control: another arm, or a number that the measurement is compared with, such as 0.
        measurement: its name.
        predicted: what the argument says of `arm`, in the measurement's own direction.
        margin: the smallest effect worth calling one, in the measurement's unit.
        margin_reason: why that one; one line.
    """

    arm: str
    control: str | float
    measurement: str
    predicted: Literal["better", "worse", "same", "not worse"]
    margin: float
    margin_reason: str

    @property
    def arms(self) -> list[str]:
        """The arm, and the control if that is one."""
        return [arm for arm in (self.arm, self.control) if isinstance(arm, str)]


@dataclass(frozen=True)
class PlannedRun:
    """A run that a claim wants, and for what.

    Args:
        seeds: empty for the run itself. Else what is wanted are the probes that measure the arm's runs at these seeds
            together, and the config is that of the first.
    """

    setting: str
    arm: str
    phase: Phase
    config: RunConfig
    seeds: tuple[int, ...] = ()

    @cached_property
    def id(self) -> str:
        return Job(self.config, seeds=self.seeds).id

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.phase, self.setting, self.arm, self.id


@dataclass(frozen=True)
class Claim:
    """One argument.

    Args:
        id: the name of its file.
        sentence: the argument.
        source: where the note says it, and the paper behind it.
        kind: exact (decided by checks), measured (by runs) or both.
        checks: what decides the exact part: names in `results/exact.json`, of functions in `normlab/exact.py`.
        limits: of the same names, those that show where the exact part ends; they decide nothing.
        settings: where arms are compared, by name.
        measurements: what is read from each verdict run. Those that no comparison names are shown beside.
        comparisons: what decides.
        tuning_seeds: of the runs by which rates are chosen.
        verdict_seeds: of the runs that decide; no tuning seed is among them.

    Raises:
        InputError: it contradicts itself.
    """

    id: str
    sentence: str
    source: str
    kind: Kind
    checks: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    settings: Mapping[str, Setting] = field(default_factory=dict)
    measurements: tuple[Measurement, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    tuning_seeds: tuple[int, ...] = ()
    verdict_seeds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._require(bool(self.sentence and self.source), "it needs a sentence and its source")
        self._require(self.kind in get_args(Kind), f"its kind is {self.kind!r}, not one of {', '.join(get_args(Kind))}")
        self._require((self.kind == "measured") != bool(self.checks), "kind exact or both, and no other, has checks")
        measured = bool(self.settings and self.measurements and self.comparisons and self.verdict_seeds)
        self._require((self.kind == "exact") != measured, "kind measured or both, and no other, has settings and seeds")
        both = sorted(set(self.tuning_seeds) & set(self.verdict_seeds))
        self._require(
            not both, f"seeds {both} are tuning and verdict seeds at once; the verdict needs seeds of its own"
        )
        for seeds in (self.tuning_seeds, self.verdict_seeds):
            self._require(len(set(seeds)) == len(seeds), f"a seed stands twice in {seeds}")
        for name, setting in self.settings.items():
            rates = setting.learning_rates
            self._require(bool(rates) and list(rates) == sorted(set(rates)), f"rates of {name} must rise: {rates}")
            self._require(len(rates) == 1 or bool(self.tuning_seeds), f"the sweep of {name} needs tuning seeds")
        names = [measurement.name for measurement in self.measurements]
        self._require(len(set(names)) == len(names), "two measurements have one name")
        for comparison in self.comparisons:
            require_choice(f"measurement of {self.id}", comparison.measurement, names)
            self._require(bool(self._settings_of(comparison)), f"no setting has {' and '.join(comparison.arms)}")
            self._require(comparison.margin > 0 and bool(comparison.margin_reason), "a margin is > 0 and has a reason")
        options: dict[str, Probed | AcrossSeeds] = {}
        for read in self.across_seeds:
            self._require(
                read.seeds == self.verdict_seeds, f"{read.probe} measures across {read.seeds}, not the verdict seeds"
            )
        for read in [*self.probes, *self.across_seeds]:
            require_choice("probe", read.probe, available_probes())
            other = options.setdefault(read.probe, read)
            self._require(
                other.options == read.options, f"the probe {read.probe} is asked for with two sets of options"
            )

    @property
    def section(self) -> str:
        return self.id[0]

    @property
    def probes(self) -> list[Probed]:
        return [read for m in self.measurements for read in parts(m.read) if isinstance(read, Probed)]

    @property
    def across_seeds(self) -> list[AcrossSeeds]:
        return [read for m in self.measurements for read in parts(m.read) if isinstance(read, AcrossSeeds)]

    @property
    def is_timed(self) -> bool:
        """Whether a measurement reads seconds, speed or memory: its verdict runs must not be trained in a stack."""
        return any(measurement.is_timed for measurement in self.measurements)

    @property
    def figures(self) -> tuple[Figure, ...]:
        """What is drawn of the verdict runs, beside the effects."""
        probes = dict.fromkeys(read.probe for read in self.probes)
        return (Curves(), *(figure for probe in probes for figure in FIGURES_OF_PROBES.get(probe, ())))

    def pairs(self) -> list[tuple[Comparison, str]]:
        """Each comparison with each of its settings, in the order of the verdicts of `judge`."""
        return [(comparison, setting) for comparison in self.comparisons for setting in self._settings_of(comparison)]

    def scales(self) -> list[Scale]:
        """Scales at which all settings have a base run."""
        return [scale for scale in SCALES if all(scale in setting.base for setting in self.settings.values())]

    def tuning_runs(self, scale: Scale) -> list[PlannedRun]:
        """Each arm at each rate on each tuning seed; none in a setting with a single rate."""
        return [
            PlannedRun(name, arm, "tuning", _at(config, rate, seed))
            for name, setting in self.settings.items()
            for arm in setting.arms
            for config in [setting.config(scale, arm)]
            for rate in setting.learning_rates
            for seed in self.tuning_seeds
            if len(setting.learning_rates) > 1
        ]

    def verdict_runs(self, scale: Scale, rates: Rates) -> list[PlannedRun]:
        """Each arm that has a rate, on each verdict seed."""
        return [
            PlannedRun(name, arm, "verdict", _at(config, rates[name, arm], seed))
            for name, setting in self.settings.items()
            for arm in setting.arms
            if (name, arm) in rates
            for config in [setting.config(scale, arm)]
            for seed in self.verdict_seeds
        ]

    def together(self, run: PlannedRun) -> PlannedRun:
        """What measures all verdict runs of the arm of `run`, which is one of them, together."""
        first = dataclasses.replace(run.config, seed=self.verdict_seeds[0])
        return dataclasses.replace(run, config=first, seeds=self.verdict_seeds)

    def choose_rates(self, rows: Iterable[Row]) -> dict[tuple[str, str], float]:
        """Rates of the arms whose sweep is complete: fewest diverged runs, then lowest mean loss, then smallest rate.

        Args:
            rows: of which those of `TUNING` in the tuning phase count.
        """
        found = {
            (row.setting, row.arm, row.learning_rate, row.seed): row
            for row in rows
            if row.phase == "tuning" and row.measurement == TUNING.name
        }
        rates: dict[tuple[str, str], float] = {}
        for name, setting in self.settings.items():
            for arm in setting.arms:
                sweep = setting.learning_rates
                if len(sweep) == 1:
                    rates[name, arm] = sweep[0]
                elif all((name, arm, rate, seed) in found for rate in sweep for seed in self.tuning_seeds):
                    of_rate = {rate: [found[name, arm, rate, seed] for seed in self.tuning_seeds] for rate in sweep}
                    rates[name, arm] = min(sweep, key=lambda rate, of_rate=of_rate: (*_badness(of_rate[rate]), rate))
        return rates

    def judge(self, rows: Iterable[Row]) -> ClaimVerdict:
        """The verdict from the verdict rows alone: that of all comparisons in all their settings, or mixed.

        Raises:
            InputError: the row of some run is missing.
        """
        found = {(row.setting, row.arm, row.measurement, row.seed): row for row in rows if row.phase == "verdict"}
        verdicts: dict[str, Verdict] = {}
        measurements = {measurement.name: measurement for measurement in self.measurements}
        for comparison, setting in self.pairs():
            measurement = measurements[comparison.measurement]
            sides: list[list[Row]] = []
            for arm in comparison.arms:
                keys = [(setting, arm, measurement.name, seed) for seed in self.verdict_seeds]
                missing = [key[-1] for key in keys if key not in found]
                self._require(not missing, f"no {measurement.name} of {arm} in {setting} at seeds {missing}")
                sides.append([found[key] for key in keys])
            if not isinstance(comparison.control, str):
                constant = comparison.control
                sides.append([dataclasses.replace(row, value=constant, diverged=False) for row in sides[0]])
            name = f"{setting}: {comparison.arm} against {comparison.control}, {measurement.name}"
            verdicts[name] = verdict_of(comparison, measurement, *sides)
        from normlab.stats.verdicts import combine

        return combine(verdicts)

    def _settings_of(self, comparison: Comparison) -> list[str]:
        return [name for name, setting in self.settings.items() if set(comparison.arms) <= set(setting.arms)]

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise InputError(f"argument {self.id}: {message}")


def verdict_of(comparison: Comparison, measurement: Measurement, arm: Sequence[Row], control: Sequence[Row]) -> Verdict:
    """The one call of `normlab.stats` on numbers: the rows of both arms, paired by seed.

    A run that diverged, or whose value is not finite, is given what its row says in its place (for the loss of a
    language model that of the unigram distribution), or else the worst value of all runs that have one;
    where no run has one, the numbers of diverged runs decide alone.
    """
    from normlab.stats import effects, verdicts

    both = [*arm, *control]
    values = [row.value for row in both if math.isfinite(row.value)]
    given = [row.value for row in both if row.diverged and math.isfinite(row.value)]
    worst = (max if measurement.lower_is_better else min)(given or values, default=0.0)

    def side(name: str | float, rows: Sequence[Row]) -> Any:
        of_seed = {row.seed: None if row.diverged or not math.isfinite(row.value) else row.value for row in rows}
        return effects.Arm(str(name), of_seed)

    pairs = effects.Comparison(
        control=side(comparison.control, control),
        arm=side(comparison.arm, arm),
        unit=measurement.unit,
        better="lower" if measurement.lower_is_better else "higher",
        diverged_value=worst,
    )
    return verdicts.judge(pairs, comparison.predicted, comparison.margin)


def _at(config: RunConfig, learning_rate: float, seed: int) -> RunConfig:
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=learning_rate), seed=seed)


def _badness(rows: Sequence[Row]) -> tuple[int, float]:
    """How many runs diverged, and the mean loss of the others."""
    losses = [row.value for row in rows if not row.diverged and math.isfinite(row.value)]
    return len(rows) - len(losses), math.fsum(losses) / len(losses) if losses else math.inf


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for name, change in changes.items():
        inner = merged.get(name)
        merged[name] = _merged(inner, change) if isinstance(inner, Mapping) and isinstance(change, Mapping) else change
    return merged
