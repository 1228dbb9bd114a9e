"""Functions whose intermediate values backward computes anew instead of keeping them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from torch.utils.checkpoint import checkpoint

from normlab.norms.base import Norm

__all__ = ["recomputed"]

T = TypeVar("T")


def recomputed(function: Callable[..., T], norms: Sequence[Norm]) -> Callable[..., T]:
    """`function(norms, ...)` without its first argument, keeping no more for backward than its other arguments.

    By the time of backward the norms have stored the sequence's statistics, and some normalize by what they stored: the
    second run is given copies of the norms as they stand now.
    """
    then = [_as_it_stands(norm) for norm in norms]

    def once(*args: Any) -> T:
        first = True

        def run(*args: Any) -> T:
            nonlocal first
            if first:
                first = False
                return function(norms, *args)
            try:
                return function(then, *args)
            finally:
                for norm in then:
                    if norm.penalties is not None:
                        norm.penalties.clear()

        return cast(T, checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False))

    return once


def _as_it_stands(norm: Norm) -> Norm:
    """A copy with the same parameters, stored values of its own, its own list of penalties, watched by nobody."""
    twin = copy.copy(norm)
    twin._buffers = {name: None if buffer is None else buffer.clone() for name, buffer in norm._buffers.items()}
    if "normalize" in vars(twin):
        object.__delattr__(twin, "normalize")
    if norm.penalties is not None:
        twin.penalties = []
    return twin
