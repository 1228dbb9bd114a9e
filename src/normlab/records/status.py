"""`python -m normlab status`: all runs as a table, once or again and again; no torch."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from normlab.config import InputError, require_choice
from normlab.machine.terminal import printable
from normlab.records.disk import to_json
from normlab.records.notice import StudyNotice
from normlab.records.progress import SPLITS, STATES, RunsFolder, RunStatus, duration

__all__ = ["Sort", "Wanted", "are_mirrored", "show_json", "show_status", "status_view", "watch_status"]

Sort = Literal["state", "run", "loss", "time"]
COLOURS = {"running": "green", "waiting": "blue", "finished": "", "diverged": "magenta", "interrupted": "yellow"}
PROBLEM = "red"
WIDE, WIDEST = 115, 130
"""Characters of a terminal that has room for all columns, and for bars too."""
BAR_WIDTH = 12
MOST_IN_TERMINAL = 50
EXPLAINED = ("failed", "damaged")
"""States whose reason is worth a line of its own where a column would cut it."""


@dataclasses.dataclass(frozen=True)
class _Column:
    name: str
    cell: Callable[[RunStatus], RenderableType]
    side: Literal["left", "right"] = "left"
    gives_way: bool = False  # where a terminal is narrow


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which runs, in which order.

    Args:
        states: those to show; empty takes all but archived ones.
        claim: beginning of the id of the argument that a run serves.
        sort: state (under way first, then what needs a look), run (by id), loss (valid), time (last sign of life).
        limit: at most so many, 0 for all; None takes what a terminal has room for, and all in a pipe.

    Raises:
        InputError: there is no such state, or the limit is negative.
    """

    states: tuple[str, ...] = ()
    claim: str = ""
    sort: Sort = "state"
    limit: int | None = None

    def __post_init__(self) -> None:
        for state in self.states:
            require_choice("state", state, STATES)
        if self.limit is not None and self.limit < 0:
            raise InputError(f"limit is {self.limit}; it must be at least 1, or 0 for all")

    def of(self, statuses: Sequence[RunStatus]) -> list[RunStatus]:
        """Those wanted, in order; the limit is left to whoever shows them."""
        states = self.states or [state for state in STATES if state != "archived"]
        chosen = [one for one in statuses if one.state in states and one.claim.startswith(self.claim)]
        keys: dict[Sort, Callable[[RunStatus], tuple[float | str, ...]]] = {
            "state": _by_state,
            "run": lambda one: (one.id,),
            "loss": lambda one: (_valid_loss(one), one.id),
            "time": lambda one: (_age(one), one.id),
        }
        return sorted(chosen, key=keys[self.sort])


def _by_state(one: RunStatus) -> tuple[float, float]:
    """What ended well by when it did; of those that wait the first stay first."""
    has_ended = one.state in ("diverged", "finished")
    return STATES.index("finished" if has_ended else one.state), _age(one) if has_ended else 0.0


def _valid_loss(one: RunStatus) -> float:
    """Infinite if there is none, or it is no number, which cannot be sorted."""
    loss = one.losses_nats.get("valid", math.inf)
    return math.inf if math.isnan(loss) else loss


def show_status(runs_dir: Path, wanted: Wanted, console: Console | None = None) -> None:
    """Print the table; in a pipe too, where nothing is cut off."""
    console = console or Console(width=None if os.isatty(1) else 10_000)
    statuses, studies = RunsFolder(runs_dir).look()
    console.print(status_view(runs_dir, statuses, studies, wanted, console), highlight=False, markup=False)


def watch_status(runs_dir: Path, wanted: Wanted, every: float, hint: str = "", console: Console | None = None) -> None:
    """Show the table until Ctrl-C, as it is every so many seconds.

    Args:
        hint: a line to stand below it.

    Raises:
        InputError: there is no terminal, or `every` is too small.
    """
    console = console or Console()
    if not console.is_terminal:
        raise InputError("--watch needs a terminal; leave it out for the table as it is now")
    if not every >= 0.1:
        raise InputError(f"every is {every}; it must be at least 0.1 seconds")
    folder = RunsFolder(runs_dir)
    view: RenderableType = ""
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                statuses, studies = folder.look()
                height = console.height - 2 * bool(hint)
                view = status_view(runs_dir, statuses, studies, wanted, console, height)
                live.update(Group(view, "", Text(hint, "dim")) if hint else view, refresh=True)
                time.sleep(every)
    except KeyboardInterrupt:
        pass
    # The other screen is gone with what was on it; what was seen last stays.
    console.print(view, highlight=False, markup=False)


