"""Results that nobody measured: tables of real and invented arguments with every verdict there is.

python tests/report/made_up.py FOLDER  writes them and the report, to be looked at.
"""

from __future__ import annotations

import dataclasses
import math
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from normlab.claims import load_claim
from normlab.claims.base import TUNING, Claim, Comparison, Scale, Setting
from normlab.claims.families import CHAR_LSTM, norm_arm
from normlab.claims.figure_tables import CurveRow, ProbeRow, curves_path, probes_path, write_table
from normlab.claims.figures import FIGURES_OF_PROBES
from normlab.claims.measurements import Measurement, probe, result
from normlab.claims.rows import Row, write_rows
from normlab.claims.rules import Rule, rule_path, rule_sha256, write_rule
from normlab.config import DataConfig, RunConfig, TransformerConfig, config_hash
from normlab.records.checks import ExactCheck, write_checks

# Their own: what is said of them depends on these.
LSTM_RATES, TUNING_SEEDS, VERDICT_SEEDS = (1e-3, 3e-3, 1e-2, 3e-2), (101, 102), tuple(range(1, 9))

LOSS = Measurement("test_loss_nats", "nats", True, result("test_loss_nats"))
SPREAD = Measurement("mean_distance_cell", "sigma", True, probe("step_statistics", "first_step_mean_distance.cell"))
TRANSFORMER: dict[Scale, RunConfig] = {
    "small": dataclasses.replace(
        CHAR_LSTM["small"], model=TransformerConfig(), data=DataConfig(corpus="ptb_char", length=50)
    )
}
(BY_STEP,), (BY_LAG,) = FIGURES_OF_PROBES["step_statistics"], FIGURES_OF_PROBES["gradient_flow"]
FLOW = Measurement("gradient_ratio", "1", False, probe("gradient_flow", "gradient_ratio"))

# Named so that a careless page would break: HTML, Markdown, and a word without an end.
NASTY = '<b onmouseover="x">ln|*_&amp;</b>'


def invented(claim_id: str, sentence: str, arms: dict | None = None, **changes: object) -> Claim:
    arms = arms or {"ln": norm_arm("ln"), "bn": norm_arm("bn")}
    first, second = list(arms)[:2]
    values: dict = {
        "id": claim_id,
        "sentence": sentence,
        "source": "nobody; Cooijmans et al. 2016, arXiv 1603.09025, section 3",
        "kind": "measured",
        "settings": {"char_lstm": Setting(CHAR_LSTM, arms, LSTM_RATES)},
        "measurements": (LOSS,),
        "comparisons": (Comparison(first, second, "test_loss_nats", "better", 0.01, "a round number"),),
        "tuning_seeds": TUNING_SEEDS,
        "verdict_seeds": VERDICT_SEEDS,
    }
    return Claim(**{**values, **changes})


REFUTED = invented("x1_refuted", "LN is better than BN, which it is not.")
MIXED = invented(
    "x2_mixed",
    "LN is better everywhere. " + "This sentence is long, because some arguments need many words. " * 3,
    settings={
        "char_lstm": Setting(CHAR_LSTM, {"ln": norm_arm("ln"), "bn": norm_arm("bn")}, LSTM_RATES),
        "char_transformer_with_a_long_name": Setting(
            TRANSFORMER, {"ln": norm_arm("ln"), "bn": norm_arm("bn")}, (1e-3,)
        ),
    },
)
INCONCLUSIVE = invented("x3_inconclusive", "LN is better, and nobody can tell.")
LOST = invented("x4_lost", "LN is better on its own, but not among so many arguments.")
NASTY_NAMES = invented(
    "x5_nasty",
    f"{NASTY} is <script>alert(1)</script> better & `safe`.",
    {NASTY: norm_arm("ln"), "a" * 60: norm_arm("rms")},
    kind="both",
    checks=("bn_mean_and_variance", "bn_keeps_correlations"),
)
DIVERGED = invented("x6_diverged", "No norm is as good as LN.", {"none": norm_arm("none"), "ln": norm_arm("ln")})
UNRUN = invented("x7_unrun", "Nobody ran this.")
UNFINISHED = invented("x8_unfinished", "Somebody stopped running this.")
EXACT = Claim("x9_exact", "This is true by mathematics.", "arXiv 1502.03167", "exact", ("bn_mean_and_variance",))
BROKEN = Claim(
    "y1_broken", "This is false by mathematics.", "arXiv 1502.03167", "exact", ("broken_one", "bn_mean_and_variance")
)
DRAWN = invented(
    "y2_drawn",
    "Statistics differ between time steps.",
    {"ln": norm_arm("ln"), "bn": norm_arm("bn"), "bn_step": norm_arm("bn_step"), "none": norm_arm("none")},
    measurements=(LOSS, SPREAD, FLOW),
)
INVENTED = (REFUTED, MIXED, INCONCLUSIVE, LOST, NASTY_NAMES, DIVERGED, UNRUN, UNFINISHED, EXACT, BROKEN, DRAWN)
CLAIMS = (load_claim("d2_shared_statistics_fail"), load_claim("d4_ln_solves_it"), *INVENTED)
FEW = (CLAIMS[1], REFUTED, BROKEN, DRAWN)

CHECKS = [
    ExactCheck("bn_mean_and_variance", "mean and variance of BN's output, off 0 and 1", 2.2e-16, "<= 1e-09", True),
    ExactCheck("bn_keeps_correlations", "correlations before and after", 1.1e-15, "<= 1e-09", True),
    ExactCheck("broken_one", "a statement <i>that is false</i>", 0.5, "<= 1e-09", False),
]

