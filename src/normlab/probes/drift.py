"""How far the activations at each norm site moved between two moments of a run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from normlab.config import require_choice
from normlab.probes.activations import PERCENTILES, ActivationStatistics
from normlab.probes.base import Measurement, Probe, Row, Subject, site_summary

__all__ = ["CHECKPOINTS", "Drift"]

CHECKPOINTS = ("initial", "best", "last", "final")

MOVING = ("mean", *(f"p{level}" for level in PERCENTILES))


@dataclass(frozen=True)
class Drift(Probe):
    """Change of each norm site's outputs between two checkpoints, on the same validation texts.

    Of mean and percentiles |last - first| / std at the first; of std |last / first - 1|. Norms are in training mode,
    without dropout: what the layers saw while training, and not what stored statistics that are still at their first
    values would make of it. A run keeps "best" (best validation loss), "last" and, if its norms store statistics,
    "final" (best, statistics re-estimated; else the same as best); "initial" are the weights it began with, made anew
    from its seed. What happened in between stands in the record's metrics, every `training.activations_every` steps.

    Args:
        first: checkpoint.
        last: checkpoint.
        batches: of the run's batch size.
    """

    first: str = "initial"
    last: str = "final"
    batches: int = 4

    def __post_init__(self) -> None:
        self.require_positive("batches")
        for checkpoint in (self.first, self.last):
            require_choice("checkpoint", checkpoint, CHECKPOINTS)

    def measure(self, subject: Subject) -> Measurement:
        statistics = ActivationStatistics(batches=self.batches, mode="train")

        def at(checkpoint: str) -> dict[str, Row]:
            model = subject.checkpoint(checkpoint).to(subject.device).eval()
            rows = statistics.measure(dataclasses.replace(subject, model=model)).rows
            return {row["path"]: row for row in rows if row["step"] is None}

        first, last = at(self.first), at(self.last)
        rows = [_compared(before, last[path]) for path, before in first.items()]
        return Measurement(site_summary(rows, [f"{name}_drift" for name in (*MOVING, "std")]), rows)


def _compared(first: Row, last: Row) -> Row:
    row: dict[str, Any] = {name: first[name] for name in ("site", "layer", "path")}
    for name in (*MOVING, "std"):
        row |= {f"{name}_first": first[name], f"{name}_last": last[name]}
    std = first["std"]
    for name in MOVING:
        row[f"{name}_drift"] = abs(last[name] - first[name]) / std if std else float("nan")
    row["std_drift"] = abs(last["std"] / std - 1) if std else float("nan")
    return row
