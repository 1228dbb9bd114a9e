"""Loaders: coverage, determinism, resume, masks, sharing between processes."""

from __future__ import annotations

import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from normlab.config import DataConfig, InputError
from normlab.data.batches import Batch, LanguageStream, LanguageWindows, Loader, TextBatches, make_loader
from normlab.data.corpora import Corpus
from normlab.data.prepared import EncodedSplit, SplitCounts, prepare, prepare_corpus
from normlab.data.splits import Split

NO_COUNTS = SplitCounts(*[0] * 10)


def _stream(tokens: int) -> EncodedSplit:
    """Ids 1, 2, 3, ...: a token is its own position, and 0 is padding alone."""
    ids = np.arange(1, tokens + 1, dtype=np.int64)
    return EncodedSplit(ids, np.zeros(1, np.int64), np.array([tokens], np.int64), None, NO_COUNTS)


def _texts(lengths: list[int]) -> EncodedSplit:
    """Text i consists of the id i + 1 and has the label i."""
    sizes = np.array(lengths, np.int64)
    ids = np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int64), sizes)
    starts = np.cumsum(sizes) - sizes
    return EncodedSplit(ids, starts, sizes, np.arange(len(sizes), dtype=np.int64), NO_COUNTS)


def _targets(batches: list[Batch]) -> list[int]:
    """Predicted tokens; checks inputs, dtypes and padding on the way."""
    found: list[int] = []
    for batch in batches:
        assert batch.targets_BT is not None
        mask = torch.ones_like(batch.tokens_BT, dtype=torch.bool) if batch.mask_BT is None else batch.mask_BT
        assert batch.tokens_BT.dtype == batch.targets_BT.dtype == torch.int64
        assert torch.equal(batch.targets_BT[mask], batch.tokens_BT[mask] + 1)
        assert not batch.tokens_BT[~mask].any()
        assert not batch.targets_BT[~mask].any()
        if batch.mask_BT is not None:
            assert not bool(mask.all())  # None is the sign for no padding
            assert bool(mask.any(dim=1).all())  # no row of padding alone
        found += batch.targets_BT[mask].tolist()
    return found


LANGUAGE = (LanguageWindows, LanguageStream)


@pytest.mark.parametrize("cls", LANGUAGE)
@pytest.mark.parametrize("tokens", [2, 9, 101, 102, 640, 641])
@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_predicts_every_token_but_the_first_once(cls: Any, tokens: int, world: int) -> None:
    if tokens < 50 and world > 1:
        with pytest.raises(InputError, match="cannot be shared by 3 processes"):
            cls(_stream(2), length=10, batch_size=8, train=False, rank=1, world=world)
        return
    found, counts = [], set()
    for rank in range(world):
        loader = cls(_stream(tokens), length=10, batch_size=8, train=False, rank=rank, world=world)
        batches = list(loader)
        counts.add(len(batches))
        assert len(batches) == len(loader)
        found += _targets(batches)
    assert sorted(found) == list(range(2, tokens + 1))
    assert len(counts) == 1


def test_windows_start_at_a_new_offset_each_epoch_and_do_not_overlap() -> None:
    loader = LanguageWindows(_stream(1000), length=10, batch_size=4, train=True, seed=3)
    offsets, orders = set(), set()
    for _ in range(8):
        batches = list(loader)
        assert len(batches) == len(loader) == 24
        assert all(batch.tokens_BT.shape == (4, 10) and batch.mask_BT is None for batch in batches)
        found = _targets(batches)
        assert len(found) == len(set(found)) == 24 * 40
        offsets.add((min(found) - 2) % 10)
        orders.add(tuple(found[:40]))
    assert len(offsets) > 3
    assert len(orders) == 8
    assert loader.epoch == 8


@pytest.mark.parametrize("tokens", [11, 12, 20, 21, 22, 30])
def test_few_windows_make_one_smaller_batch_and_every_offset_fits(tokens: int) -> None:
    loader = LanguageWindows(_stream(tokens), length=10, batch_size=64, train=True)
    for _ in range(20):
        batches = list(loader)
        assert len(batches) == 1
        assert batches[0].tokens_BT.shape[1] == 10
        assert max(_targets(batches)) <= tokens


