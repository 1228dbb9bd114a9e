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
from normlab.data.resample import sample_facts
from normlab.machine.products import choice
from normlab.models.recurrent import Recurrent
from normlab.norms.base import Norm
from normlab.norms.batch_statistics import BatchStatisticsNorm
from normlab.norms.kernels import PREFIX
from normlab.tasks.metrics import baseline, evaluation_note
from normlab.training.module import TextModule

__all__ = [
    "data_facts",
    "device_names",
    "leak_facts",
    "leak_warning",
    "prefix_facts",
    "prefix_norms",
    "product_facts",
    "recurrence_facts",
    "run_facts",
    "site_facts",
    "statistics_rows",
]


def data_facts(text: PreparedText, config: RunConfig) -> dict[str, Any]:
    """What the record says about the data."""
    facts: dict[str, Any] = {
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
    if config.data.resample:
        facts["resample"] = sample_facts(text.splits["train"], config.seed)
    return facts


def site_facts(module: TextModule) -> dict[str, str]:
    """What stands at each site, with every option as it was resolved."""
    return {part.site: f"{part.name}({part.extra_repr()})" for part in module.modules() if isinstance(part, Norm)}


def recurrence_facts(module: TextModule, trainer: pl.Trainer) -> dict[str, str]:
    """The backend of the model's recurrence on this device and in this precision, and why; empty if it has none."""
    for part in module.modules():
        if isinstance(part, Recurrent):
            if trainer.world_size > 1 and part.mixes_rows:  # the processes may not be there yet
                return {"backend": "reference", "reason": "processes share statistics"}
            with trainer.precision_plugin.forward_context():
                backend, reason = part.backend_choice(trainer.strategy.root_device.type)
            return {"backend": backend, "reason": reason}
    return {}


def prefix_norms(module: TextModule) -> list[Norm]:
    """The norms with running statistics for which there are C kernels, and which get whole sequences."""
    parts = list(module.modules())
    stepwise = {norm for part in parts if isinstance(part, Recurrent) for norm in part.stepwise_norms()}
    return [part for part in parts if isinstance(part, Norm) and part.has_kernels and part not in stepwise]


def prefix_facts(module: TextModule, trainer: pl.Trainer) -> str:
    """What computes the running statistics of `prefix_norms`, and why not the kernels; empty if there are none."""
    if not prefix_norms(module):
        return ""
    on_cpu = trainer.strategy.root_device.type == "cpu"
    absence = PREFIX.absence(torch.float32) if on_cpu else "not on a CPU"
    return f"torch operators: {absence}" if absence else "C kernels"


def product_facts(trainer: pl.Trainer) -> dict[str, Any]:
    """Which matrix products are oneDNN's and why; empty where there is no choice (not on a CPU in float32)."""
    if trainer.strategy.root_device.type != "cpu" or trainer.precision != "32-true":
        return {}
    chosen = choice()
    return {"onednn": sorted(chosen.onednn), "reason": chosen.reason}


def statistics_rows(module: TextModule, batch_size: int, processes: int) -> int | None:
    """Rows that share a training statistic, the fewest if norms differ; None if no row sees another.

    Args:
        batch_size: rows per process.
    """
    rows: list[int] = []
    for part in module.modules():
        if not isinstance(part, Norm) or part.batch_independent:
            continue
        ghost = part.ghost_rows if isinstance(part, BatchStatisticsNorm) else None
        memory = part.memory_batches if isinstance(part, BatchStatisticsNorm) else 0
        # Ghosts are cut within each process; a batch smaller than one is one.
        rows.append(batch_size * processes * (1 + memory) if ghost is None else min(ghost, batch_size))
    return min(rows, default=None)


def leak_facts(module: TextModule) -> dict[str, str]:
    """What each site of a language model shows of later text; empty if it shows none."""
    if module.text.task != "language_modelling":
        return {}
    return {part.site: part.leaks for part in module.modules() if isinstance(part, Norm) and part.leaks}


def leak_warning(module: TextModule) -> str:
    """One line on `leak_facts`, which must not be empty."""
    leaks = leak_facts(module)
    sites = {leak: ", ".join(site for site, other in leaks.items() if other == leak) for leak in leaks.values()}
    norms = [part for part in module.modules() if isinstance(part, Norm)]
    always = any(part.leaks and not part.causal_in_evaluation for part in norms)
    which = "losses, in evaluation too," if always else "losses in training mode"
    return (
        f"warning: {'; '.join(f'{sites[leak]}: {leak}' for leak in sites)}; {which} are not those of a language model"
    )


def device_names(trainer: pl.Trainer) -> list[str]:
    """Names of the accelerators in use; none on a CPU."""
    if trainer.strategy.root_device.type != "cuda":
        return []
    return [torch.cuda.get_device_name(trainer.strategy.root_device)] * trainer.num_devices


def run_facts(module: TextModule, tokens_per_second: float, trainer: pl.Trainer) -> dict[str, float | int | str]:
    """What stands in the results of any run, however it ended: the plain baseline, speed and size."""
    return {
        **baseline(module.text),
        "tokens_per_second": tokens_per_second,
        "peak_memory_mib": peak_memory_mib(trainer),
        "parameters": sum(p.numel() for p in module.model.parameters()),
    }


def peak_memory_mib(trainer: pl.Trainer) -> float:
    """Peak memory of this run on its GPU, or of this process where there is none."""
    if trainer.strategy.root_device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if os.uname().sysname == "Darwin" else peak / 2**10
