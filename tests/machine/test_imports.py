"""Garbage is not looked for while much is imported, and is again afterwards."""

from __future__ import annotations

import gc
from contextlib import suppress

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
