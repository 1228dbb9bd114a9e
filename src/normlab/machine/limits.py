"""What a container, a batch system or the machine leaves to this process: share of the cores, memory. Linux; elsewhere
nothing is known of limits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["available_memory_mib", "core_quota"]

ROOT = Path("/")


def core_quota() -> float | None:
    """Cores' worth of time that control groups allow, such as 2.0 of the 64 there are; None without a limit."""
    quotas = []
    for group in _groups("cpu"):
        if group.joinpath("cpu.max").exists():  # version 2: "200000 100000" or "max 100000"
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
        if quota not in ("", "max", "-1") and float(period) > 0:
            quotas.append(float(quota) / float(period))
    return min(quotas, default=None)


def available_memory_mib() -> float | None:
    """Memory that can still be taken, by the machine's and by the control groups' reckoning, and no more than SLURM
    gave; None if nobody says."""
    lines = _read(ROOT / "proc" / "meminfo").splitlines()
    left = [float(line.split()[1]) / 2**10 for line in lines if line.startswith("MemAvailable:")]
    for group in _groups("memory"):
        limit = _read(group / "memory.max") or _read(group / "memory.limit_in_bytes")
        used = _read(group / "memory.current") or _read(group / "memory.usage_in_bytes")
        if not limit or limit == "max" or not used:
            continue
        # Pages of files that were read once count as used, but are given back when they are wanted.
        stat = dict(line.split() for line in _read(group / "memory.stat").splitlines())
        idle = stat.get("total_inactive_file", stat.get("inactive_file", 0))
        left.append((float(limit) - float(used) + float(idle)) / 2**20)
    # Where SLURM does not hold its jobs to it by control groups, it only says what they may take.
    for name, times in (("SLURM_MEM_PER_NODE", "1"), ("SLURM_MEM_PER_CPU", os.environ.get("SLURM_CPUS_ON_NODE", "1"))):
        granted = os.environ.get(name, "0")  # 0: all there is
        if granted.isdecimal() and times.isdecimal() and int(granted) > 0:
            left.append(float(granted) * int(times))
    return max(0.0, min(left)) if left else None


def _groups(controller: str) -> Iterator[Path]:
    """Folders of this process's control group and of those above it, of version 2 and of version 1's `controller`."""
    for line in _read(ROOT / "proc" / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = ROOT / "sys" / "fs" / "cgroup" / (controller if controllers else "")
        folder = top / path.lstrip("/")
        # In a container the path may be the host's, and only the top is to be seen.
        yield from (place for place in (folder, *folder.parents) if place.is_relative_to(top) and place.exists())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
