"""A stand-in for nvidia-smi."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = """#!/bin/sh
case "$1" in
  -L) cat {folder}/list ;;
  --query-gpu=uuid,name,memory.total) cat {folder}/gpus ;;
  --query-gpu=uuid,memory.used,utilization.gpu) cat {folder}/loads ;;
  *) echo "$1 is not a valid option" >&2; exit 6 ;;
esac
"""


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says from now on what it is given: lines of `-L`, of the GPUs there are and of their loads."""
    folder = tmp_path / "nvidia"
    folder.mkdir()
    program = folder / "nvidia-smi"
    program.write_text(SCRIPT.format(folder=folder))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(folder), os.environ["PATH"]]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def says(**texts: str) -> None:
        for name, text in texts.items():
            (folder / name).write_text(text)

    says(list="", gpus="", loads="")
    return says
