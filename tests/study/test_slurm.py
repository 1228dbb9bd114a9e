"""Studies on a SLURM of one node, which `scripts/slurm_local.sh` starts; test_slurm_options.py needs none."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from slow_worker import STEPS
from tiny_study import tiny_claim

from normlab.config import InputError, OutputConfig, RunConfig
from normlab.execution import slurm
from normlab.execution.engine import Ended, SlurmOptions
from normlab.execution.jobs import Job
from normlab.execution.slurm import SlurmEngine
from normlab.records.record import RunRecord, record_ids
from normlab.study.plan import Study
from normlab.study.running import run_study
from normlab.training.run import train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("sbatch") is None or shutil.which("munged", path=f"{os.environ['PATH']}:/usr/sbin") is None,
        reason="SLURM is not installed (Debian, Ubuntu: apt install --no-install-recommends slurm-wlm munge)",
    ),
]

SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm_local.sh"
SECONDS = 240  # of a busy machine
KEY = "a-key-that-nobody-may-find"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Callable[[str], None]]:
    """Runs a verb of the script; its SLURM is started, and ended after the module's tests."""
    folder = tempfile.mkdtemp(prefix="normlab-slurm-")  # a short path: sockets are in it

    def script(verb: str) -> None:
        done = subprocess.run([SCRIPT, verb, folder], capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, done.stderr

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", f"{folder}/slurm.conf")
        try:
            script("start")
            yield script
        finally:
            script("stop")


@pytest.fixture
def slow(slow_site: Path) -> SlurmOptions:
    """Options with which the workers of SLURM jobs are `slow_worker.py`."""
    return SlurmOptions(partition="test", cpus=2, runs_per_job=2, setup=f"export PYTHONPATH={slow_site}:$PYTHONPATH")


@pytest.fixture(autouse=True)
def surroundings(cluster: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "LOOK_SECONDS", 0.3)
    monkeypatch.setattr(slurm, "QUIET_SECONDS", 0.5)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("SBATCH_PARTITION", "nowhere")
    monkeypatch.setenv("SBATCH_JOB_NAME", "another")
    monkeypatch.setenv("SQUEUE_STATES", "SUSPENDED")


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def records(runs: Path) -> list[RunRecord]:
    return [RunRecord.open(name, runs) for name in record_ids(runs)]


def restarted(number: str) -> list[int]:
    """Tasks of an array that SLURM put back into the queue."""
    shown = subprocess.run(["scontrol", "show", "job", "-o", number], capture_output=True, text=True, check=True).stdout
    tasks = [dict(part.split("=", 1) for part in line.split() if "=" in part) for line in shown.splitlines()]
    return [int(task["ArrayTaskId"]) for task in tasks if task["Restarts"] != "0"]


def ended(engine: SlurmEngine, jobs: int) -> list[Ended]:
    over: list[Ended] = []
    wait_for(lambda: over.extend(engine.ended()) or len(over) >= jobs)
    return over


def test_whatever_happens_every_run_ends_once(
    cluster: Callable[[str], None], slow: SlurmOptions, tiny_text: Path, tmp_path: Path
) -> None:
    """Eight runs in four jobs: one preempted, one cancelled, a worker of a third killed; the controller restarts."""
    runs = tmp_path / "runs"
    claim = tiny_claim(tiny_text, rates=(1e-2,), seeds=(1, 2, 3, 4))
    said = StringIO()
    codes: list[int] = []

    def study() -> None:
        plan = Study(
            [claim], "small", OutputConfig(runs_dir=str(runs), wandb="off", progress=False), tmp_path / "results"
        )
        codes.append(run_study(plan, SlurmEngine(runs / ".study", slow), Console(file=said, width=200)))

    thread = threading.Thread(target=study)
    thread.start()
    try:
        wait_for(lambda: [len(record.metrics()) for record in records(runs)] == [STEPS // 2] * 8)
        (batch,) = (runs / ".study" / "slurm").glob("normlab-*")
        (script,) = batch.glob("*_submission.sh")
        number = script.name.split("_")[0]
        tasks = [[job_id for group in task for job_id in group] for task in slurm._read_batch(batch)["tasks"]]
        urgent = ["sbatch", "--partition=urgent", "--cpus-per-task=2", "--output=/dev/null", "--wrap=true"]
        subprocess.run(urgent, check=True)
        wait_for(lambda: restarted(number))
        (index,) = restarted(number)
        preempted = tasks[index]
        (first, cancelled), (_, (killed, _)), *_ = ((i, task) for i, task in enumerate(tasks) if i != index)
        subprocess.run(["scancel", f"{number}_{first}"], check=True)
        os.kill(RunRecord.open(killed, runs).outcome().pid, signal.SIGKILL)
        cluster("restart-controller")
        (runs / "go").touch()
        thread.join(SECONDS)
    finally:
        subprocess.run(["scancel", "--me"], check=True)
        thread.join(10)
    output = said.getvalue()
    assert codes == [0], output
    assert [record.outcome().state for record in records(runs)] == ["finished"] * 8
    for record in records(runs):
        assert [row["step"] for row in record.metrics()] == list(range(1, STEPS + 1)), (
            "each step once: none from 0 again"
        )
    starts = [line.split() for line in (runs / "starts").read_text().splitlines()]
    assert Counter(job_id for job_id, why in starts if why == "never") == Counter(
        {record.id: 1 for record in records(runs)}
    )
    again = Counter((job_id, why) for job_id, why in starts if why != "never")
    saved = Counter((job_id, "SIGTERM") for job_id in [*cancelled, *preempted])
    assert again == saved + Counter([(killed, "killed")])
    for job_id in cancelled:
        assert f"{job_id}: SLURM job {number}_{first}: CANCELLED" in output
    assert f"{killed}: killed by SIGKILL" in output
    assert not any(job_id in line and "SLURM" in line for job_id in preempted for line in output.splitlines())
    # The runs are there: nothing is sent.
    before = sorted((runs / ".study" / "slurm").iterdir())
    study()
    assert codes == [0, 0]
    assert sorted((runs / ".study" / "slurm").iterdir()) == before
    found = [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert not found


def test_the_next_study_finds_what_is_in_the_queue(
    slow: SlurmOptions, tiny_run: Callable[..., RunConfig], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / ".study"
    jobs = [Job(tiny_run(seed=seed)) for seed in range(3)]
    one_at_once = dataclasses.replace(slow, array_parallelism=1)
    with SlurmEngine(folder, one_at_once) as first:
        assert (first.jobs, first.free) == ([], 500)
        first.start([[job] for job in jobs])
        assert [job.id for job in first.jobs] == [job.id for job in jobs]
        assert first.free == 0
        wait_for(lambda: any(record.metrics() for record in records(tmp_path / "runs")))
    hint = capfd.readouterr().err
    assert "3 runs stay in SLURM's queue or at work; the same command goes on with them, scancel " in hint
    with SlurmEngine(folder, one_at_once) as second:
        assert [job.id for job in second.jobs] == [job.id for job in jobs]
        assert second.free == 0
        subprocess.run([*hint[hint.index("scancel") :].split()[:2], "--state=PENDING"], check=True)
        (tmp_path / "runs" / "go").touch()
        over = {each.job.id: each.reason for each in ended(second, 3)}
        assert second.jobs == []
    assert [bool(over[job.id]) for job in jobs] == [False, False, True]
    assert "CANCELLED" in over[jobs[2].id]
    starts = [line.split()[0] for line in (tmp_path / "runs" / "starts").read_text().splitlines()]
    assert sorted(starts) == sorted(job.id for job in jobs[:2])
    assert "scancel" not in capfd.readouterr().err
    with SlurmEngine(folder, one_at_once) as third:
        assert third.jobs == []


def test_a_job_whose_python_dies_says_where_it_did(
    slow: SlurmOptions, tiny_run: Callable[..., RunConfig], tmp_path: Path
):
    broken = dataclasses.replace(slow, setup="export PYTHONHOME=/nowhere")
    with SlurmEngine(tmp_path / "runs" / ".study", broken) as engine:
        engine.start([[Job(tiny_run())]])
        (over,) = ended(engine, 1)
    assert not over.again
    state, code, log = over.reason.split(", ")
    assert (state.split()[-1], code) == ("FAILED", "exit code 1:0")
    assert "No module named 'encodings'" in Path(log.removeprefix("its log: ")).read_text()


def test_what_slurm_does_not_take_is_said_in_its_words(
    slow: SlurmOptions, tiny_run: Callable[..., RunConfig], tmp_path: Path
):
    with SlurmEngine(tmp_path / ".study", dataclasses.replace(slow, partition="gpu")) as engine:
        with pytest.raises(InputError, match=r"SLURM does not take the jobs: .*Invalid partition name") as error:
            engine.start([[Job(tiny_run())]])
        assert "\n" not in str(error.value)
        assert engine.jobs == []


def test_a_run_whose_time_is_up_goes_on_in_the_next_job(tiny_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    """The real worker: to the same numbers as a run that nothing stopped."""
    runs = tmp_path / "runs"
    job = Job(tiny_run(training__steps=600, training__valid_every=200))
    with SlurmEngine(runs / ".study", SlurmOptions(partition="test")) as engine:
        engine.start([[job]])
        wait_for(job.record.metrics)
        (batch,) = engine._batches.values()
        subprocess.run(["scancel", "--signal=USR2", batch.number], check=True)
        wait_for(lambda: job.record.outcome().reason == "SIGTERM")
        stopped = job.record.outcome().step
        assert [each.reason for each in ended(engine, 1)] == [""]
    assert 0 < stopped < 600
    assert f"going on from step {stopped} of" in engine.log(job).read_text()
    output = dataclasses.replace(job.config.output, runs_dir=str(tmp_path / "twin"))
    twin = train(dataclasses.replace(job.config, output=output))
    losses = [
        [(row["step"], row["valid_loss_nats"]) for row in record.metrics() if "valid_loss_nats" in row]
        for record in (job.record, twin)
    ]
    assert losses[0] == losses[1]
    results = [record.outcome().results for record in (job.record, twin)]
    assert results[0]["test_loss_nats"] == results[1]["test_loss_nats"]
