"""Bootstrap samples of a training split, for the variance of a model over the texts that it happened to be trained on.

Texts with labels are drawn with replacement, as many as there are (Efron 1979). A stream is put together from blocks of
consecutive tokens that begin anywhere (the moving-block bootstrap, Künsch 1989), so that what depends on the text just
before still does, but for the seams between blocks. About 1/e of the texts or tokens are not drawn at all.

What is drawn depends on the seed alone: neither on torch's random numbers nor on the order of batches, which has
numbers of its own. Symbols and their counts stay those of the whole split: runs on different samples share a
vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any

import numpy as np

from normlab.config import InputError
from normlab.data.prepared import EncodedSplit

__all__ = ["BLOCK_TOKENS", "draw", "resampled", "sample_facts"]

BLOCK_TOKENS = 1000
"""Several windows, so that few have a seam, and thousands of blocks in a corpus; whatever data.length is."""


def draw(split: EncodedSplit, seed: int) -> np.ndarray:
    """Indices of the texts that are drawn; of a stream the first tokens of its blocks.

    Args:
        split: the training split.
        seed: of the run.

    Raises:
        InputError: a stream shorter than two blocks.
    """
    # A key of its own: batch orders are drawn from (seed, epoch).
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))
    if split.labels is not None:
        return rng.integers(len(split.lengths), size=len(split.lengths))
    tokens = len(split.ids)
    if tokens < 2 * BLOCK_TOKENS:
        raise InputError(
            f"a training text of {tokens} tokens is too short for data.resample, which draws blocks of {BLOCK_TOKENS}; "
            "give a longer text"
        )
    return rng.integers(tokens - BLOCK_TOKENS + 1, size=math.ceil(tokens / BLOCK_TOKENS))


def resampled(split: EncodedSplit, seed: int) -> EncodedSplit:
    """The sample: as many texts, or tokens of a stream (the last block is cut). `counts` are still of the split."""
    drawn = draw(split, seed)
    if split.labels is not None:
        starts, lengths, labels = split.starts[drawn], split.lengths[drawn], split.labels[drawn]
        return dataclasses.replace(split, starts=starts, lengths=lengths, labels=labels)
    where = drawn[:, None] + np.arange(BLOCK_TOKENS)
    return dataclasses.replace(split, ids=split.ids[where.ravel()[: len(split.ids)]])


def sample_facts(split: EncodedSplit, seed: int) -> dict[str, Any]:
    """For the record: what is drawn, how much, how much of the split is in the sample, and a checksum of the draws."""
    drawn = draw(split, seed)
    if split.labels is not None:
        unit, size, distinct = "texts", len(drawn), len(np.unique(drawn))
    else:
        unit, size = f"tokens, in blocks of {BLOCK_TOKENS}", len(split.ids)
        places = resampled(dataclasses.replace(split, ids=np.arange(size)), seed).ids
        distinct = int(np.count_nonzero(np.bincount(places)))
    digest = hashlib.sha256(drawn.astype("<i8").tobytes()).hexdigest()
    return {"unit": unit, "size": size, "distinct": distinct, "sha256": digest}
