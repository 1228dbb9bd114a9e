"""`python -m normlab study`: from what was asked to a list, a plan or the runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from normlab.claims import available_claims, load_claim, select_claims
from normlab.claims.base import SCALES, Scale
from normlab.config import InputError, OutputConfig
from normlab.execution.engine import ExecutionOptions
from normlab.execution.gpus import Gpu, visible_gpus
from normlab.execution.local import LocalWorkers
from normlab.records.environment import available_cores
from normlab.study.plan import Study
from normlab.study.running import run_study
from normlab.study.showing import list_claims, print_plan, study_console

__all__ = ["study"]


def study(
    wanted: str | None, scale: Scale, output: OutputConfig, results: Path, options: ExecutionOptions, dry_run: bool
) -> int:
    """List all arguments, or print or run what those that `wanted` means still miss.

    Returns:
        The exit code: 1 if an argument is not complete in the end.
    """
    console = study_console()
    if wanted is None:
        claims = [load_claim(name) for name in available_claims()]
        measured = [claim for claim in claims if claim.settings]
        studies = [Study([c for c in measured if each in c.scales()], each, output, results) for each in SCALES]
        list_claims(studies, [claim for claim in claims if not claim.settings], console)
        return 0
    claims = [claim for claim in select_claims(wanted) if claim.settings]
    if not claims:
        raise InputError(f"{wanted} is decided by computation alone: make exact")
    chosen = Study(claims, scale, output, results)
    gpus = visible_gpus() if scale == "full" else []
    if dry_run:
        together = len(gpus) * max(1, options.runs_per_gpu) or (available_cores() if scale == "small" else 1)
        print_plan(chosen, options.workers or together, console)
        return 0
    engine = _local_workers(options, scale, gpus, output, console)
    return 1 if run_study(chosen, engine, console, options.stack) else 0


def _local_workers(
    options: ExecutionOptions, scale: Scale, gpus: Sequence[Gpu], output: OutputConfig, console: Console
) -> LocalWorkers:
    if options.runs_per_gpu and not gpus:
        why = (
            "runs of scale small use none" if scale == "small" else "nvidia-smi and CUDA_VISIBLE_DEVICES name none here"
        )
        raise InputError(f"runs-per-gpu is {options.runs_per_gpu}, but there is no GPU to share: {why}; leave it out")
    # Where nobody says which GPUs there are, one run at a time has what torch finds.
    size = available_cores() if scale == "small" or gpus else 1
    return LocalWorkers(
        options.workers or max(size, len(gpus) * max(1, options.runs_per_gpu)),
        Path(output.runs_dir) / ".study",
        gpus=gpus,
        runs_per_gpu=options.runs_per_gpu,
        say=lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True),
    )
