"""What a run ran on and with: versions, machine, commit, command. No host name, user name or environment variable."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from normlab.machine.limits import core_quota

__all__ = ["available_cores", "code_commit", "collect_environment", "commit_label", "program"]

PACKAGES = ("normlab", "torch", "pytorch-lightning", "numpy", "wandb", "datasets", "tokenizers", "transformers")


def collect_environment(devices: Sequence[str] = ()) -> dict[str, Any]:
    """Plain values, ready for JSON.

    Args:
        devices: names of the accelerators in use, such as "NVIDIA H200"; none on a CPU.
    """
    cores, memory_gib = available_cores(), _memory_gib()
    machine = ", ".join(devices) or f"{cores}-core {platform.machine()}, {memory_gib:.0f} GiB"
    return {
        "machine": machine,
        "devices": list(devices),
        "cpu": _cpu(),
        "cores": cores,
        "memory_gib": round(memory_gib, 1),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **_versions()},
        "git": code_commit(),
        "argv": _command(sys.argv),
    }


def program(name: str) -> str:
    """How to call a program of this Python's environment from here: by name if that is activated, else by its path."""
    if "VIRTUAL_ENV" in os.environ:
        return name
    path = Path(sys.executable).parent / name
    if not path.exists():
        return name
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _command(argv: Sequence[str]) -> list[str]:
    """`argv` with the program's folders left out and the home folder, which names the user, as ~."""
    home = str(Path.home())
    program = Path(argv[0]).name if argv else ""
    return [program, *(argument.replace(home, "~") for argument in argv[1:])]


def available_cores() -> int:
    """Cores that this process may use; a container's share of time is rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, math.ceil(core_quota() or cores)))


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def code_commit() -> dict[str, Any]:
    """Commit of the normlab in use and whether its files differ from it, when first asked in this process; None where
    git does not know them."""
    return dict(_git(Path(__file__).parent))


def commit_label(git: Mapping[str, Any]) -> str:
    """The commit in what `code_commit` says; "+" after it if files differed from it, empty if unknown."""
    return (git.get("commit") or "") + ("+" if git.get("dirty") else "")


@cache
def _git(folder: Path) -> dict[str, Any]:
    unknown = {"commit": None, "dirty": None}
    # `ls-files`: an installed package may lie inside somebody else's repository.
    if not _ask_git(folder, "ls-files", "--", "record.py"):
        return unknown
    lines = _ask_git(folder, "status", "--porcelain=v2", "--branch", "--untracked-files=no").splitlines()
    commits = [line.split()[2] for line in lines if line.startswith("# branch.oid")]
    if not commits or commits[0] == "(initial)":
        return unknown
    return {"commit": commits[0], "dirty": any(not line.startswith("#") for line in lines)}


def _ask_git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "--no-optional-locks", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
