"""Imports of what is large."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["without_collecting"]


@contextmanager
def without_collecting() -> Iterator[None]:
    """While open, nobody looks for garbage, nor later among what was imported.

    Imports make none, and to look for it again and again took a quarter of the processor time in which torch and
    Lightning are imported and a short run begins.
    """
    was_on, modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > modules:
            gc.freeze()
        if was_on:
            gc.enable()
