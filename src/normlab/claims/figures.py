"""What is drawn of an argument's verdict runs beside its effects: learning curves, and rows of probes it measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["FIGURES_OF_PROBES", "ByX", "Curves", "Figure"]


@dataclass(frozen=True)
class Curves:
    """A metric of `metrics.jsonl` over steps and over seconds of training, per setting; a band over seeds."""

    metric: str = "valid_loss_nats"


@dataclass(frozen=True)
class ByX:
    """Rows of a probe as lines, averaged over layers and seeds, one panel per setting, quantity and `by`.

    Args:
        title: what is seen; with units.
        probe: whose rows they are.
        x: column to the right.
        y: columns upwards.
        by: column whose values get panels of their own, such as site; empty for none.
        kind: rows of this `kind` alone; empty for all.
        log: whether y is on a logarithmic scale.
    """

    title: str
    probe: str
    x: str
    y: tuple[str, ...]
    by: str = ""
    kind: str = ""
    log: bool = False


Figure = Curves | ByX

FIGURES_OF_PROBES: Mapping[str, tuple[ByX, ...]] = {
    "step_statistics": (
        ByX(
            "Statistics of each time step, distance from those of the late steps in standard deviations",
            "step_statistics",
            "step",
            ("mean_distance", "std_distance"),
            by="site",
        ),
    ),
    "by_length": (
        ByX("Loss by position, the state carried", "by_length", "position", ("loss_nats",), kind="position"),
    ),
    "gradient_flow": (
        ByX(
            "Gradient of the loss of the last time step, by lag",
            "gradient_flow",
            "lag",
            ("gradient_norm",),
            kind="lag",
            log=True,
        ),
    ),
    "discrepancy": (
        ByX(
            "Train-inference discrepancy of means in batch standard deviations",
            "discrepancy",
            "step",
            ("discrepancy_mean",),
            by="site",
            log=True,
        ),
    ),
}
"""By the probe that an argument measures; the rows of others say little beyond their summary."""
