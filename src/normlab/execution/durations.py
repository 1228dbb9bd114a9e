"""How long a run will take, by how long its like took."""

from __future__ import annotations

import dataclasses
import statistics

from normlab.config import OptimConfig, OutputConfig, RunConfig, run_id

__all__ = ["Durations", "likes"]


class Durations:
    """Seconds of runs, and estimates from them.

    A run is like another if they differ in seed and learning rate alone; failing that, in their norm as well.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, dict[str, float]] = {}

    def add(self, config: RunConfig, seconds: float) -> None:
        for like in likes(config):
            self._seconds.setdefault(like, {})[run_id(config)] = seconds

    def estimate(self, config: RunConfig) -> float | None:
        """Median seconds of the runs most like it; None if there are none."""
        for like in likes(config):
            if like in self._seconds:
                return statistics.median(self._seconds[like].values())
        return None


def likes(config: RunConfig) -> tuple[str, str]:
    """Names of what a run has in common with others: with those of another seed and rate, and of another norm too."""
    same = dataclasses.replace(config, seed=0, optim=OptimConfig(), output=OutputConfig())
    # Config files of architectures are not read again: `from_file` holds what they said.
    norm = {"norm": "none", "norm_options": type(config.model.norm_options)()}
    if config.model.name == "hf":
        norm["swap"] = "*"
    else:
        norm["sites"] = type(config.model.sites)()
    return run_id(same), run_id(dataclasses.replace(same, model=dataclasses.replace(config.model, **norm)))
