"""What is to be done by somebody: a run and the probes that measure it, or probes of runs together. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from normlab.config import InputError, RunConfig, config_from_dict, config_to_dict, run_id
from normlab.records.disk import parse_json, read_bytes, read_yaml, write_atomically
from normlab.records.record import RunRecord

__all__ = ["JOB_FILE", "Job", "read_job", "write_job"]

JOB_FILE = "job.json"
"""In the record's folder: `job_seconds`, with start, evaluation and probes, which the seconds of training leave out."""


@dataclass(frozen=True)
class Job:
    """A run and its probes, or, with `seeds`, probes of runs that differ in seed alone and have ended.

    Args:
        config: of the run, with its place in `output`; of the first one if there are `seeds`.
        probes: their options by name.
        seeds: of the runs that the probes measure together; empty for one run by itself.
        alone: the run's seconds count, so it must not be trained in a stack.
        stack: whether the worker trains the runs of its group as one: "never"; "if faster" (which it measures, and if
            not does the first job of the group alone, and leaves the others); or "always".
    """

    config: RunConfig
    probes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    alone: bool = False
    stack: Literal["never", "if faster", "always"] = "never"

    @cached_property
    def id(self) -> str:
        """That of the run; of runs together, one that their seeds decide."""
        if not self.seeds:
            return run_id(self.config)
        return f"{run_id(self.config)}-seeds-{hashlib.sha256(repr(self.seeds).encode()).hexdigest()[:8]}"

    @property
    def record(self) -> RunRecord:
        return RunRecord(Path(self.config.output.runs_dir) / run_id(self.config), self.config)

    @property
    def records(self) -> list[RunRecord]:
        """Of all its runs."""
        return [self.record.at_seed(seed) for seed in self.seeds] or [self.record]

    def is_trained(self) -> bool:
        ended = all(record.outcome().state in ("finished", "diverged") for record in self.records)
        return ended and not self.is_to_be_anew()

    def is_to_be_anew(self) -> bool:
        """Whether the record of the run is that of a stack, whose seconds do not count."""
        return self.alone and "stacked" in self.record.environment()

    def measured(self) -> list[RunRecord]:
        """Runs that the probes look at: a diverged one has no weights worth measuring. What they find is in the folder
        of the first. Of runs together too few may be left."""
        finished = [record for record in self.records if record.outcome().state == "finished"]
        return [] if self.seeds and len(finished) < 2 else finished

    def missing_probes(self) -> list[str]:
        """Probes that did not measure yet, or with other options."""
        runs = self.measured()
        if not runs:
            return []
        ids = [record.id for record in runs]
        found = {name: runs[0].probe(name, ids) for name in self.probes}
        return [
            name
            for name, options in self.probes.items()
            if not found[name] or not options.items() <= found[name]["options"].items()
        ]

    def is_done(self) -> bool:
        return self.is_trained() and not self.missing_probes()

    def joined(self, other: Job) -> Job:
        """The same with the probes of both.

        Raises:
            InputError: they want a probe with different options; a record has room for one.
        """
        for name in self.probes.keys() & other.probes.keys():
            if self.probes[name] != other.probes[name]:
                claims = f"{self.config.output.claim} and {other.config.output.claim}"
                raise InputError(f"{claims} want the probe {name} of run {self.id} with different options")
        return Job(self.config, {**self.probes, **other.probes}, self.seeds, self.alone or other.alone)

    def seconds(self) -> float:
        """What the whole job took; without that, the training alone."""
        try:
            values = parse_json(read_bytes(path := self.record.folder / JOB_FILE), str(path))
        except FileNotFoundError:
            return self.record.outcome().seconds
        seconds = values.get("job_seconds")
        if not isinstance(seconds, int | float):
            raise InputError(f"cannot read {path}: job_seconds is {seconds!r:.60}; delete the file")
        return float(seconds)


def write_job(path: Path, job: Job) -> None:
    probes = {name: dict(options) for name, options in job.probes.items()}
    values = {
        "config": config_to_dict(job.config),
        "probes": probes,
        "seeds": list(job.seeds),
        "alone": job.alone,
        "stack": job.stack,
    }
    write_atomically(path, yaml.safe_dump(values, sort_keys=False))


def read_job(path: Path) -> Job:
    try:
        values = read_yaml(path)
        config, seeds = config_from_dict(values["config"]), tuple(values["seeds"])
        return Job(config, values["probes"], seeds, values["alone"], values["stack"])
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise InputError(f"cannot read the job {path}: {' '.join(str(error).split())}") from None
