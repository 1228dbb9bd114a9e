"""What stands in a variable of make reaches normlab as it is: neither make nor a shell runs it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ODD = [
    "$(shell touch {mark})",
    "$(shell touch {mark}",
    "`touch {mark}`",
    '"; touch {mark}; "',
    "'; touch {mark}; '",
    "$$(touch {mark})",
    "it's $HOME and $$HOME #1 \\ \\\\ %",
    "with  two spaces/and a *",
    "--flag",
]


def made(
    target: str, tmp_path: Path, variables: dict[str, str], environment: dict[str, str] | None = None
) -> list[str]:
    """The arguments that `make target` gives to Python, each in a line of its own."""
    if shutil.which("make") is None:
        pytest.skip("no make on this machine")
    python, ready = tmp_path / "python", tmp_path / "ready"
    python.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done\n')
    python.chmod(0o755)
    ready.touch()
    command = ["make", "-s", "-C", str(ROOT), target, f"PY={python}", f"READY={ready}"]
    command += [f"{name}={value}" for name, value in variables.items()]
    # `make test ARGS=...` hands its own variables on.
    own = ("MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "MFLAGS", "ARGS")
    clean = {name: value for name, value in os.environ.items() if name not in own}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**clean, **(environment or {})})
    return done.stdout.splitlines()


@pytest.mark.parametrize("odd", ODD)
def test_train(odd: str, tmp_path: Path) -> None:
    mark = tmp_path / "it_ran"
    value = odd.replace("{mark}", str(mark))
    flags = {"CONFIG": "--config", "MODEL": "--model", "NORM": "--norm", "DATA": "--data", "SEED": "--seed"}
    expected = ["-m", "normlab", "train", *(word for flag in flags.values() for word in (flag, value))]
    assert made("train", tmp_path, dict.fromkeys(flags, value)) == expected
    assert made("train", tmp_path, {}, dict.fromkeys(flags, value)) == expected
    assert not mark.exists()


@pytest.mark.parametrize("odd", ODD[:5])
def test_study(odd: str, tmp_path: Path) -> None:
    mark = tmp_path / "it_ran"
    value = odd.replace("{mark}", str(mark))
    words = made("study", tmp_path, {"CLAIM": value, "SCALE": value})
    assert words == ["-m", "normlab", "study", value, "--scale", value]
    assert not mark.exists()


@pytest.mark.parametrize("odd", ODD[:5])
def test_dashboard(odd: str, tmp_path: Path) -> None:
    mark = tmp_path / "it_ran"
    value = odd.replace("{mark}", str(mark))
    words = made("dashboard", tmp_path, {"ENTITY": value, "PROJECT": value})
    assert words == ["scripts/wandb_workspace.py", "--entity", value, "--project", value]
    assert not mark.exists()


def test_arguments_are_several_words_and_what_is_empty_is_left_out(tmp_path: Path) -> None:
    words = made("train", tmp_path, {"NORM": "ln", "ARGS": "--optim.lr 1e-3 --data.text_column 'the text'"})
    assert words[3:] == ["--norm", "ln", "--optim.lr", "1e-3", "--data.text_column", "the text"]
    assert made("study", tmp_path, {}) == ["-m", "normlab", "study"]


def test_a_line_end_ends_no_command(tmp_path: Path) -> None:
    mark = tmp_path / "it_ran"
    for value in (f"a\ntouch {mark}\n", f"a'\ntouch {mark}\n'"):
        with pytest.raises(subprocess.CalledProcessError):
            made("train", tmp_path, {"DATA": value})
    assert not mark.exists()
