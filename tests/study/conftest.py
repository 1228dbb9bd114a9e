"""A study whose workers are stand-ins."""

from __future__ import annotations

from pathlib import Path

import pytest
from study_bench import Bench

from normlab.execution import local
from normlab.study import running


@pytest.fixture
def bench(tmp_path: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    stand_in = Path(__file__).with_name("stand_in_worker.py")
    monkeypatch.setattr(local, "WORKER", (str(stand_in),))
    monkeypatch.setattr(running, "POLL_SECONDS", 0.02)
    return Bench(tmp_path, tiny_text)


@pytest.fixture
def slow_site(tmp_path: Path) -> Path:
    """A folder which, first in PYTHONPATH, makes the workers of any Python be `slow_worker.py`."""
    site = tmp_path / "site"
    site.mkdir()
    worker = str(Path(__file__).with_name("slow_worker.py"))
    (site / "sitecustomize.py").write_text(
        f"import normlab.execution.local as local\nlocal.WORKER = ({worker!r},)\nlocal.PRELOADED = []\n"
    )
    return site
