"""Checkpoints are read here: tensors and plain values, without running what else a file may hold."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from normlab.config import InputError

__all__ = ["read_checkpoint"]


def read_checkpoint(path: Path, mend: str) -> dict[str, Any]:
    """What the checkpoint holds, on the CPU.

    Args:
        mend: what to do about a file that cannot be read.

    Raises:
        FileNotFoundError: there is none.
        InputError: it is damaged, no checkpoint with a `state_dict`, or holds more than tensors and plain values. Such
            a pickle could run anything when it is read; torch's `weights_only` stops at the first such object.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # what torch finds odd in a file that it then refuses
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # a damaged file fails in many ways
        raise InputError(f"cannot read the checkpoint {path} ({type(error).__name__}); {mend}") from None
    if not isinstance(stored, dict) or not isinstance(stored.get("state_dict"), dict):
        raise InputError(f"{path} is no checkpoint: it has no state_dict; {mend}")
    return stored
