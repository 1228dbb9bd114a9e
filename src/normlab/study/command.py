"""`python -m normlab study`: from what was asked to a list, a plan or the runs."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from normlab.claims import available_claims, load_claim, select_claims
from normlab.claims.base import SCALES, Scale
from normlab.config import InputError, OutputConfig
from normlab.execution.engine import Engine, ExecutionOptions
from normlab.execution.gpus import visible_gpus
from normlab.execution.local import LocalWorkers
from normlab.execution.slurm import SlurmEngine
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
    engine, at_once = _engine(options, scale, Path(output.runs_dir) / ".study", console)
    if dry_run:
        print_plan(chosen, at_once, console)
        return 0
    return 1 if run_study(chosen, engine, console, options.stack) else 0


def _engine(options: ExecutionOptions, scale: Scale, folder: Path, console: Console) -> tuple[Engine, int]:
    """What does the runs, and how many of them at once at most, as far as is known."""

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    if options.where == "slurm":
        slurm = options.slurm
        in_a_job = min(options.workers or (1 if slurm.gres else slurm.cpus), slurm.runs_per_job)
        at_once = min(slurm.max_queued, slurm.array_parallelism * in_a_job or slurm.max_queued)
        return SlurmEngine(folder, slurm, options.workers, options.runs_per_gpu), at_once
    gpus = visible_gpus() if scale == "full" else []
    if options.runs_per_gpu and not gpus:
        why = (
            "runs of scale small use none" if scale == "small" else "nvidia-smi and CUDA_VISIBLE_DEVICES name none here"
        )
        raise InputError(f"runs-per-gpu is {options.runs_per_gpu}, but there is no GPU to share: {why}; leave it out")
    # Where nobody says which GPUs there are, one run at a time has what torch finds.
    size = options.workers or (1 if scale == "full" and not gpus else 0)
    workers = LocalWorkers(size, folder, gpus=gpus, runs_per_gpu=options.runs_per_gpu, say=say)
    return workers, min(workers.size, len(gpus) * max(1, options.runs_per_gpu)) if gpus else workers.size
