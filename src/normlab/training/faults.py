"""What can go wrong with a run that its user can mend: found before it starts, or explained in one line after."""

from __future__ import annotations

import errno
from typing import Any

import torch

from normlab.config import HuggingFaceConfig, InputError, RunConfig
from normlab.data.prepared import PreparedText
from normlab.norms.base import Norm
from normlab.norms.batch_statistics import BatchStatisticsNorm
from normlab.records.record import OUT_OF_MEMORY, RunRecord
from normlab.training.module import TextModule

__all__ = [
    "belongs_to",
    "explain",
    "failure",
    "other_process_ended",
    "require_accelerator",
    "require_rows",
    "require_same_text",
]

_PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
"""What gloo and NCCL say when another process is gone."""


def require_accelerator(asked: str, devices: int) -> str:
    """ "gpu" (CUDA) or "cpu"; other accelerators lack the fp64 that losses are summed in. `devices` are those here."""
    found = torch.cuda.device_count()
    if asked == "gpu" and found == 0:
        raise InputError("training.accelerator is gpu but torch sees none; use cpu or auto")
    accelerator = "gpu" if found and asked != "cpu" else "cpu"
    if accelerator == "gpu" and devices > found:
        raise InputError(f"training.devices asks for {devices} here but torch sees {found} GPU(s)")
    return accelerator


def require_rows(module: TextModule, batch_size: int, config: RunConfig) -> None:
    """Raise `InputError` if a norm takes its statistics over a single row; `batch_size` is that of one process."""
    together = batch_size * config.training.devices
    lonely = [
        part.name
        for part in module.modules()
        if isinstance(part, Norm)
        and not part.works_at_batch_1
        # Ghost batches are cut within each process.
        and (together if getattr(part, "ghost_rows", None) is None else batch_size) == 1
    ]
    if lonely:
        raise InputError(
            f"{lonely[0]} takes its statistics over the rows of a batch, and a batch has one row; raise "
            f"data.batch_size (now {config.data.batch_size}), lower data.length if the text is short, or use a norm "
            "that works at batch 1"
        )
    for part in module.modules():
        ghost = part.ghost_rows if isinstance(part, BatchStatisticsNorm) else None
        if ghost is not None and ghost > batch_size:
            raise InputError(
                f"model.norm_options.ghost_rows is {ghost}, but a batch has {batch_size} rows per process; lower it, "
                "or raise data.batch_size"
            )


def require_same_text(record: RunRecord, text: PreparedText) -> None:
    before = record.environment().get("data", {}).get("sha256")
    if before not in (None, text.sha256):
        raise InputError(
            f"the text of {text.name} has changed since {record.folder} was begun; put it back, or train anew with "
            "--output.fresh true"
        )


def belongs_to(stored: Any, module: TextModule) -> bool:
    """Whether `stored` is a whole checkpoint (not weights alone) of a model of the same shapes."""
    parts = {
        "state_dict": dict,
        "global_step": int,
        "loops": dict,
        "callbacks": dict,
        "optimizer_states": list,
        "pytorch-lightning_version": str,
    }
    if not (isinstance(stored, dict) and all(isinstance(stored.get(part), kind) for part, kind in parts.items())):
        return False
    shapes = {name: value.shape for name, value in module.state_dict().items()}
    return shapes == {name: getattr(value, "shape", None) for name, value in stored["state_dict"].items()}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or not; torch has several ways to say so."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(said in text for said in ("can't allocate memory", "out of memory"))
    )


def other_process_ended(error: BaseException) -> bool:
    """Whether this is what is left of a run of several processes when another one of them has ended."""
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _PEER_GONE)


def failure(error: BaseException) -> str:
    """The reason in the outcome of a failed run, one line."""
    line = f"{type(error).__name__}: {(str(error).strip().splitlines() or [type(error).__name__])[0][:200]}"
    return f"{OUT_OF_MEMORY}: {line}" if is_out_of_memory(error) else line


def explain(error: BaseException, record: RunRecord | None, config: RunConfig) -> str | None:
    """One line for what the user can mend; None for what is a bug, or already one line."""
    again = "run the same command again to go on from the last checkpoint"
    if is_out_of_memory(error):
        batch_size, model = config.data.batch_size, config.model
        size = (
            "the sizes of model.overrides"
            if isinstance(model, HuggingFaceConfig)
            else f"model.width (now {model.width})"
        )
        return f"{OUT_OF_MEMORY}; lower data.batch_size (now {batch_size}), {size} or data.length"
    if record is None:
        return None
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of {record.folder} is full; free some space, then {again}"
    if isinstance(error, OSError):
        return f"cannot write {error.filename or record.folder}: {error.strerror or error}; mend that, then {again}"
    if other_process_ended(error):
        return f"another process of this run has ended; {again}"
    return None
