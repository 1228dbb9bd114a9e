"""The table of a claim's numbers, `results/<scale>/<claim>.csv`: all that a verdict needs, read in milliseconds."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from normlab.config import InputError
from normlab.records.disk import write_atomically

__all__ = ["Phase", "Row", "cell", "read_rows", "write_rows"]

Phase = Literal["tuning", "verdict"]


@dataclass(frozen=True)
class Row:
    """One measurement of one run.

    Args:
        setting: where the arms are compared.
        arm: what differs.
        seed: of the run.
        phase: tuning (the rate is chosen from these) or verdict.
        learning_rate: of the run.
        measurement: name, with its unit.
        value: NaN if a diverged run has none.
        diverged: whether the run diverged.
        run_id: of the record.
        config_hash: SHA-256 of everything that decides the run's numbers.
        commit: of the code that trained it; "+" after it if files differed from it, empty if unknown.
        machine: its kind.
        seconds: of training.
    """

    setting: str
    arm: str
    seed: int
    phase: Phase
    learning_rate: float
    measurement: str
    value: float
    diverged: bool
    run_id: str
    config_hash: str
    commit: str
    machine: str
    seconds: float


_COLUMNS = [f.name for f in fields(Row)]
_PARSE: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": lambda text: bool(("0", "1").index(text)),
    "Phase": lambda text: get_args(Phase)[get_args(Phase).index(text)],
}
"""How a column is read, by the type of its field."""


def cell(value: Any) -> Any:
    """`value` as it goes into a table that a spreadsheet may open: no text in it begins as a formula does."""
    if isinstance(value, bool):
        return int(value)
    if not isinstance(value, str):
        return value
    text = value.replace("\r", r"\r")  # read as a line end, it would break the table
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t")) else text


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replace the table at `path`, whole or not at all; the order of the rows is the caller's."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(_COLUMNS)
    for row in rows:
        # repr gives a float back bit by bit.
        table.writerow([cell(getattr(row, name)) for name in _COLUMNS])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue())


def read_rows(path: Path) -> list[Row]:
    """The rows in the order of the file; none if there is no file.

    Raises:
        InputError: it is not such a table.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    table = csv.reader(io.StringIO(text))
    if next(table, None) != _COLUMNS:
        raise InputError(f"{path} has other columns than {', '.join(_COLUMNS)}; restore it, or move it away")
    rows: list[Row] = []
    for values in table:
        try:
            rows.append(Row(*(_PARSE[str(f.type)](value) for f, value in zip(fields(Row), values, strict=True))))
        except ValueError as error:
            raise InputError(f"{path} line {table.line_num}: {error}; restore it, or move it away") from None
    return rows
