"""Loaders: plain iterables over tensors that are in memory already, each a function of (seed, epoch) alone.

Training loaders resume exactly: `state_dict()` after a batch and `load_state_dict()` before the next `iter` go on with
the batch that would have come next. Evaluation loaders start at the first batch in every pass and lose nothing.
With `world` processes each sees disjoint rows and the same number of batches.

Shapes: B batch, T time.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from normlab.config import DataConfig, InputError
from normlab.data.prepared import EncodedSplit, PreparedText
from normlab.data.resample import resampled

__all__ = ["Batch", "LanguageStream", "LanguageWindows", "Loader", "TextBatches", "make_loader"]


class Batch(NamedTuple):
    """One batch.

    Args:
        tokens_BT: int64; 0 in padding.
        mask_BT: bool, True = real entry; None if nothing is padding.
        targets_BT: int64, the next token (language modelling); 0 in padding.
        labels_B: int64 (classification).
        fresh_B: bool, True where the carried state must restart; None if no state is carried.
    """

    tokens_BT: Tensor
    mask_BT: Tensor | None = None
    targets_BT: Tensor | None = None
    labels_B: Tensor | None = None
    fresh_B: Tensor | None = None

    def model_inputs(self) -> tuple[Tensor, Tensor | None]:
        """What a model is called with."""
        return self.tokens_BT, self.mask_BT


class Loader(ABC):
    """A pass over one split.

    Args:
        train: True: shuffled, one epoch after the other, resumable. False: fixed order, everything once.
        seed: of the order.
        rank: this process.
        world: number of processes.

    Attributes:
        batch_size: rows of a batch in this process; fewer than asked for if the text is short.
    """

    batch_size: int

    def __init__(self, *, train: bool, seed: int, rank: int, world: int) -> None:
        self.train = train
        self.seed = seed
        self.rank = rank
        self.world = world
        self.epoch = 0
        self.position = 0

    @abstractmethod
    def __len__(self) -> int:
        """Batches per epoch; the same in every epoch and process."""

    @abstractmethod
    def _plan(self, rng: np.random.Generator) -> Any:
        """Whatever `_batch` needs to make any batch of one epoch."""

    @abstractmethod
    def _batch(self, plan: Any, position: int) -> Batch: ...

    def __iter__(self) -> Iterator[Batch]:
        if not self.train:
            plan = self._plan(np.random.default_rng(self.seed))
            yield from (self._batch(plan, position) for position in range(len(self)))
            return
        plan = self._plan(np.random.default_rng((self.seed, self.epoch)))
        start = self.position
        for position in range(start, len(self)):
            batch = self._batch(plan, position)
            # Advanced before the batch is handed out: a caller that counts batches never comes back for the end.
            last = position + 1 == len(self)
            self.epoch, self.position = (self.epoch + 1, 0) if last else (self.epoch, position + 1)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Where the next batch is."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from `state` at the next `iter`."""
        self.epoch, self.position = int(state["epoch"]), int(state["position"])


