"""docs/norms.md is what the norms declare, and what its pictures show is what the norms do."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from normlab.config import available_norms
from normlab.norms import build_norm
from normlab.norms.base import Norm, Shares

SCRIPT = Path(__file__).parent.parent / "scripts" / "norms_table.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("norms_table", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


made = load()
SHAPE = (made.B, made.T, made.F)
ENTRIES = list(np.ndindex(*SHAPE))
# Options that change what is shared, beside the pools.
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("pnv", {"group_scaling": 4}),
    ("pn", {"group_scaling": 2, "pool": "prefix"}),
    ("pn", {"warmup": 0}),
    ("gn", {"groups": 2, "pool": "time"}),
    ("gn", {"groups": 1}),
    ("lrn", {"window": 2}),
    ("lrn", {"window": 4}),
]


def influences(norm: Norm) -> np.ndarray:
    """Boolean: entries of the output x entries of the input that change it, by changing one after the other."""
    torch.manual_seed(0)
    norm.double()
    x = torch.randn(SHAPE, dtype=torch.float64)
    with torch.no_grad():
        before = norm.normalize(x)[0].flatten()
        changed = []
        for entry in ENTRIES:
            other = x.clone()
            other[entry] += 0.5
            # Far below any change, far above rounding: gn and inorm over 2 entries give +-1 up to eps.
            changed.append((norm.normalize(other)[0].flatten() - before).abs() > 1e-10)
    return torch.stack(changed, 1).numpy()


def declared(norm: Norm) -> np.ndarray:
    return np.stack([made.shared_entries(norm, *SHAPE, entry).ravel() for entry in ENTRIES])


def compare_with_declared(norm: Norm) -> None:
    expected = declared(norm)
    # A statistic over its one entry alone makes an output constant (inorm, first time step): nothing changes it.
    told = (expected.sum(1) > 1) | (norm.shares == Shares())
    assert told.sum() > len(ENTRIES) / 2
    np.testing.assert_array_equal(influences(norm)[told], expected[told])


@pytest.mark.parametrize("variant", made.variants(), ids="-".join)
def test_shared_entries_are_those_that_matter_in_training(variant: Any) -> None:
    compare_with_declared(variant.build(made.F, **made.BLOCK_OPTIONS))


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_shared_entries_follow_options(name: str, options: dict[str, Any]) -> None:
    compare_with_declared(build_norm(name, made.F, **options))


@pytest.mark.parametrize("variant", made.variants(), ids="-".join)
def test_in_evaluation_stored_values_stand_in_or_nothing_changes(variant: Any) -> None:
    norm = variant.build(made.F, **made.BLOCK_OPTIONS).eval()
    if norm.needs_statistics:
        np.testing.assert_array_equal(influences(norm), np.eye(len(ENTRIES), dtype=bool))
    else:
        compare_with_declared(norm)
    assert ("stored" in made.panel(variant).evaluation) == norm.needs_statistics


@pytest.mark.parametrize("one", made.panels(), ids=lambda one: "-".join((*one.names, one.pool)))
def test_a_panel_shows_what_matters_to_its_marked_entry(one: Any) -> None:
    matters = influences(one.norm)[ENTRIES.index(one.entry)].reshape(SHAPE)
    kinds: dict[str, set[tuple[int, ...]]] = {kind: set() for kind in made.COLOURS}
    for face in made.faces(one.shared, one.entry):
        kinds[face.kind].add(face.entry)
    t = one.entry[1]
    assert kinds["marked"] == {one.entry}
    assert kinds["shared"] == {e for e in ENTRIES if matters[e] and e[1] <= t} - {one.entry}
    assert kinds["future"] == {e for e in ENTRIES if matters[e] and e[1] > t}
    assert bool(kinds["future"]) == bool(one.warning)


def test_faces_are_those_of_the_block_seen_from_the_front_top_and_right() -> None:
    b, t, f = SHAPE
    found = made.faces(np.zeros(SHAPE, bool), (0, 0, 0))
    assert len(found) == t * f + b * t + b * f
    assert {face.entry for face in found} == {e for e in ENTRIES if e[0] == 0 or e[1] == t - 1 or e[2] == 0}


def test_every_norm_and_pool_is_in_both_pictures() -> None:
    every = [(name, one.pool) for one in made.panels() for name in one.names]
    by_set = [(name, one.pool) for one in made.panels_by_set() for name in one.names]
    assert {name for name, _ in every} == set(available_norms())
    assert sorted(by_set) == sorted(every) == sorted(made.variants())
    for one in made.panels_by_set():
        for name in one.names:
            other = made.panel(made.Variant(name, one.pool))
            assert (other.entry, other.caption, other.evaluation) == (one.entry, one.caption, one.evaluation)
            np.testing.assert_array_equal(other.shared, one.shared)


@pytest.mark.parametrize("panels", ["panels", "panels_by_set"])
def test_no_text_leaves_its_panel(panels: str) -> None:
    figure = made.picture(getattr(made, panels)())
    figure.draw_without_rendering()
    for axes in figure.axes:
        frame = axes.get_window_extent()
        texts = [text.get_window_extent() for text in axes.texts if text.get_text()]
        assert len(texts) > 4
        for number, box in enumerate(texts):
            assert frame.x0 <= box.x0 < box.x1 <= frame.x1
            assert frame.y0 <= box.y0 < box.y1 <= frame.y1
            assert not any(box.overlaps(other) for other in texts[number + 1 :])


def test_pictures_are_there_and_small() -> None:
    for path in (made.EVERY_NORM, made.EVERY_SET):
        assert 10_000 < path.stat().st_size < 300_000


def test_the_page_is_that_of_the_norms() -> None:
    assert made.PAGE.read_text(encoding="utf-8") == made.page(), "run `make norms`"
    readme = made.README.read_text(encoding="utf-8")
    assert readme == made.named_in(readme), "run `make norms`"


def test_the_page_tells_shapes_and_defaults() -> None:
    page = made.page()
    assert "`running_mean` (`max_steps` + 1) x F" in page
    assert "| `inorm` | `time` (default, classifier) |" in page
    assert r"\|\|x\|\|" in page
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) == 2 * len(made.variants()) + len(available_norms())
