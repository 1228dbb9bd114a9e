"""How far the runs of a folder are, from their records as they stand, while they are written to; no torch.

Of a curve no more is read than its end, so that a thousand records take less than a second.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import yaml

from normlab.config import InputError, RunConfig
from normlab.machine.terminal import printable
from normlab.records.disk import last_rows, read_bytes
from normlab.records.notice import PlannedJob, StudyNotice, studies_under_way
from normlab.records.record import RunRecord

__all__ = ["SPLITS", "STATES", "Progress", "RunStatus", "RunsFolder", "duration", "progress"]

StatusState = Literal["running", "failed", "damaged", "interrupted", "diverged", "finished", "waiting", "archived"]
STATES: tuple[StatusState, ...] = (
    "running",
    "failed",
    "damaged",
    "interrupted",
    "diverged",
    "finished",
    "waiting",
    "archived",
)
"""In the order in which they matter to whoever looks."""

SPLITS = ("train", "valid", "test")
ROWS_OF_SPEED = 10
MOST_ROWS = 1000
"""So far back the last loss of a split is looked for: validations may be rare."""

SILENT_SECONDS = 300.0
"""A run that holds its lock and has written nothing for so long is said to be silent: it validates, or it hangs."""

FRESH_SECONDS = 120.0
"""A record without a lock that was written to so lately may belong to a run on another machine."""

_Loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
"""libyaml's where it is: ten times as fast."""


@dataclass(frozen=True)
class Progress:
    """The end of a curve.

    Args:
        step: of the last row; 0 if there is none.
        losses_nats: the last one of each split that has any, by the split's name.
        seconds_per_step: of training, over the last rows; None before there are two.
    """

    step: int = 0
    losses_nats: dict[str, float] = field(default_factory=dict)
    seconds_per_step: float | None = None

    def line(self, steps: int) -> str:
        """Such as: step 20/200: train 2.310, valid 2.405 nats."""
        if not self.step:
            return "starting"
        losses = ", ".join(f"{split} {loss:.3f}" for split, loss in self.losses_nats.items())
        return f"step {self.step}/{steps}" + (f": {losses} nats" if losses else "")


def progress(folder: Path) -> Progress:
    """How far the run whose record is in `folder` is by its curve, which may be written to meanwhile.

    Raises:
        InputError: a row at its end is damaged.
    """
    found: dict[str, float] = {}
    speed: list[tuple[int, float]] = []
    step = 0
    path = folder / "metrics.jsonl"
    for row in islice(last_rows(path), MOST_ROWS):
        step = step or row["step"]
        found = _losses(row, path) | found
        if "train_loss_nats" in row and len(speed) < ROWS_OF_SPEED:
            speed.append((row["step"], row["seconds"]))
        if {"train", "valid"} <= found.keys() and len(speed) == ROWS_OF_SPEED:
            break
    losses = {split: found[split] for split in SPLITS if split in found}
    seconds_per_step = None
    if len(speed) > 1 and speed[0][0] > speed[-1][0]:
        seconds_per_step = (speed[0][1] - speed[-1][1]) / (speed[0][0] - speed[-1][0])
    return Progress(step, losses, seconds_per_step)


def _losses(values: Mapping[str, Any], path: Path) -> dict[str, float]:
    """Those of each split that has any, from a row or the results in `path`; `InputError` if one is no number."""
    losses = {split: values.get(f"{split}_loss_nats") for split in SPLITS}
    for split, loss in losses.items():
        if not isinstance(loss, int | float | None):
            raise InputError(
                f"{path} has {loss!r:.60} for {split}_loss_nats; the record is damaged: move its folder away"
            )
    return {split: float(loss) for split, loss in losses.items() if loss is not None}


def duration(seconds: float | None) -> str:
    """Such as 45 s, 12 min, 3.4 h or 5 days; ? if unknown."""
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} days"


@dataclass(frozen=True)
class RunStatus:
    """One run, as `python -m normlab status` shows it.

    Args:
        id: name of the record's folder.
        state: that of the outcome; waiting (in a study under way), damaged (it cannot be read) or archived.
        note: one line: why it ended so, or what it is at.
        claim: id of the argument that it serves; empty if none.
        model: name of the model, or of its recurrent cell.
        norm: of the run; single sites may have another.
        corpus: name or file.
        steps: that it is to do.
        losses_nats: by split: the last ones of its curve, or once it is finished those of the weights kept.
        seconds_left: of training, about; None if unknown or not under way.
        silent_seconds: since its last row, or sign of life; None if it has not begun.
        is_mirrored: W&B has a part in it.
    """

    id: str
    state: StatusState
    note: str = ""
    claim: str = ""
    model: str = ""
    norm: str = ""
    corpus: str = ""
    learning_rate: float = math.nan
    seed: int = 0
    step: int = 0
    steps: int = 0
    losses_nats: dict[str, float] = field(default_factory=dict)
    seconds_left: float | None = None
    silent_seconds: float | None = None
    is_mirrored: bool = False


