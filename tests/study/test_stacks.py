"""Which runs a study offers as one stack, and what becomes of them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_study import DISCREPANCY, TEST_LOSS, tiny_claim, variance

from normlab.claims import available_claims, load_claim
from normlab.claims.measurements import TIMED_PROBES, Measurement, Reach, probe, result
from normlab.config import OutputConfig, available_probes
from normlab.execution import worker
from normlab.execution.engine import Ended
from normlab.execution.jobs import Job, read_job, write_job
from normlab.records.record import Outcome, RunRecord
from normlab.study import running
from normlab.study.plan import Study
from normlab.study.running import run_study
from normlab.training.stackable import Gains, write_gains

SEEDS = tuple(range(11, 19))
SECONDS = Measurement("seconds_to_ln", "seconds", True, Reach("seconds", of="ln"))


class Engine:
    """Notes the groups that it is given, and does at once what `work` says: all jobs of a group, or the first."""

    def __init__(self, size: int, first_alone: bool = False) -> None:
        self.size, self.first_alone = size, first_alone
        self.groups: list[list[Job]] = []
        self.jobs: list[Job] = []

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None: ...

    @property
    def free(self) -> int:
        return 0 if self.jobs else self.size

    def start(self, groups: Sequence[Sequence[Job]]) -> None:
        for group in groups:
            self.groups.append(list(group))
            self.jobs += group
            for job in group[: 1 if self.first_alone else None]:
                record = RunRecord.create(job.config)
                loss = job.config.optim.lr + job.config.seed / 1000
                record.log(2, 0.2, {"valid_loss_nats": loss, "train_loss_nats": loss})
                record.finish(Outcome("finished", "", 2, 0.2, {"valid_loss_nats": loss, "test_loss_nats": loss}))

    def ended(self) -> list[Ended]:
        over, self.jobs = [Ended(job, "") for job in self.jobs], []
        return over

    def log(self, job: Job) -> Path:
        return Path(f"{job.id}.log")

    def stop(self) -> None: ...


@pytest.fixture
def study(tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """Two arms, each with 8 runs of one rate."""
    monkeypatch.setattr(running, "POLL_SECONDS", 0.0)
    claim = tiny_claim(tiny_text, rates=(1e-2,), seeds=SEEDS)
    output = OutputConfig(runs_dir=str(tmp_path / "runs"), wandb="off", progress=False)
    return Study([claim], "small", output, tmp_path / "results")


def sizes(engine: Engine) -> list[int]:
    return [len(group) for group in engine.groups]


def run(study: Study, engine: Any, stack: int) -> str:
    said = StringIO()
    assert run_study(study, engine, Console(file=said, width=200), stack) == 0, said.getvalue()
    return said.getvalue()


def test_runs_of_one_arm_are_offered_together_and_no_worker_goes_without(study: Study):
    engine = Engine(4)
    run(study, engine, 0)
    assert sizes(engine) == [4, 4, 4, 4]
    for group in engine.groups:
        assert len({job.config.model.norm for job in group}) == 1
        assert {job.stack for job in group} == {"if faster"}


@pytest.mark.parametrize(("stack", "expected", "how"), [(1, [1] * 16, "never"), (3, [3, 3, 3, 3, 2, 2], "always")])
def test_the_user_says_how_many(study: Study, stack: int, expected: list[int], how: str):
    engine = Engine(2)
    run(study, engine, stack)
    assert sizes(engine) == expected
    assert {job.stack for group in engine.groups for job in group} == {how}


def test_what_is_known_to_be_slower_is_not_offered(study: Study):
    (state,) = [study.state(claim) for claim in study.claims]
    configs = {run.config.model.norm: run.config for run in state.runs}
    here = dataclasses.replace(configs["ln"], output=study.output)
    write_gains(here, Gains("here", {8: 1.01}))
    engine = Engine(2)
    run(study, engine, 0)
    assert sorted((group[0].config.model.norm, len(group)) for group in engine.groups) == [
        ("bn_step", 8),
        *[("ln", 1)] * 8,
    ]


def test_jobs_that_a_worker_leaves_since_a_stack_is_slower_have_not_failed(study: Study):
    class Measures(Engine):
        def start(self, groups: Sequence[Sequence[Job]]) -> None:
            for group in groups:
                write_gains(group[0].config, Gains("here", {8: 0.5}))
            super().start(groups)

    engine = Measures(2, first_alone=True)
    said = run(study, engine, 0)
    assert sizes(engine) == [8, 8, *[1] * 14]
    assert len(said.splitlines()) == 17, "a line per run, none for what was left, and the summary"


def test_what_failed_in_a_group_is_tried_alone(study: Study):
    """A worker that is killed, or ends with an error in one run, takes all runs of its group with it."""

    class Dies(Engine):
        def start(self, groups: Sequence[Sequence[Job]]) -> None:
            whole = [group for group in groups if len(group) > 1]
            super().start([group for group in groups if len(group) == 1])
            self.groups += [list(group) for group in whole]
            self.jobs += [job for group in whole for job in group]

    engine = Dies(2)
    run(study, engine, 4)
    assert sizes(engine) == [4, 4, *[1] * 8] * 2


def test_a_claim_about_seconds_has_its_runs_trained_alone(tiny_text: Path, tmp_path: Path, study: Study):
    output = study.output
    timed = tiny_claim(tiny_text, "z9_seconds", SECONDS, (1e-2,), SEEDS)
    run(study, Engine(2), 0)
    both = Study([*study.claims, timed], "small", output, tmp_path / "results")
    assert both.state(timed).ready == [], "runs that were trained alone will do"
    for path in Path(output.runs_dir).glob("*-s1[34]-*/config.yaml"):
        RunRecord.open(path.parent).write_environment({"stacked": {"runs": 8}})
    both = Study([*study.claims, timed], "small", output, tmp_path / "results")
    assert [found.config.seed for found in both.state(timed).ready] == [13, 14, 13, 14]
    assert both.state(study.claims[0]).ready == []
    assert [(job.alone, job.is_trained()) for job in both.jobs([both.state(timed)])] == [(True, False)] * 4
    engine = Engine(1)
    running._Runner(both, Console(file=StringIO()), 0)._fill(engine, [both.state(claim) for claim in both.claims])
    assert [(job.config.seed, job.alone, job.stack) for job in engine.jobs] == [(13, True, "never")]


def test_what_reads_time_is_known():
    assert SECONDS.is_timed
    assert Measurement("speed", "1/s", False, result("tokens_per_second")).is_timed
    assert Measurement("bytes", "bytes", True, probe("cost", "peak_bytes")).is_timed
    assert not any(m.is_timed for m in (TEST_LOSS, DISCREPANCY, variance()))
    from normlab.probes.base import probe_class

    assert {name for name in available_probes() if probe_class(name).timed} == TIMED_PROBES
    timed = {name for name in available_claims() if load_claim(name).is_timed}
    assert timed == {"d5_ln_speeds_up_lstm", "d6_bn_step_is_costly"}


@pytest.mark.parametrize("gain", [2.0, 0.5])
def test_a_worker_stacks_its_group_if_that_is_faster(
    tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gain: float
):
    from normlab.training import stacked_gain

    monkeypatch.setattr(stacked_gain, "measure_gain", lambda configs: gain)
    jobs = [Job(dataclasses.replace(tiny_run(model="mlp"), seed=seed), stack="if faster") for seed in (1, 2)]
    paths = [tmp_path / f"{job.id}.yaml" for job in jobs]
    for path, job in zip(paths, jobs, strict=True):
        write_job(path, job)
        assert read_job(path) == job
    monkeypatch.setattr(sys, "argv", ["worker", *map(str, paths)])
    assert worker.main() == 0
    stacked = ["stacked" in job.record.environment() for job in jobs]
    assert (stacked, [job.is_done() for job in jobs]) == (
        ([True, True], [True, True]) if gain > 1 else ([False, False], [True, False])
    )
    if gain > 1:
        alone = dataclasses.replace(jobs[0], alone=True, stack="never")
        assert not alone.is_done()
        assert worker.perform(alone)
        assert alone.is_done()
        assert (jobs[0].record.folder.with_name(jobs[0].id + ".1") / "config.yaml").exists()
        assert worker.perform(alone), "and not once more"
        assert not jobs[0].record.folder.with_name(jobs[0].id + ".2").exists()
