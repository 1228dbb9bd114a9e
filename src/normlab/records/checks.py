"""What was checked by computation, without training: `results/exact.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from normlab.config import InputError
from normlab.records.disk import parse_json, to_json, write_atomically

__all__ = ["ExactCheck", "read_checks", "write_checks"]


@dataclass(frozen=True)
class ExactCheck:
    """One statement, the number that decides it, and whether it kept its bound.

    Args:
        name: of the function in `normlab/exact.py`.
        statement: what was computed on what, in one line.
        value: the number.
        bound: what it had to keep, such as "<= 1e-12".
        holds: whether it did.
    """

    name: str
    statement: str
    value: float
    bound: str
    holds: bool


def write_checks(path: Path, checks: Sequence[ExactCheck]) -> None:
    """Replace the file at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"checks": [dataclasses.asdict(check) for check in checks]}
    write_atomically(path, to_json(values, indent=2) + "\n")


def read_checks(path: Path) -> list[ExactCheck]:
    """What `write_checks` wrote; empty if there is no such file."""
    if not path.exists():
        return []
    try:
        return [ExactCheck(**check) for check in parse_json(path.read_bytes(), str(path))["checks"]]
    except (KeyError, TypeError):
        raise InputError(f"{path} holds no exact checks; write it anew with `make exact`") from None
