"""Every number that a run logs, by name: in the rows and the outcome of its record, and in W&B. docs/metrics.md is made
of this list (`make metrics`), the dashboards take their names from it, and a test holds it against what runs log.

`<...>` in a name stands for what a run decides: a site, a module's path, a layer, a multiple of the training length.
What a probe found has the probe in its name in W&B, `probe/<probe>/<quantity>`; rows of four probes are there too, over
an axis of their own: `by_time_step/<probe>/<quantity>.<site>`, averaged over layers.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

__all__ = ["ALONG", "METRICS", "Along", "Metric", "find_metric", "probe_summary", "probe_summary_of_run"]


@dataclass(frozen=True)
class Metric:
    """One name, or all that fit it.

    Args:
        name: as it is logged.
        unit: empty for what is not a number.
        meaning: one line.
        when: one of the keys of `WHEN`.
    """

    name: str
    unit: str
    meaning: str
    when: str

    def fits(self, name: str) -> bool:
        return self._pattern.fullmatch(name) is not None

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(_PLACEHOLDER.sub(lambda match: _STANDS_FOR[match[0]], self.name.replace(".", r"\.")))


_STANDS_FOR = {"<site>": r"[a-z_]+", "<path>": r"[\w.]+", "<layer>": r"\d+", "<multiple>": r"\d+"}
_PLACEHOLDER = re.compile(r"<\w+>")

WHEN = {
    "rows": "in every row, the axes of all others",
    "steps": "every 10 optimizer steps, at the first and the last",
    "validations": "every `training.valid_every` steps",
    "activations": "every `training.activations_every` steps, of one fixed validation batch in evaluation mode",
    "end": "once, when the run ends: in its outcome and in the summary in W&B",
    "probe": "once a probe measured the ended run: in `probes/<probe>.json`, and in the summary in W&B",
    "rows of a probe": "the same, as rows over an axis of their own in W&B",
}


def _of_training() -> Iterable[Metric]:
    yield Metric("step", "steps", "optimizer steps done", "rows")
    yield Metric("seconds", "s", "training time, without validations and probes", "rows")
    yield Metric("train_loss_nats", "nats", "loss of the step's batch in training mode, without penalties", "steps")
    yield Metric("penalty_nats", "nats", "what the norms add to the loss (rbn)", "steps")
    yield Metric("gradient_norm", "", "norm of the gradient of all parameters, before clipping", "steps")
    yield Metric("learning_rate", "", "of the first parameter group", "steps")
    yield Metric("tokens_per_second", "1/s", "valid tokens trained on, since the row before", "steps")
    for name, unit, meaning in _LOSSES:
        yield Metric(f"valid_{name}", unit, f"{meaning}, validation, in evaluation mode", "validations")
    for name, meaning in _ACTIVATIONS.items():
        yield Metric(f"activations/<path>/{name}", "", f"{meaning} of the outputs of the norm at <path>", "activations")


_LOSSES = (
    ("loss_nats", "nats", "mean cross-entropy per predicted token or text"),
    ("bits_per_char", "bits", "the same per raw character (language models)"),
    ("word_perplexity", "", "exp of the same per word (language models)"),
    ("accuracy", "share", "texts classified rightly (classifiers)"),
)
_ACTIVATIONS = {
    "mean": "mean",
    "std": "standard deviation",
    "p15": "15th percentile",
    "p50": "median",
    "p85": "85th percentile",
    "saturated": "share beyond ±2",
    "active": "share above 0",
}


def _of_the_end() -> Iterable[Metric]:
    yield Metric("outcome", "", "finished, diverged, interrupted or failed", "end")
    yield Metric("best_step", "steps", "of the weights that were tested: the lowest validation loss", "end")
    for name, unit, meaning in _LOSSES:
        yield Metric(f"valid_{name}", unit, f"{meaning}, whole validation split, best weights", "end")
        yield Metric(f"test_{name}", unit, f"{meaning}, test split, best weights", "end")
        yield Metric(f"train_{name}", unit, f"{meaning}, a part of train, best weights, evaluation mode", "end")
        for split in ("valid", "test"):
            running = "with running averages in place of re-estimated statistics"
            yield Metric(f"{split}_running_{name}", unit, f"`{split}_{name}` {running}", "end")
        if name != "accuracy":
            yield Metric(f"unigram_test_{name}", unit, f"`test_{name}` of the unigram distribution of train", "end")
    yield Metric("majority_test_accuracy", "share", "`test_accuracy` of the most frequent class of train", "end")
    yield Metric("statistics_gap_mean", "sigma", "largest distance of running means from re-estimated ones", "end")
    yield Metric("statistics_gap_std", "share", "largest distance of running standard deviations from them", "end")
    yield Metric("recomputed_batches", "batches", "over which stored statistics were re-estimated", "end")
    yield Metric("tokens_per_second", "1/s", "valid tokens trained on, over the whole run", "end")
    yield Metric("peak_memory_mib", "MiB", "most memory in use: of the GPU, else of the process", "end")
    yield Metric("parameters", "", "numbers trained", "end")


_PROBES: Mapping[str, Sequence[tuple[str, str, str]]] = {
    "activations": [(f"{name}.<site>", "", meaning) for name, meaning in _ACTIVATIONS.items()],
    "bias_variance": [
        ("loss_nats", "nats", "of this run on the test texts that all runs were given"),
        ("brier", "", "Brier score of this run"),
        ("variance_nats", "nats", "KL from the common prediction of the runs to that of this one"),
    ],
    "by_length": [
        ("length", "tokens", "of the training texts"),
        ("loss_nats_at_<multiple>x", "nats", "loss on texts of <multiple> training lengths"),
    ],
    "companions": [
        ("companion_variance_ratio", "share", "of the variance of outputs that comes from the other rows of a batch"),
        ("companion_variance", "", "variance of an example's output over such rows"),
        ("example_variance", "", "variance of outputs over examples"),
    ],
    "cost": [
        ("seconds_per_step", "s", "median of a training step"),
        ("seconds_per_step_reference", "s", "the same on the plain loop (recurrent networks)"),
        ("peak_bytes", "bytes", "most memory in use in a step"),
        ("saved_bytes", "bytes", "kept from forward for backward"),
        ("parameter_bytes", "bytes", "of all parameters"),
        ("buffer_bytes", "bytes", "of stored statistics and other buffers"),
    ],
    "discrepancy": [
        ("discrepancy_mean", "sigma", "TID of means: stored against those of training batches, over all sites"),
        ("discrepancy_std", "share", "TID of standard deviations"),
        ("discrepancy_mean_median", "sigma", "median over time steps, mean over sites"),
        ("discrepancy_std_median", "share", "median over time steps, mean over sites"),
        ("discrepancy_mean.<site>", "sigma", "the same of one site"),
        ("discrepancy_std.<site>", "share", "the same of one site"),
        ("loss_nats_stored", "nats", "validation loss with stored statistics"),
        ("loss_nats_batch", "nats", "validation loss with the statistics of each batch"),
    ],
    "drift": [
        (f"{name}_drift.<site>", "sigma", f"how far the {_ACTIVATIONS[name]} moved from one checkpoint to another")
        for name in ("mean", "p15", "p50", "p85", "std")
    ],
    "gradient_flow": [
        ("gradient_norm_first", "", "gradient of the last time step's loss by the hidden state of the first"),
        ("gradient_norm_last", "", "the same by that of the last"),
        ("gradient_ratio", "", "first over last"),
        ("log10_decay_per_step", "decades", "slope of log10 of the norm by lag: below 0 gradients vanish"),
        ("block_gradient_norm.<layer>", "", "the same by the outputs of a block at all time steps (Transformers)"),
        ("parameter_gradient_norm.<layer>", "", "gradient of the mean loss by the parameters of a layer"),
    ],
    "leak": [
        (f"{what}_leak_{mode}", "", f"gradient of outputs by {meaning}, norms in {mode} mode; 0 where nothing leaks")
        for what, meaning in (("row", "other rows of the batch"), ("future", "later inputs (language models)"))
        for mode in ("train", "eval")
    ],
    "senses": [
        ("auc.<site>", "share", "pairs of different senses further apart than one of the same"),
        ("distance_same.<site>", "scale", "mean distance of two occurrences in one sense"),
        ("distance_different.<site>", "scale", "mean distance of two occurrences in different senses"),
        ("scale.<site>", "", "mean distance of random tokens"),
        ("pairs_same", "pairs", "of one sense"),
        ("pairs_different", "pairs", "of different senses"),
        ("pairs_unknown", "pairs", "left out: the model does not know the word"),
    ],
    "sphere": [
        (f"{name}_{when}.<site>", unit, f"{meaning}, {when} gain and bias")
        for when in ("before", "after")
        for name, unit, meaning in (
            ("token_mean", "", "mean over tokens of |mean of the features|"),
            ("token_variance", "", "mean over tokens of the variance of the features"),
            ("sphere_distance", "radii", "mean distance to the sphere of radius sqrt(features)"),
            ("anisotropy", "", "mean cosine of random pairs of tokens"),
        )
    ],
    "step_statistics": [
        ("settling_step.<site>", "time steps", "from which statistics stay near those of the late steps"),
        ("step_mean_spread.<site>", "sigma", "standard deviation over time steps of the means"),
        ("step_std_spread.<site>", "share", "standard deviation over time steps of sigma, over its mean"),
        ("first_step_mean_distance.<site>", "sigma", "mean of the first step against the late ones"),
        ("first_step_std_distance.<site>", "share", "sigma of the first step against the late ones"),
        ("stored_mean_distance.<site>", "sigma", "stored means against those of each step, mean over steps"),
        ("stored_std_distance.<site>", "share", "stored sigma against that of each step, mean over steps"),
        ("noise", "sigma", "distance of means that so few entries give by chance"),
        ("steps", "time steps", "that enough texts reach"),
    ],
}


@dataclass(frozen=True)
class Along:
    """Rows of a probe that are logged over an axis.

    Args:
        probe: whose rows.
        axis: its name in W&B; a metric of each row.
        column: its name in the probe's rows; None there is a row of no place on the axis.
        quantities: columns upwards: name, unit and meaning.
        by_site: whether each site has values of its own.
        kind: rows of this `kind` alone; empty for all.
    """

    probe: str
    axis: str
    column: str
    quantities: tuple[tuple[str, str, str], ...]
    by_site: bool = False
    kind: str = ""

    def name(self, quantity: str, site: str = "") -> str:
        """In W&B."""
        return f"by_{self.axis}/{self.probe}/{quantity}{f'.{site}' if self.by_site else ''}"

    def rows(self, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What is logged of the probe's rows, one for each place on the axis: means over layers."""
        places: dict[int, dict[str, list[float]]] = {}
        for row in rows:
            if row.get(self.column) is None or row.get("kind", "") != self.kind:
                continue
            values = places.setdefault(row[self.column], {})
            for quantity, _, _ in self.quantities:
                if row[quantity] is not None:
                    values.setdefault(self.name(quantity, row.get("site", "")), []).append(row[quantity])
        return [
            {self.axis: place, **{name: statistics.fmean(each) for name, each in values.items()}}
            for place, values in sorted(places.items())
        ]


