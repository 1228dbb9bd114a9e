"""Bootstrap samples of the training split: their size, what they repeat, and what they leave alone."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from normlab.config import DataConfig, InputError, RunConfig, run_id
from normlab.data.batches import Batch, make_loader
from normlab.data.prepared import EncodedSplit, PreparedText, SplitCounts, prepare
from normlab.data.resample import BLOCK_TOKENS, draw, resampled, sample_facts

NO_COUNTS = SplitCounts(*[0] * 10)


def stream(tokens: int) -> EncodedSplit:
    """A token is its own position."""
    return EncodedSplit(np.arange(tokens), np.zeros(1, np.int64), np.array([tokens]), None, NO_COUNTS)


def texts(count: int) -> EncodedSplit:
    """Text i is the id i once, twice or three times, and has the label i."""
    lengths = 1 + np.arange(count) % 3
    return EncodedSplit(
        np.repeat(np.arange(count), lengths), np.cumsum(lengths) - lengths, lengths, np.arange(count), NO_COUNTS
    )


def test_texts_are_drawn_with_replacement_and_keep_their_label():
    split = texts(3000)
    sample = resampled(split, seed=1)
    assert sample.labels is not None
    assert len(sample.labels) == len(sample.starts) == len(sample.lengths) == 3000
    for start, length, label in zip(sample.starts, sample.lengths, sample.labels, strict=True):
        assert sample.ids[start : start + length].tolist() == [label] * (1 + label % 3)
    # Of n texts 1 - 1/e are in the sample, give or take sqrt((1/e - 2/e^2) n) = 17: here six times that.
    assert abs(len(set(sample.labels)) - 3000 * (1 - np.exp(-1))) < 100
    # Each with the same chance.
    drawn = np.concatenate([draw(split, seed) for seed in range(50)])
    assert abs(drawn.mean() - 1499.5) < 6 * 866 / np.sqrt(len(drawn))


@pytest.mark.parametrize("tokens", [2 * BLOCK_TOKENS, 50_017])
def test_a_stream_is_blocks_of_consecutive_tokens(tokens: int):
    sample = resampled(stream(tokens), seed=1).ids
    assert len(sample) == tokens
    blocks = [sample[first : first + BLOCK_TOKENS] for first in range(0, tokens, BLOCK_TOKENS)]
    assert all(np.array_equal(block, block[0] + np.arange(len(block))) for block in blocks)
    assert 0 <= sample.min() < sample.max() < tokens
    assert len(np.unique(sample)) < tokens


def test_blocks_begin_anywhere():
    split = stream(2 * BLOCK_TOKENS)
    starts = np.concatenate([draw(split, seed) for seed in range(5000)])
    assert (starts.min(), starts.max()) == (0, BLOCK_TOKENS)


def test_the_seed_alone_decides_on_every_machine():
    split = texts(1000)
    assert draw(split, 7)[:5].tolist() == [681, 480, 399, 59, 442]
    assert draw(stream(10_000), 7)[:5].tolist() == [6133, 4325, 3591, 535, 3979]
    torch.manual_seed(3)
    np.random.seed(3)
    state = torch.get_rng_state()
    assert np.array_equal(draw(split, 7), draw(split, 7))
    assert torch.equal(state, torch.get_rng_state())
    assert not np.array_equal(draw(split, 7), draw(split, 8))
    # Nor are they the numbers that order batches.
    assert not np.array_equal(draw(split, 7), np.random.default_rng((7, 1)).integers(1000, size=1000))


def test_a_text_of_less_than_two_blocks_is_refused():
    with pytest.raises(InputError, match=r"1999 tokens is too short for data\.resample") as error:
        draw(stream(2 * BLOCK_TOKENS - 1), 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("split", [texts(500), stream(20_500)], ids=["texts", "stream"])
def test_facts_count_what_is_in_the_sample(split: EncodedSplit):
    facts, sample = sample_facts(split, 1), resampled(split, 1)
    found = sample.ids if sample.labels is None else sample.labels
    assert (facts["size"], facts["distinct"]) == (len(found), len(np.unique(found)))
    assert facts == sample_facts(split, 1)
    assert facts["sha256"] != sample_facts(split, 2)["sha256"]


@pytest.fixture(params=["windows", "stateful", "texts"])
def data(request: pytest.FixtureRequest, tiny_text: Path, tiny_labels: Path) -> DataConfig:
    if request.param == "texts":
        return DataConfig(corpus=str(tiny_labels), tokens="word", batch_size=8)
    return DataConfig(corpus=str(tiny_text), tokens="char", batch_size=4, length=12, stream=request.param)


def batches(text: PreparedText, data: DataConfig, split: str, train: bool, seed: int) -> list[Batch]:
    return list(make_loader(text, data, split, train=train, seed=seed))


def same(left: list[Batch], right: list[Batch]) -> bool:
    parts = itertools.zip_longest(itertools.chain(*left), itertools.chain(*right))
    return all(a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in parts)


def test_training_alone_is_on_the_sample(data: DataConfig):
    on = dataclasses.replace(data, resample=True)
    text, of_sample = prepare(data), prepare(on)
    assert of_sample.vocabulary == text.vocabulary
    for split in ("valid", "test"):
        assert same(batches(text, data, split, False, 1), batches(of_sample, on, split, False, 2))
    for train in (True, False):
        one = batches(of_sample, on, "train", train, 1)
        assert same(one, batches(of_sample, on, "train", train, 1))
        assert not same(one, batches(of_sample, on, "train", train, 2))
        assert not same(one, batches(text, data, "train", train, 1))
        # As what it is, and not by chance: the sample itself, in the batches that this seed gives a text.
        split = resampled(text.splits["train"], 1)
        whole = dataclasses.replace(text, splits={**text.splits, "train": split})
        assert same(one, batches(whole, data, "train", train, 1))


def test_it_goes_on_exactly(data: DataConfig):
    on = dataclasses.replace(data, resample=True)
    text = prepare(on)
    whole = make_loader(text, on, "train", train=True, seed=5)
    every = [*whole, *whole]
    first = make_loader(text, on, "train", train=True, seed=5)
    head = list(itertools.islice(first, 3))
    second = make_loader(text, on, "train", train=True, seed=5)
    second.load_state_dict(first.state_dict())
    assert same(every, [*head, *second, *second])


def test_ids_of_runs_on_the_whole_text_stay():
    config = RunConfig()
    assert run_id(dataclasses.replace(config, data=DataConfig(resample=False))) == "lstm-ln-pydocs-s1-2239b9a5"
    assert run_id(dataclasses.replace(config, data=DataConfig(resample=True))) != run_id(config)