class RunsFolder:
    """The runs in `runs_dir`, and the studies under way there; look again and again with one of these.

    What has ended is read once, as long as its files stay the same.
    """

    def __init__(self, runs_dir: Path) -> None:
        self.runs_dir = runs_dir
        self._configs: dict[str, tuple[int, RunStatus]] = {}
        self._ended: dict[str, tuple[int, RunStatus, float]] = {}
        self._rows_at: dict[str, float] = {}
        self._grew: dict[str, float] = {}

    def look(self) -> tuple[list[RunStatus], list[StudyNotice]]:
        """All runs: those with a record by id, then others in the order of their study; and all studies under way.

        Raises:
            InputError: the folder cannot be read.
        """
        # First the plans, then the records: what was planned may have begun since, not the other way round.
        studies = studies_under_way(self.runs_dir)
        statuses = {status.id: status for status in sorted(self._records(), key=lambda status: status.id)}
        for job in (job for study in studies for job in study.under_way):
            statuses[job.id] = _under_way(job, statuses.get(job.id))
        for job in (job for study in studies for job in study.waiting):
            statuses[job.id] = _waiting(job, statuses.get(job.id))
        return [_printable(status) for status in statuses.values()], studies

    def _records(self) -> Iterator[RunStatus]:
        try:
            with os.scandir(self.runs_dir) as entries:
                names = [entry.name for entry in entries if not entry.name.startswith(".")]
        except FileNotFoundError:
            raise InputError(f"there is no folder {self.runs_dir}; make train begins one") from None
        except OSError as error:
            raise InputError(f"cannot read the folder {self.runs_dir}: {error.strerror}") from None
        for name in names:
            folder = self.runs_dir / name
            try:
                yield self._record(folder, (folder / "config.yaml").stat().st_mtime_ns)
            except (FileNotFoundError, NotADirectoryError):
                continue  # not a record, or moved away just now
            except (InputError, OSError) as error:
                yield RunStatus(name, "damaged", " ".join(str(error).split()))

    def _record(self, folder: Path, config_changed: int) -> RunStatus:
        name = folder.name
        known = self._configs.get(name)
        if known is None or known[0] != config_changed:
            known = self._configs[name] = config_changed, _planned(folder)
            self._ended.pop(name, None)
        planned = known[1]
        try:
            outcome_changed = (folder / "outcome.json").stat().st_mtime_ns
        except FileNotFoundError:
            return replace(planned, state="waiting", note="it never started")
        ended = self._ended.get(name)
        if ended is None or ended[0] != outcome_changed:
            status, at = self._read(folder, planned)
            if status.state == "running":
                return status
            if status.state == "interrupted" and status.note.startswith("killed"):
                return status  # it may show signs of life elsewhere
            ended = self._ended[name] = outcome_changed, status, at
        return replace(ended[1], silent_seconds=max(0.0, time.time() - ended[2]))

    def _read(self, folder: Path, planned: RunStatus) -> tuple[RunStatus, float]:
        """The status, and when the record was last written to (seconds since the epoch)."""
        outcome = RunRecord(folder, _ANY_CONFIG).outcome()
        at = (folder / "outcome.json").stat().st_mtime
        if outcome.state == "finished":
            losses = _losses(outcome.results, folder / "outcome.json")
            done = replace(planned, state=_archived(folder, "finished"), note=outcome.reason, losses_nats=losses)
            return replace(done, step=outcome.step), at
        curve = progress(folder)
        if curve.step:
            at = max(at, (folder / "metrics.jsonl").stat().st_mtime)
        status = replace(planned, step=max(outcome.step, curve.step), losses_nats=curve.losses_nats)
        status = replace(status, silent_seconds=max(0.0, time.time() - at))
        elsewhere = self._lives_elsewhere(folder.name, at, is_killed=outcome.reason == "killed")
        if outcome.state == "running" or elsewhere:
            return _running(folder, status, curve, elsewhere), at
        note = outcome.reason
        if note == "killed" and time.time() - at < FRESH_SECONDS:
            note = "killed, or on another machine whose lock is not seen here"
        return replace(status, state=_archived(folder, outcome.state), note=note), at

    def _lives_elsewhere(self, name: str, at: float, is_killed: bool) -> bool:
        """Whether rows came since the last look although nobody held the lock: locks of other machines may be
        invisible, rows are not."""
        if not is_killed:
            self._rows_at.pop(name, None)  # rows that come until the next look are its holder's
            return False
        if self._rows_at.setdefault(name, at) < at:
            self._rows_at[name] = self._grew[name] = at
        return time.time() - self._grew.get(name, -math.inf) < FRESH_SECONDS


def _printable(status: RunStatus) -> RunStatus:
    """Names and reasons may be those of somebody else's record."""
    names = ("id", "note", "claim", "model", "norm", "corpus")
    return replace(status, **{name: printable(getattr(status, name)) for name in names})


