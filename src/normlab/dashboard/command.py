"""`make dashboard`: write what is to be shown as files, and save it in W&B if there is an account."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from normlab.claims.base import Claim
from normlab.config import InputError
from normlab.dashboard import spec
from normlab.records.disk import parse_json, to_json, write_atomically
from normlab.records.wandb_mirror import Account
from normlab.report.judged import judge_all

__all__ = ["dashboard"]

SAVED = "saved.json"
AGAIN = "then the same command saves them in W&B"


def dashboard(claims: Sequence[Claim], results: Path, output: Path, entity: str, project: str) -> int:
    """Write `<section>.json`, `all.json` and `report.json` into `output`; with an account save them in W&B too.

    What was saved before is changed in place: `saved.json` says under which ids.

    Args:
        results: folder of the tables, for the verdicts.
        entity: in W&B; empty takes the account's default.
        project: in W&B.

    Returns:
        The exit code: 1 if there is an account, and saving failed. The files are there all the same.

    Raises:
        InputError: a table is damaged, or a folder cannot be written.
    """
    arguments = judge_all(claims, results)
    account = Account.find()
    why = account.why_not
    if not why and not entity:
        entity, why = _default_entity()
    built = spec.build(arguments, entity, project)
    _write(built, output)
    if not why:
        why = _save(built, output / SAVED, f"{account.server} {entity}/{project}")
    if why:
        print(f"W&B: {why}; {AGAIN}" if account.has_key else f"there is no API key: `wandb login`, {AGAIN}")
    return 1 if why and account.has_key else 0


def _write(built: spec.Dashboard, output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, item in _items(built).items():
            write_atomically(
                output / f"{name}.json", json.dumps(spec.spec_of(item), indent=1, ensure_ascii=False) + "\n"
            )
    except OSError as error:
        raise InputError(f"cannot write to {output}: {error.strerror}; give another folder with --output") from None
    print(f"wrote {', '.join(f'{name}.json' for name in _items(built))} to {output}")


def _items(built: spec.Dashboard) -> dict[str, Any]:
    return {**built.views, "report": built.report}


def _default_entity() -> tuple[str, str]:
    """The account's entity, or why there is none."""
    try:
        return spec.default_entity(), ""
    except Exception as error:  # of a library over a network: any
        return "", _one_line(error)


def _save(built: spec.Dashboard, saved: Path, place: str) -> str:
    """Save all; returns why that failed, in one line, or nothing."""
    try:
        known = parse_json(saved.read_bytes(), str(saved))
    except FileNotFoundError:
        known = {}
    ids = known.setdefault(place, {})
    try:
        # The report first: it makes the project if there is none.
        for name, item in reversed(_items(built).items()):
            url, ids[name] = spec.save(item, ids.get(name, {}))
            print(f"{name}: {url}")
    except Exception as error:  # as above
        return _one_line(error)
    finally:
        write_atomically(saved, to_json(known, indent=1) + "\n")
    return ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
