"""One run to be done by somebody: its config, and the probes that measure it afterwards. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from normlab.config import InputError, RunConfig, config_from_dict, config_to_dict, run_id
from normlab.records.disk import parse_json, write_atomically
from normlab.records.record import RunRecord

__all__ = ["JOB_FILE", "Job", "read_job", "write_job"]

JOB_FILE = "job.json"
"""In the record's folder: `job_seconds`, with start, evaluation and probes, which the seconds of training leave out."""


@dataclass(frozen=True)
class Job:
    """A run, with its place in `config.output`, and options by name of the probes it needs."""

    config: RunConfig
    probes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @cached_property
    def id(self) -> str:
        return run_id(self.config)

    @property
    def record(self) -> RunRecord:
        return RunRecord(Path(self.config.output.runs_dir) / self.id, self.config)

    def is_trained(self) -> bool:
        return self.record.outcome().state in ("finished", "diverged")

    def missing_probes(self) -> list[str]:
        """Probes that did not measure yet, or with other options. A diverged run has no weights worth measuring."""
        record = self.record
        if record.outcome().state == "diverged":
            return []
        found = {name: record.probe(name) for name in self.probes}
        return [
            name
            for name, options in self.probes.items()
            if not found[name] or not options.items() <= found[name]["options"].items()
        ]

    def is_done(self) -> bool:
        return self.is_trained() and not self.missing_probes()

    def joined(self, other: Job) -> Job:
        """This run with the probes of both.

        Raises:
            InputError: they want a probe with different options; a record has room for one.
        """
        for name in self.probes.keys() & other.probes.keys():
            if self.probes[name] != other.probes[name]:
                claims = f"{self.config.output.claim} and {other.config.output.claim}"
                raise InputError(f"{claims} want the probe {name} of run {self.id} with different options")
        return Job(self.config, {**self.probes, **other.probes})

    def seconds(self) -> float:
        """What the whole job took; without that, the training alone."""
        try:
            values = parse_json((self.record.folder / JOB_FILE).read_bytes(), JOB_FILE)
        except FileNotFoundError:
            return self.record.outcome().seconds
        return float(values["job_seconds"])


def write_job(path: Path, job: Job) -> None:
    values = {"config": config_to_dict(job.config), "probes": {name: dict(o) for name, o in job.probes.items()}}
    write_atomically(path, yaml.safe_dump(values, sort_keys=False))


def read_job(path: Path) -> Job:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Job(config_from_dict(values["config"]), values["probes"])
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise InputError(f"cannot read the job {path}: {' '.join(str(error).split())}") from None
