"""Checkpoints are written here, straight to where they are told to go."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

__all__ = ["PlainFiles", "write_checkpoint"]


class PlainFiles(TorchCheckpointIO):
    """Writes straight into the file it is given.

    Lightning's own way holds a second copy in memory and passes through a file in the system's folder for temporary
    ones, which may be on another disk and stays there after a kill.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        write_checkpoint(checkpoint, Path(path))


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write `checkpoint` and wait until it is on the disk.

    Raises:
        OSError: naming the file; torch alone speaks of positions in an archive when a disk is full.
    """
    try:
        with path.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise type(cause)(cause.errno, cause.strerror, str(path)) from error
