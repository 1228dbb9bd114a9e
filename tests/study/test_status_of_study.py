"""What `python -m normlab status` says while a study goes on."""

from __future__ import annotations

import threading

import pytest
from study_bench import Bench
from tiny_study import tiny_claim, variance

from normlab.records.notice import StudyNotice
from normlab.records.progress import RunsFolder, RunStatus

pytestmark = pytest.mark.slow
NOTES = ("", "queued or starting", "starting", "measuring", "bias_variance of 2 runs together", "its probes wait")
ORDER = ("waiting", "running", "finished")


def watched(bench: Bench, *claims: object) -> tuple[list[list[RunStatus]], list[list[StudyNotice]]]:
    """All that could be seen until the study was over."""
    study = threading.Thread(target=bench.run, args=claims)
    study.start()
    folder, looks, notices = RunsFolder(bench.runs), [], []
    while study.is_alive():
        statuses, studies = folder.look()
        looks.append(statuses)
        notices.append(studies)
        study.join(0.02)
    looks.append(folder.look()[0])
    return looks, notices


def test_nothing_impossible_is_shown(bench: Bench):
    bench.order(ln="slowly", bn_step="slowly")
    claim = tiny_claim(bench.text, "z3_variance", variance(), rates=(1e-2,))
    looks, notices = watched(bench, claim)
    seen: dict[str, list[str]] = {}
    for statuses in looks:
        for status in statuses:
            states = seen.setdefault(status.id, [])
            if not states or states[-1] != status.state:
                states.append(status.state)
            assert status.note in NOTES
            assert status.state != "finished" or status.losses_nats.keys() == {"valid", "test"}
            assert status.steps == 200
    runs = {id_: states for id_, states in seen.items() if "-seeds-" not in id_}
    together = {id_: states for id_, states in seen.items() if "-seeds-" in id_}
    assert len(runs) == 4
    assert len(together) == 2
    for states in seen.values():
        assert states == sorted(states, key=ORDER.index), "never back"
    assert all(states[-2:] == ["running", "finished"] for states in runs.values())
    assert "waiting" in {state for states in runs.values() for state in states}, "two workers, four runs"
    assert all(states[-1] == "running" for states in together.values())
    told = [notice for notices in notices for notice in notices]
    assert {notice.total for notice in told} == {6}
    assert [notice.done for notice in told] == sorted(notice.done for notice in told)
    assert max(notice.done for notice in told) >= 4
    assert all(len(notice.under_way) <= 2 for notice in told)
    assert {status.state for status in looks[-1]} == {"finished"}
    assert not list((bench.runs / ".study" / "now").iterdir()), "taken down"


def test_killed_workers_are_shown_as_failed_while_others_go_on(bench: Bench):
    bench.order(ln="die", bn_step="slowly")
    looks, _ = watched(bench)
    failed = {status.note for statuses in looks for status in statuses if status.state == "failed"}
    assert failed == {"killed by SIGKILL; out of memory?"}
    assert all(status.norm == "ln" for statuses in looks for status in statuses if status.state == "failed")
