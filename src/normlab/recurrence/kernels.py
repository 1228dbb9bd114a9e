"""Builds kernels.c with the system's C compiler, once per machine, and mirrors its structures.

A machine without a compiler is served too, more slowly: `load` then returns None, and says so once in the log.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from normlab.machine import cache

__all__ = ["Sequence", "Site", "compiler", "load"]

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
TIMEOUT_SECONDS = 120
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


@functools.cache
def load(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels in float32 or float64; None where there is no compiler or it does not succeed."""
    program = compiler()
    if program is None:
        log.info("no C compiler found (cc, gcc or clang): normalized LSTMs run without their faster kernels")
        return None
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
            library = ctypes.CDLL(str(_built(program, flags)))
        except (OSError, subprocess.SubprocessError) as error:
            failure = getattr(error, "stderr", None) or str(error)
            continue
        for name, last in (("forward", _POINTER), ("backward", _POINTER)):
            function = getattr(library, name)
            function.argtypes, function.restype = (ctypes.POINTER(Sequence), _INT, last), None
        return library
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


def _built(program: str, flags: tuple[str, ...]) -> Path:
    """The shared library built with `flags`, from the cache if it is there."""
    source = SOURCE.read_bytes()
    version = subprocess.run([program, "--version"], capture_output=True, timeout=TIMEOUT_SECONDS, check=True).stdout
    parts = (source, version, program.encode(), " ".join(flags).encode(), cache.processor().encode())
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    folder = cache.folder()
    path = folder / f"lstm-{key}.so"
    if path.exists():
        return path
    log.info("building the LSTM kernels with %s, once on this machine", program)
    began = time.monotonic()
    # Beside its place and then renamed: another process never sees half a file.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        unlinked, linked = Path(scratch) / "kernels.o", Path(scratch) / "kernels.so"
        _run(program, *flags, "-c", str(SOURCE), "-o", str(unlinked))
        # Linked without -fopenmp, which would bring in a second OpenMP.
        _run(program, "-shared", str(unlinked), "-o", str(linked), "-lm")
        linked.replace(path)
    log.info("built the LSTM kernels in %.1f s", time.monotonic() - began)
    return path


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True)
