"""What a study runs, in which order, and what it does when runs fail, are locked or are done already."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from study_bench import Bench
from tiny_study import DISCREPANCY, STEPS_TO_LN, TEST_LOSS, tiny_claim

from normlab.claims.rows import read_rows
from normlab.config import InputError
from normlab.execution import local
from normlab.execution.engine import Ended
from normlab.execution.jobs import JOB_FILE, Job
from normlab.execution.local import LocalWorkers
from normlab.records.record import RunRecord
from normlab.study.running import ATTEMPTS
from normlab.study.showing import list_claims, print_plan, study_console


def test_tuning_then_the_best_rate_for_the_verdict(bench: Bench):
    code, said = bench.run()
    study = bench.study()
    (claim,) = study.claims
    rows = read_rows(study.table(claim))
    assert code == 0
    assert [(row.phase, row.arm, row.learning_rate, row.seed) for row in rows] == [
        *(("tuning", arm, rate, 7) for arm in ("ln", "bn_step") for rate in (1e-3, 1e-2)),
        *(("verdict", arm, 1e-2, seed) for arm in ("ln", "bn_step") for seed in (1, 2)),
    ]
    assert [row.value for row in rows if row.arm == "bn_step" and row.phase == "verdict"] == [0.501, 0.502]
    assert claim.judge(rows).kind == "supported"
    assert {row.run_id for row in rows[:4]} >= set(bench.starts()[:2]), "tuning runs come first"
    assert "ln 0.01 (end of the sweep)" in said
    assert "z1_ln_is_better (small): supported: ln is 0.5 nats better than bn_step" in said
    assert (bench.runs / "starts").read_text().count(" 1\n") == 8, "one thread each"


def test_a_done_study_starts_nothing_and_writes_the_same(bench: Bench):
    bench.run()
    study = bench.study()
    table = study.table(study.claims[0])
    before = table.read_bytes()
    code, _ = bench.run()
    assert (code, len(bench.starts())) == (0, 8)
    assert table.read_bytes() == before


def test_arguments_share_runs(bench: Bench):
    other = tiny_claim(bench.text, "z2_steps", STEPS_TO_LN)
    code, _ = bench.run(tiny_claim(bench.text), other)
    assert (code, len(bench.starts())) == (0, 8)
    study = bench.study(other)
    values = {(row.arm, row.value) for row in read_rows(study.table(other)) if row.phase == "verdict"}
    # ln reaches its own best at its last validation; bn_step never does, and counts with its last step.
    assert values == {("ln", 2.0), ("bn_step", 2.0)}


def test_one_verdict_run_of_two_arguments_is_one_job_with_the_probes_of_both(bench: Bench):
    one = (1e-2,)
    study = bench.study(
        tiny_claim(bench.text, rates=one), tiny_claim(bench.text, "z2_discrepancy", DISCREPANCY, rates=one)
    )
    jobs = study.jobs([study.state(claim) for claim in study.claims])
    assert len(jobs) == 4
    assert [dict(job.probes) for job in jobs] == [{"discrepancy": {"batches": 2}}] * 4


def test_one_probe_of_one_run_with_two_sets_of_options_is_refused(bench: Bench):
    read = dataclasses.replace(DISCREPANCY.read, options=(("batches", 3),))
    other = dataclasses.replace(DISCREPANCY, read=read)
    with pytest.raises(InputError, match="different options"):
        bench.study(tiny_claim(bench.text, "z2_a", DISCREPANCY), tiny_claim(bench.text, "z3_b", other))


def test_a_failed_run_is_tried_once_more_then_reported_and_the_study_goes_on(bench: Bench):
    bench.order(bn_step="fail")
    code, said = bench.run()
    assert code == 1
    assert Counter(Counter(bench.starts()).values()) == {1: 4, 2: 2}  # ln: 2 + 2 runs; bn_step: 2 tuning runs, twice
    assert said.count("failed twice") == 2
    assert "the disk is full" in said
    assert "4 of 8 runs missing" in said
    study = bench.study()
    assert {row.arm for row in read_rows(study.table(study.claims[0]))} == {"ln"}


def test_what_failed_once_is_done_in_the_end(bench: Bench):
    bench.order(bn_step="fail once")
    code, said = bench.run()
    assert code == 0
    assert "failed twice" not in said
    assert len(bench.starts()) == 12


def test_a_killed_worker_takes_no_other_down(bench: Bench):
    bench.order(bn_step="die")
    _, said = bench.run()
    assert "killed by SIGKILL; out of memory?" in said
    assert sum("-ln-" in name for name in bench.starts()) == 4


def test_a_worker_that_leaves_nothing_has_failed(bench: Bench):
    bench.order(bn_step="nothing")
    code, said = bench.run()
    assert code == 1
    assert said.count("it left no result") == 2


class _Cluster(LocalWorkers):
    """As an engine that knows of a job of another study, which fails, and of machines that are taken away."""

    def __init__(self, folder: Path, foreign: Job, often: int) -> None:
        super().__init__(2, folder)
        self.foreign, self.often = foreign, often

    @property
    def jobs(self) -> list[Job]:
        return [*super().jobs, self.foreign]

    def ended(self) -> list[Ended]:
        over = super().ended()
        taken = [dataclasses.replace(each, again=True) for each in over if each.reason][: self.often]
        self.often -= len(taken)
        ids = {each.job.id for each in taken}
        return [Ended(self.foreign, "it failed"), *taken, *(each for each in over if each.job.id not in ids)]


def test_a_machine_that_is_taken_away_is_no_attempt_and_jobs_of_others_are_theirs(bench: Bench):
    (claim,) = bench.study(tiny_claim(bench.text, rates=(1e-2,), seeds=(1, 2))).claims
    bench.order(ln="fail")
    foreign = Job(dataclasses.replace(claim.settings["tiny"].base["small"], seed=99))
    code, said = bench.run(claim, engine=_Cluster(bench.runs / ".study", foreign, often=3))
    assert code == 1
    starts = Counter(job_id for job_id in bench.starts() if "-ln-" in job_id)
    assert sum(starts.values()) == 2 * ATTEMPTS + 3
    assert said.count("failed twice: ") == 2
    assert foreign.id not in said


class _FullQueue(LocalWorkers):
    """As an engine that jobs of others fill once so many of ours began."""

    left, looks = 4 * ATTEMPTS, 0

    @property
    def free(self) -> int:
        return min(super().free, self.left)

    def start(self, groups: Sequence[Sequence[Job]]) -> None:
        self.left -= len(groups)
        super().start(groups)

    def ended(self) -> list[Ended]:
        self.looks += not self.left and not self.jobs
        assert self.looks < 5, "it waits for room that nothing needs"
        return super().ended()


def test_a_study_with_nothing_left_to_try_does_not_wait_for_room(bench: Bench):
    bench.order(ln="fail", bn_step="fail")
    code, said = bench.run(engine=_FullQueue(2, bench.runs / ".study"))
    assert (code, len(bench.starts())) == (1, 4 * ATTEMPTS)
    assert said.count("failed twice") == 4


def test_a_diverged_run_counts_as_worst_and_stays(bench: Bench):
    bench.order(bn_step="diverge")
    code, _ = bench.run()
    assert code == 0
    study = bench.study()
    rows = [row for row in read_rows(study.table(study.claims[0])) if row.arm == "bn_step"]
    assert all(row.diverged for row in rows)
    assert {row.learning_rate for row in rows if row.phase == "verdict"} == {1e-3}, "a tie takes the smaller rate"
    assert [row.value for row in rows if row.phase == "verdict"] == [3.0, 3.0], "the loss of the unigram distribution"
    assert all(math.isnan(row.value) for row in rows if row.phase == "tuning")


def test_a_run_that_lacked_memory_beside_others_runs_again_beside_fewer(bench: Bench):
    bench.order(bn_step="no memory twice")
    code, said = bench.run(workers=4)
    assert code == 0, "the first of two failures was not its own"
    assert "failed twice" not in said
    assert "4 at once: 2 from now on, and it runs again" in said
    assert Counter(Counter(bench.starts()).values()) == {1: 6, 3: 2}


def test_a_run_of_another_process_is_left_to_it_and_waited_for(bench: Bench):
    study = bench.study()
    job = study.jobs([study.state(study.claims[0])])[0]
    theirs = RunRecord.create(job.config)
    theirs.start()
    result: list[tuple[int, str]] = []
    ours = threading.Thread(target=lambda: result.append(bench.run()))
    ours.start()
    while len(bench.starts()) < 5:  # 3 tuning runs and the verdict runs of the other arm
        assert ours.is_alive()
        time.sleep(0.05)
    theirs.release()  # as if it was killed: the run is anybody's again
    ours.join(240)
    assert result[0][0] == 0
    assert sorted(Counter(bench.starts()).values()) == [1] * 8


def test_rows_of_a_table_stand_for_records_that_are_elsewhere(bench: Bench):
    bench.run()
    study = bench.study()
    table = study.table(study.claims[0])
    before = table.read_bytes()
    shutil.rmtree(bench.runs)
    bench.runs.mkdir()
    code, _ = bench.run()
    assert (code, bench.starts()) == (0, [])
    assert table.read_bytes() == before
    # Without the row of one arm its pair is run anew, and nothing else.
    lines = before.decode().splitlines(keepends=True)
    table.write_text("".join(line for line in lines if "bn_step,2,verdict" not in line))
    code, _ = bench.run()
    assert code == 0
    assert sorted(name.rpartition("-")[0] for name in bench.starts()) == [
        "lstm-bn_step-tiny-s2",
        "lstm-ln-tiny-s2",
    ]
    assert len(read_rows(table)) == 8


def test_ctrl_c_stops_the_workers_and_keeps_what_there_is(bench: Bench, tiny_text: Path, tmp_path: Path):
    bench.order(bn_step="wait")
    code = (
        # A study begun in the background of a shell would ignore Ctrl-C.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys; from pathlib import Path; from rich.console import Console\n"
        "from tiny_study import local_workers, tiny_study\n"
        "from normlab.execution import local; from normlab.study.running import run_study\n"
        f"local.WORKER = {local.WORKER!r}\n"
        "study = tiny_study(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "try:\n    run_study(study, local_workers(2, Path(study.output.runs_dir)), Console())\n"
        "except KeyboardInterrupt:\n    sys.exit(130)\n"
    )
    folder = Path(__file__).parent
    study = subprocess.Popen(
        [sys.executable, "-c", code, str(tiny_text), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])},
        start_new_session=True,
    )
    # The waiting runs keep both workers once ln is done.
    while len(list(bench.runs.glob("*-bn_step-*/metrics.jsonl"))) < 2:
        assert study.poll() is None
        time.sleep(0.05)
    os.killpg(study.pid, signal.SIGINT)
    assert study.wait(240) == 130
    outcomes = [
        RunRecord.open(path.parent, bench.runs).outcome() for path in bench.runs.glob("*-bn_step-*/config.yaml")
    ]
    assert {outcome.state for outcome in outcomes} == {"interrupted"}
    assert "SIGTERM" in {outcome.reason for outcome in outcomes}, "it was asked to save"
    assert len(read_rows(bench.results / "small" / "z1_ln_is_better.csv")) == 2, "both runs of ln were done"


def test_a_plan_names_runs_and_knows_how_long_their_like_took(bench: Bench, capsys: pytest.CaptureFixture[str]):
    study = bench.study()
    print_plan(study, 2, study_console())
    said = capsys.readouterr().out
    assert said.count("z1_ln_is_better tuning tiny/") == 4
    assert "then 4 verdict runs" in said
    assert "about ?" in said
    assert bench.starts() == []
    bench.run()
    more = dataclasses.replace(tiny_claim(bench.text), verdict_seeds=(1, 2, 3, 4, 5))
    study = bench.study(more)
    list_claims([study], [], study_console())
    line = next(line for line in capsys.readouterr().out.splitlines() if "z1_ln_is_better" in line)
    assert line.split() == ["z1_ln_is_better", "measured", "small", "8", "6", "1", "s"]


def test_a_measurement_that_a_record_lacks_is_said_at_the_end(bench: Bench):
    lacking = dataclasses.replace(TEST_LOSS, name="z", read=dataclasses.replace(TEST_LOSS.read, names=("zzz",)))
    code, said = bench.run(tiny_claim(bench.text, measurement=lacking))
    assert said.count("has no zzz") == 2, "when the table could not be written, and at the end"
    assert code == 0


def test_runs_on_different_texts_are_not_compared(bench: Bench):
    bench.run()
    study = bench.study()
    (claim,) = study.claims
    records = [RunRecord.open(run.id, bench.runs) for run in study.state(claim).tuned]
    for record, text in zip(records, ("a", "a", None, "a"), strict=True):
        record.write_environment({**record.environment(), "data": {"sha256": text} if text else {}})
    assert bench.run()[0] == 0, "what an older record does not say is not held against it"
    records[3].write_environment({**records[3].environment(), "data": {"sha256": "b"}})
    said = f"compares {records[0].folder} and {records[3].folder}, but the text of .* changed between them; move away"
    with pytest.raises(InputError, match=said):
        bench.run()


@pytest.mark.parametrize("text", ["{}", '{"job_seconds": "long"}', '{"job_seconds": nan'])
def test_a_damaged_time_of_a_job_is_one_line(text: str, bench: Bench):
    bench.run()
    folder = next(path.parent for path in bench.runs.glob("*/outcome.json"))
    (folder / JOB_FILE).write_text(text)
    with pytest.raises(InputError, match=rf"{folder / JOB_FILE}.*(delete the file|is damaged)"):
        bench.run()
