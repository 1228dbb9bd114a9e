"""The folder for what is built or measured once per machine, and what tells machines apart.

Libraries in it are loaded into the process: nobody but the user may have put them there.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import platform
import shutil
import stat
import tempfile
from pathlib import Path

__all__ = ["folder", "is_own", "processor"]

log = logging.getLogger(__name__)

_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def folder() -> Path:
    """A folder that the user alone can write to; a new one for this process where there is none."""
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        path = (Path(root) if root else Path.home() / ".cache") / "normlab"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            return _for_this_process()
        strangers = _open_to_others(path.resolve())
    except (OSError, RuntimeError):
        return _for_this_process()
    if strangers:
        return _for_this_process(f"{strangers}: not kept for later processes; XDG_CACHE_HOME can name another folder")
    return path


def is_own(path: Path) -> bool:
    """Whether `path` is a plain file of the user's that nobody else can have written; False if there is none."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & _BY_OTHERS


def _open_to_others(path: Path) -> str:
    """How somebody else could put files into the folder `path`; empty if nobody can."""
    found = path.stat()
    if found.st_uid != os.geteuid():
        return f"the cache folder {path} belongs to somebody else"
    if found.st_mode & _BY_OTHERS:  # made under a lenient umask; what lies in it is looked at file by file
        path.chmod(0o700)
    for place in path.parents:
        # Where all may write, and rename what is not theirs, another folder may take this one's place. A group that may
        # write is let pass: most users have one of their own.
        mode = place.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return f"the cache folder {path} lies in {place}, where everybody can write"
    return ""


@functools.cache
def _for_this_process(reason: str = "") -> Path:
    if reason:
        log.warning("%s", reason)
    path = Path(tempfile.mkdtemp(prefix="normlab-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def processor() -> str:
    """The processor and its instructions: what `-march=native` and the speed of a product depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    names = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(names)}))
