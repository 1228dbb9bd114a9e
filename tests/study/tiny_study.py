"""Three small arguments that share their runs, and the study of them as a program: it can be killed.

python tiny_study.py TEXT FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from normlab.claims.base import Claim, Comparison, Setting
from normlab.claims.measurements import Measurement, Reach, across_seeds, probe, result
from normlab.config import OutputConfig, RunConfig, config_from_dict
from normlab.execution.local import LocalWorkers
from normlab.study.plan import Study
from normlab.study.running import run_study

ARMS = {"ln": {"model": {"norm": "ln"}}, "bn_step": {"model": {"norm": "bn_step", "norm_options": {"momentum": 0.2}}}}
RATES = (1e-3, 1e-2)
TEST_LOSS = Measurement("test_loss_nats", "nats", True, result("test_loss_nats", "unigram_test_loss_nats"))
STEPS_TO_LN = Measurement("steps_to_ln", "steps", True, Reach("step", of="ln"))
DISCREPANCY = Measurement("discrepancy_mean", "sigma", True, probe("discrepancy", "discrepancy_mean", batches=2))
SEEDS = (1, 2)


def variance(seeds: tuple[int, ...] = SEEDS, **options: int) -> Measurement:
    return Measurement("variance_nats", "nats", True, across_seeds("bias_variance", "variance_nats", seeds, **options))


def base_run(text: Path) -> RunConfig:
    return config_from_dict(
        {
            "model": {"width": 8},
            "data": {"corpus": str(text), "tokens": "char", "batch_size": 4, "length": 8},
            "training": {"steps": 200, "valid_every": 100, "checkpoint_every": 50, "activations_every": 0},
        }
    )


def tiny_claim(
    text: Path,
    claim_id: str = "z1_ln_is_better",
    measurement: Measurement = TEST_LOSS,
    rates: tuple[float, ...] = RATES,
    seeds: tuple[int, ...] = SEEDS,
) -> Claim:
    return Claim(
        id=claim_id,
        sentence="LN is better than BN on a tiny text.",
        source="a test",
        kind="measured",
        settings={"tiny": Setting({"small": base_run(text)}, ARMS, rates)},
        measurements=(measurement,),
        comparisons=(Comparison("ln", "bn_step", measurement.name, "better", 0.01, "a round number"),),
        tuning_seeds=(7,),
        verdict_seeds=seeds,
    )


def tiny_study(text: Path, folder: Path) -> Study:
    """Three arguments with the same four runs."""
    one_rate = (1e-2,)
    claims = [
        tiny_claim(text, rates=one_rate),
        tiny_claim(text, "z2_discrepancy", DISCREPANCY, one_rate),
        tiny_claim(text, "z3_variance", variance(examples=64), one_rate),
    ]
    output = OutputConfig(runs_dir=str(folder / "runs"), wandb="off", progress=False)
    return Study(claims, "small", output, folder / "results")


def local_workers(size: int, runs: Path, say: Callable[[str], None] = print) -> LocalWorkers:
    return LocalWorkers(size, runs / ".study", say=say)


if __name__ == "__main__":
    study = tiny_study(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.exit(run_study(study, local_workers(2, Path(study.output.runs_dir)), Console(width=200)))
