"""Draws what `python -m normlab status` shows of a folder of runs, as it is now: docs/status.svg.

python scripts/status_picture.py RUNS_DIR      while a study is under way there
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console

from normlab.records.progress import RunsFolder
from normlab.records.status import Wanted, status_view

PICTURE = Path(__file__).parent.parent / "docs" / "status.svg"
WIDTH, HEIGHT = 132, 22
"""Of the terminal, in characters."""


def main(runs_dir: Path) -> None:
    console = Console(file=io.StringIO(), record=True, width=WIDTH, height=HEIGHT, force_terminal=True)
    statuses, studies = RunsFolder(runs_dir).look()
    view = status_view(runs_dir, statuses, studies, Wanted(), console, HEIGHT)
    console.print(view, highlight=False, markup=False)
    # An id that is always the same: the same view is the same file. Fonts of the web are left out: it is to look the
    # same without a network.
    picture = console.export_svg(title="make status", unique_id="status")
    PICTURE.write_text(re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL), encoding="utf-8")
    print(f"{PICTURE}: {PICTURE.stat().st_size / 1024:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs"))
