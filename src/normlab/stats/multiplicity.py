"""Holm's correction over the claims of one report (Holm 1979)."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["holm"]


def holm(p_by_name: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values: calling all at or below alpha makes any false call at all with probability <= alpha.

    The smallest of m is multiplied by m, the next by m - 1 and so on, never below the one before, never above 1.
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_by_name, key=p_by_name.__getitem__)):
        largest = max(largest, min(1.0, (len(p_by_name) - rank) * p_by_name[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_by_name}