ALONG = (
    Along(
        "step_statistics",
        "time_step",
        "step",
        (
            ("mean", "", "mean over features of what enters the norm"),
            ("std", "", "standard deviation over texts of what enters the norm"),
            ("mean_distance", "sigma", "mean against the late steps"),
            ("std_distance", "share", "sigma against the late steps"),
            ("stored_mean_distance", "sigma", "stored mean against that of the step"),
            ("stored_std_distance", "share", "stored sigma against that of the step"),
        ),
        by_site=True,
    ),
    Along(
        "discrepancy",
        "time_step",
        "step",
        (
            ("discrepancy_mean", "sigma", "TID of means"),
            ("discrepancy_std", "share", "TID of standard deviations"),
        ),
        by_site=True,
    ),
    Along("by_length", "position", "position", (("loss_nats", "nats", "loss, the state carried"),), kind="position"),
    Along(
        "gradient_flow",
        "lag",
        "lag",
        (("gradient_norm", "", "gradient of the last time step's loss by the hidden state so many steps before"),),
        kind="lag",
    ),
)
AXES = {
    "time_step": "time step in a text, from 0",
    "position": "of a token in a text, from 0",
    "lag": "time steps before the last",
}


def _of_probes() -> Iterable[Metric]:
    for probe, quantities in _PROBES.items():
        for name, unit, meaning in quantities:
            yield Metric(f"probe/{probe}/{name}", unit, meaning, "probe")
    for axis, meaning in AXES.items():
        yield Metric(axis, "time steps", meaning, "rows of a probe")
    for along in ALONG:
        for name, unit, meaning in along.quantities:
            yield Metric(along.name(name, "<site>"), unit, meaning, "rows of a probe")


METRICS: tuple[Metric, ...] = (*_of_training(), *_of_the_end(), *_of_probes())
"""In the order of docs/metrics.md. A name that is logged in rows and once more in the end stands here twice."""


def find_metric(name: str) -> Metric | None:
    """The first of the list that `name` fits."""
    return next((metric for metric in METRICS if metric.fits(name)), None)


def probe_summary(probe: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a probe found, by its names in W&B."""
    return {f"probe/{probe}/{quantity}": value for quantity, value in summary.items()}


def probe_summary_of_run(probe: str, rows: Iterable[Mapping[str, Any]], run_id: str) -> dict[str, Any]:
    """What a probe of several runs found for one of them, by its names in W&B."""
    row = next((row for row in rows if row.get("run") == run_id), {})
    return probe_summary(probe, {name: value for name, value in row.items() if name not in ("run", "seed")})
