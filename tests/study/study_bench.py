"""Studies whose workers only write records, so that a test of their order takes a second."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

from rich.console import Console
from tiny_study import local_workers, tiny_claim

from normlab.claims.base import Claim
from normlab.config import OutputConfig
from normlab.execution.engine import Engine
from normlab.study.plan import Study
from normlab.study.running import run_study


class Bench:
    """A folder for runs and results, and studies in it."""

    def __init__(self, folder: Path, text: Path) -> None:
        self.runs, self.results, self.text = folder / "runs", folder / "results", text
        self.runs.mkdir()

    def study(self, *claims: Claim) -> Study:
        output = OutputConfig(runs_dir=str(self.runs), wandb="off", progress=False)
        return Study(claims or (tiny_claim(self.text),), "small", output, self.results)

    def run(self, *claims: Claim, workers: int = 2, engine: Engine | None = None) -> tuple[int, str]:
        """Incomplete arguments, and what was printed."""
        said = StringIO()
        console = Console(file=said, width=200)
        engine = engine or local_workers(workers, self.runs, console.print)
        code = run_study(self.study(*claims), engine, console)
        return code, said.getvalue()

    def order(self, **of_norm: str) -> None:
        (self.runs / "orders.json").write_text(json.dumps(of_norm))

    def starts(self) -> list[str]:
        """Ids of runs in the order in which they were started."""
        path = self.runs / "starts"
        return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []
