"""The command line in processes of their own that have torch imported already: twenty starts take seconds."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import yaml

from normlab.config import RunConfig, config_to_dict

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["normlab.execution.preloaded", "jsonargparse"])


@dataclass
class Program:
    """One process; what it prints goes to files."""

    process: BaseProcess
    out: Path
    err: Path

    def wait(self, seconds: float = 120) -> int:
        """Its exit code; negative for a signal."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {seconds} seconds: {self.out.read_text()}{self.err.read_text()}")
        return self.process.exitcode

    @property
    def said(self) -> str:
        return self.out.read_text() + self.err.read_text()


def begin(
    arguments: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    before: Callable[[], object] | None = None,
) -> Program:
    """`python -m normlab ARGUMENTS`.

    Args:
        log: file name without suffix of what is printed.
        environment: variables to add.
        before: called in the new process first.
    """
    return run(_main, (list(arguments), dict(environment or {}), before), log)


def run(target: Callable[..., object], arguments: Sequence[object], log: Path) -> Program:
    """`target(*arguments)` in such a process."""
    out, err = (log.with_suffix(suffix) for suffix in (".out", ".err"))
    for file in (out, err):
        file.write_bytes(b"")
    process = _processes.Process(target=_call, args=(target, tuple(arguments), out, err))
    process.start()
    return Program(process, out, err)


def train_config(config: RunConfig, folder: Path) -> list[str]:
    """Arguments that train `config`."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config_to_dict(config)))
    return ["train", "--config", str(path)]


def torchrun(
    arguments: Sequence[str], log: Path, world: int = 2, before: Sequence[Callable[[], object] | None] = (None, None)
) -> list[Program]:
    """So many processes as `torchrun` would start them, on this node."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return [
        begin(
            arguments,
            log.with_name(f"{log.name}{rank}"),
            {
                "TORCHELASTIC_RUN_ID": "none",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "GROUP_RANK": "0",
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            before[rank],
        )
        for rank in range(world)
    ]


def _call(target: Callable[..., object], arguments: tuple[object, ...], out: Path, err: Path) -> None:
    for file, number in ((out, 1), (err, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    target(*arguments)


def _main(arguments: list[str], environment: dict[str, str], before: Callable[[], object] | None) -> None:
    os.environ.update(environment)
    sys.argv = ["normlab", *arguments]
    if before is not None:
        before()
    runpy.run_module("normlab", run_name="__main__", alter_sys=True)
