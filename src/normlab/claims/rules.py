"""The rule of an argument as it stood when its verdict runs began: `results/<scale>/<claim>.json`.

A claim's file holds all of the rule: what is compared, by how much, on which seeds. Its hash tells whether it was
changed once there were numbers to see.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

from normlab.config import InputError
from normlab.records.disk import parse_json, to_json, write_atomically
from normlab.records.environment import last_commit

__all__ = ["Rule", "present_sha256", "read_rule", "rule_now", "rule_path", "write_rule"]


@dataclass(frozen=True)
class Rule:
    """A claim's file at some time.

    Args:
        rule_commit: the last commit that changed it; "+" after it if it was changed since, empty if unknown.
        rule_sha256: of its bytes.
    """

    rule_commit: str
    rule_sha256: str


def rule_path(table: Path) -> Path:
    """Where the rule of the numbers in `table` is."""
    return table.with_suffix(".json")


def present_sha256(claim_id: str) -> str:
    """Of the claim's file as it is; empty if it is not one of this package."""
    path = _file(claim_id)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def rule_now(claim_id: str) -> Rule:
    return Rule(last_commit(_file(claim_id)), present_sha256(claim_id))


def write_rule(path: Path, rule: Rule) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, to_json(dataclasses.asdict(rule), indent=2) + "\n")


def read_rule(path: Path) -> Rule | None:
    """What `write_rule` wrote; None if there is no file.

    Raises:
        InputError: it is another file.
    """
    try:
        return Rule(**parse_json(path.read_bytes(), str(path)))
    except FileNotFoundError:
        return None
    except TypeError:
        raise InputError(f"{path} does not say which rule was fixed; restore it") from None


def _file(claim_id: str) -> Path:
    return Path(__file__).parent / f"{claim_id}.py"
