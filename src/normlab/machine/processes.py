"""Which of the processes of one run this is, as the program that started it says in the environment. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from normlab.config import InputError

__all__ = ["Place", "ProcessError", "place_in_run", "says_mistakes"]


class ProcessError(InputError):
    """What went wrong in one process of several: the others do not know of it, so this one says it."""


@dataclass(frozen=True)
class Place:
    """The place of this process among those of its run.

    Args:
        by: what started them: torchrun, srun, or Lightning, which starts the others from the first one.
        rank: number of this process; number 0 writes the record.
        local_rank: its number on this node.
        world: processes of the run.
        local_world: those on this node.
    """

    by: Literal["torchrun", "srun", "lightning"] = "lightning"
    rank: int = 0
    local_rank: int = 0
    world: int = 1
    local_world: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def nodes(self) -> int:
        return self.world // self.local_world


def place_in_run(devices: int, environ: Mapping[str, str] = os.environ) -> Place:
    """The place of this process in a run of so many processes, all nodes together.

    Tasks of one `srun` that ask for one device each are runs of their own, as are processes inside a batch job.

    Raises:
        InputError: another number of processes was started.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        place = Place("torchrun", *(int(environ[name]) for name in names))
    elif devices > 1 and int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        world, nodes = int(environ["SLURM_STEP_NUM_TASKS"]), int(environ.get("SLURM_STEP_NUM_NODES", "1"))
        if world % nodes:
            raise InputError(f"srun started {world} tasks on {nodes} nodes; give each node as many: --ntasks-per-node")
        place = Place("srun", int(environ["SLURM_PROCID"]), int(environ["SLURM_LOCALID"]), world, world // nodes)
    else:
        rank = int(environ.get("LOCAL_RANK", "0")) if devices > 1 else 0
        return Place("lightning", rank, rank, devices, devices)
    if place.world != devices:
        raise InputError(
            f"{place.by} started {place.world} processes but training.devices, which counts those of all nodes, is "
            f"{devices}; make them the same"
        )
    if place.world % place.local_world:
        raise InputError(
            f"{place.by} started {place.world} processes and {place.local_world} of them on this node; give each node "
            "as many"
        )
    return place


def says_mistakes(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a mistake that all processes of a run find is this one's to say: the first one's on each node."""
    return "TORCHELASTIC_RUN_ID" not in environ or int(environ.get("LOCAL_RANK", "0")) == 0