Value = Callable[[str, str, str, int], float | None]
"""Of setting, arm, measurement and seed; None is a run that diverged."""


def make_rows(claim: Claim, scale: Scale, value: Value, seeds: Sequence[int] | None = None) -> list[Row]:
    """All rows of a claim: every sweep is best at its second rate."""

    def row(run, measurement: str, found: float | None) -> Row:
        where = (run.setting, run.arm, run.config.seed, run.phase, run.config.optim.lr, measurement)
        number = math.nan if found is None else found
        end = (run.id, config_hash(run.config), "1234567890", "2-core x86_64, 24 GiB", 61.5)
        return Row(*where, number, found is None, *end)

    rows = []
    for run in claim.tuning_runs(scale):
        sweep = claim.settings[run.setting].learning_rates
        far = abs(sweep.index(run.config.optim.lr) - 1)
        rows.append(
            row(run, TUNING.name, None if far > 1 and run.arm == "none" else 1.5 + 0.2 * far + run.config.seed / 1e4)
        )
    for run in claim.verdict_runs(scale, claim.choose_rates(rows)):
        if seeds is None or run.config.seed in seeds:
            for measurement in claim.measurements:
                found = value(run.setting, run.arm, measurement.name, run.config.seed)
                rows.append(row(run, measurement.name, found))
    return rows


def _noise(*key: object) -> float:
    return random.Random(str(key)).gauss(0, 1)


def _effect(of_arm: dict[str, float], spread: float = 0.004) -> Value:
    """1.5 and what `of_arm` adds, with noise of the run, and of the seed, which pairing takes out."""

    def value(setting: str, arm: str, measurement: str, seed: int) -> float:
        return 1.5 + of_arm.get(arm, 0.0) + 0.02 * _noise(seed) + spread * _noise(setting, arm, measurement, seed)

    return value


def _curves(claim: Claim, rows: Sequence[Row]) -> list[CurveRow]:
    steps = range(50, 301, 50)
    return [
        CurveRow(
            row.setting,
            row.arm,
            row.seed,
            step,
            step * (0.1 + 0.05 * (row.arm != "ln")),
            "valid_loss_nats",
            round(row.value + 3 / math.sqrt(step) + 0.02 * _noise(row.run_id, step), 5),
        )
        for row in rows
        if row.phase == "verdict" and row.measurement == "test_loss_nats" and not row.diverged
        for step in steps
    ]


def _probes(claim: Claim) -> list[ProbeRow]:
    rows = []
    for arm in claim.settings["char_lstm"].arms:
        for site in ("input_to_hidden", "hidden_to_hidden", "cell"):
            for step in range(50):
                for quantity, height in (("mean_distance", 0.3), ("std_distance", 1.0)):
                    mean = height * (1 - math.exp(-(step + 1) / 5)) + 0.05 * _noise(arm, site)
                    rows.append(
                        ProbeRow(
                            "char_lstm",
                            arm,
                            "step_statistics",
                            "",
                            site,
                            "step",
                            step,
                            quantity,
                            round(mean, 5),
                            0.03,
                            8,
                        )
                    )
        for lag in range(50):
            rows.append(
                ProbeRow(
                    "char_lstm", arm, "gradient_flow", "lag", "", "lag", lag, "gradient_norm", 10 ** (-lag / 20), 0.0, 8
                )
            )
    return rows


def write_results(folder: Path) -> None:
    """Tables of `CLAIMS` below `folder`: every verdict, and what a report may meet."""

    def mixed(setting: str, arm: str, measurement: str, seed: int) -> float:
        return _effect({"ln": -0.05 if setting == "char_lstm" else 0.05})(setting, arm, measurement, seed)

    def diverged(setting: str, arm: str, measurement: str, seed: int) -> float | None:
        return None if arm == "none" and seed < 7 else _effect({})(setting, arm, measurement, seed)

    d2, d4 = CLAIMS[:2]
    values: list[tuple[Claim, Scale, Value]] = [
        (d2, "small", _effect({"bn": 0.06})),
        (d4, "small", _effect({"none": 0.04, "bn_step": 0.03})),
        (d4, "full", _effect({"none": 0.001, "bn_step": 0.001}, spread=0.001)),
        (REFUTED, "small", _effect({"ln": 0.03})),
        (MIXED, "small", mixed),
        (INCONCLUSIVE, "small", _effect({"ln": -0.01}, spread=0.03)),
        (LOST, "small", _effect({"ln": -0.0155}, spread=0.0125)),
        (NASTY_NAMES, "small", _effect({NASTY: -0.05})),
        (DIVERGED, "small", diverged),
        (DRAWN, "small", _effect({"ln": -0.05})),
    ]
    for claim, scale, value in values:
        table = folder / scale / f"{claim.id}.csv"
        rows = make_rows(claim, scale, value)
        write_rows(table, rows)
        write_table(curves_path(table), _curves(claim, rows))
        write_rule(rule_path(table), Rule("abcdef0123", rule_sha256(claim, scale) if claim is d4 else "0" * 64))
    write_table(probes_path(folder / "small" / f"{DRAWN.id}.csv"), _probes(DRAWN))
    write_rows(folder / "small" / f"{UNFINISHED.id}.csv", make_rows(UNFINISHED, "small", _effect({}), seeds=(1, 2)))
    write_checks(folder / "exact.json", CHECKS)


if __name__ == "__main__":
    from normlab.report.command import report

    write_results(Path(sys.argv[1]))
    report(CLAIMS, Path(sys.argv[1]), Path(sys.argv[1]), None, check=False)
