"""Garbage is not looked for while much is imported, and is again afterwards."""

from __future__ import annotations

import gc
import sys
from contextlib import suppress
from types import ModuleType

import pytest

from normlab.machine.imports import without_collecting


@pytest.mark.parametrize("on", [True, False])
def test_collection_stands_still_and_is_as_before_afterwards(on: bool) -> None:
    before = gc.isenabled()
    (gc.enable if on else gc.disable)()
    try:
        with suppress(ImportError), without_collecting():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == on
    finally:
        (gc.enable if before else gc.disable)()


def test_what_was_imported_is_left_out_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[list[int]] = []
    with without_collecting():
        kept += [[] for _ in range(1000)]
    frozen = gc.get_freeze_count()
    with without_collecting():
        monkeypatch.setitem(sys.modules, "made_up", ModuleType("made_up"))
        kept += [[] for _ in range(1000)]
    assert gc.get_freeze_count() >= frozen + 1000
    frozen = gc.get_freeze_count()
    with without_collecting():
        kept += [[] for _ in range(1000)]  # no import: what is garbage by now is to be found
    assert gc.get_freeze_count() <= frozen
