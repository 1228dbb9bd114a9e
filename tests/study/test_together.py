"""Probes that measure the runs of an arm together: when they are run, what they leave out, who shares them."""

from __future__ import annotations

import math
import shutil
from collections import Counter

import pytest
from study_bench import Bench
from tiny_study import tiny_claim, variance

from normlab.claims.base import Claim
from normlab.claims.rows import Row, read_rows
from normlab.config import InputError

ONE_RATE = (1e-2,)
THREE = (1, 2, 3)


def claim(bench: Bench, claim_id: str = "z1_variance", seeds: tuple[int, ...] = THREE, **options: int) -> Claim:
    return tiny_claim(bench.text, claim_id, variance(seeds, **options), ONE_RATE, seeds)


def rows(bench: Bench, of: Claim) -> list[Row]:
    return read_rows(bench.study(of).table(of))


def values(bench: Bench, of: Claim, arm: str = "ln") -> dict[int, float]:
    return {row.seed: row.value for row in rows(bench, of) if row.arm == arm}


def together(bench: Bench) -> list[str]:
    return [name for name in bench.starts() if "-seeds-" in name]


def test_once_per_arm_when_its_runs_are_done(bench: Bench):
    one = claim(bench)
    state = bench.study(one).state(one)
    assert [len(state.runs), len(state.ready), len(state.waiting)] == [8, 6, 2], "two more than there are runs"
    code, said = bench.run(one, workers=1)
    assert (code, len(bench.starts()), len(together(bench))) == (0, 8, 2)
    for name in together(bench):
        norm = name.split("-")[1]
        before = bench.starts()[: bench.starts().index(name)]
        assert sum(f"-{norm}-" in other for other in before) == 3
    assert "bias_variance of 3 runs together" in said
    assert "8/8" in said
    assert values(bench, one) == {1: 3.01, 2: 3.02, 3: 3.03}
    assert len(rows(bench, one)) == 6
    before = bench.study(one).table(one).read_bytes()
    assert bench.run(one)[0] == 0
    assert len(bench.starts()) == 8
    assert bench.study(one).table(one).read_bytes() == before


def test_a_failed_measurement_is_tried_once_more_and_runs_stay(bench: Bench):
    bench.order(ln="fail together once", bn_step="fail together")
    code, said = bench.run(claim(bench))
    assert code == 1
    assert "1 of 8 runs missing" in said
    assert said.count("failed twice") == 1
    assert "no weights" in said
    assert sorted(Counter(bench.starts()).values()) == [1] * 6 + [2, 2]
    bench.order()
    assert bench.run(claim(bench))[0] == 0
    assert len(bench.starts()) == 11


def test_a_diverged_run_is_left_out_and_counts(bench: Bench):
    bench.order(ln="diverge at 1", bn_step="diverge")
    one = claim(bench)
    assert bench.run(one)[0] == 0
    assert len(together(bench)) == 1, "of bn_step nothing is left"
    of_ln = [row for row in rows(bench, one) if row.arm == "ln"]
    assert [row.diverged for row in of_ln] == [True, False, False]
    assert math.isnan(of_ln[0].value)
    assert [row.value for row in of_ln[1:]] == [2.02, 2.03]
    assert all(row.diverged and math.isnan(row.value) for row in rows(bench, one) if row.arm == "bn_step")
    verdict = next(iter(one.judge(rows(bench, one)).by_setting.values()))
    assert [rate.diverged for rate in verdict.divergence] == [3, 1]


def test_a_run_alone_has_no_variance(bench: Bench):
    bench.order(ln="diverge at 1")
    two = claim(bench, seeds=(1, 2))
    assert bench.run(two)[0] == 0
    assert [(row.diverged, math.isnan(row.value)) for row in rows(bench, two)][:2] == [(True, True), (False, True)]
    assert len(together(bench)) == 1


def test_arguments_with_other_seeds_share_runs_and_not_what_they_measure(bench: Bench):
    two, three = claim(bench, "z2_two", (1, 2)), claim(bench, "z3_three")
    assert bench.run(two, three)[0] == 0
    assert len(bench.starts()) == 6 + 4
    assert values(bench, two) == {1: 2.01, 2: 2.02}
    assert values(bench, three) == {1: 3.01, 2: 3.02, 3: 3.03}
    # One after the other is no different.
    assert bench.run(two)[0] == 0
    assert values(bench, two) == {1: 2.01, 2: 2.02}


def test_arguments_with_the_same_seeds_share_what_they_measure(bench: Bench):
    assert bench.run(claim(bench), claim(bench, "z2_same"))[0] == 0
    assert len(bench.starts()) == 8
    with pytest.raises(InputError, match=r"want the probe bias_variance of run lstm-ln-.*with different options"):
        bench.study(claim(bench), claim(bench, "z2_other", examples=8))


def test_a_table_stands_for_records_elsewhere_with_all_its_seeds_or_not_at_all(bench: Bench):
    one = claim(bench)
    bench.run(one)
    table = bench.study(one).table(one)
    before = table.read_bytes()
    shutil.rmtree(bench.runs)
    bench.runs.mkdir()
    assert bench.run(one)[0] == 0
    assert (bench.starts(), table.read_bytes()) == ([], before)
    # With another list of seeds its rows are other numbers, also for the seeds that stay.
    two = claim(bench, seeds=(1, 2))
    state = bench.study(two).state(two)
    assert (len(state.ready), len(state.waiting)) == (4, 2)
    assert bench.study(two).rows(state) == []
    # Without one row all runs are needed: the weights of the others are not here.
    table.write_text("".join(line for line in table.read_text().splitlines(True) if "bn_step,2,verdict" not in line))
    assert bench.run(one)[0] == 0
    assert len(bench.starts()) == 8


def test_seeds_of_the_measurement_are_those_of_the_verdict(bench: Bench):
    with pytest.raises(InputError, match=r"bias_variance measures across \(1, 2\), not the verdict seeds"):
        tiny_claim(bench.text, "z1_variance", variance((1, 2)), ONE_RATE, THREE)
