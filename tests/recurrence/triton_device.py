"""Where Triton's kernels are tested: on a GPU if there is one, else in its interpreter; and compiled for one anyway."""

from __future__ import annotations

import copy
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from normlab.recurrence import cuda
from normlab.recurrence.reference import SiteNorms, Weights

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda" if GPU else "cpu")
on_either = pytest.mark.skipif(not (GPU or INTERPRETED), reason="no GPU; runs in the interpreter, in another process")
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no GPU")]
to_compile = pytest.mark.skipif(INTERPRETED or GPU, reason="they are compiled and run for real by the other tests")

EXACT = {"rtol": 1e-9, "atol": 1e-9}
# Root mean square error relative to that of each result. Float32: sums in another order, divisions and exp to 2 units
# in the last place. Bfloat16 has 8 bits, and rounds h and the weights at every time step. The worst, 5e-5 and 4e-2, are
# gradients through the variance of a few rows.
SINGLE, HALF = 1e-4, 6e-2


def require_close(found: list[Tensor], exact: list[Tensor], tolerance: float) -> None:
    for one, other in zip(found, exact, strict=True):
        if one.is_floating_point():
            error = (one.double() - other).norm() / other.norm().clamp(min=1e-3)
            assert error < tolerance


def lowered(weights: Weights, norms: SiteNorms, *tensors: Tensor) -> Any:
    """The same in float32."""

    def single(value: Tensor | None) -> Any:
        return None if value is None else value.detach().float().requires_grad_()

    twins = copy.deepcopy(norms)
    for norm in twins:
        norm.float()
    return Weights(*(single(weight) for weight in weights)), twins, *(single(value) for value in tensors)


class _AbsentGpu:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled_for_an_absent_gpu(
    monkeypatch: pytest.MonkeyPatch, folder: Path, capability: int, where: ModuleType, names: Sequence[str]
) -> dict[str, list[Any]]:
    """What comes of the kernels `names` when, from here on, `where` launches them: machine code, but no run.

    Args:
        folder: for what Triton keeps.
        where: cuda.py or another with such `_kernels`.
    """
    triton = pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    kernels = where._kernels()
    compiled: dict[str, list[Any]] = defaultdict(list)

    class Compiled:
        triton = kernels.triton

    class Compiler:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Any:
            kernel = getattr(kernels, self.name)
            return lambda *args, **options: compiled[self.name].append(kernel.warmup(*args, grid=grid, **options))

    for name in names:
        setattr(Compiled, name, Compiler(name))
    monkeypatch.setattr(where, "_kernels", lambda: Compiled)
    monkeypatch.setattr(cuda, "_multiply", lambda *args: None)
    monkeypatch.setattr(triton.runtime.driver, "_active", _AbsentGpu(capability))
    return compiled
