"""The record of one run: a folder of plain files that a kill at any moment leaves readable.

    runs/<id>/config.yaml        the resolved config
              environment.json   versions, machine, data
              metrics.jsonl      one row per line: step, seconds and metrics with units in their names
              outcome.json       how the run ended
              statistics_gap.json  running averages against re-estimated statistics, per norm that stores any
              probes/<name>.json  what a probe measured on the run once it had ended; <name>-<hash>.json: on it
                                 and other runs together
              checkpoints/       what to resume from
              tokenizer.json     symbols of the corpus

Whole files are replaced atomically; rows are appended, and a torn last row is ignored when read and cut
before the next one is written. JSON is strict: "nan", "inf" and "-inf" stand for the floats of that name.
One process at a time writes to a record; it holds a lock that the kernel releases when the process ends.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from normlab.config import InputError, RunConfig, config_from_dict, config_to_dict, run_id
from normlab.records.disk import (
    append,
    last_rows,
    parse_json,
    parse_row,
    read_bytes,
    read_yaml,
    require_plain_files,
    to_json,
    write_atomically,
)
from normlab.records.lock import FolderLock

__all__ = ["OUT_OF_MEMORY", "Outcome", "RunRecord", "record_ids"]

FORMAT_VERSION = 1
OUT_OF_MEMORY = "out of memory"
"""How the reason of a run begins that failed because memory ran out; fewer runs at once may do."""
State = Literal["running", "finished", "diverged", "interrupted", "failed"]


@dataclass(frozen=True)
class Outcome:
    """How a run ended, or that it is under way.

    Args:
        state: "diverged" is a result (the loss left its bound or is not finite), "failed" is an error.
        reason: one line.
        step: optimizer steps done.
        seconds: training time.
        results: final numbers, units in their names: `valid_loss_nats`, `test_bits_per_char`, ...
        written_at: ISO time; filled in when the outcome is written.
        pid: process that wrote it; filled in when the outcome is written.
    """

    state: State
    reason: str = ""
    step: int = 0
    seconds: float = 0.0
    results: dict[str, float | int | str] = field(default_factory=dict)
    written_at: str = ""
    pid: int = 0


_OUTCOME_TYPES = {"state": str, "reason": str, "step": int, "seconds": int | float, "results": dict}


class RunRecord:
    """The record in `folder`; get one from `create` or `open`."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder = folder
        self.config = config
        self._lock = FolderLock(folder)

    def __repr__(self) -> str:
        return f"RunRecord({str(self.folder)!r})"

    @classmethod
    def create(cls, config: RunConfig) -> RunRecord:
        """The record of `config` under its `output.runs_dir`: the folder is made and the config written.

        An existing record keeps its metrics and outcome; whether to go on with it is the caller's to decide.

        Raises:
            InputError: the folder cannot be made, or holds what no run writes: links, pipes.
        """
        record = cls(Path(config.output.runs_dir) / run_id(config), config)
        require_plain_files(record.folder)
        try:
            record.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            why = error.strerror or error
            raise InputError(f"cannot make the folder {record.folder} ({why}); change output.runs_dir") from None
        write_atomically(record.folder / "config.yaml", yaml.safe_dump(config_to_dict(config), sort_keys=False))
        return record

    @classmethod
    def open(cls, folder_or_id: str | os.PathLike[str], runs_dir: str | os.PathLike[str] = "runs") -> RunRecord:
        """An existing record, by its folder or by its id in `runs_dir`.

        Raises:
            InputError: there is none (names the nearest ids), another version wrote it, its config cannot be read, or
                it holds what no run writes: links, pipes.
        """
        asked, runs = Path(folder_or_id), Path(runs_dir)
        # os.path, which takes a name that can be none, such as one that is too long, for one that is not there.
        folder = next((place for place in (asked, runs / asked) if os.path.isfile(place / "config.yaml")), None)
        if folder is None:
            ids = record_ids(runs)
            near = difflib.get_close_matches(asked.name, ids, n=3, cutoff=0.0)
            hint = f"nearest in {runs}: {', '.join(near)}" if near else f"there are no records in {runs}"
            raise InputError(f"no run {str(folder_or_id)!r}; {hint}")
        require_plain_files(folder)
        for name in ("outcome.json", "environment.json"):
            _read_json(folder / name)  # of another version? Then its config may have other fields
        path = folder / "config.yaml"
        try:
            return cls(folder, config_from_dict(read_yaml(path)))
        except (OSError, yaml.YAMLError, ValueError, TypeError) as error:
            why = " ".join(str(error).split())
            raise InputError(f"cannot read {path}: {why}; restore the file or move its folder away") from None

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / "tokenizer.json"

    def start(self, step: int = 0, seconds: float = 0.0) -> None:
        """Claim the record for this process (until `finish`, `release` or its end) and say that it is running.

        Raises:
            InputError: another process (or another `RunRecord` of this one) is training this run.
        """
        self._acquire()
        try:
            for leftover in self.folder.rglob(".*.tmp"):  # a half-written checkpoint too
                # A config is written before the lock is taken, and another process may be at it.
                if not leftover.name.startswith(".config.yaml."):
                    leftover.unlink(missing_ok=True)
            self._write_outcome(Outcome("running", step=step, seconds=seconds))
        except BaseException:  # whoever keeps the error, and with it this record, would keep the lock
            self.release()
            raise

    def log(self, step: int, seconds: float, metrics: Mapping[str, Any]) -> None:
        """Append one row: `step` (optimizer steps done), `seconds` (training time) and `metrics`.

        Raises:
            OSError: naming the file, with the rows before this one intact.
        """
        row = to_json({"step": step, "seconds": seconds, **metrics})
        append(self.folder / "metrics.jsonl", row.encode() + b"\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All rows, oldest first; a torn last row is left out."""
        path = self.folder / "metrics.jsonl"
        try:
            lines = read_bytes(path).split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        return [parse_row(line, f"{path} line {number}") for number, line in enumerate(lines, 1)]

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`: a run resumed from a checkpoint writes them again."""
        kept = [to_json(row) + "\n" for row in self.metrics() if row["step"] <= step]
        write_atomically(self.folder / "metrics.jsonl", "".join(kept))

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        self._write_json("environment.json", environment)

    def environment(self) -> dict[str, Any]:
        """What `write_environment` wrote; empty if it was never called."""
        return self._read_json("environment.json") or {}

    def write_statistics_gap(self, batches: int, gaps: Mapping[str, Mapping[str, float | int]]) -> None:
        """How far the running averages were from statistics re-estimated over `batches`, per norm by its name."""
        self._write_json("statistics_gap.json", {"batches": batches, "norms": gaps})

    def statistics_gap(self) -> dict[str, Any]:
        """What `write_statistics_gap` wrote: `batches` and `norms`; empty if it was never called."""
        return self._read_json("statistics_gap.json") or {}

    def at_seed(self, seed: int) -> RunRecord:
        """The record of the run that differs in its seed alone, in the same folder of runs; it need not be there."""
        config = dataclasses.replace(self.config, seed=seed)
        return RunRecord(self.folder.with_name(run_id(config)), config)

    def write_probe(self, name: str, values: Mapping[str, Any], runs: Sequence[str] = ()) -> Path:
        """What the probe `name` measured, in place of what it did before; returns the file.

        Args:
            runs: ids of all that it measured, if this run was not the only one.
        """
        file = _probe_file(name, runs)
        (self.folder / "probes").mkdir(exist_ok=True)
        self._write_json(file, values)
        return self.folder / file

    def probe(self, name: str, runs: Sequence[str] = ()) -> dict[str, Any]:
        """What `write_probe` wrote with just these `runs`; empty if it was never called."""
        return self._read_json(_probe_file(name, runs)) or {}

    def finish(self, outcome: Outcome) -> None:
        """Write the outcome and give the record free."""
        self._write_outcome(outcome)
        self.release()

    def outcome(self) -> Outcome:
        """How the run ended; a run that says it is running but whose process is gone was interrupted."""
        values = self._read_json("outcome.json")
        if values is None:
            return Outcome("interrupted", reason="never started")
        try:
            outcome = Outcome(**values)
        except TypeError as error:
            raise InputError(f"cannot read {self.folder / 'outcome.json'}: {error}") from None
        for name, kind in _OUTCOME_TYPES.items():
            value = getattr(outcome, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise InputError(f"cannot read {self.folder / 'outcome.json'}: {name} is {value!r:.60}")
        if outcome.state not in get_args(State):
            raise InputError(f"cannot read {self.folder / 'outcome.json'}: unknown state {outcome.state!r}")
        if outcome.state != "running":
            return outcome
        # How far it is stands in its last row alone.
        row = next(last_rows(self.folder / "metrics.jsonl"), None)
        if row is not None:
            outcome = dataclasses.replace(outcome, step=row["step"], seconds=float(row["seconds"]))
        if self._lock.is_held_by_anyone():
            return outcome
        if (self._read_json("outcome.json") or {}).get("state") != "running":
            return self.outcome()  # it ended between the looks at its outcome and at its lock
        return dataclasses.replace(outcome, state="interrupted", reason="killed")

    def archive(self) -> RunRecord:
        """Move the record aside to the first free `<id>.1`, `<id>.2`, ... and return it there.

        Raises:
            InputError: another process is training this run.
        """
        self._acquire()
        try:
            number = 1
            while (aside := self.folder.with_name(f"{self.folder.name}.{number}")).exists():
                number += 1
            self.folder.rename(aside)
        finally:
            self.release()
        return RunRecord(aside, self.config)

    def release(self) -> None:
        """Give the record free for other processes; nothing happens if this one does not hold it."""
        self._lock.release()

    def _acquire(self) -> None:
        require_plain_files(self.folder)
        holder = self._lock.acquire()
        if holder is not None:
            raise InputError(f"run {self.id} is being trained by process {holder}; wait for it or change the seed")

    def _write_outcome(self, outcome: Outcome) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        reason = " ".join(outcome.reason.split())
        written = dataclasses.replace(outcome, reason=reason, written_at=now, pid=os.getpid())
        self._write_json("outcome.json", dataclasses.asdict(written))

    def _write_json(self, name: str, values: Mapping[str, Any]) -> None:
        text = to_json({"version": FORMAT_VERSION, **values}, indent=2)
        write_atomically(self.folder / name, text + "\n")

    def _read_json(self, name: str) -> dict[str, Any] | None:
        return _read_json(self.folder / name)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        values = parse_json(read_bytes(path), str(path))
    except FileNotFoundError:
        return None
    version = values.pop("version", None)
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {version!r}, this normlab reads {FORMAT_VERSION}: use the one that wrote it"
        )
    return values


def _probe_file(name: str, runs: Sequence[str]) -> str:
    """Runs measured together have a file for each list of them: arguments may take other seeds of one arm."""
    if len(runs) < 2:
        return f"probes/{name}.json"
    return f"probes/{name}-{hashlib.sha256(' '.join(runs).encode()).hexdigest()[:8]}.json"


def record_ids(runs_dir: str | os.PathLike[str]) -> list[str]:
    """Ids of the records in `runs_dir`, sorted; archived ones (`<id>.1`) included."""
    return sorted(path.parent.name for path in Path(runs_dir).glob("*/config.yaml"))
