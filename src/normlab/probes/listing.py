"""Probes and what they measured as tables for the terminal."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from normlab.config import available_probes
from normlab.machine.terminal import PlainConsole
from normlab.probes.base import probe_class

__all__ = ["show_measurement", "show_probes"]


def show_probes(console: PlainConsole | None = None) -> None:
    """Every probe with the first line of its description."""
    table = _table(no_wrap=True)
    for name in available_probes():
        table.add_row(name, (probe_class(name).__doc__ or "").partition("\n")[0])
    console = console or _console()
    console.print("usage: python -m normlab probe NAME [RUN ...] [--option value]; NAME --help says more\n")
    console.print(table)


def show_measurement(values: Mapping[str, Any], console: PlainConsole | None = None) -> None:
    """The summary of what `run_probe` returned, and where the rest is."""
    table = _table(no_wrap=False)
    for name, value in values["summary"].items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.4g}")
    console = console or _console()
    console.print(table)
    console.print(f"{len(values['rows'])} rows in {values['path']}", soft_wrap=True)


def _table(*, no_wrap: bool) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=no_wrap)
    table.add_column(overflow="fold")
    return table


def _console() -> PlainConsole:
    return PlainConsole(width=None if os.isatty(1) else 120)