def _shares(count: int, batch_size: int, rank: int, world: int) -> list[np.ndarray]:
    """Indices 0 .. count - 1, all of them, for one process: near-equal batches, the same number in every process."""
    if count < world:
        raise InputError(f"{count} rows cannot be shared by {world} processes; use fewer training.devices")
    most = math.ceil(count / world)
    batches = min(math.ceil(most / batch_size), count // world)
    return np.array_split(np.arange(rank, count, world), batches)


class LanguageWindows(Loader):
    """Stateless windows of a stream (Cooijmans et al. 2016).

    Training: non-overlapping windows from an offset in [0, length) that is drawn anew each epoch, shuffled; full
    batches only (what is left over comes back under another offset). A stream with fewer windows than one batch makes
    one smaller batch. Evaluation: offset 0, every token but the first is predicted once; the last window is padded.
    """

    def __init__(
        self,
        split: EncodedSplit,
        *,
        length: int,
        batch_size: int,
        train: bool,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        super().__init__(train=train, seed=seed, rank=rank, world=world)
        self.length = length
        self._tokens = int(split.lengths[0])
        stream = torch.from_numpy(split.ids)
        # Padding at the end lets the last window of an evaluation be sliced like any other.
        self._stream = torch.cat([stream, stream.new_zeros(length)])
        self._steps = torch.arange(length + 1)
        if train:
            # Under the largest offset one window fewer may fit: all epochs take that many, so all are equally long.
            windows = max(1, (self._tokens - length) // length)
            if self._tokens < length + 1 or windows < world:
                raise InputError(
                    f"a text of {self._tokens} tokens has too few windows of data.length={length} for {world} "
                    "process(es); set a smaller data.length or give a longer text"
                )
            self._windows = windows
            self.batch_size = min(batch_size, windows // world)
            self._batches = windows // (self.batch_size * world)
        else:
            self._windows = math.ceil((self._tokens - 1) / length)
            self._rows = _shares(self._windows, batch_size, rank, world)
            self.batch_size = batch_size
            self._batches = len(self._rows)

    def __len__(self) -> int:
        return self._batches

    def _plan(self, rng: np.random.Generator) -> list[np.ndarray]:
        if not self.train:
            return [rows * self.length for rows in self._rows]
        offset = int(rng.integers(min(self.length, self._tokens - self._windows * self.length)))
        available = (self._tokens - 1 - offset) // self.length
        size = self.batch_size * self.world
        order = rng.permutation(available)[: self._batches * size].reshape(self._batches, self.world, self.batch_size)
        return list(order[:, self.rank] * self.length + offset)

    def _batch(self, plan: list[np.ndarray], position: int) -> Batch:
        starts_B = torch.from_numpy(plan[position])
        window_BT = self._stream[starts_B[:, None] + self._steps]
        tokens_BT, targets_BT = window_BT[:, :-1], window_BT[:, 1:]
        if int(starts_B[-1]) + self.length < self._tokens:
            return Batch(tokens_BT, None, targets_BT)
        mask_BT = (starts_B[:, None] + self._steps[1:]) < self._tokens
        return Batch(torch.where(mask_BT, tokens_BT, 0), mask_BT, targets_BT)


class LanguageStream(Loader):
    """Contiguous rows of a stream, read chunk by chunk with the state carried: truncated backpropagation.

    The stream is cut into batch_size * world rows; `fresh_B` is True at their beginning. Training: equal rows, full
    chunks; the tail of each row is left out. Evaluation: every token but the first is predicted once; rows differ by
    at most one prediction, and what they lack at the end is padded.
    """

    def __init__(
        self,
        split: EncodedSplit,
        *,
        length: int,
        batch_size: int,
        train: bool,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        super().__init__(train=train, seed=seed, rank=rank, world=world)
        self.length = length
        predicted = int(split.lengths[0]) - 1
        rows = batch_size * world
        if train and predicted // rows < length:
            raise InputError(
                f"a text of {predicted + 1} tokens cannot fill one batch of {rows} rows of data.length={length}; "
                "set a smaller data.batch_size or data.length, or use data.stream=windows"
            )
        if not train:
            rows = min(rows, predicted // world * world)
        if rows < world:
            raise InputError(
                f"{predicted} predictions cannot be shared by {world} processes; use fewer training.devices"
            )
        shortest, longer = divmod(predicted, rows)
        sizes = np.full(rows, shortest) if train else shortest + (np.arange(rows) < longer)
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        mine = slice(rank, None, world)
        self.batch_size = rows // world
        self._sizes_B = torch.from_numpy(sizes[mine].astype(np.int64))
        self._starts_B = torch.from_numpy(starts[mine].astype(np.int64))
        # Rows shorter than the longest one read a step beyond the stream, under the mask.
        stream = torch.from_numpy(split.ids)
        self._stream = torch.cat([stream, stream.new_zeros(2)])
        # The longest row of any process decides, so that all make the same number of batches.
        self._longest = int(sizes[0])
        self._batches = self._longest // length if train else math.ceil(self._longest / length)

    def __len__(self) -> int:
        return self._batches

    def _plan(self, rng: np.random.Generator) -> None:
        return None

    def _batch(self, plan: None, position: int) -> Batch:
        first = position * self.length
        steps = torch.arange(first, min(first + self.length, self._longest) + 1)
        window_BT = self._stream[self._starts_B[:, None] + steps]
        tokens_BT, targets_BT = window_BT[:, :-1], window_BT[:, 1:]
        fresh_B = torch.full((self.batch_size,), position == 0)
        mask_BT = steps[:-1] < self._sizes_B[:, None]
        if bool(mask_BT.all()):
            return Batch(tokens_BT, None, targets_BT, None, fresh_B)
        return Batch(torch.where(mask_BT, tokens_BT, 0), mask_BT, torch.where(mask_BT, targets_BT, 0), None, fresh_B)


class TextBatches(Loader):
    """Whole texts with labels, padded to the longest of their batch.

    Training: every text once per epoch (with several processes up to world - 1 texts, drawn anew, sit an epoch out).
    Texts of like length share a batch: the shuffled order is sorted by (blurred) length within pools of `POOL`
    batches, then batches are shuffled; so both company and order are fresh each epoch. Batches differ by at most one
    row, which leaves no last batch of a single row. Evaluation: in the order of length.
    """

    POOL = 40

    def __init__(
        self, split: EncodedSplit, *, batch_size: int, train: bool, seed: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        super().__init__(train=train, seed=seed, rank=rank, world=world)
        if split.labels is None:
            raise InputError("classification needs labelled texts")
        self.batch_size = batch_size
        self._ids = torch.from_numpy(split.ids)
        self._starts = torch.from_numpy(split.starts)
        self._lengths = torch.from_numpy(split.lengths)
        self._labels = torch.from_numpy(split.labels)
        self._order = np.argsort(split.lengths, kind="stable")
        self._by_length = split.lengths
        count = len(split.lengths)
        # Units of `world` texts: each process takes one text of every unit.
        self._units = count // world
        if self._units == 0:
            raise InputError(f"{count} texts cannot be shared by {world} processes; use fewer training.devices")
        self._batches = math.ceil(self._units / batch_size) if train else len(_shares(count, batch_size, rank, world))
        if train and batch_size > 1:
            self._batches = min(self._batches, max(1, self._units // 2))  # two rows at least

    def __len__(self) -> int:
        return self._batches

    def _plan(self, rng: np.random.Generator) -> list[np.ndarray]:
        if not self.train:
            return [self._order[rows] for rows in _shares(len(self._order), self.batch_size, self.rank, self.world)]
        shuffled = rng.permutation(len(self._order))[: self._units * self.world]
        pool = self.batch_size * self.world * self.POOL
        pools = [shuffled[first : first + pool] for first in range(0, len(shuffled), pool)]
        # Blurred by 5 % and a token, or texts that all fit into one pool would keep their company.
        blurred = self._by_length * rng.uniform(0.95, 1.05, len(self._by_length)) + rng.uniform(
            0, 2, len(self._by_length)
        )
        ordered = np.concatenate([rows[np.argsort(blurred[rows], kind="stable")] for rows in pools])
        mine = ordered.reshape(self._units, self.world)[:, self.rank]
        batches = np.array_split(mine, self._batches)
        return [batches[i] for i in rng.permutation(self._batches)]

    def _batch(self, plan: list[np.ndarray], position: int) -> Batch:
        rows_B = torch.from_numpy(plan[position])
        lengths_B = self._lengths[rows_B]
        steps = torch.arange(int(lengths_B.max()))
        mask_BT = steps < lengths_B[:, None]
        where_BT = torch.where(mask_BT, self._starts[rows_B][:, None] + steps, 0)
        tokens_BT = self._ids[where_BT]
        if bool(mask_BT.all()):
            return Batch(tokens_BT, labels_B=self._labels[rows_B])
        return Batch(tokens_BT.masked_fill_(~mask_BT, 0), mask_BT, labels_B=self._labels[rows_B])


def make_loader(
    text: PreparedText, data: DataConfig, split: str, *, train: bool, seed: int = 0, rank: int = 0, world: int = 1
) -> Loader:
    """The loader that task and config ask for.

    Args:
        text: the prepared corpus.
        data: batch_size, stream and resample.
        split: train, valid or test.
        train: shuffled epochs, or one pass in fixed order over everything (the training split too can be evaluated).
        seed: of the order, and of the sample of the training split if there is one.
        rank: this process.
        world: number of processes.
    """
    part = text.splits[split]
    if data.resample and split == "train":
        part = resampled(part, seed)
    if text.task == "classification":
        return TextBatches(part, batch_size=data.batch_size, train=train, seed=seed, rank=rank, world=world)
    cls = LanguageStream if data.stream == "stateful" else LanguageWindows
    return cls(part, length=text.length, batch_size=data.batch_size, train=train, seed=seed, rank=rank, world=world)
