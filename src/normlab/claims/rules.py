"""The rule of an argument as it stood when its verdict runs began: `results/<scale>/<claim>.json`.

The rule is what decides: comparisons and what they read, runs of all arms, sweeps, seeds. Its hash tells whether any of
it was changed once there were numbers to see; sentences, and what is measured beside, may change.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

from normlab.claims.base import Claim, Scale
from normlab.config import InputError, config_hash
from normlab.records.disk import parse_json, to_json, write_atomically
from normlab.records.environment import code_commit, commit_label

__all__ = ["Rule", "read_rule", "rule_now", "rule_path", "rule_sha256", "write_rule"]


@dataclass(frozen=True)
class Rule:
    """A claim's rule at some time.

    Args:
        rule_commit: of the code; "+" after it if files differed from it, empty if unknown.
        rule_sha256: see `rule_sha256`.
        verdict_runs_before: verdict runs that were there by then, since other arguments have them too.
    """

    rule_commit: str
    rule_sha256: str
    verdict_runs_before: int = 0


def rule_path(table: Path) -> Path:
    """Where the rule of the numbers in `table` is."""
    return table.with_suffix(".json")


def rule_sha256(claim: Claim, scale: Scale) -> str:
    """Of all that decides."""
    compared = {comparison.measurement for comparison in claim.comparisons}
    decides = {
        "comparisons": [[c.arm, c.control, c.measurement, c.predicted, c.margin] for c in claim.comparisons],
        "measurements": {m.name: [repr(m.read), m.lower_is_better] for m in claim.measurements if m.name in compared},
        "runs": {
            name: {arm: config_hash(setting.config(scale, arm)) for arm in setting.arms}
            for name, setting in claim.settings.items()
        },
        "sweeps": {name: list(setting.learning_rates) for name, setting in claim.settings.items()},
        "seeds": [list(claim.tuning_seeds), list(claim.verdict_seeds)],
    }
    return hashlib.sha256(to_json(decides).encode()).hexdigest()


def rule_now(claim: Claim, scale: Scale, verdict_runs_before: int) -> Rule:
    return Rule(commit_label(code_commit()), rule_sha256(claim, scale), verdict_runs_before)


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
