"""What is asked of SLURM and what is said where there is none. No SLURM is needed: programs of its names stand in."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from normlab.__main__ import main
from normlab.config import InputError, RunConfig
from normlab.execution import slurm
from normlab.execution.engine import SlurmOptions
from normlab.execution.jobs import Job, write_job
from normlab.execution.slurm import BATCH_FILE, SlurmEngine

SECONDS = 240  # of a busy machine


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--slurm.partition gpu", "--slurm options need --where slurm, not --where local"),
        ("--where cluster", "where must be one of local, slurm, not 'cluster'"),
        ("--where slurm --slurm.time 2:00", "slurm.time is '2:00'; write 2:00:00 for hours, or minutes alone"),
        ("--where slurm --slurm.time soon", "slurm.time is 'soon'; it must be minutes, H:MM:SS, D-HH or D-HH:MM"),
        ("--where slurm --slurm.time 4", "slurm.time is '4'; it must be at least 5 minutes"),
        ("--where slurm --slurm.cpus 0", "slurm.cpus is 0; it must be at least 1"),
        ("--where slurm --slurm.max_queued 5000", "slurm.max_queued is 5000; it must be at most 1000"),
        ("--where slurm --slurm.partion gpu", "did you mean '--slurm.partition'?"),
        ("--where slurm --slurm.sbatch.partition gpu", "has a flag of its own: --slurm.partition"),
        ("--where slurm --slurm.sbatch.cpus-per-task 3", "has a flag of its own: --slurm.cpus"),
        ("--where slurm --slurm.sbatch.array 0-3", "slurm.sbatch.array is decided by the study; leave it out"),
        ("--where slurm --slurm.sbatch.Nice 3", "slurm.sbatch.Nice is no long option of sbatch"),
        ("--where slurm --slurm.sbatch.exclusive false", "slurm.sbatch.exclusive is False; it must be text"),
        ("--where slurm --slurm.setup module\nload", "slurm.setup is more than one line"),
    ],
)
def test_a_mistake_gets_one_line(flags: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "a2", *flags.split(" ")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("time", "minutes"), [("120", 120), ("2:00:00", 120), ("1-12", 2160), ("2-01:30", 2970), ("0:05:59", 5)]
)
def test_times_are_those_of_slurm(time: str, minutes: int) -> None:
    assert SlurmOptions(time=time).minutes == minutes


def test_a_file_holds_the_options_of_a_site(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("partition: gpu\ncpus: 4\nruns_per_job: 8\narray_parallelism: 3\nsbatch:\n  reservation: ours\n")
    arguments = ["study", "d2", "--where", "slurm", "--slurm", str(site), "--runs_dir", str(tmp_path), "--dry-run"]
    assert main(arguments) == 0
    assert "with 12 workers" in capsys.readouterr().out
    assert main([*arguments, "--slurm.cpus", "2"]) == 0
    assert "with 6 workers" in capsys.readouterr().out
    site.write_text("sbatch:\n  1: 2\n")
    assert main(arguments) == 2
    assert capsys.readouterr().err == "normlab: error: slurm.sbatch.1 is no long option of sbatch; leave it out\n"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc, as SLURM does")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_to_all_processes_of_a_task_ends_it_after_its_runs_have_saved(
    number: signal.Signals, slow_site: Path, tiny_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """SIGTERM is preemption or scancel, SIGUSR2 the end of the time; what lives when the task ends, SLURM kills."""
    folder = tmp_path / "runs" / ".study"
    (batch := folder / "slurm" / "normlab-0").mkdir(parents=True)
    jobs = [Job(tiny_run(seed=seed)) for seed in (1, 2)]
    for job in jobs:
        write_job(folder / f"{job.id}.yaml", job)
    (batch / BATCH_FILE).write_text(
        json.dumps({"tasks": [[[job.id] for job in jobs]], "workers": 2, "runs_per_gpu": 0})
    )
    mark = f"MARK={tmp_path}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(slow_site), *sys.path]), "MARK": str(tmp_path)}
    script = f"from normlab.execution.slurm import ArrayTask; ArrayTask()({str(batch)!r}, 0)"
    task = subprocess.Popen([sys.executable, "-c", script], env={**environment, "SLURM_NTASKS": "1"})
    try:
        deadline = time.monotonic() + SECONDS
        while not all(job.record.metrics() for job in jobs):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for place in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if place.name.isdigit() and mark.encode() in (place / "environ").read_bytes().split(b"\0"):
                    os.kill(int(place.name), number)
        assert task.wait(SECONDS) == 143
        assert [job.record.outcome().reason for job in jobs] == ["SIGTERM"] * 2
    finally:
        task.kill()
    assert not (batch / "0.ended.jsonl").exists(), "it has not ended: the task comes back for it"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Writes a program of that name, in the only folder of PATH: a script of sh."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(slurm, "LOOK_SECONDS", 0.0)

    def write(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return write


def test_where_there_is_no_slurm_one_line_says_so(programs: Callable[[str, str], None], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--where slurm needs sbatch, which is not here"):
        SlurmEngine(tmp_path, SlurmOptions()).__enter__()


def test_without_submitit_one_line_says_so(
    programs: Callable[[str, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tool in slurm.TOOLS:
        programs(tool, "exit 1")
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InputError, match="--where slurm needs submitit: pip install"):
        SlurmEngine(tmp_path, SlurmOptions()).__enter__()


def test_a_disk_without_locks_is_refused(
    programs: Callable[[str, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tool in slurm.TOOLS:
        programs(tool, "exit 1")
    monkeypatch.setattr(slurm, "has_locks", lambda folder: False)
    with pytest.raises(InputError, match=r"is on a disk without locks .flock., .*give --runs_dir a place on another"):
        SlurmEngine(tmp_path / "runs" / ".study", SlurmOptions()).__enter__()


def test_a_controller_that_does_not_answer_loses_nothing(
    programs: Callable[[str, str], None],
    tiny_run: Callable[..., RunConfig],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Neither at the start, nor while jobs are under way, nor when they are sent: those are sent again, once."""
    silent = 'echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1'
    folder, sent = tmp_path / "runs" / ".study", tmp_path / "sent"
    listed = f"""[ -e {tmp_path}/up ] || {{ {silent}; }}
[ ! -e {sent} ] || echo "$(cat {sent})|N/A|7|None" """
    # A fourth look finds the controller: it is back when it was asked three times.
    programs(
        "squeue", f"echo x >> {tmp_path}/asked; [ $(wc -l < {tmp_path}/asked) -ne 4 ] || : > {tmp_path}/up\n{listed}"
    )
    programs("sbatch", silent.replace("slurm_load_jobs error", "sbatch: error: Batch job submission failed"))
    for tool in ("srun", "scontrol", "scancel"):
        programs(tool, "exit 1")
    os.environ["PATH"] += ":/usr/bin:/bin"
    job = Job(tiny_run())
    with SlurmEngine(folder, SlurmOptions(mem="2G", sbatch={"nice": 7, "exclusive": True})) as engine:
        said = capsys.readouterr().err
        assert said.count("SLURM does not answer (slurm_load_jobs error: Unable to contact") == 1
        assert said.count("SLURM answers again") == 1
        engine.start([[job]])
        for _ in range(5):
            assert engine.ended() == []
        assert [each.id for each in engine.jobs] == [job.id]
        (batch,) = (folder / "slurm").glob("normlab-*")
        # The controller gets the job, and goes down before it says so.
        timed_out = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
        programs("sbatch", f'echo {batch.name} > {sent}; cat "$1" > {tmp_path}/script; echo "{timed_out}" >&2; exit 1')
        assert engine.ended() == []
        assert sent.exists()
        (tmp_path / "up").unlink()
        programs("sbatch", f"echo again > {tmp_path}/twice")
        for _ in range(5):
            assert engine.ended() == []
        (tmp_path / "up").touch()
        for _ in range(5):
            assert engine.ended() == []
        assert not (tmp_path / "twice").exists()
        sent.unlink()
        assert engine.ended() == [], "it may be on its way back into the queue"
        (over,) = engine.ended()
        assert over.reason.startswith("SLURM job 7: left the queue without a result")
        assert engine.jobs == []
    script = (tmp_path / "script").read_text()
    for line in ("--nice=7", "--exclusive", "--mem=2G", "--time=60", "--requeue", f"--job-name={batch.name}"):
        assert f"#SBATCH {line}\n" in script
    assert "--partition" not in script


