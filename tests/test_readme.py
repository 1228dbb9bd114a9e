"""What README, CONTRIBUTING and the configs say is true of the tree."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from normlab.config import available_norms
from normlab.data.corpora import corpus_names

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def shipped() -> ModuleType:
    spec = importlib.util.spec_from_file_location("shipped_configs", ROOT / "scripts" / "shipped_configs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readmes_table_is_that_of_results(shipped: ModuleType):
    table = README.split(shipped.BEGIN)[1].split(shipped.END)[0].strip()
    assert table == shipped.markdown(shipped.read_table())


def test_results_name_commands_that_parse_to_their_run_ids(shipped: ModuleType):
    from normlab.__main__ import parse_run
    from normlab.config import run_id

    rows = shipped.read_table()
    assert rows
    for row in rows:
        arguments = row["command"].removeprefix("python -m normlab train ").split()
        assert run_id(parse_run(arguments)) == row["run"]


def test_make_targets_that_are_named_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for name in ("README.md", "CONTRIBUTING.md"):
        named = set(re.findall(r"make ([a-z]+)", (ROOT / name).read_text()))
        assert named - {"can"} <= targets


def test_make_alone_prints_help():
    printed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for word in ("make train", "make test", "make watch", "NORM", "CONFIG", "ARGS"):
        assert word in printed


def test_make_help_lists_the_norms():
    printed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    line = next(line for line in printed.splitlines() if line.startswith("    NORM "))
    assert sorted(line.split("NORM")[1].split("(")[0].split()) == sorted(available_norms())


def test_norms_and_corpora_of_the_readme_are_those_that_exist():
    listed = re.search(r"`--norm` \| `([^`]+)`", README)
    assert listed is not None
    assert sorted(listed[1].split()) == sorted(available_norms())
    section = README.split("| name | task | tokens |")[1].split("\n\n")[0]
    assert set(re.findall(r"`([^`]+)`", section)) == set(corpus_names())


def test_files_of_the_tree_exist():
    tree = README.split("## The tree")[1].split("```")[1]
    for name in re.findall(r"^(\S+)\s", tree, re.M):
        if name not in ("runs/",):
            assert (ROOT / name).exists(), name
    for name in re.findall(r"^  (\S+)\s", tree, re.M):
        assert (ROOT / "src" / "normlab" / name).exists(), name
