"""What a claim may say, how rates are chosen, what its table gives back, and that none of it needs torch."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from normlab.claims import available_claims, load_claim, select_claims
from normlab.claims.base import TUNING, Claim, Comparison, Setting
from normlab.claims.measurements import Difference, Log2, Measurement, Reach, Tail, probe, result
from normlab.claims.rows import Row, read_rows, write_rows
from normlab.config import InputError, RunConfig, config_hash
from normlab.records.record import Outcome, RunRecord

LOSS = Measurement("test_loss_nats", "nats", True, result("test_loss_nats"))
SETTING = Setting(
    {"small": RunConfig()}, {"ln": {"model": {"norm": "ln"}}, "bn": {"model": {"norm": "bn"}}}, (0.1, 0.2)
)
COMPARISON = Comparison("ln", "bn", "test_loss_nats", "better", 0.01, "a round number")


def claim(**changes: Any) -> Claim:
    values: dict[str, Any] = {
        "id": "z1_test",
        "sentence": "LN is better.",
        "source": "a test",
        "kind": "measured",
        "settings": {"one": SETTING},
        "measurements": (LOSS,),
        "comparisons": (COMPARISON,),
        "tuning_seeds": (11, 12),
        "verdict_seeds": (1, 2, 3, 4, 5),
    }
    return Claim(**{**values, **changes})


def row(arm: str, seed: int, value: float, **changes: Any) -> Row:
    first = Row("one", arm, seed, "verdict", 0.1, "test_loss_nats", value, False, "id", "hash", "abc", "machine", 1.5)
    return dataclasses.replace(first, **changes)


def tuning(values: dict[tuple[str, float], tuple[float, ...]]) -> list[Row]:
    """Rows of a sweep; an infinite loss is a run that diverged."""
    return [
        row(arm, seed, loss, phase="tuning", learning_rate=rate, measurement=TUNING.name, diverged=math.isinf(loss))
        for (arm, rate), losses in values.items()
        for seed, loss in zip((11, 12), losses, strict=False)
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"verdict_seeds": (5, 11)}, r"seeds \[11\] are tuning and verdict seeds at once"),
        ({"tuning_seeds": ()}, "the sweep of one needs tuning seeds"),
        ({"verdict_seeds": (1, 1)}, "a seed stands twice"),
        ({"verdict_seeds": ()}, "has settings and seeds"),
        ({"kind": "exact"}, "has checks"),
        ({"kind": "exact", "checks": ("bn_mean_and_variance",)}, "has settings and seeds"),
        ({"kind": "guessed"}, "its kind is 'guessed'"),
        ({"sentence": ""}, "a sentence and its source"),
        ({"settings": {"one": dataclasses.replace(SETTING, learning_rates=(0.2, 0.1))}}, "rates of one must rise"),
        ({"comparisons": (dataclasses.replace(COMPARISON, control="rms"),)}, "no setting has ln and rms"),
        ({"comparisons": (dataclasses.replace(COMPARISON, measurement="test_los"),)}, "did you mean 'test_loss_nats'"),
        ({"comparisons": (dataclasses.replace(COMPARISON, margin=0.0),)}, "a margin is > 0"),
        ({"comparisons": (dataclasses.replace(COMPARISON, margin_reason=""),)}, "has a reason"),
        ({"measurements": (LOSS, LOSS)}, "two measurements have one name"),
        ({"measurements": (LOSS, Measurement("x", "1", True, probe("leek", "x")))}, "did you mean 'leak'"),
        (
            {
                "measurements": (
                    LOSS,
                    Measurement("x", "1", True, probe("cost", "x")),
                    Measurement("y", "1", True, probe("cost", "y", steps=3)),
                )
            },
            "two sets of options",
        ),
    ],
)
def test_a_claim_that_contradicts_itself_is_refused(changes: dict[str, Any], said: str):
    assert claim()
    with pytest.raises(InputError, match=said):
        claim(**changes)


def test_all_arms_get_one_sweep_on_seeds_of_its_own():
    runs = claim().tuning_runs("small")
    assert {(run.arm, run.config.optim.lr, run.config.seed) for run in runs} == {
        (arm, rate, seed) for arm in ("ln", "bn") for rate in (0.1, 0.2) for seed in (11, 12)
    }
    assert {run.config.model.norm for run in runs if run.arm == "bn"} == {"bn"}


def test_an_arm_may_be_a_function_of_the_base_run():
    half = Setting({"small": RunConfig()}, {"half": lambda run: dataclasses.replace(run, seed=9)}, (0.1,))
    assert half.config("small", "half").seed == 9


def test_verdict_runs_are_those_of_arms_with_a_rate():
    runs = claim().verdict_runs("small", {("one", "ln"): 0.2})
    assert [(run.arm, run.config.optim.lr, run.config.seed) for run in runs] == [("ln", 0.2, s) for s in range(1, 6)]


@pytest.mark.parametrize(
    ("low", "high", "chosen"),
    [
        ((2.0, 2.0), (1.0, 1.9), 0.2),
        ((2.0, 1.0), (1.0, 2.0), 0.1),  # a tie takes the smaller rate
        ((3.0, 3.0), (1.0, math.inf), 0.1),  # a diverged run is worst
        ((math.inf, math.inf), (9.0, math.inf), 0.2),
        ((math.inf, math.inf), (math.inf, math.inf), 0.1),
        ((math.nan, 1.0), (2.0, 2.0), 0.2),
    ],
)
def test_the_rate_is_that_of_the_best_validation_loss(low: tuple, high: tuple, chosen: float):
    rows = tuning({("ln", 0.1): low, ("ln", 0.2): high})
    assert claim().choose_rates(rows) == {("one", "ln"): chosen}


def test_no_rate_before_the_sweep_is_complete():
    assert claim().choose_rates(tuning({("ln", 0.1): (1.0, 1.0), ("ln", 0.2): (1.0,)})) == {}


def test_a_single_rate_needs_no_tuning():
    one = claim(settings={"one": dataclasses.replace(SETTING, learning_rates=(0.3,))}, tuning_seeds=())
    assert one.tuning_runs("small") == []
    assert one.choose_rates([]) == {("one", "ln"): 0.3, ("one", "bn"): 0.3}


def test_the_table_gives_rows_back_to_the_bit(tmp_path: Path):
    rows = [row("ln", 1, 0.1 + 0.2), row("bn", 2, math.inf, diverged=True), row("a,b\n", 3, 1e-300)]
    path = tmp_path / "small" / "z.csv"
    write_rows(path, rows)
    assert read_rows(path) == rows
    assert read_rows(tmp_path / "none.csv") == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("setting,", "settings,", "has other columns"),
        (",verdict,", ",final,", "line 2"),
        (",0,id", ",maybe,id", "line 2"),
        ("0.25", "x", "line 2"),
        (",abc", "", "line 2"),
    ],
)
def test_a_damaged_table_gets_one_line(tmp_path: Path, old: str, new: str, said: str):
    path = tmp_path / "z.csv"
    write_rows(path, [row("ln", 1, 0.25)])
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(InputError, match=said):
        read_rows(path)


def test_what_is_read_from_a_record(tmp_path: Path):
    config = dataclasses.replace(RunConfig(), output=dataclasses.replace(RunConfig().output, runs_dir=str(tmp_path)))

    def record(seed: int, state: Any, losses: tuple[float, ...], **results: float) -> RunRecord:
        made = RunRecord.create(dataclasses.replace(config, seed=seed))
        for step, loss in enumerate(losses, 1):
            made.log(step, step * 10.0, {"valid_loss_nats": loss})
        made.finish(Outcome(state, "", len(losses), 1.0, dict(results)))
        return made

    ln = record(1, "finished", (3.0, 2.0, 1.0), test_loss_nats=1.0)
    bn = record(2, "finished", (2.0, 0.5, 0.5), test_loss_nats=0.7, test_running_loss_nats=0.9)
    broken = record(3, "diverged", (9.0,), unigram_test_loss_nats=3.0)
    peers = {"ln": ln, "bn": bn}
    running = result("test_running_loss_nats", "test_loss_nats", "unigram_test_loss_nats")
    assert [running(each, peers) for each in (ln, bn, broken)] == [1.0, 0.9, 3.0]
    assert Tail("valid_loss_nats", rows=2)(ln, peers) == 1.5
    assert [Reach("step", of="ln")(each, peers) for each in (ln, bn)] == [3.0, 2.0]
    assert [Reach("seconds", of="bn")(each, peers) for each in (ln, bn)] == [30.0, 20.0]
    assert [Reach("reached", of="bn")(each, peers) for each in (ln, bn)] == [0.0, 1.0]
    lost = record(4, "diverged", ())
    assert Reach("step", of="bn")(ln, {"bn": lost}) == 1.0
    assert math.isnan(Reach("step", of="bn")(lost, {"bn": ln}))
    with pytest.raises(InputError, match="of which there is no logarithm"):
        Log2(Difference(result("test_loss_nats"), result("test_loss_nats")))(ln, peers)
    ln.write_probe("leak", {"options": {}, "summary": {"row_leak_eval": 0.25}})
    assert probe("leak", "row_leak_eval")(ln, peers) == 0.25
    assert Difference(result("test_running_loss_nats"), result("test_loss_nats"))(bn, peers) == pytest.approx(0.2)
    assert Log2(Reach("step", of="ln"))(ln, peers) == pytest.approx(math.log2(3))
    assert Log2(probe("leak", "row_leak_eval"))(ln, peers) == -2.0
    reads = (Tail("valid_loss_nats"), Reach("step", of="ln"), result("test_loss_nats"), probe("leak", "x"))
    for read in (*reads, Difference(reads[0], reads[2]), Difference(result("unigram_test_loss_nats"), reads[2])):
        assert math.isnan(read(broken, peers))
    for read in (Tail("x"), result("x"), probe("leak", "x"), probe("cost", "x")):
        with pytest.raises(InputError, match="has no"):
            read(ln, peers)


def test_what_a_reading_is_made_of_counts_as_read():
    """A probe is run, and another arm's record waited for, wherever they stand in it."""
    nested = Difference(Log2(probe("cost", "seconds_per_step")), Reach("step", of="none"))
    one = claim(measurements=(LOSS, Measurement("x", "1", True, nested)))
    assert [read.probe for read in one.probes] == ["cost"]
    assert not one.measurements[1].is_readable({})


