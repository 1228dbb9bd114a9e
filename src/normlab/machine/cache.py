"""The folder for what is built or measured once per machine, and what tells machines apart."""

from __future__ import annotations

import functools
import os
import platform
import tempfile
from pathlib import Path

__all__ = ["folder", "processor"]


def folder() -> Path:
    """A folder of the user's own; a new one for this process where there is none to write to."""
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        path = (Path(root) if root else Path.home() / ".cache") / "normlab"
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return _for_this_process()
    return path if os.access(path, os.W_OK) else _for_this_process()


@functools.cache
def _for_this_process() -> Path:
    return Path(tempfile.mkdtemp(prefix="normlab-"))


def processor() -> str:
    """The processor and its instructions: what `-march=native` and the speed of a product depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    names = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(names)}))
