"""Where the time of a training step of a normalized `normlab.LSTM` on a CPU goes, by clocks round what it calls.

torch's profiler does not see the C kernels, so each call is timed in Python: a clock costs less than a microsecond, and
the step is timed without clocks too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from benchmarking import Step, timed

from normlab.recurrence import fast

PARTS: tuple[str, ...] = ("recurrent products", "input products", "weight gradients", "time step kernels", "rest")
"""Input products: the projection and the gradient of the input. Time step kernels: norms, gates, cell, forward and
backward. Rest: what is between, such as memory, stored statistics and autograd itself."""


class Clocks:
    """Seconds by part; a call within another counts for the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PARTS[:-1], 0.0)
        self._inside = False

    def round(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, with its time counted as that of `part`."""

        def clocked(*args: Any) -> Any:
            if self._inside:
                return call(*args)
            self._inside = True
            began = time.perf_counter()
            try:
                return call(*args)
            finally:
                self.seconds[part] += time.perf_counter() - began
                self._inside = False

        return clocked

    @contextmanager
    def running(self) -> Iterator[None]:
        """Clocks round what fast.py calls, until it closes."""
        products, steps = fast.Product, fast._steps

        def recurrent(*args: Any) -> Any:
            return self.round("recurrent products", self.round("recurrent products", products)(*args))

        def clocked_steps(*args: Any) -> Any:
            found = steps(*args)
            for name in ("forward", "backward"):
                setattr(found, name, self.round("time step kernels", getattr(found, name)))
            return found

        with (
            mock.patch.object(fast, "Product", recurrent),
            mock.patch.object(fast, "product", self.round("input products", fast.product)),
            mock.patch.object(fast, "input_gradient", self.round("input products", fast.input_gradient)),
            mock.patch.object(fast, "weight_gradient", self.round("weight gradients", fast.weight_gradient)),
            mock.patch.object(fast, "_steps", clocked_steps),
        ):
            yield


def profile(step: Step, rounds: int) -> dict[str, Any]:
    """Seconds of a step without clocks (median), with them (the step of median length), and of its parts."""
    step()
    plain: list[float] = []
    clocked: list[tuple[float, dict[str, float]]] = []
    for _ in range(rounds):
        plain.append(timed(step, "cpu")[0])
        clocks = Clocks()
        with clocks.running():
            seconds = timed(step, "cpu")[0]
        clocked.append((seconds, clocks.seconds))
    seconds, parts = sorted(clocked, key=lambda found: found[0])[rounds // 2]
    parts = {**parts, "rest": seconds - sum(parts.values())}
    return {
        "seconds": float(f"{statistics.median(plain):.4g}"),
        "seconds_with_clocks": float(f"{seconds:.4g}"),
        "parts": {name: float(f"{parts[name]:.4g}") for name in PARTS},
    }