def test_a_verdict_wants_all_its_rows():
    rows = [row(arm, seed, seed / 10) for arm in ("ln", "bn") for seed in (1, 2, 3, 4)]
    with pytest.raises(InputError, match=r"no test_loss_nats of ln in one at seeds \[5\]"):
        claim().judge(rows)


@pytest.mark.parametrize("claim_id", available_claims())
def test_each_argument_plans_its_runs(claim_id: str):
    found = load_claim(claim_id)
    for scale in found.scales():
        runs = found.tuning_runs(scale) + found.verdict_runs(scale, found.choose_rates([]))
        assert all(len(config_hash(run.config)) == 64 for run in runs)
        # The control has no norm at all where it is called none.
        controls = [run.config.model for run in runs if run.arm == "none"]
        assert all(model.norm == "none" for model in controls)
    if found.settings:
        assert "small" in found.scales()
        assert len(found.verdict_seeds) >= 5


def test_an_argument_is_found_by_id_prefix_section_or_all():
    ids = available_claims()
    assert [each.id for each in select_claims("all")] == list(ids)
    assert [each.id for each in select_claims("D2")] == ["d2_shared_statistics_fail"]
    assert [each.id for each in select_claims("d4_ln_solves_it")] == ["d4_ln_solves_it"]
    assert [each.id for each in select_claims("d")] == [name for name in ids if name.startswith("d")]
    for wrong in ("d99", "y", "d4_ln_solves"[:-1] + "x", ""):
        with pytest.raises(InputError):
            select_claims(wrong)


