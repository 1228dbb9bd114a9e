"""What an argument wants drawn from its verdict runs, beside its effects."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ByX", "Curves", "Figure"]


@dataclass(frozen=True)
class Curves:
    """A metric of `metrics.jsonl` over steps and over seconds of training, per setting; a band over seeds."""

    metric: str = "valid_loss_nats"


@dataclass(frozen=True)
class ByX:
    """Rows of a probe as lines, averaged over layers and seeds, one panel per setting, quantity and `by`.

    Args:
        title: what is seen; with units.
        probe: one that the argument measures.
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