_ANY_CONFIG = RunConfig()
"""What an outcome says does not depend on it, and building a thousand configs takes seconds."""


def _planned(folder: Path) -> RunStatus:
    """What the config says; the outcome is still to be read."""
    path = folder / "config.yaml"
    try:
        values = _scalars(read_bytes(path))
        name = values["model.name"]
        return RunStatus(
            id=folder.name,
            state="waiting",
            claim=values["output.claim"],
            model=values.get("model.cell", name) if name != "hf" else f"hf:{values['model.architecture']}",
            norm=values["model.norm"],
            corpus=Path(values["data.corpus"]).name,
            learning_rate=float(values["optim.lr"]),
            seed=int(values["seed"]),
            steps=int(values["training.steps"]),
            is_mirrored=values["output.wandb"] != "off" and (folder / "wandb_id").exists(),
        )
    except KeyError as error:
        raise InputError(f"{path} lacks {error.args[0]}; restore the file or move its folder away") from None
    except (yaml.YAMLError, ValueError) as error:
        why = " ".join(str(error).split())
        raise InputError(f"cannot read {path}: {why}; restore the file or move its folder away") from None


def _scalars(text: bytes) -> dict[str, str]:
    """What stands in a YAML mapping of mappings, by dotted names. Reading events alone, without building values, is
    what makes a thousand configs quick; lists are passed over."""
    found: dict[str, str] = {}
    parents: list[str] = []
    key: str | None = None
    lists = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.SequenceStartEvent | yaml.SequenceEndEvent):
            lists += 1 if isinstance(event, yaml.SequenceStartEvent) else -1
            key = None
        elif lists:
            continue
        elif isinstance(event, yaml.MappingStartEvent):
            parents.append(f"{parents[-1]}{key}." if key is not None and parents else "")
            key = None
        elif isinstance(event, yaml.MappingEndEvent):
            parents.pop()
        elif isinstance(event, yaml.ScalarEvent):
            if key is None:
                key = event.value
            else:
                found[f"{parents[-1] if parents else ''}{key}"] = event.value
                key = None
    return found


def _running(folder: Path, status: RunStatus, curve: Progress, elsewhere: bool) -> RunStatus:
    notes = ["on another machine"] if elsewhere else []
    left = None
    if not curve.step:
        notes.append("starting")
    elif curve.step >= status.steps:
        notes.append("last evaluation")
    elif curve.seconds_per_step is not None:
        left = (status.steps - curve.step) * max(curve.seconds_per_step, _seconds_per_step_with_all(folder, curve))
        left = max(0.0, left - (status.silent_seconds or 0.0))
    if (status.silent_seconds or 0.0) > SILENT_SECONDS:
        notes.append("silent")
        left = None
    return replace(status, state="running", note=", ".join(notes), seconds_left=left)


def _seconds_per_step_with_all(folder: Path, curve: Progress) -> float:
    """With validations and whatever else: by the clock, since the environment was written, just before the first step.
    Too little in a run that went on from a checkpoint."""
    try:
        began = (folder / "environment.json").stat().st_mtime
    except FileNotFoundError:
        return 0.0
    return max(0.0, (folder / "metrics.jsonl").stat().st_mtime - began) / curve.step


def _archived(folder: Path, state: StatusState) -> StatusState:
    return "archived" if re.search(r"\.\d+$", folder.name) else state


def _under_way(job: PlannedJob, record: RunStatus | None) -> RunStatus:
    """A job that its study has given away: it is in a queue, or begins, trains or measures."""
    if record is None and job.note:
        return replace(_of_plan(job), state="running", note=job.note)  # what measures runs together has no record
    if record is None or record.state in ("waiting", "interrupted", "failed"):
        return replace(record or _of_plan(job), state="waiting", note="queued or starting")
    return replace(record, state="running", note="measuring") if record.state == "finished" else record


def _waiting(job: PlannedJob, record: RunStatus | None) -> RunStatus:
    """A job that waits in a study, which may have a record of an earlier try or be in the hands of another by now."""
    if record is None:
        return replace(_of_plan(job), state="failed" if job.has_failed else "waiting", note=job.note)
    if record.state in ("waiting", "interrupted") and job.has_failed:
        return replace(record, state="failed", note=job.note)
    if record.state == "waiting":  # "it never started" is nothing to a study that has yet to begin it
        return replace(record, note=job.note)
    if record.state == "interrupted":
        return replace(record, state="waiting", note="to go on from its last checkpoint")
    return replace(record, note=job.note or "its probes wait") if record.state == "finished" else record


def _of_plan(job: PlannedJob) -> RunStatus:
    return RunStatus(
        id=job.id,
        state="waiting",
        claim=job.claim,
        model=job.model,
        norm=job.norm,
        corpus=job.corpus,
        learning_rate=job.learning_rate,
        seed=job.seed,
        steps=job.steps,
    )
