"""What a study that is under way says of itself, for `python -m normlab status`: what is left, and what waits.

    <runs_dir>/.study/now/<token>/lock          held by the study as long as it lives
                                  study.json    `StudyNotice`

A study that was killed leaves its folder behind, without a lock; the next one removes it.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normlab.config import InputError, RunConfig, model_label
from normlab.records.disk import parse_json, read_bytes, to_json, write_atomically
from normlab.records.lock import FolderLock

__all__ = ["NoticeBoard", "PlannedJob", "StudyNotice", "studies_under_way"]


@dataclass(frozen=True)
class PlannedJob:
    """A run of a study, or what measures several.

    Args:
        id: that of the run; of runs measured together one of its own.
        note: what is to be known about it, such as how the last try failed.
        has_failed: the last try failed.
    """

    id: str
    claim: str
    model: str
    norm: str
    corpus: str
    learning_rate: float
    seed: int
    steps: int
    note: str = ""
    has_failed: bool = False

    @classmethod
    def of(cls, id: str, config: RunConfig, note: str = "", has_failed: bool = False) -> PlannedJob:
        model, data = config.model, Path(config.data.corpus).name
        rate, steps, claim = config.optim.lr, config.training.steps, config.output.claim
        return cls(id, claim, model_label(model), model.norm, data, rate, config.seed, steps, note, has_failed)


@dataclass(frozen=True)
class StudyNotice:
    """How far a study is.

    Args:
        claims: the arguments that it is for.
        done: runs done, of `total`.
        seconds_left: about, when this was written; None if unknown.
        under_way: given away, to a worker or a queue.
        waiting: not given away yet.
        later: runs whose rate the ones before them decide.
        written: seconds since the epoch; filled in by `NoticeBoard.put`.
    """

    claims: Sequence[str]
    scale: str
    done: int
    total: int
    seconds_left: float | None
    under_way: Sequence[PlannedJob] = ()
    waiting: Sequence[PlannedJob] = ()
    later: int = 0
    written: float = 0.0


class NoticeBoard:
    """Where one study puts its notice, in the folder of runs; `close` takes it away."""

    def __init__(self, runs_dir: Path) -> None:
        self._folder = _boards(runs_dir) / uuid.uuid4().hex[:12]
        self._lock = FolderLock(self._folder)

    def put(self, notice: StudyNotice) -> None:
        """Write the notice in place of the last one. A full disk is for the runs to complain about."""
        try:
            if not self._lock.held:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._lock.acquire()
                _remove_left_over(self._folder)
            values = dataclasses.asdict(dataclasses.replace(notice, written=time.time()))
            write_atomically(self._folder / "study.json", to_json(values))
        except OSError:
            pass

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.release()


def studies_under_way(runs_dir: Path) -> list[StudyNotice]:
    """Notices of the studies that live; one that is being written or taken away is left out."""
    found = []
    for path in sorted(_boards(runs_dir).glob("*/study.json")):
        try:
            if FolderLock(path.parent).is_held_by_anyone():
                found.append(_notice(parse_json(read_bytes(path), str(path))))
        except (OSError, InputError, TypeError, KeyError):
            continue
    return found


def _notice(values: dict[str, Any]) -> StudyNotice:
    jobs = {name: [PlannedJob(**job) for job in values[name]] for name in ("under_way", "waiting")}
    return StudyNotice(**{**values, **jobs})


def _boards(runs_dir: Path) -> Path:
    return runs_dir / ".study" / "now"


def _remove_left_over(own: Path) -> None:
    for folder in own.parent.iterdir():
        if folder != own and (folder / "study.json").exists() and not FolderLock(folder).is_held_by_anyone():
            shutil.rmtree(folder, ignore_errors=True)
