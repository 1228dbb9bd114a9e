"""Builds kernels.c with the system's C compiler, once per machine, and mirrors its structures.

A library that is there, in this process or in the cache on disk, is used at once. Else it is built when that pays: at
the first call with gradient (`load`), never for a call without (`find`). A training run decides before its first step
(`worth_building`) and stays with its decision (`left_out`): kernels and torch operators round differently, in float32
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from normlab.machine import cache

__all__ = ["Sequence", "Site", "absence", "compiler", "find", "left_out", "load", "worth_building"]

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
TIMEOUT_SECONDS = 120
BUILD_SECONDS = 1.0
"""One precision, on one core of 2024."""
SAVED_SECONDS = 350e-6
"""Of a time step, forward and backward, over torch operators: mostly what starting those costs, whatever the sizes."""
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64


class Site(ctypes.Structure):
    """`site` of kernels.c."""

    _fields_ = (
        *((name, _INT) for name in ("kind", "features", "groups", "centered", "stored_stride")),
        ("eps", ctypes.c_double),
        *((name, _POINTER) for name in ("weight", "bias", "mean", "spread", "stored_mean", "stored_scale")),
        *((name, _POINTER) for name in ("normalized", "d_weight", "d_bias")),
    )


class Sequence(ctypes.Structure):
    """`sequence` of kernels.c."""

    _fields_ = (
        *((name, _INT) for name in ("rows", "hidden", "threads", "by_columns", "kept")),
        *((name, _POINTER) for name in ("mask", "count", "projected", "bias", "first_h", "first_c")),
        *((name, _POINTER) for name in ("gates", "cell", "squashed", "output", "d_output", "d_gates")),
        ("d_gates_kept", _INT),
        *((name, _POINTER) for name in ("d_product", "d_projected", "d_h", "d_cell", "d_squashed", "d_bias")),
        *((name, Site) for name in ("input_site", "hidden_site", "cell_site")),
    )


_libraries: dict[torch.dtype, ctypes.CDLL | None] = {}
"""What this process found or built; None: nothing in the cache, or (then in `_failed` too) nothing to be built."""
_failed: set[torch.dtype] = set()
_reasons: list[str] = []
"""Why the kernels are left out, from the outermost `left_out` to the innermost."""


def find(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels in float32 or float64 if they need not be built; looks into the cache on disk once."""
    if _reasons:
        return None
    if dtype not in _libraries:
        program = compiler()
        _libraries[dtype] = None if program is None else _opened(program, dtype, build=False)
    return _libraries[dtype]


def load(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels, built if need be; None where there is no compiler or it does not succeed, or they are left out."""
    library = find(dtype)
    if library is not None or _reasons or dtype in _failed:
        return library
    program = compiler()
    if program is None:
        log.info("no C compiler found (cc, gcc or clang): normalized LSTMs run without their faster kernels")
    else:
        library = _libraries[dtype] = _opened(program, dtype, build=True)
    if library is None:
        _failed.add(dtype)
    return library


def worth_building(time_steps: int) -> bool:
    """Whether building takes less time than it saves over so many time steps of training (of any layer)."""
    return time_steps * SAVED_SECONDS > BUILD_SECONDS


@contextmanager
def left_out(reason: str) -> Iterator[None]:
    """While open, the kernels are neither built nor used."""
    _reasons.append(reason)
    try:
        yield
    finally:
        _reasons.remove(reason)


def absence(dtype: torch.dtype) -> str:
    """Why a call with gradient will not run on the kernels; empty if it will."""
    if _reasons:
        return _reasons[-1]
    return "no C compiler that works" if dtype in _failed or compiler() is None else ""


def _opened(program: str, dtype: torch.dtype, *, build: bool) -> ctypes.CDLL | None:
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
            path = _place(program, flags)
            if not cache.is_own(path):
                if not build:
                    continue
                path = _built(program, flags, path)
            library = ctypes.CDLL(str(path))
        except (OSError, subprocess.SubprocessError) as error:
            failure = getattr(error, "stderr", None) or str(error)
            continue
        for cell in ("", "gru_", "tanh_", "relu_"):
            for function in (getattr(library, f"{cell}forward"), getattr(library, f"{cell}backward")):
                function.argtypes, function.restype = (ctypes.POINTER(Sequence), _INT, _POINTER), None
        return library
    if build:
        log.warning("%s could not build the LSTM kernels, which run without: %s", program, failure.strip()[-300:])
    return None


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


def _place(program: str, flags: tuple[str, ...]) -> Path:
    """Where the shared library of this source, compiler, CPU and `flags` belongs."""
    source = SOURCE.read_bytes()
    version = subprocess.run([program, "--version"], capture_output=True, timeout=TIMEOUT_SECONDS, check=True).stdout
    # Whether the threads are shared: a torch without GNU's OpenMP gets another library than one with it.
    shares = str(_share_threads()).encode()
    parts = (source, version, program.encode(), " ".join(flags).encode(), cache.processor().encode(), shares)
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    return cache.folder() / f"lstm-{key}.so"


def _built(program: str, flags: tuple[str, ...], path: Path) -> Path:
    """Build the shared library at `path`, which it returns."""
    # A warning, so that it is seen where nobody has set up logging: the first step waits for it.
    log.warning("building the LSTM kernels with %s, once on this machine", program)
    began = time.monotonic()
    # Beside its place and then renamed: another process never sees half a file.
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        unlinked, linked = Path(scratch) / "kernels.o", Path(scratch) / "kernels.so"
        _run(program, *flags, "-c", str(SOURCE), "-o", str(unlinked))
        # Linked without -fopenmp, which would bring in a second OpenMP.
        _run(program, "-shared", str(unlinked), "-o", str(linked), "-lm")
        linked.chmod(0o700)  # whatever the umask: what others could change is not loaded
        linked.replace(path)
    log.info("built the LSTM kernels in %.1f s", time.monotonic() - began)
    return path


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True)
