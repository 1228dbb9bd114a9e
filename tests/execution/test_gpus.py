"""Which GPUs there are and how busy, in the words of nvidia-smi."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from normlab.execution.gpus import Gpu, Load, gpu_loads, visible_gpus

A, B = "GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"
TWO = f"{A}, NVIDIA H200, 143771\n{B}, NVIDIA A100-SXM4-40GB, 40960\n"
FIRST, SECOND = Gpu(A, A, "NVIDIA H200", 143771), Gpu(B, B, "NVIDIA A100-SXM4-40GB", 40960)
LIST = f"GPU 0: NVIDIA H200 (UUID: {A})\nGPU 1: NVIDIA A100-SXM4-40GB (UUID: {B})\n"
DIVIDED = LIST + (
    "  MIG 3g.20gb     Device  0: (UUID: MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f)\n"
    "  MIG 3g.20gb     Device  1: (UUID: MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb)\n"
)


def as_entry(gpu: Gpu, entry: str) -> Gpu:
    return Gpu(entry, gpu.uuid, gpu.model, gpu.memory_mib)


@pytest.mark.parametrize(
    ("variable", "found"),
    [
        (None, [FIRST, SECOND]),
        ("", []),
        ("-1", []),
        ("1", [as_entry(SECOND, "1")]),
        ("1, 0", [as_entry(SECOND, "1"), as_entry(FIRST, "0")]),
        ("0,7,1", [as_entry(FIRST, "0")]),
        ("GPU-8932f937", [as_entry(SECOND, "GPU-8932f937")]),
        ("MIG-c6d4f1ef-42e4", [Gpu("MIG-c6d4f1ef-42e4")]),
    ],
)
def test_the_variable_chooses(
    variable: str | None, found: list[Gpu], nvidia_smi: Callable[..., None], monkeypatch: pytest.MonkeyPatch
):
    nvidia_smi(gpus=TWO, list=LIST)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert visible_gpus() == found


def test_parts_stand_for_a_gpu_that_is_divided(nvidia_smi: Callable[..., None]):
    nvidia_smi(gpus=TWO, list=DIVIDED)
    parts = [
        Gpu(f"MIG-{name}") for name in ("c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f", "cba663e8-9bed-5b25-b243-5985ef7c9beb")
    ]
    assert visible_gpus() == [FIRST, *parts]


def test_without_nvidia_smi_the_variable_alone_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,GPU-8932f937,-1,2")
    assert visible_gpus() == [Gpu("0"), Gpu("GPU-8932f937")]
    assert gpu_loads() == {}


def test_loads(nvidia_smi: Callable[..., None]):
    nvidia_smi(loads=f"{A}, 3511, 23\n{B}, 12, [N/A]\n")
    assert gpu_loads() == {A: Load(3511, 0.23)}


def test_a_driver_that_does_not_answer_is_none(nvidia_smi: Callable[..., None], tmp_path: Path):
    (tmp_path / "nvidia" / "nvidia-smi").write_text("#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    assert (visible_gpus(), gpu_loads()) == ([], {})
