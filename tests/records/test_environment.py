"""The environment says what a run ran on, and nothing about who ran it where."""

from __future__ import annotations

import json
import platform
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from normlab.records import environment
from normlab.records.environment import collect_environment


def test_it_names_versions_and_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [f"{Path.home()}/bin/normlab", "train", f"--data.corpus={Path.home()}/my.txt"])
    values = json.loads(json.dumps(collect_environment()))
    assert values["versions"]["python"] == platform.python_version()
    assert "torch" in values["versions"]
    assert values["cores"] >= 1
    assert values["memory_gib"] > 0
    assert "-core" in values["machine"]
    assert values["argv"] == ["normlab", "train", "--data.corpus=~/my.txt"]
    assert collect_environment(["NVIDIA H200"])["machine"] == "NVIDIA H200"


def test_it_names_neither_host_nor_user(monkeypatch: pytest.MonkeyPatch) -> None:
    name = platform.uname()._replace(node="name-of-the-host")
    monkeypatch.setattr(platform, "uname", lambda: name)
    monkeypatch.setattr(socket, "gethostname", lambda: "name-of-the-host")
    monkeypatch.setenv("NORMLAB_TEST_SECRET", "mellon")
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("USER", "somebody")
    monkeypatch.setattr(sys, "argv", ["/home/somebody/bin/normlab", "--config=/home/somebody/a.yaml"])
    assert platform.node() == "name-of-the-host"
    text = json.dumps(collect_environment())
    assert not [word for word in ("name-of-the-host", "mellon", "somebody") if word in text]


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


def test_commit_and_dirty_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    monkeypatch.setattr(environment, "_git", environment._git.__wrapped__)
    unknown = {"commit": None, "dirty": None}
    assert collect_environment()["git"] == unknown
    git(tmp_path, "init", "-q")
    (tmp_path / "other").write_text("")
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "-q", "-m", "somebody else's repository")
    (tmp_path / "record.py").write_text("")
    assert collect_environment()["git"] == unknown
    git(tmp_path, "add", "record.py")
    git(tmp_path, "commit", "-q", "-m", "ours")
    clean = collect_environment()["git"]
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "record.py").write_text("changed")
    assert collect_environment()["git"] == {"commit": clean["commit"], "dirty": True}
    monkeypatch.setenv("PATH", "")
    assert collect_environment()["git"] == unknown


def test_the_commit_is_that_of_the_first_time_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs is what was imported then."""
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    (tmp_path / "record.py").write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    first = collect_environment()["git"]
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "second")
    assert collect_environment()["git"] == first


def test_records_import_neither_torch_nor_wandb() -> None:
    code = (
        "import sys, normlab.records.record, normlab.records.environment, normlab.records.wandb_mirror;"
        "sys.exit(bool({'torch', 'wandb'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
