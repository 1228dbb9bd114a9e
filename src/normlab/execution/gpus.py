"""The NVIDIA GPUs that workers may use and how busy they are, as `nvidia-smi` says: asking CUDA in this process would
take memory on each, and would not survive a fork. No torch.

Tested with a stand-in for `nvidia-smi` alone, not yet on hardware.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass

__all__ = ["Gpu", "Load", "gpu_loads", "visible_gpus"]

SECONDS = 20.0
"""Without its persistence daemon the driver is loaded anew for each question."""


@dataclass(frozen=True)
class Gpu:
    """A GPU, or a part of one (MIG), that a worker can have.

    Args:
        entry: in CUDA_VISIBLE_DEVICES.
        uuid: of a whole GPU; empty for a part, whose load nobody says, and for one that nvidia-smi does not know.
        model: such as "NVIDIA H200"; empty if unknown.
        memory_mib: in all; 0 if unknown.
    """

    entry: str
    uuid: str = ""
    model: str = ""
    memory_mib: float = 0.0


@dataclass(frozen=True)
class Load:
    """Memory in use by all, and the share of the last second or less in which a kernel ran, 0 to 1."""

    memory_mib: float
    utilization: float


def visible_gpus() -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES names, in its order; without it all there are. Empty if there are none, or if
    nobody says: without `nvidia-smi` the variable alone counts."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    known = [Gpu(uuid, uuid, model, _number(memory) or 0.0) for uuid, model, memory in _query("uuid,name,memory.total")]
    if names is None:
        parts = _mig_parts()
        # By UUID: CUDA numbers them in another order than nvidia-smi where they differ.
        return [each for gpu in known for each in ([Gpu(part) for part in parts.get(gpu.uuid, [])] or [gpu])]
    gpus = []
    for entry in (name.strip() for name in names.split(",")):
        found = [gpu for number, gpu in enumerate(known) if entry == str(number) or _names(entry, gpu)]
        if not entry or entry.startswith("-") or (known and not found and not entry.startswith("MIG-")):
            break  # as CUDA does: what follows a wrong entry is not seen
        gpus.append(Gpu(entry, found[0].uuid, found[0].model, found[0].memory_mib) if found else Gpu(entry))
    return gpus


def gpu_loads() -> dict[str, Load]:
    """By UUID; without those of which it is not said."""
    loads = {}
    for uuid, used, busy in _query("uuid,memory.used,utilization.gpu"):
        memory_mib, percent = _number(used), _number(busy)
        if memory_mib is not None and percent is not None:
            loads[uuid] = Load(memory_mib, percent / 100)
    return loads


def _names(entry: str, gpu: Gpu) -> bool:
    """CUDA takes the beginning of a UUID for the whole."""
    return entry.startswith("GPU-") and gpu.uuid.startswith(entry)


def _number(text: str) -> float | None:
    """None for what nvidia-smi does not know: "[N/A]"."""
    return float(text) if text.isdigit() else None


def _query(fields: str) -> list[list[str]]:
    lines = _ask(f"--query-gpu={fields}", "--format=csv,noheader,nounits").splitlines()
    rows = [[cell.strip() for cell in line.split(",")] for line in lines]
    return [row for row in rows if len(row) == fields.count(",") + 1]


def _mig_parts() -> dict[str, list[str]]:
    """UUIDs of the parts of each GPU that is divided, by its UUID."""
    parts: dict[str, list[str]] = {}
    gpu = ""
    for line in _ask("-L").splitlines():
        found = re.search(r"\(UUID: ([^)]+)\)", line)
        if found and line.startswith("GPU"):
            gpu = found[1]
        elif found:
            parts.setdefault(gpu, []).append(found[1])
    return parts


def _ask(*arguments: str) -> str:
    """What nvidia-smi prints; empty where there is none, or no driver."""
    try:
        return subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=SECONDS, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