def test_no_more_is_sent_than_asked_for(
    programs: Callable[[str, str], None], tiny_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Two jobs at once over all arrays, and five runs in the queue."""
    folder = tmp_path / "runs" / ".study"
    for tool in slurm.TOOLS:
        programs(tool, "exit 1")
    programs(
        "squeue", f'cd {folder}/slurm; for name in normlab-*; do for i in 0 1 2; do echo "$name|$i|7|None"; done; done'
    )
    programs("sbatch", f'cat "$1" > {tmp_path}/script; echo "Submitted batch job 7"')
    programs("srun", "exit 1")
    os.environ["PATH"] += ":/usr/bin:/bin"
    jobs = [Job(tiny_run(seed=seed)) for seed in range(5)]
    with SlurmEngine(folder, SlurmOptions(array_parallelism=2, max_queued=5)) as engine:
        assert engine.free == 5
        engine.start([[job] for job in jobs[:3]])
        assert "#SBATCH --array=0-2%2\n" in (tmp_path / "script").read_text()
        assert engine.free == 0
        (batch,) = (folder / "slurm").glob("normlab-*")
        for index in (0, 1):
            row = {"id": jobs[index].id, "reason": "", "again": False}
            (batch / f"{index}.ended.jsonl").write_text(json.dumps(row) + "\n")
        assert [over.job for over in engine.ended()] == jobs[:2]
        assert engine.free == 4
        engine.start([[job] for job in jobs[3:]])
        assert "#SBATCH --array=0-1%1\n" in (tmp_path / "script").read_text()
        assert engine.free == 0


def test_a_job_that_waits_for_ever_is_said_once(
    programs: Callable[[str, str], None],
    tiny_run: Callable[..., RunConfig],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "runs" / ".study"
    programs(
        "squeue", f'cd {folder}/slurm; for name in normlab-*; do echo "$name|N/A|7|launch failed requeued held"; done'
    )
    programs("sbatch", 'echo "Submitted batch job 7"')
    for tool in ("srun", "scontrol", "scancel"):
        programs(tool, "exit 1")
    with SlurmEngine(folder, SlurmOptions()) as engine:
        engine.start([[Job(tiny_run())]])
        assert engine.ended() == engine.ended() == []
    said = capsys.readouterr().err
    assert said.count("SLURM job 7 waits (launch failed requeued held): scontrol release 7, or scancel 7") == 1
