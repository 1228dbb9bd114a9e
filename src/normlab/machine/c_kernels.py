"""Builds a source of C kernels with the system's C compiler, once per machine.

A library that is there, in this process or in the cache on disk, is used at once. Else it is built when that pays: at
the first call with gradient (`load`), never for a call without (`find`). A training run decides before its first step
(training/engine.py) and stays with its decision (`left_out`): kernels and torch operators round differently, in float32
by about 1e-7 of a value, which training enlarges.

A machine without a compiler is served too, more slowly: `load` then returns None, and says so once in the log.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from normlab.machine import cache

__all__ = ["Kernels", "compiler", "left_out"]

log = logging.getLogger(__name__)

FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
TIMEOUT_SECONDS = 120

_libraries: dict[tuple[str, torch.dtype], ctypes.CDLL | None] = {}
"""What this process found or built, by the kernels' name; None: nothing in the cache, or (then in `_failed` too)
nothing to be built."""
_failed: set[tuple[str, torch.dtype]] = set()
_reasons: list[str] = []
"""Why kernels are left out, from the outermost `left_out` to the innermost."""


class Kernels:
    """One C source and the functions in it, all of which take the same arguments and return nothing.

    Args:
        source: the file; with `-DNORMLAB_DOUBLE` it must give the functions in float64, else in float32.
        name: what the kernels are, in messages and in the cache.
        without: how the user's work goes on without them, in messages.
        functions: their names.
        arguments: what each takes.
        build_seconds: of one precision, on one core of 2024.
    """

    def __init__(
        self,
        source: Path,
        name: str,
        without: str,
        functions: Sequence[str],
        arguments: Sequence[Any],
        build_seconds: float,
    ) -> None:
        self.source, self.name, self.without = source, name, without
        self.functions, self.arguments, self.build_seconds = functions, arguments, build_seconds

    def find(self, dtype: torch.dtype) -> ctypes.CDLL | None:
        """The kernels in float32 or float64 if they need not be built; looks into the cache on disk once."""
        if _reasons:
            return None
        key = self.name, dtype
        if key not in _libraries:
            program = compiler()
            _libraries[key] = None if program is None else self._opened(program, dtype, build=False)
        return _libraries[key]

    def load(self, dtype: torch.dtype) -> ctypes.CDLL | None:
        """The kernels, built if need be; None where there is no compiler, it does not succeed or they are left out."""
        library, key = self.find(dtype), (self.name, dtype)
        if library is not None or _reasons or key in _failed:
            return library
        program = compiler()
        if program is None:
            log.info("no C compiler found (cc, gcc or clang): %s", self.without)
        else:
            library = _libraries[key] = self._opened(program, dtype, build=True)
        if library is None:
            _failed.add(key)
        return library

    def absence(self, dtype: torch.dtype) -> str:
        """Why a call with gradient will not run on the kernels; empty if it will."""
        if _reasons:
            return _reasons[-1]
        return "no C compiler that works" if (self.name, dtype) in _failed or compiler() is None else ""

    def _opened(self, program: str, dtype: torch.dtype, *, build: bool) -> ctypes.CDLL | None:
        """The library from the cache, or else, with `build`, a new one."""
        precision = ("-DNORMLAB_DOUBLE",) if dtype == torch.float64 else ()
        failure = ""
        # One pool of threads with torch, else none: two pools on the same cores wait for each other.
        for parallel, native in ((True, True), (False, True), (False, False)):
            if parallel and not _share_threads():
                continue
            flags = (
                *FLAGS,
                *precision,
                "-fopenmp" if parallel else "-fopenmp-simd",
                *(("-march=native",) if native else ()),
            )
            try:
                path = self._place(program, flags)
                if not cache.is_own(path):
                    if not build:
                        continue
                    path = self._built(program, flags, path)
                library = ctypes.CDLL(str(path))
            except (OSError, subprocess.SubprocessError) as error:
                failure = getattr(error, "stderr", None) or str(error)
                continue
            for name in self.functions:
                function = getattr(library, name)
                function.argtypes, function.restype = self.arguments, None
            return library
        if build:
            log.warning(
                "%s could not build the %s kernels (%s): %s", program, self.name, self.without, failure.strip()[-300:]
            )
        return None

    def _place(self, program: str, flags: tuple[str, ...]) -> Path:
        """Where the shared library of this source, compiler, CPU and `flags` belongs."""
        source = self.source.read_bytes()
        version = subprocess.run(
            [program, "--version"], capture_output=True, timeout=TIMEOUT_SECONDS, check=True
        ).stdout
        # Whether the threads are shared: a torch without GNU's OpenMP gets another library than one with it.
        shares = str(_share_threads()).encode()
        parts = (source, version, program.encode(), " ".join(flags).encode(), cache.processor().encode(), shares)
        key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
        return cache.folder() / f"{self.name.lower()}-{key}.so"

    def _built(self, program: str, flags: tuple[str, ...], path: Path) -> Path:
        """Build the shared library at `path`, which it returns."""
        # A warning, so that it is seen where nobody has set up logging: the first step waits for it.
        log.warning("building the %s kernels with %s, once on this machine", self.name, program)
        began = time.monotonic()
        # Beside its place and then renamed: another process never sees half a file.
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            unlinked, linked = Path(scratch) / "kernels.o", Path(scratch) / "kernels.so"
            _run(program, *flags, "-c", str(self.source), "-o", str(unlinked))
            # Linked without -fopenmp, which would bring in a second OpenMP.
            _run(program, "-shared", str(unlinked), "-o", str(linked), "-lm")
            linked.chmod(0o700)  # whatever the umask: what others could change is not loaded
            linked.replace(path)
        log.info("built the %s kernels in %.1f s", self.name, time.monotonic() - began)
        return path


@contextmanager
def left_out(reason: str) -> Iterator[None]:
    """While open, no kernels are built or used."""
    _reasons.append(reason)
    try:
        yield
    finally:
        _reasons.remove(reason)


def compiler() -> str | None:
    """Path of the C compiler: $CC, else cc, gcc or clang."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    return next((path for name in names if (path := shutil.which(name))), None)


def _share_threads() -> bool:
    """Make torch's OpenMP the one that the kernels find; False where it is not GNU's."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    if not found:
        return False
    try:
        ctypes.CDLL(str(found[0]), ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True)
