"""Seconds spent training: validation, probes and checkpoints do not count."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Stopwatch"]


class Stopwatch:
    """A stopwatch that can be held and that goes on from an earlier total after a resume.

    Args:
        seconds: what was on it before.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._total = seconds
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._total + running

    def set(self, seconds: float) -> None:
        """Put the watch, which must be stopped, on `seconds`."""
        self._total = seconds

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> None:
        self._total, self._since = self.seconds, None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Time inside does not count; does nothing while the watch is stopped already."""
        running = self._since is not None
        if running:
            self.stop()
        try:
            yield
        finally:
            if running:
                self.start()
