"""A disk that is full, for real, at each file that a run writes: one line, and the same command goes on afterwards."""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from forked import run, train_config
from test_damaged_checkpoints import results
from test_run import Build, numbers

from normlab.config import RunConfig
from normlab.records.record import RunRecord, record_ids

pytestmark = pytest.mark.slow

PRIVATE_MOUNTS, NEW_USER = 0x00020000, 0x10000000
RECURSIVE_PRIVATE = 0x4000 | 0x40000
DISK_BYTES = 4_000_000

WRITES = [
    (".config.yaml.*.tmp", 1),
    ("lock", 1),
    (".outcome.json.*.tmp", 1),
    (".environment.json.*.tmp", 1),
    (".tokenizer.json*.tmp", 1),
    ("metrics.jsonl", 1),
    (".last.ckpt.tmp", 2),
    (".best.ckpt.tmp", 2),
    (".final.ckpt.tmp", 1),
    (".statistics_gap.json.*.tmp", 1),
    (".outcome.json.*.tmp", 2),
]
"""Patterns of file names, and at which time that one is opened for writing the disk is full."""


def mount_small_disk(folder: Path) -> None:
    """Mount a disk of a few megabytes that this process alone can see; as root, or where users may have namespaces."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *arguments: object) -> None:
        if getattr(libc, name)(*arguments):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), name)

    user, group = os.getuid(), os.getgid()
    try:
        call("unshare", PRIVATE_MOUNTS)
    except PermissionError:
        call("unshare", PRIVATE_MOUNTS | NEW_USER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    call("mount", b"none", b"/", None, ctypes.c_ulong(RECURSIVE_PRIVATE), None)
    call("mount", b"none", str(folder).encode(), b"tmpfs", ctypes.c_ulong(0), f"size={DISK_BYTES}".encode())


class Filler:
    """Fills the disk at the moment that a chosen file is opened for writing."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "filler"
        self.pattern, self.left = "", 0
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not self.left or not isinstance(arguments[0], str | os.PathLike):
            return
        if arguments[2] & (os.O_WRONLY | os.O_RDWR) and fnmatch(os.path.basename(arguments[0]), self.pattern):
            self.left -= 1
            if not self.left:
                with contextlib.suppress(OSError), self.path.open("wb", buffering=0) as file:
                    while True:
                        file.write(bytes(4096))


def fill_and_free(folder: Path, config: RunConfig, report: Path) -> None:
    """In a process of its own: one run after the other, each meeting a full disk at another file."""
    from normlab.__main__ import main

    try:
        mount_small_disk(folder)
    except OSError as error:
        report.write_text(json.dumps({"cannot": str(error)}))
        return

    def train() -> tuple[int, str]:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            return main(train_config(config, report.parent)), said.getvalue()

    def record() -> RunRecord:
        return RunRecord(folder / record_ids(folder)[0], config)

    found = {"whole": {"code": train()[0], "rows": numbers(record()), "results": results(record())}}
    filler = Filler(folder)
    for pattern, time in WRITES:
        shutil.rmtree(record().folder)
        filler.pattern, filler.left = pattern, time
        full, line = train()
        freed, filler.left = filler.left == 0, 0
        filler.path.unlink(missing_ok=True)
        code, after = train()
        found[f"{pattern} {time}"] = {
            "freed": freed,
            "full": full,
            "line": line,
            "code": code,
            "after": after,
            "rows": numbers(record()),
            "results": results(record()),
        }
    report.write_text(json.dumps(found))


def test_a_full_disk_at_every_file(tiny_run: Build, tmp_path: Path):
    disk, report = tmp_path / "disk", tmp_path / "report.json"
    disk.mkdir()
    short = {"training__checkpoint_every": 2, "training__recompute_batches": 2, "training__activations_every": 0}
    config = tiny_run(model__norm="bn_step", model__width=8, **short, output__runs_dir=str(disk))
    program = run(fill_and_free, (disk, config, report), tmp_path / "log")
    assert program.wait(300) == 0, program.said
    found = json.loads(report.read_text())
    if "cannot" in found:
        pytest.skip(f"no disk can be mounted here: {found['cannot']}")
    whole = found.pop("whole")
    assert whole["code"] == 0
    assert len(found) == len(WRITES)
    for write, seen in found.items():
        assert seen["freed"], f"{write} was never written"
        assert seen["full"] == 2, write
        assert seen["line"].startswith(f"normlab: error: the disk of {disk}"), (write, seen["line"])
        assert seen["line"].endswith(
            " is full; free some space, then run the same command again to go on from the last checkpoint\n"
        )
        assert seen["line"].count("\n") == 1
        assert seen["code"] == 0, (write, seen["after"])
        assert seen["rows"] == whole["rows"], write
        assert seen["results"] == whole["results"], write