def test_tables_are_read_without_torch_in_no_time(tmp_path: Path):
    path = tmp_path / "z.csv"
    write_rows(path, [row("ln", seed, seed / 7) for seed in range(500)])
    code = (
        "import sys, normlab.claims, normlab.study.plan, normlab.study.showing; normlab.claims.select_claims('all')\n"
        "heavy = {'torch', 'pytorch_lightning', 'wandb', 'datasets', 'numpy', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    began = time.process_time()
    assert len(read_rows(path)) == 500
    assert time.process_time() - began < 0.1


def test_the_verdict_follows_the_numbers():
    def kind(ln: float, spread: float = 0.0) -> str:
        rows = [row("ln", seed, ln + spread * (-1) ** seed) for seed in range(1, 6)]
        rows += [row("bn", seed, 1.0 + seed / 1000) for seed in range(1, 6)]
        return claim().judge(rows).kind

    assert kind(0.9) == "supported"
    assert kind(1.1) == "refuted"
    assert kind(1.003) == "refuted", "shown to be the same within the margin"
    assert kind(0.99, spread=0.5) == "inconclusive"


@pytest.mark.parametrize(
    ("predicted", "kind"),
    [("worse", "supported"), ("better", "refuted"), ("same", "refuted"), ("not worse", "refuted")],
)
def test_a_number_may_be_the_control(predicted: Any, kind: str):
    one = claim(comparisons=(dataclasses.replace(COMPARISON, control=0.5, predicted=predicted),))
    rows = [row("ln", seed, 1.0 + seed / 1000) for seed in range(1, 6)]
    found = one.judge(rows)
    assert found.kind == kind
    (verdict,) = found.by_setting.values()
    assert abs(verdict.effect) == pytest.approx(0.503)
    # The control does not diverge with the arm.
    rows[0] = row("ln", 1, 3.0, diverged=True)
    (verdict,) = one.judge(rows).by_setting.values()
    assert [rate.diverged for rate in verdict.divergence] == [0, 1]
    assert abs(verdict.effect) == pytest.approx((3.0 + 4 * 1.0 + 0.014) / 5 - 0.5)


def test_settings_that_disagree_are_mixed():
    two = claim(settings={"one": SETTING, "two": SETTING})
    rows = [row("bn", seed, 1.0 + seed / 1000, setting=setting) for seed in range(1, 6) for setting in ("one", "two")]
    rows += [row("ln", seed, 0.5, setting="one") for seed in range(1, 6)]
    rows += [row("ln", seed, 1.5, setting="two") for seed in range(1, 6)]
    verdict = two.judge(rows)
    assert verdict.kind == "mixed"
    assert "refuted in two: ln against bn, test_loss_nats" in verdict.why


@pytest.mark.parametrize("value", [3.0, math.nan, math.inf])
def test_diverged_runs_count_in_the_verdict(value: float):
    rows = [row("ln", seed, 1.0 + seed / 1000) for seed in range(1, 6)]
    rows += [row("bn", seed, value if seed == 1 else 1.2, diverged=seed == 1) for seed in range(1, 6)]
    verdict = next(iter(claim().judge(rows).by_setting.values()))
    assert [rate.diverged for rate in verdict.divergence] == [1, 0]
    # In place of the run: what its row says, or the worst value there is.
    assert verdict.effect == pytest.approx(((value if value == 3.0 else 1.2) + 4 * 1.2) / 5 - 1.003)
    all_diverged = [row(arm, seed, math.nan, diverged=True) for arm in ("ln", "bn") for seed in range(1, 6)]
    assert claim().judge(all_diverged).kind == "inconclusive"
