"""Checkpoints as files: written where they are told to go, and read with a look at their checksums."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from normlab.config import InputError

__all__ = ["CheckpointError", "PlainFiles", "read_checkpoint", "read_weights"]


class CheckpointError(Exception):
    """A checkpoint that cannot be read; says why in a few words."""


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


def read_checkpoint(path: Path) -> Any:
    """What is stored in `path`, on the CPU.

    Raises:
        CheckpointError: it is cut short, or a part of it differs from its checksum, which torch does not look at.
        FileNotFoundError: there is none.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (part := archive.testzip()) is not None:
                raise CheckpointError(f"{Path(part).name} differs from its checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, MemoryError, CheckpointError):
        raise
    except zipfile.BadZipFile:
        raise CheckpointError("it is cut short" if path.stat().st_size else "it is empty") from None
    except Exception as error:  # what damaged bytes make of zipfile and torch is anybody's guess
        raise CheckpointError(type(error).__name__) from None


def read_weights(path: Path, step: int) -> dict[str, Any]:
    """The checkpoint with the best weights, those of that step.

    Raises:
        InputError: it is missing, damaged, or of another step.
    """
    mend = "train anew with --output.fresh true"
    try:
        stored = read_checkpoint(path)
    except FileNotFoundError:
        raise InputError(f"{path}, which holds the best weights, is gone; {mend}") from None
    except CheckpointError as error:
        raise InputError(f"cannot read {path}, which holds the best weights ({error}); {mend}") from None
    if stored["global_step"] != step:
        raise InputError(f"{path} is of step {stored['global_step']}, the best weights are of step {step}; {mend}")
    return stored
