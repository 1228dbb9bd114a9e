"""Limits of control groups, as the kernel's files say them, of both versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from normlab.machine import limits
from normlab.machine.limits import available_memory_mib, core_quota
from normlab.records import environment
from normlab.records.environment import available_cores

MEMINFO = "MemTotal:       33554432 kB\nMemAvailable:   16777216 kB\n"
V1_CPU = {"cpu.cfs_quota_us": "250000", "cpu.cfs_period_us": "100000"}
V1_MEMORY = {
    "memory.limit_in_bytes": str(4 << 30),
    "memory.usage_in_bytes": str(2 << 30),
    "memory.stat": f"inactive_file 0\ntotal_inactive_file {1 << 30}",
}
V2 = {
    "cpu.max": "150000 100000",
    "memory.max": str(2 << 30),
    "memory.current": str(1 << 30),
    "memory.stat": f"anon 5\ninactive_file {256 << 20}",
}
FREE = {"cpu.max": "max 100000", "memory.max": "max", "memory.current": "1000", "memory.stat": "inactive_file 0"}
NO_LIMIT = {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    ("groups", "folders", "quota", "memory_mib"),
    [
        ("", {}, None, 16384),
        ("0::/\n", {"": V2}, 1.5, 1280),
        ("0::/job/run\n", {"": FREE, "job": V2, "job/run": FREE}, 1.5, 1280),
        ("0::/of/the/host\n", {"": V2}, 1.5, 1280),
        ("0::/\n", {"": FREE}, None, 16384),
        ("4:memory:/a\n1:cpu,cpuacct:/a\n0::/\n", {"cpu/a": V1_CPU, "memory/a": V1_MEMORY}, 2.5, 3072),
        ("1:cpu:/\n", {"cpu": NO_LIMIT}, None, 16384),
    ],
)
def test_limits(
    groups: str,
    folders: dict[str, dict[str, str]],
    quota: float | None,
    memory_mib: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
    (tmp_path / "proc" / "meminfo").write_text(MEMINFO)
    for name, files in folders.items():
        folder = tmp_path / "sys" / "fs" / "cgroup" / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (folder / file).write_text(text + "\n")
    monkeypatch.setattr(limits, "ROOT", tmp_path)
    assert core_quota() == quota
    assert available_memory_mib() == memory_mib


def test_nothing_is_known_without_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "ROOT", tmp_path)
    assert (core_quota(), available_memory_mib()) == (None, None)


@pytest.mark.parametrize(("quota", "cores"), [(None, 8), (2.0, 2), (2.5, 3), (0.1, 1), (64.0, 8)])
def test_cores_are_those_that_the_share_of_time_fills(quota: float | None, cores: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(environment, "core_quota", lambda: quota)
    assert available_cores() == cores


def test_a_job_of_slurm_has_the_memory_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text(MEMINFO)
    monkeypatch.setattr(limits, "ROOT", tmp_path)
    for given, memory_mib in (
        ({"SLURM_MEM_PER_NODE": "8000"}, 8000),
        ({"SLURM_MEM_PER_CPU": "2000", "SLURM_CPUS_ON_NODE": "3"}, 6000),
        ({"SLURM_MEM_PER_NODE": "0"}, 16384),
        ({"SLURM_MEM_PER_NODE": "99999"}, 16384),
    ):
        with monkeypatch.context() as patch:
            for name, value in given.items():
                patch.setenv(name, value)
            assert available_memory_mib() == memory_mib
