"""What a study leaves for the figures, and the rule that it writes down before the runs that decide."""

from __future__ import annotations

import dataclasses
import math
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from study_bench import Bench
from tiny_study import DISCREPANCY, tiny_claim

from normlab.claims import load_claim, rules
from normlab.claims.figure_tables import (
    CurveRow,
    ProbeRow,
    curve_rows,
    curves_path,
    probe_rows,
    probes_path,
    read_table,
)
from normlab.claims.figures import FIGURES_OF_PROBES, ByX, Curves
from normlab.claims.rows import read_rows
from normlab.claims.rules import read_rule, rule_path, rule_sha256
from normlab.config import InputError, RunConfig, available_probes
from normlab.records.record import RunRecord

BY_SITE = ByX("statistics", "step_statistics", "step", ("mean", "std"), by="site")
BY_LAG = ByX("gradients", "gradient_flow", "lag", ("gradient_norm",), kind="lag")


def record(folder: Path, seed: int) -> RunRecord:
    output = dataclasses.replace(RunConfig().output, runs_dir=str(folder))
    return RunRecord.create(dataclasses.replace(RunConfig(), seed=seed, output=output))


def test_a_study_leaves_curves_of_its_verdict_runs(bench: Bench):
    bench.run()
    study = bench.study()
    table = study.table(study.claims[0])
    rows = read_table(curves_path(table), CurveRow)
    assert [(row.arm, row.seed, row.step) for row in rows] == [
        (arm, seed, step) for arm in ("ln", "bn_step") for seed in (1, 2) for step in (1, 2)
    ]
    assert rows[0] == CurveRow("tiny", "ln", 1, 1, 0.1, "valid_loss_nats", 0.501)
    assert not probes_path(table).exists()


def test_curves_stay_where_the_records_are_elsewhere(bench: Bench):
    bench.run()
    study = bench.study()
    path = curves_path(study.table(study.claims[0]))
    before = path.read_bytes()
    for folder in sorted(bench.runs.glob("lstm-*-s1-*")):
        shutil.rmtree(folder)
    code, _ = bench.run()
    assert code == 0
    assert path.read_bytes() == before


def test_values_that_are_not_finite_are_not_drawn(tmp_path: Path):
    made = record(tmp_path, 1)
    for step, loss in enumerate((2.0, math.nan, math.inf, 1.0), 1):
        made.log(step, step / 3, {"valid_loss_nats": loss})
    made.log(5, 2.0, {"train_loss_nats": 1.0})
    rows = curve_rows((Curves(),), {("one", "ln", 1): made})
    assert [(row.step, row.seconds, row.value) for row in rows] == [(1, 0.33, 2.0), (4, 1.33, 1.0)]
    assert [row.value for row in curve_rows((Curves("train_loss_nats"),), {("one", "ln", 1): made})] == [1.0]


def test_long_curves_keep_their_beginning_and_their_end(tmp_path: Path):
    made = record(tmp_path, 1)
    for step in range(1, 1001):
        made.log(step, step, {"valid_loss_nats": 1.0})
    steps = [row.step for row in curve_rows((Curves(),), {("one", "ln", 1): made})]
    assert len(steps) == 60
    assert steps[:20] == list(range(1, 21))
    assert steps[-1] == 1000
    assert {b - a for a, b in pairwise(steps[20:])} == {24, 25}


def test_rows_of_probes_are_means_over_layers_and_then_over_runs(tmp_path: Path):
    records = {}
    for seed, height in ((1, 1.0), (2, 3.0)):
        records["one", "ln", seed] = made = record(tmp_path, seed)
        of_layers = [
            {"site": site, "layer": layer, "step": step, "mean": height + layer + step, "std": None}
            for site in ("cell", "final")
            for layer in (0, 1)
            for step in (0, 1)
        ]
        made.write_probe("step_statistics", {"options": {}, "summary": {}, "rows": of_layers})
        by_lag = [{"kind": "lag", "lag": 0, "gradient_norm": height}, {"kind": "parameters", "gradient_norm": 100.0}]
        made.write_probe("gradient_flow", {"options": {}, "summary": {}, "rows": by_lag})
    records["one", "ln", 3] = record(tmp_path, 3)  # diverged: no probe
    rows = probe_rows((Curves(), BY_SITE, BY_LAG), records)
    std = round(math.sqrt(2), 4)
    assert rows == [
        *(
            ProbeRow("one", "ln", "step_statistics", "", site, "step", step, "mean", 2.5 + step, std, 2)
            for site in ("cell", "final")
            for step in (0.0, 1.0)
        ),
        ProbeRow("one", "ln", "gradient_flow", "lag", "", "lag", 0.0, "gradient_norm", 2.0, std, 2),
    ]