def test_stateful_rows_are_contiguous_across_batches() -> None:
    loader = LanguageStream(_stream(1000), length=10, batch_size=4, train=True)
    batches = list(loader)
    assert [bool(batch.fresh_B.all()) for batch in batches if batch.fresh_B is not None] == [True] + [False] * 23
    assert not any(batch.fresh_B.any() for batch in batches[1:] if batch.fresh_B is not None)
    rows = torch.cat([batch.tokens_BT for batch in batches], dim=1)
    assert torch.equal(rows, rows[:, :1] + torch.arange(rows.shape[1]))
    evaluation = list(LanguageStream(_stream(1003), length=10, batch_size=4, train=False))
    rows = torch.cat([batch.tokens_BT for batch in evaluation], dim=1)
    assert int((rows > 0).sum()) == 1002


def _make(kind: str, **options: Any) -> Loader:
    if kind == "texts":
        return TextBatches(_texts([1 + i % 17 for i in range(203)]), batch_size=8, train=True, **options)
    cls = LanguageWindows if kind == "windows" else LanguageStream
    return cls(_stream(2000), length=10, batch_size=4, train=True, **options)


def _same(left: list[Batch], right: list[Batch]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        return a is b is None or (a is not None and b is not None and torch.equal(a, b))

    return len(left) == len(right) and all(all(map(equal, a, b)) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("kind", ["windows", "stream", "texts"])
@pytest.mark.parametrize("taken", [0, 1, 7, -1])
def test_a_loaded_state_goes_on_exactly(kind: str, taken: int) -> None:
    whole = _make(kind, seed=5)
    per_epoch = len(whole)
    taken = per_epoch if taken == -1 else taken
    every = [*whole, *whole]
    first = _make(kind, seed=5)
    # Like a trainer that counts batches: it never comes back after the last one.
    head = list(islice(iter(first), taken))
    second = _make(kind, seed=5)
    second.load_state_dict(first.state_dict())
    tail = [*second, *second][: 2 * per_epoch - taken]
    assert _same(every, head + tail)
    assert first.state_dict() == (
        {"epoch": 1, "position": 0} if taken == per_epoch else {"epoch": 0, "position": taken}
    )


@pytest.mark.parametrize("kind", ["windows", "texts"])
def test_order_follows_seed_and_epoch(kind: str) -> None:
    a, b, c = _make(kind, seed=1), _make(kind, seed=1), _make(kind, seed=2)
    first = list(a)
    assert _same(first, list(b))
    assert not _same(first, list(c))
    assert not _same(first, list(a))  # the second epoch


@pytest.mark.parametrize("kind", ["windows", "stream", "texts"])
def test_processes_share_without_overlap(kind: str) -> None:
    parts = [list(_make(kind, seed=1, rank=rank, world=3)) for rank in range(3)]
    assert len({len(part) for part in parts}) == 1
    shapes = [[len(batch.tokens_BT) for batch in part] for part in parts]
    assert shapes[0] == shapes[1] == shapes[2]
    if kind == "texts":
        seen = [int(label) for part in parts for batch in part for label in batch.labels_B]  # type: ignore[union-attr]
        assert len(seen) == 201  # two of 203 sit out
    else:
        seen = [target for part in parts for target in _targets(part)]
    assert len(seen) == len(set(seen))


def test_a_stopped_evaluation_starts_from_the_beginning_again() -> None:
    loader = LanguageWindows(_stream(500), length=10, batch_size=4, train=False)
    list(islice(iter(loader), 2))
    assert len(_targets(list(loader))) == 499


@pytest.mark.parametrize("count", [1, 7, 64, 65, 129])
@pytest.mark.parametrize("train", [True, False])
def test_every_text_comes_once_with_its_label_and_mask(count: int, train: bool) -> None:
    lengths = [1 + (7 * i) % 23 for i in range(count)]
    loader = TextBatches(_texts(lengths), batch_size=64, train=train)
    seen = []
    for batch in loader:
        assert batch.labels_B is not None
        mask = torch.ones_like(batch.tokens_BT, dtype=torch.bool) if batch.mask_BT is None else batch.mask_BT
        assert mask.sum(dim=1).tolist() == [lengths[label] for label in batch.labels_B]
        assert torch.equal(batch.tokens_BT, torch.where(mask, batch.labels_B[:, None] + 1, 0))
        assert bool(mask[:, 0].all())
        if batch.mask_BT is not None:
            assert not bool(mask.all())
        assert len(batch.tokens_BT) > 1 or count == 1
        seen += batch.labels_B.tolist()
    assert sorted(seen) == list(range(count))
    assert len(loader) == -(-count // 64)


@pytest.mark.parametrize("count", [700, 2000])  # one pool, several
def test_texts_of_like_length_share_a_batch_and_company_changes(count: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 200, count).tolist()
    loader = TextBatches(_texts(lengths), batch_size=20, train=True)
    first, second = list(loader), list(loader)
    area = sum(batch.tokens_BT.numel() for batch in first)
    assert sum(lengths) / area > 0.9  # in shuffled batches it is about 0.5
    companies = [
        {frozenset(batch.labels_B.tolist()) for batch in part if batch.labels_B is not None} for part in (first, second)
    ]
    assert len(companies[0] & companies[1]) <= 1
    widths = [batch.tokens_BT.shape[1] for batch in first]
    assert widths != sorted(widths)
    evaluation = [batch.tokens_BT.shape[1] for batch in TextBatches(_texts(lengths), batch_size=20, train=False)]
    assert evaluation == sorted(evaluation)


def test_texts_are_shared_in_evaluation_without_loss() -> None:
    parts = [TextBatches(_texts([3] * 65), batch_size=8, train=False, rank=rank, world=2) for rank in range(2)]
    assert len(parts[0]) == len(parts[1])
    seen = [label for part in parts for batch in part for label in batch.labels_B.tolist()]  # type: ignore[union-attr]
    assert sorted(seen) == list(range(65))


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(InputError, match=r"cannot fill one batch of 64 rows of data\.length=100"):
        LanguageStream(_stream(6400), length=100, batch_size=64, train=True)
    assert len(LanguageStream(_stream(6401), length=100, batch_size=64, train=True)) == 1
    with pytest.raises(InputError, match=r"too few windows of data\.length=100"):
        LanguageWindows(_stream(100), length=100, batch_size=64, train=True)
    with pytest.raises(InputError, match="3 texts cannot be shared by 4"):
        TextBatches(_texts([1, 2, 3]), batch_size=2, train=True, world=4)
    with pytest.raises(InputError, match="labelled"):
        TextBatches(_stream(10), batch_size=2, train=True)


@pytest.mark.parametrize(
    ("kind", "stream", "expected"),
    [("text", "windows", LanguageWindows), ("text", "stateful", LanguageStream), ("labelled", "windows", TextBatches)],
)
def test_make_loader_follows_task_and_config(kind: Any, stream: Any, expected: type) -> None:
    texts = tuple(f"text number {i} of some\n" for i in range(50))
    split = Split(texts, None if kind == "text" else tuple(i % 2 for i in range(50)))
    classes = None if kind == "text" else ("a", "b")
    corpus = Corpus("toy", kind, dict.fromkeys(("train", "valid", "test"), split), classes, "char", "0", "here")
    data = DataConfig(batch_size=4, length=12, stream=stream)
    prepared = prepare_corpus(corpus, data)
    loader = make_loader(prepared, data, "train", train=True, seed=1)
    assert type(loader) is expected
    batch = next(iter(loader))
    assert batch.tokens_BT.shape[0] == 4
    assert (batch.fresh_B is not None) == (stream == "stateful")
    assert (batch.labels_B is None) == (kind == "text")


def test_a_batch_is_made_in_well_under_a_millisecond() -> None:
    loader = LanguageWindows(_stream(1_000_000), length=100, batch_size=64, train=True)
    list(islice(iter(loader), 5))
    start = time.perf_counter()
    made = len(list(islice(iter(loader), 100)))
    assert (time.perf_counter() - start) / made < 3e-3  # about 1e-4 on an idle core


def test_no_training_batch_has_a_single_row(tmp_path: Path) -> None:
    seen = set()
    for count in range(36, 44):
        path = tmp_path / f"{count}.csv"
        path.write_text("text,label\n" + "".join(f"word {i % 7} and {i},{i % 2}\n" for i in range(count)))
        data = DataConfig(corpus=str(path), tokens="word", batch_size=2)
        rows = [len(batch.tokens_BT) for batch in make_loader(prepare(data), data, "train", train=True)]
        assert set(rows) <= {2, 3}
        seen.add(sum(rows) % 2)
    assert seen == {0, 1}