def show_json(runs_dir: Path, wanted: Wanted) -> None:
    """Print `runs` and `studies` as one JSON object: the fields of `RunStatus` and `StudyNotice`."""
    statuses, studies = RunsFolder(runs_dir).look()
    chosen = wanted.of(statuses)
    values = {
        "counts": dict(Counter(one.state for one in statuses)),
        "ended_in_the_last_hour": _ended_lately(statuses),
        "studies": [dataclasses.asdict(study) for study in studies],
        "runs": [dataclasses.asdict(one) for one in chosen[: wanted.limit or None]],
    }
    Console().out(to_json(values, indent=2), highlight=False)


def are_mirrored(statuses: Sequence[RunStatus]) -> bool:
    """Whether W&B has a part in all that is under way; if nothing is, in anything."""
    under_way = [one.is_mirrored for one in statuses if one.state == "running"]
    return all(under_way) if under_way else any(one.is_mirrored for one in statuses)


def status_view(
    runs_dir: Path,
    statuses: Sequence[RunStatus],
    studies: Sequence[StudyNotice],
    wanted: Wanted,
    console: Console,
    height: int = 0,
) -> RenderableType:
    """Counts, studies under way, and the table.

    Args:
        height: lines that there is room for; 0 if it does not matter.
    """
    chosen = wanted.of(statuses)
    parts: list[RenderableType] = [_counts(runs_dir, statuses), *(_study(study, console) for study in studies)]
    limit = MOST_IN_TERMINAL if wanted.limit is None and console.is_terminal else wanted.limit or len(chosen)
    room = max(1, height - len(parts) - 4) if height else limit
    shown = chosen[: min(room, limit)]
    reasons = [Text(f"{one.id}: {one.note}", PROBLEM) for one in shown if _is_explained(one, console)]
    if height and reasons:
        # In a view of fixed height they take the place of rows.
        most = max(1, room // 3)
        reasons = [Text(text.plain, text.style, no_wrap=True, overflow="ellipsis") for text in reasons[:most]]
        shown = shown[: max(1, min(len(shown), room - len(reasons) - 1))]
    parts += ["", _table(shown, console)] if shown else ["", Text("no run matches" if statuses else "no runs yet")]
    if len(shown) < len(chosen):
        more = f"... and {len(chosen) - len(shown)} more"
        parts.append(Text(more if height else f"{more}; --limit 0 shows all", "dim"))
    if reasons:
        parts += ["", *reasons]
    return Group(*parts)


def _counts(runs_dir: Path, statuses: Sequence[RunStatus]) -> Text:
    counts = Counter(one.state for one in statuses)
    line = Text(f"{runs_dir}  ", "bold", no_wrap=True, overflow="ellipsis")
    for state in STATES:
        if counts[state]:
            line.append(f"{counts[state]} {state}  ", _colour(state))
    return line.append(f"{_ended_lately(statuses)} ended in the last hour", "not bold")


def _ended_lately(statuses: Sequence[RunStatus]) -> int:
    return sum(one.state in ("finished", "diverged") and _age(one) <= 3600 for one in statuses)


def _study(study: StudyNotice, console: Console) -> RenderableType:
    names = printable(", ".join(claim.partition("_")[0] for claim in study.claims))
    left = None if study.seconds_left is None else max(0.0, study.seconds_left - (time.time() - study.written))
    said = f"{study.done}/{study.total} runs"
    if left is not None:
        at = time.localtime(time.time() + left)
        said += f", about {duration(left)} left, until {time.strftime('%H:%M' if left < 43200 else '%a %H:%M', at)}"
    if study.later:
        said += f"; {study.later} wait for what others find"
    line = Table.grid(padding=(0, 1))
    parts: list[RenderableType] = [Text(f"study {names} ({study.scale})", "bold")]
    if console.color_system:
        width = 2 * BAR_WIDTH if console.width >= WIDE else BAR_WIDTH
        parts.append(ProgressBar(study.total, study.done, width, complete_style="cyan"))
    line.add_row(*parts, Text(said, no_wrap=True, overflow="ellipsis"))
    return line


def _columns(statuses: Sequence[RunStatus], console: Console) -> list[_Column]:
    """Those that there is something to say in, and room for."""
    is_wide = not console.is_terminal or console.width >= WIDE
    columns = [
        _Column("state", lambda one: Text(one.state, _colour(one.state))),
        _Column("run", lambda one: Text(one.id), gives_way=not is_wide),
    ]
    if is_wide and any(one.claim for one in statuses):
        columns.append(_Column("claim", lambda one: Text(one.claim.partition("_")[0])))
    columns.append(
        _Column("rate", lambda one: Text("" if math.isnan(one.learning_rate) else f"{one.learning_rate:g}"), "right")
    )
    if console.color_system and console.width >= WIDEST:
        columns.append(_Column("", _bar))
    columns.append(_Column("step", lambda one: Text(f"{one.step}/{one.steps}" if one.steps else ""), "right"))
    for split in SPLITS if is_wide else ("valid",):
        unit = "" if is_wide and split != SPLITS[-1] else " nats"
        columns.append(_Column(f"{split}{unit}", lambda one, split=split: _loss(one, split), "right"))
    columns.append(_Column("left", lambda one: _duration(one.seconds_left), "right"))
    if is_wide:
        columns.append(_Column("last", lambda one: _duration(one.silent_seconds), "right"))
    if any(one.note and not _is_explained(one, console) for one in statuses):
        note = _Column("note", lambda one: Text("" if _is_explained(one, console) else one.note), gives_way=True)
        columns.append(note)
    return columns


def _table(statuses: Sequence[RunStatus], console: Console) -> RenderableType:
    columns = _columns(statuses, console)
    if not console.is_terminal:
        return _plain([[Text(column.name), *map(column.cell, statuses)] for column in columns], columns)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1))
    for column in columns:
        table.add_column(column.name, justify=column.side, no_wrap=not column.gives_way)
    for one in statuses:
        cells = [column.cell(one) for column in columns]
        for column, cell in zip(columns, cells, strict=True):
            if column.gives_way and isinstance(cell, Text):
                cell.no_wrap, cell.overflow = True, "ellipsis"
        table.add_row(*cells)
    return table


