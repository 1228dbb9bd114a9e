"""Checkpoints are read here: tensors and plain values, without running what else a file may hold."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from normlab.config import InputError

__all__ = ["MEND_BEST", "CheckpointError", "read_best", "read_checkpoint"]

MEND_BEST = "train anew with --output.fresh true"


class CheckpointError(InputError):
    """A file is no whole checkpoint; `why` is that in a few words."""

    def __init__(self, message: str, why: str) -> None:
        super().__init__(message)
        self.why = why


def read_checkpoint(path: Path, mend: str) -> dict[str, Any]:
    """What the checkpoint holds, on the CPU.

    Args:
        mend: what to do about a file that cannot be read.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is cut short or differs from its checksums (at which torch does not look), no checkpoint
            with a `state_dict`, or holds more than tensors and plain values. Such a pickle could run anything when it
            is read; torch's `weights_only` stops at the first such object.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        why = "" if damaged is None else f"{Path(damaged).name} differs from its checksum"
        with warnings.catch_warnings(action="ignore"):  # what torch finds odd in a file that it then refuses
            stored = None if why else torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, MemoryError):
        raise
    except zipfile.BadZipFile:
        stored, why = None, "it is cut short" if path.stat().st_size else "it is empty"
    except Exception as error:  # a damaged file fails in many ways
        stored, why = None, type(error).__name__
    if why:
        raise CheckpointError(f"cannot read the checkpoint {path} ({why}); {mend}", why)
    if not isinstance(stored, dict) or not isinstance(stored.get("state_dict"), dict):
        raise CheckpointError(f"{path} is no checkpoint: it has no state_dict; {mend}", "it has no state_dict")
    return stored


def read_best(path: Path, step: int) -> dict[str, Any]:
    """The checkpoint with the best weights, those of that step.

    Raises:
        InputError: it is missing, damaged, or of another step.
    """
    try:
        stored = read_checkpoint(path, MEND_BEST)
    except FileNotFoundError:
        raise InputError(f"{path}, which holds the best weights, is gone; {MEND_BEST}") from None
    if stored.get("global_step") != step:
        found = stored.get("global_step")
        raise InputError(f"{path} is of step {found}, the best weights are of step {step}; {MEND_BEST}")
    return stored
