"""The small tables behind an argument's figures, beside its table of numbers, so that no record is needed to draw.

results/<scale>/<claim>.curves.csv    metrics by step and seconds of each verdict run
results/<scale>/<claim>.probes.csv    rows of probes, averaged over layers within a run, then over runs
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from normlab.claims.figures import ByX, Curves, Figure
from normlab.claims.rows import cell
from normlab.config import InputError
from normlab.records.disk import write_atomically
from normlab.records.record import RunRecord

__all__ = [
    "CurveRow",
    "ProbeRow",
    "Records",
    "curve_rows",
    "curves_path",
    "mean_and_std",
    "probe_rows",
    "probes_path",
    "read_table",
    "write_table",
]

Records = Mapping[tuple[str, str, int], RunRecord]
"""Verdict runs by setting, arm and seed."""

MOST_POINTS = 60
"""Of one line: what a figure of this size can show, and keeps a table below 200 kB."""
EARLY_POINTS = 20
"""Of these none is left out: statistics per time step differ most in the first ones."""


@dataclass(frozen=True)
class CurveRow:
    """A metric of one run after so many optimizer steps and seconds of training."""

    setting: str
    arm: str
    seed: int
    step: int
    seconds: float
    metric: str
    value: float


@dataclass(frozen=True)
class ProbeRow:
    """A quantity of a probe at one x: mean over `runs` runs and their standard deviation (0 for a single run).

    `kind` and `by` are as in `ByX`, `by` being the value; `axis` is the name of x.
    """

    setting: str
    arm: str
    probe: str
    kind: str
    by: str
    axis: str
    x: float
    quantity: str
    mean: float
    std: float
    runs: int


def curves_path(table: Path) -> Path:
    """Where the curves of the numbers in `table` are."""
    return table.with_suffix(".curves.csv")


def probes_path(table: Path) -> Path:
    """Where the probes' rows of the numbers in `table` are."""
    return table.with_suffix(".probes.csv")


def curve_rows(figures: Iterable[Figure], records: Records) -> list[CurveRow]:
    """What `Curves` among the figures need; values that are not finite are left out."""
    rows: list[CurveRow] = []
    for metric in dict.fromkeys(figure.metric for figure in figures if isinstance(figure, Curves)):
        for (setting, arm, seed), record in records.items():
            curve = [row for row in record.metrics() if math.isfinite(row.get(metric, math.nan))]
            rows += [
                CurveRow(setting, arm, seed, row["step"], round(row["seconds"], 2), metric, _rounded(row[metric]))
                for row in _thinned(curve)
            ]
    return rows


def probe_rows(figures: Iterable[Figure], records: Records) -> list[ProbeRow]:
    """What `ByX` among the figures need; a run without the probe, as a diverged one is, is left out."""
    rows: list[ProbeRow] = []
    for figure in figures:
        if isinstance(figure, ByX):
            for setting, arm in dict.fromkeys((setting, arm) for setting, arm, _ in records):
                of_arm = [record for (s, a, _), record in records.items() if (s, a) == (setting, arm)]
                rows += _reduced(figure, setting, arm, of_arm)
    return rows


def _reduced(figure: ByX, setting: str, arm: str, records: Sequence[RunRecord]) -> list[ProbeRow]:
    of_runs = [_run_means(figure, record.probe(figure.probe).get("rows", [])) for record in records]
    rows: list[ProbeRow] = []
    for by, quantity in dict.fromkeys((by, quantity) for means in of_runs for by, quantity, _ in means):
        found = {x for means in of_runs for b, q, x in means if (b, q) == (by, quantity)}
        for x in _thinned(sorted(found)):
            values = [means[by, quantity, x] for means in of_runs if (by, quantity, x) in means]
            mean, std = mean_and_std(values)
            where = (setting, arm, figure.probe, figure.kind, by, figure.x, _rounded(x))
            rows.append(ProbeRow(*where, quantity, _rounded(mean), _rounded(std), len(values)))
    return rows


def _run_means(figure: ByX, rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, float], float]:
    """Means by panel, quantity and x over the rows of one run, such as those of its layers."""
    values: dict[tuple[str, str, float], list[float]] = {}
    for row in rows:
        if row.get("kind", "") != figure.kind and figure.kind:
            continue
        for quantity in figure.y:
            value, x = row.get(quantity), row.get(figure.x)
            if value is not None and x is not None and math.isfinite(value):
                by = str(row[figure.by]) if figure.by else ""
                values.setdefault((by, quantity, float(x)), []).append(float(value))
    return {key: math.fsum(found) / len(found) for key, found in values.items()}


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation with n - 1, which of one value is 0."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, 0.0
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


Point = TypeVar("Point")


def _thinned(points: Sequence[Point]) -> list[Point]:
    """The first ones and then evenly spaced ones, the last included."""
    more, room = len(points) - EARLY_POINTS, MOST_POINTS - EARLY_POINTS
    if more <= room:
        return list(points)
    late = [points[EARLY_POINTS - 1 + math.ceil(number * more / room)] for number in range(1, room + 1)]
    return [*points[:EARLY_POINTS], *late]


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


Row = TypeVar("Row", CurveRow, ProbeRow)
_PARSE = {"str": str, "int": int, "float": float}


def write_table(path: Path, rows: Sequence[CurveRow] | Sequence[ProbeRow]) -> None:
    """Replace the table at `path`; without a row there is none."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    names = [f.name for f in fields(rows[0])]
    table.writerow(names)
    table.writerows([cell(getattr(row, name)) for name in names] for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue())


def read_table(path: Path, kind: type[Row]) -> list[Row]:
    """The rows of a table that `write_table` wrote; none if there is no file.

    Raises:
        InputError: it is no such table.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    names = [f.name for f in fields(kind)]
    table = csv.reader(io.StringIO(text))
    if next(table, None) != names:
        raise InputError(f"{path} has other columns than {', '.join(names)}; restore it, or remove it")
    rows: list[Row] = []
    for values in table:
        try:
            parsed = [_PARSE[str(f.type)](value) for f, value in zip(fields(kind), values, strict=True)]
        except ValueError as error:
            raise InputError(f"{path} line {table.line_num}: {error}; restore it, or remove it") from None
        rows.append(kind(*parsed))
    return rows