def _plain(texts: Sequence[Sequence[RenderableType]], columns: Sequence[_Column]) -> Text:
    """For a pipe, where nothing is cut off, and where a table of rich takes half a second for a thousand rows."""
    padded = []
    for column, cells in zip(columns, texts, strict=True):
        plain = [str(cell) for cell in cells]
        width = max(map(len, plain))
        padded.append([text.rjust(width) if column.side == "right" else text.ljust(width) for text in plain])
    return Text("\n".join("  ".join(row).rstrip() for row in zip(*padded, strict=True)))


def _bar(one: RunStatus) -> RenderableType:
    if not one.steps:
        return Text("")
    done = one.steps if one.state == "finished" else one.step  # one that stopped early has no more to do
    colour = _colour(one.state) or "bright_black"
    return ProgressBar(one.steps, done, BAR_WIDTH, complete_style=colour, finished_style=colour)


def _loss(one: RunStatus, split: str) -> Text:
    return Text(f"{one.losses_nats[split]:.3f}" if split in one.losses_nats else "")


def _duration(seconds: float | None) -> Text:
    return Text("" if seconds is None else duration(seconds))


def _is_explained(one: RunStatus, console: Console) -> bool:
    """Beneath the table, in full."""
    return one.state in EXPLAINED and console.is_terminal


def _colour(state: str) -> str:
    return COLOURS.get(state, "dim" if state == "archived" else PROBLEM)


def _age(one: RunStatus) -> float:
    return math.inf if one.silent_seconds is None else one.silent_seconds
