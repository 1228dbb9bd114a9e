"""What `python -m normlab status` says of records in every state, while they change."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from normlab.__main__ import main
from normlab.config import InputError, RunConfig
from normlab.records.disk import last_rows
from normlab.records.lock import FolderLock
from normlab.records.notice import NoticeBoard, PlannedJob, StudyNotice, studies_under_way
from normlab.records.progress import RunsFolder, RunStatus, progress
from normlab.records.record import Outcome, RunRecord
from normlab.records.status import Wanted, are_mirrored, show_status, status_view, watch_status

Build = Callable[..., RunConfig]
LOSSES: dict[str, float | int | str] = {"train_loss_nats": 1.5, "valid_loss_nats": 1.625, "test_loss_nats": 1.75}


@pytest.fixture
def record(tiny_run: Build) -> Callable[..., RunRecord]:
    """A record of ten steps of which some are done, in a second each; it says it is running."""

    def build(steps: int = 0, **changes: object) -> RunRecord:
        made = RunRecord.create(tiny_run(**changes))
        made.start()
        for step in range(1, steps + 1):
            made.log(step, float(step), {"train_loss_nats": 3 - step / 10})
        return made

    return build


def look(record: RunRecord) -> RunStatus:
    statuses, _ = RunsFolder(record.folder.parent).look()
    return next(status for status in statuses if status.id == record.id)


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def printed(runs: Path, wanted: Wanted | None = None, **console: object) -> str:
    said = StringIO()
    settings: dict = {"width": 10_000, **console}
    show_status(runs, wanted or Wanted(), Console(file=said, **settings))
    return said.getvalue()


def test_the_last_rows_are_those_of_the_whole_file(tmp_path: Path):
    draw = random.Random(3)
    path = tmp_path / "metrics.jsonl"
    assert list(last_rows(path)) == []
    rows = []
    with path.open("w") as file:
        for number in range(60):
            # Shorter and longer than what is read at a time.
            rows.append({"step": number, "seconds": 0.5, "much": "x" * draw.choice((0, 50, 4000, 9000))})
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
            assert next(last_rows(path)) == rows[-1]
    assert list(last_rows(path)) == rows[::-1]
    with path.open("a") as file:
        file.write('{"step": 60, "sec' + "x" * 5000)
    assert list(last_rows(path)) == rows[::-1], "a torn row"
    path.write_text('{"step": 1')
    assert list(last_rows(path)) == []
    path.write_text("")
    assert list(last_rows(path)) == []
    path.write_text('{"step": 1}\n')
    with pytest.raises(InputError, match="lacks numbers step and seconds"):
        next(last_rows(path))


def test_no_more_than_the_end_of_a_curve_is_read(record: Callable[..., RunRecord]):
    run = record()
    path = run.folder / "metrics.jsonl"
    rows = [{"step": step, "seconds": step, "train_loss_nats": 1.0, "valid_loss_nats": 2.0} for step in range(1000)]
    path.write_text("not JSON\n" + "".join(json.dumps(row) + "\n" for row in rows))
    assert progress(run.folder).step == 999
    assert look(run).step == run.outcome().step == 999


def test_a_run_from_its_plan_to_its_end(record: Callable[..., RunRecord], tiny_run: Build):
    planned = RunRecord.create(tiny_run())
    assert (look(planned).state, look(planned).note) == ("waiting", "it never started")
    run = record()
    first = look(run)
    assert (first.state, first.note, first.step, first.steps) == ("running", "starting", 0, 10)
    assert (first.norm, first.model, first.seed, first.learning_rate) == ("ln", "lstm", 1, 0.002)
    assert first.corpus == Path(run.config.data.corpus).name
    assert first.seconds_left is None
    run.log(1, 1.0, {"train_loss_nats": 3.0})
    run.log(2, 3.0, {"train_loss_nats": 2.0})
    run.log(2, 3.0, {"valid_loss_nats": 2.5})
    status = look(run)
    assert (status.state, status.step, status.losses_nats) == ("running", 2, {"train": 2.0, "valid": 2.5})
    assert status.seconds_left == pytest.approx(8 * 2.0, abs=1.0), "two seconds a step"
    run.log(10, 20.0, {"train_loss_nats": 1.0})
    assert (look(run).state, look(run).note, look(run).seconds_left) == ("running", "last evaluation", None)
    run.finish(Outcome("finished", "", 10, 20.0, LOSSES))
    status = look(run)
    assert (status.state, status.step, status.seconds_left) == ("finished", 10, None)
    assert status.losses_nats == {"train": 1.5, "valid": 1.625, "test": 1.75}, "of the weights kept"


def test_validations_count_in_the_time_left(record: Callable[..., RunRecord]):
    run = record(5)
    run.write_environment({})
    age(run.folder / "environment.json", 50)
    assert look(run).seconds_left == pytest.approx(5 * 10, rel=0.2), "ten seconds a step by the clock, one of training"
    age(run.folder / "environment.json", 1)
    assert look(run).seconds_left == pytest.approx(5 * 1, abs=1.5), "one that went on from a checkpoint"


def test_how_runs_end(record: Callable[..., RunRecord]):
    ends = {
        "finished": Outcome("finished", "stopped early: no better", 4, 4.0, LOSSES),
        "diverged": Outcome("diverged", "training loss is nan", 4, 4.0),
        "interrupted": Outcome("interrupted", "SIGTERM", 4, 4.0),
        "failed": Outcome("failed", "OSError: the disk\nis full", 4, 4.0),
    }
    for seed, (state, outcome) in enumerate(ends.items()):
        run = record(4, seed=seed)
        run.finish(outcome)
        status = look(run)
        assert (status.state, status.note, status.step) == (state, " ".join(outcome.reason.split()), 4)
        assert status.losses_nats["train"] == (1.5 if state == "finished" else 2.6)


@pytest.mark.slow
def test_a_killed_process_leaves_an_interrupted_run(record: Callable[..., RunRecord]):
    run = record(3)
    run.release()
    code = (
        "import sys, time; from normlab.records.record import RunRecord; record = RunRecord.open(sys.argv[1]); "
        "record.start(); print('on', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(run.folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "on\n"
    assert (look(run).state, look(run).step) == ("running", 3)
    process.kill()
    process.communicate()
    assert look(run).state == "interrupted"
    assert look(run).note.startswith("killed, or on another machine"), "just now: who knows"
    age(run.folder / "metrics.jsonl", 600)
    age(run.folder / "outcome.json", 600)
    assert (look(run).state, look(run).note) == ("interrupted", "killed")


def test_an_end_between_the_looks_at_outcome_and_lock(record: Callable[..., RunRecord], monkeypatch):
    """Else a run that just finished would be shown as killed."""
    run = record(10)
    seen = RunRecord(run.folder, run.config)

    def ends_now(lock: FolderLock) -> bool:
        run.finish(Outcome("finished", "", 10, 10.0, LOSSES))
        return False

    monkeypatch.setattr(FolderLock, "is_held_by_anyone", ends_now)
    assert seen.outcome().state == "finished"


def test_a_silent_run_says_so(record: Callable[..., RunRecord]):
    run = record(3)
    age(run.folder / "outcome.json", 1000)
    age(run.folder / "metrics.jsonl", 60)
    assert (look(run).note, round(look(run).silent_seconds or 0)) == ("", 60)
    age(run.folder / "metrics.jsonl", 600)
    status = look(run)
    assert (status.state, status.note, status.seconds_left) == ("running", "silent", None)
    assert "10 min" in printed(run.folder.parent)


def test_rows_without_a_lock_come_from_another_machine(record: Callable[..., RunRecord]):
    run = record(3)
    run.release()
    folder = RunsFolder(run.folder.parent)
    age(run.folder / "outcome.json", 100)
    age(run.folder / "metrics.jsonl", 100)
    assert [status.state for status in folder.look()[0]] == ["interrupted"]
    run.log(4, 4.0, {"train_loss_nats": 2.0})
    (status,) = folder.look()[0]
    assert (status.state, status.note, status.step) == ("running", "on another machine", 4)
    assert [one.state for one in RunsFolder(run.folder.parent).look()[0]] == ["interrupted"], "it takes two looks"


def test_rows_written_under_a_lock_are_no_sign_of_another_machine(record: Callable[..., RunRecord]):
    run = record(3)
    run.release()
    age(run.folder / "outcome.json", 100)
    age(run.folder / "metrics.jsonl", 100)
    folder = RunsFolder(run.folder.parent)
    assert [status.state for status in folder.look()[0]] == ["interrupted"]
    run.start(3)  # it goes on here, and is killed once more
    run.log(4, 4.0, {"train_loss_nats": 2.0})
    assert [status.state for status in folder.look()[0]] == ["running"]
    run.release()
    assert [status.state for status in folder.look()[0]] == ["interrupted"]


def test_damaged_records_are_a_row_each(record: Callable[..., RunRecord]):
    damages = {
        "config.yaml": ["model: {", "model: 3\n", ""],
        "outcome.json": [
            '{"version": 1, "state": "runn',
            '{"version": 1, "state": "odd"}',
            '{"version": 99}',
            '{"version": 1, "state": "finished", "results": {"valid_loss_nats": "low"}}',
        ],
        "metrics.jsonl": [
            '{"step": 1, "sec\n',
            '{"step": "one", "seconds": 1}\n',
            '{"step": "inf", "seconds": 1}\n',
            '{"step": 1, "seconds": null}\n',
            '{"step": 1, "seconds": 1, "train_loss_nats": "low"}\n',
        ],
    }
    seed = 0
    for file, texts in damages.items():
        for text in texts:
            seed += 1
            run = record(2, seed=seed)
            run.release()
            (run.folder / file).write_text(text)
            status = look(run)
            assert status.state == "damaged", text
            assert file in status.note
            assert "\n" not in status.note
    good = record(2, seed=99)
    assert look(good).state == "running"
    lines = printed(good.folder.parent).splitlines()
    assert sum(line.startswith("damaged ") for line in lines) == seed
    assert "1 running" in lines[0]
    assert f"{seed} damaged" in lines[0]


def test_archived_records_are_shown_if_asked_for(record: Callable[..., RunRecord]):
    old = record(2)
    old.finish(Outcome("finished", "", 10, 10.0, LOSSES))
    archived = old.archive()
    new = record(1)
    runs = new.folder.parent
    assert archived.id not in printed(runs)
    assert "1 running  1 archived" in printed(runs)
    assert archived.id in printed(runs, Wanted(states=("archived",)))


def test_what_ended_is_read_once_and_anew_when_it_goes_on(record: Callable[..., RunRecord], monkeypatch):
    run = record(4)
    run.finish(Outcome("interrupted", "SIGTERM", 4, 4.0))
    folder = RunsFolder(run.folder.parent)
    assert [one.state for one in folder.look()[0]] == ["interrupted"]
    monkeypatch.setattr(RunRecord, "outcome", lambda self: pytest.fail("read again"))
    assert [one.state for one in folder.look()[0]] == ["interrupted"]
    monkeypatch.undo()
    run.start()
    assert [one.state for one in folder.look()[0]] == ["running"]


def test_wanted_runs_in_the_wanted_order():
    runs = [
        RunStatus("a", "finished", claim="d2_x", losses_nats={"valid": 1.0}, silent_seconds=9.0),
        RunStatus("b", "running", claim="d2_x", losses_nats={"valid": 3.0}, silent_seconds=2.0),
        RunStatus("c", "finished", claim="e1_x", losses_nats={"valid": 2.0}, silent_seconds=1.0),
        RunStatus("d", "failed", losses_nats={"valid": float("nan")}),
        RunStatus("e", "archived"),
    ]

    def ids(**wanted: object) -> str:
        return "".join(run.id for run in Wanted(**wanted).of(runs))  # pyright: ignore[reportArgumentType]

    assert ids() == "bdca"
    assert ids(sort="run") == "abcd"
    assert ids(sort="loss") == "acbd"
    assert ids(sort="time") == "cbad"
    assert ids(claim="d2") == "ba"
    assert ids(states=("failed", "archived")) == "de"
    with pytest.raises(InputError, match="unknown state 'runing' \\(did you mean 'running'"):
        Wanted(states=("runing",))
    with pytest.raises(InputError, match="limit is -1"):
        Wanted(limit=-1)


def test_a_pipe_is_not_cut_and_a_terminal_is_not_overrun(record: Callable[..., RunRecord]):
    reason = "OSError: " + "very " * 60 + "long"
    for seed in range(8):
        run = record(2, seed=seed)
        run.finish(Outcome("failed", reason, 2, 2.0))
    runs = run.folder.parent
    lines = printed(runs).splitlines()
    assert sum(line.endswith(reason) and run.id[:8] in line for line in lines) == 8
    assert len(printed(runs, Wanted(limit=3)).splitlines()) == len(lines) - 4
    for width, height in ((60, 12), (120, 24), (200, 60)):
        said = StringIO()
        console = Console(file=said, width=width, height=height, force_terminal=True)
        console.print(status_view(runs, *RunsFolder(runs).look(), Wanted(), console, height))
        assert len(said.getvalue().splitlines()) <= height
    whole = printed(runs, width=100, force_terminal=True, color_system=None)
    assert " ".join(whole.split()).count(" ".join(reason.split())) == 8, "beneath, in full"


def test_studies_are_known_while_they_live(tiny_run: Build, tmp_path: Path):
    runs = tmp_path / "runs"
    config = tiny_run(output__claim="d2_shared")
    waits, works = PlannedJob.of("waits", config), PlannedJob.of("works", config, "bias_variance of 2 runs together")
    begins = PlannedJob.of("begins", config)
    failed = PlannedJob.of("failed", config, "killed by SIGKILL", has_failed=True)
    notice = StudyNotice(["d2_shared"], "small", 3, 9, 600.0, [begins, works], [waits, failed], later=2)
    board = NoticeBoard(runs)
    board.put(notice)
    statuses, (study,) = RunsFolder(runs).look()
    assert (study.done, study.total, study.waiting) == (3, 9, [waits, failed])
    assert [(one.id, one.state, one.note) for one in statuses] == [
        ("begins", "waiting", "queued or starting"),
        ("works", "running", "bias_variance of 2 runs together"),
        ("waits", "waiting", ""),
        ("failed", "failed", "killed by SIGKILL"),
    ]
    text = printed(runs)
    assert "study d2 (small) 3/9 runs, about 10 min left, until " in text
    assert "2 wait for what others find" in text
    assert "killed by SIGKILL" in text
    left_over = next((runs / ".study" / "now").iterdir())
    board._lock.release()  # as its process ends
    assert studies_under_way(runs) == []
    other = NoticeBoard(runs)
    other.put(notice)
    assert not left_over.exists()
    assert len(studies_under_way(runs)) == 1
    other.close()
    assert studies_under_way(runs) == []
    assert RunsFolder(runs).look() == ([], [])


@pytest.mark.parametrize(
    ("outcome", "is_under_way", "reason", "state", "note"),
    [
        (Outcome("interrupted", "SIGTERM", 4), False, "", "waiting", "to go on from its last checkpoint"),
        (Outcome("interrupted", "SIGTERM", 4), False, "out of memory?", "failed", "out of memory?"),
        (Outcome("interrupted", "SIGTERM", 4), True, "", "waiting", "queued or starting"),
        (Outcome("failed", "OSError: full", 4), False, "other words", "failed", "OSError: full"),
        (Outcome("failed", "OSError: full", 4), True, "", "waiting", "queued or starting"),
        (Outcome("finished", "", 10, 10.0, LOSSES), False, "", "finished", "its probes wait"),
        (Outcome("finished", "", 10, 10.0, LOSSES), True, "", "running", "measuring"),
        (None, False, "", "running", ""),  # in the hands of another study
        (None, True, "", "running", ""),
    ],
)
def test_what_a_study_knows_of_a_record(
    record: Callable[..., RunRecord], outcome: Outcome | None, is_under_way: bool, reason: str, state: str, note: str
):
    run = record(4)
    if outcome is not None:
        run.finish(outcome)
    job = [PlannedJob.of(run.id, run.config, reason, bool(reason))]
    board = NoticeBoard(run.folder.parent)
    board.put(
        StudyNotice(
            ["d2"], "small", 0, 1, None, under_way=job if is_under_way else [], waiting=[] if is_under_way else job
        )
    )
    status = look(run)
    assert (status.state, status.note) == (state, note)
    assert status.step == (10 if outcome is not None and outcome.state == "finished" else 4), "of its record"
    board.close()


@pytest.mark.parametrize(
    ("reason", "state"),
    [("killed by SIGKILL", "failed"), ("", "waiting")],
    ids=["it failed", "it was given away since"],
)
def test_a_job_whose_run_has_not_begun(record: Callable[..., RunRecord], reason: str, state: str):
    run = record()
    run.release()
    (run.folder / "outcome.json").unlink()
    assert (look(run).state, look(run).note) == ("waiting", "it never started")
    job = PlannedJob.of(run.id, run.config, reason, has_failed=bool(reason))
    board = NoticeBoard(run.folder.parent)
    board.put(StudyNotice(["d2"], "small", 0, 1, None, waiting=[job]))
    assert (look(run).state, look(run).note) == (state, reason)
    board.close()


def test_json_for_machines(record: Callable[..., RunRecord], capfd: pytest.CaptureFixture[str]):
    run = record(2)
    run.log(3, 3.0, {"train_loss_nats": float("nan")})
    assert main(["status", str(run.folder.parent), "--json", "--state", "running,failed"]) == 0
    values = json.loads(capfd.readouterr().out)
    assert values["counts"] == {"running": 1}
    (one,) = values["runs"]
    assert (one["id"], one["step"], one["losses_nats"]) == (run.id, 3, {"train": "nan"})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("missing", "there is no folder missing; make train begins one"),
        (". --state runing", "unknown state 'runing' (did you mean 'running'?)"),
        (". --sort size", "sort must be one of state, run, loss, time, not 'size'"),
        (". --limit -1", "limit is -1"),
        (". --watch", "--watch needs a terminal"),
        (". --watch --json", "--json prints once"),
    ],
)
def test_a_mistake_gets_one_line(arguments: str, said: str, capsys: pytest.CaptureFixture[str], tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["status", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_no_heavy_library_is_imported(record: Callable[..., RunRecord]):
    run = record(2)
    code = (
        "import sys; from normlab.__main__ import main; code = main(['status', sys.argv[1]]); "
        "print({'torch', 'pytorch_lightning', 'wandb', 'scipy'} & set(sys.modules)); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, str(run.folder.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.id in done.stdout
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """It works, even where the tests were started in the background, in which shells have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_the_live_view_follows_and_ends_well_with_ctrl_c(record: Callable[..., RunRecord], monkeypatch):
    run = record(2)
    said = StringIO()
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 1:
            run.log(3, 3.0, {"train_loss_nats": 1.0})
        else:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("normlab.records.status.time.sleep", sleep)
    console = Console(file=said, width=140, height=20, force_terminal=True, color_system=None)
    watch_status(run.folder.parent, Wanted(), 0.5, "a hint", console)
    assert looks == [0.5, 0.5]
    first, second, _after = said.getvalue().split("1 running")[1:]
    assert "2/10" in first
    assert "a hint" in first
    assert "3/10" in second
    with pytest.raises(InputError, match="every is 0"):
        watch_status(run.folder.parent, Wanted(), 0.0, console=console)


def test_curves_are_for_runs_that_are_mirrored(record: Callable[..., RunRecord]):
    plain, mirrored = record(1, seed=1), record(1, seed=2, output__wandb="offline")
    (mirrored.folder / "wandb_id").write_text("x")
    assert (look(plain).is_mirrored, look(mirrored).is_mirrored) == (False, True)
    assert not are_mirrored([look(plain), look(mirrored)]), "one under way would not be seen"
    plain.finish(Outcome("finished", "", 10, 10.0, LOSSES))
    assert are_mirrored([look(plain), look(mirrored)])
    assert not are_mirrored([look(plain)])
