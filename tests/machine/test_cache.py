"""Libraries are loaded from the cache: nobody but the user can have put them there."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from normlab.machine import c_kernels, cache
from normlab.recurrence.kernels import LSTM


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache._for_this_process.cache_clear()


def test_it_is_made_for_the_user_alone(tmp_path: Path) -> None:
    folder = cache.folder()
    assert folder == tmp_path / "cache" / "normlab"
    assert folder.stat().st_mode & 0o777 == 0o700


def test_one_that_others_can_write_to_is_closed_to_them(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "normlab"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert cache.folder() == folder
    assert folder.stat().st_mode & 0o022 == 0


def test_one_of_somebody_else_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = cache.folder()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    caplog.set_level(logging.WARNING)
    assert not cache.folder().is_relative_to(tmp_path)
    assert f"{theirs.resolve()} belongs to somebody else" in caplog.text


def test_one_whose_place_others_can_take_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    assert not cache.folder().is_relative_to(tmp_path)
    (tmp_path / "cache").chmod(0o1777)  # as /tmp is
    assert cache.folder().is_relative_to(tmp_path)


def test_one_for_a_process_goes_with_it(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder can be made here")
    command = "from normlab.machine import cache; folder = cache.folder(); print(folder, folder.is_dir())"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    folder, was_there = done.stdout.split()
    assert was_there == "True"
    assert not Path(folder).exists()


def test_whose_file_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    assert not cache.is_own(path)
    path.touch(mode=0o600)
    link.symlink_to(path)
    assert cache.is_own(path)
    assert not cache.is_own(link)
    path.chmod(0o622)
    assert not cache.is_own(path)
    path.chmod(0o600)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert not cache.is_own(path)


def _compiler_of_nothing(folder: Path, program: str) -> Path:
    """A compiler that takes no time: its kernels have the right names and do nothing."""
    (folder / "nothing.c").write_text("".join(f"void {name}(void) {{}}\n" for name in LSTM.functions))
    script = folder / "cc"
    script.write_text(
        "#!/bin/sh\n"
        'case "$1" in --version) echo nothing; exit ;; '
        f'-shared) exec {program} "$@" ;; esac\n'
        'for out in "$@"; do :; done\n'
        f'exec {program} -fPIC -c {folder / "nothing.c"} -o "$out"\n'
    )
    script.chmod(0o755)
    return script


def test_a_planted_library_is_not_loaded_but_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = c_kernels.compiler()
    if program is None:
        pytest.skip("no C compiler on this machine")
    monkeypatch.setenv("CC", str(_compiler_of_nothing(tmp_path, program)))
    monkeypatch.setattr(c_kernels, "_libraries", {})
    monkeypatch.setattr(c_kernels, "_failed", set())
    # Where each of the flags tried would look.
    real, places = LSTM._place, []
    monkeypatch.setattr(LSTM, "_place", lambda *args: places.append(real(*args)) or places[-1])
    assert LSTM.find(torch.float32) is None
    mark, source, planted = tmp_path / "it_ran", tmp_path / "planted.c", tmp_path / "planted.so"
    source.write_text(
        f'#include <stdio.h>\n__attribute__((constructor)) void run() {{ fclose(fopen("{mark}", "w")); }}'
    )
    subprocess.run([program, "-shared", "-fPIC", str(source), "-o", str(planted)], check=True)
    for place in places:
        shutil.copy(planted, place)
        place.chmod(0o777)
    c_kernels._libraries.clear()
    assert LSTM.find(torch.float32) is None
    assert LSTM.load(torch.float32) is not None
    assert not mark.exists()
    built = {place for place in places if place.read_bytes() != planted.read_bytes()}
    assert len(built) == 1
    assert built.pop().stat().st_mode & 0o022 == 0
