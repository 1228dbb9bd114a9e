"""What is shown of runs, by the names that runs log: curves, bars of what they reach, what probes found."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from normlab.claims.base import Claim
from normlab.claims.figures import FIGURES_OF_PROBES
from normlab.claims.measurements import AcrossSeeds, Probed, Result, parts
from normlab.config import RunConfig
from normlab.records.metrics import ALONG

__all__ = ["Bars", "Group", "Lines", "Panel", "panels_of", "panels_of_any_run", "site_names"]


@dataclass(frozen=True)
class Lines:
    """Curves of a metric.

    Args:
        metric: its name; a regular expression of names if `is_pattern`.
        x: the metric to the right.
        log: whether y is on a logarithmic scale.
    """

    metric: str
    x: str
    log: bool = False
    is_pattern: bool = False


@dataclass(frozen=True)
class Bars:
    """The last value of a metric, from the summary of each run."""

    metric: str


Panel = Lines | Bars


@dataclass(frozen=True)
class Group:
    """Panels under a title."""

    title: str
    panels: Sequence[Panel]


LOSSES = ("train_loss_nats", "valid_loss_nats")
TRAINING = ("gradient_norm", "learning_rate", "tokens_per_second")
ACTIVATIONS = ("mean", "std", "saturated")
ANY_RESULT = ("test_loss_nats", "test_bits_per_char", "test_accuracy", "peak_memory_mib")
PROBE_TITLES = {
    "discrepancy": "Train-inference discrepancy",
    "gradient_flow": "Gradient flow",
    "step_statistics": "Statistics per time step",
}
"""Of the probes that every run can be asked about; others go by their name."""
ANY_PROBED = {
    "discrepancy": ("discrepancy_mean", "discrepancy_std", "loss_nats_stored", "loss_nats_batch"),
    "gradient_flow": ("log10_decay_per_step", "gradient_ratio"),
    "step_statistics": ("noise",),
}


def panels_of(claims: Sequence[Claim]) -> list[Group]:
    """Of the runs that these arguments are judged by; empty if they are exact alone."""
    configs = _bases(claims)
    if not configs:
        return []
    reads = [read for claim in claims for each in claim.measurements for read in parts(each.read)]
    results = [name for read in reads if isinstance(read, Result) for name in read.names[:1]]
    groups = [*_common(), _activations()] if any(each.training.activations_every for each in configs) else _common()
    groups += [Group("Results", [Bars(name) for name in dict.fromkeys(["test_loss_nats", *results])])]
    probed: dict[str, list[str]] = {}
    for read in reads:
        if isinstance(read, Probed | AcrossSeeds):
            probed.setdefault(read.probe, []).append(read.key)
    return groups + [
        Group(PROBE_TITLES.get(probe, f"Probe: {probe}"), _probed(probe, dict.fromkeys(keys), site_names(configs)))
        for probe, keys in probed.items()
    ]


def panels_of_any_run(claims: Sequence[Claim]) -> list[Group]:
    """Of runs that serve no argument too. Sites are those of the arguments' models."""
    sites = site_names(_bases(claims))
    groups = [*_common(), Group("Results", [Bars(name) for name in ANY_RESULT]), _activations()]
    return groups + [Group(PROBE_TITLES[probe], _probed(probe, keys, sites)) for probe, keys in ANY_PROBED.items()]


def site_names(configs: Iterable[RunConfig]) -> list[str]:
    """Sites of these models that take the norm of the run, or one of their own."""
    found: dict[str, None] = {}
    for config in configs:
        sites = getattr(config.model, "sites", None)
        for field in dataclasses.fields(sites) if sites is not None else ():
            if getattr(sites, field.name).norm != "none":
                found[field.name] = None
    return list(found)


def _bases(claims: Iterable[Claim]) -> list[RunConfig]:
    return [base for claim in claims for setting in claim.settings.values() for base in setting.base.values()]


def _common() -> list[Group]:
    axes = ("step", "seconds")
    return [
        Group("Loss", [Lines(name, x) for name, x in itertools.product(LOSSES, axes)]),
        Group("Training", [Lines(name, "step") for name in TRAINING]),
    ]


def _activations() -> Group:
    patterns = [f"activations/.+/{name}" for name in ACTIVATIONS]
    return Group("Activations per site", [Lines(pattern, "step", is_pattern=True) for pattern in patterns])


def _probed(probe: str, keys: Iterable[str], sites: Sequence[str]) -> list[Panel]:
    """Numbers of the probe's summary, and its rows where the report of the results draws them."""
    panels: list[Panel] = [Bars(f"probe/{probe}/{key}") for key in keys]
    along = {each.probe: each for each in ALONG}.get(probe)
    if along is None:
        return panels
    return panels + [
        Lines(along.name(quantity, site), along.axis, figure.log)
        for figure in FIGURES_OF_PROBES[probe]
        for quantity in figure.y
        for site in (sites if along.by_site else [""])
    ]
