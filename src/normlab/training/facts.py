"""What a record says about a run beside its numbers: data, sites, devices, memory."""

from __future__ import annotations

import dataclasses
import os
import resource
from typing import Any

import pytorch_lightning as pl
import torch

from normlab.config import RunConfig
from normlab.data.prepared import PreparedText
from normlab.norms.base import Norm
from normlab.tasks.metrics import evaluation_note
from normlab.training.module import TextModule

__all__ = ["couples_rows", "data_facts", "device_names", "peak_memory_mib", "site_facts"]


def data_facts(text: PreparedText, config: RunConfig) -> dict[str, Any]:
    """What the record says about the data."""
    return {
        "corpus": text.name,
        "sha256": text.sha256,
        "source": text.source,
        "license": text.license,
        "note": text.note,
        "task": text.task,
        "classes": text.classes,
        "tokens": text.tokenizer.kind,
        "vocabulary": text.vocabulary,
        "length": text.length,
        "evaluation": evaluation_note(text, config.data.stream),
        "splits": {name: dataclasses.asdict(split.counts) for name, split in text.splits.items()},
    }


def site_facts(module: TextModule) -> dict[str, str]:
    """What stands at each site, with every option as it was resolved."""
    return {part.site: f"{part.name}({part.extra_repr()})" for part in module.modules() if isinstance(part, Norm)}


def couples_rows(module: TextModule) -> bool:
    return any(isinstance(part, Norm) and not part.batch_independent for part in module.modules())


def device_names(trainer: pl.Trainer) -> list[str]:
    """Names of the accelerators in use; none on a CPU."""
    if trainer.strategy.root_device.type != "cuda":
        return []
    return [torch.cuda.get_device_name(trainer.strategy.root_device)] * trainer.num_devices


def peak_memory_mib(trainer: pl.Trainer) -> float:
    """Peak memory of this run on its GPU, or of this process where there is none."""
    if trainer.strategy.root_device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if os.uname().sysname == "Darwin" else peak / 2**10
