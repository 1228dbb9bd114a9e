"""The folder for what is built or measured once per machine, and what tells machines apart.

Libraries in it are loaded into the process: nobody but the user may have put them there.
"""

from __future__ import annotations

import functools
import os
import platform
import stat
import tempfile
from pathlib import Path

__all__ = ["folder", "is_own", "processor"]

_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def folder() -> Path:
    """A folder that the user alone can write to; a new one for this process where there is none."""
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        path = (Path(root) if root else Path.home() / ".cache") / "normlab"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path if os.access(path, os.W_OK) and _is_private(path) else _for_this_process()
    except (OSError, RuntimeError):
        return _for_this_process()


def is_own(path: Path) -> bool:
    """Whether `path` is a plain file of the user's that nobody else can have written; False if there is none."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & _BY_OTHERS


def _is_private(path: Path) -> bool:
    path = path.resolve()
    found = path.stat()
    if found.st_uid != os.geteuid():
        return False
    if found.st_mode & _BY_OTHERS:  # made under a lenient umask; what lies in it is looked at file by file
        path.chmod(0o700)
    # Where all may write, and rename what is not theirs, another folder may take its place. A group that may write is
    # let pass above: most users have a group of their own.
    modes = (place.stat().st_mode for place in path.parents)
    return all(not mode & stat.S_IWOTH or mode & stat.S_ISVTX for mode in modes)


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