def test_an_argument_has_the_figures_of_the_probes_it_measures(bench: Bench):
    assert tiny_claim(bench.text).figures == (Curves(),)
    drawn = tiny_claim(bench.text, measurement=DISCREPANCY).figures
    assert drawn == (Curves(), *FIGURES_OF_PROBES["discrepancy"])
    for probe, figures in FIGURES_OF_PROBES.items():
        assert probe in available_probes()
        assert all(figure.probe == probe for figure in figures)


@pytest.mark.parametrize(
    ("old", "new", "said"), [("setting,", "place,", "has other columns"), (",1,1,", ",1,x,", "line 2")]
)
def test_a_damaged_table_of_figures_gets_one_line(bench: Bench, old: str, new: str, said: str):
    bench.run()
    study = bench.study()
    path = curves_path(study.table(study.claims[0]))
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(InputError, match=said):
        read_table(path, CurveRow)


def test_the_rule_is_that_of_the_beginning_of_the_verdict_runs(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    def fix(commit: str) -> None:
        monkeypatch.setattr(rules, "code_commit", lambda: {"commit": commit, "dirty": False})

    def written() -> str:
        study = bench.study()
        rule = read_rule(rule_path(study.table(study.claims[0])))
        assert rule is not None
        return rule.rule_commit

    fix("planned")
    bench.study().fix_rules()
    fix("changed before there was anything to see")
    bench.study().fix_rules()
    assert written() == "changed before there was anything to see"
    fix("begun")
    bench.run()
    fix("changed when the verdict was known")
    bench.run()
    assert written() == "begun"
    table = bench.study().table(bench.study().claims[0])
    assert read_rows(table)
    # What was not written down in time is not made up later.
    rule_path(table).unlink()
    bench.run()
    assert read_rule(rule_path(table)) is None


def test_a_rule_of_shared_runs_says_how_many_were_there(bench: Bench):
    """Another argument had them made, so that they are there before this one is asked for."""
    bench.run()
    table = bench.study().table(bench.study().claims[0])
    table.unlink()
    rule_path(table).unlink()
    bench.run()
    rule = read_rule(rule_path(table))
    assert rule is not None
    assert rule.verdict_runs_before == 4


def test_a_rule_is_what_decides():
    d4 = load_claim("d4_ln_solves_it")
    first = rule_sha256(d4, "small")
    assert len(first) == 64
    assert rule_sha256(d4, "full") != first
    beside = [m for m in d4.measurements if m.name in {c.measurement for c in d4.comparisons}]
    assert rule_sha256(dataclasses.replace(d4, sentence="Other words.", measurements=tuple(beside)), "small") == first
    ((name, setting),) = d4.settings.items()
    arms = {**setting.arms, "ln": {"model": {"norm": "rms"}}}
    others = (
        {"verdict_seeds": (1, 2, 3, 4, 5)},
        {"tuning_seeds": (103,)},
        {"settings": {name: dataclasses.replace(setting, arms=arms)}},
        {"settings": {name: dataclasses.replace(setting, learning_rates=(0.1, 0.2))}},
        {"comparisons": d4.comparisons[:1]},
        {"comparisons": tuple(dataclasses.replace(c, margin=1.0) for c in d4.comparisons)},
        {"measurements": tuple(dataclasses.replace(m, read=beside[0].read) for m in d4.measurements)},
    )
    assert len({first, *(rule_sha256(dataclasses.replace(d4, **other), "small") for other in others)}) == 8
