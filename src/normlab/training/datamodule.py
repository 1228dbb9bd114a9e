"""The LightningDataModule: one text in batches, for any `pl.Trainer`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import pytorch_lightning as pl

from normlab.config import DataConfig
from normlab.data.batches import Batch, Loader, make_loader
from normlab.data.prepared import PreparedText, prepare

__all__ = ["TextDataModule", "WholeRun"]

LARGEST_LOGITS = 2**24
"""Scores held at once in evaluation: 64 MiB in fp32."""


class TextDataModule(pl.LightningDataModule):
    """Batches of one corpus, sliced from one array in memory: nothing is left for worker processes to do.

    Args:
        data: which text, in which symbols, in which batches.
        seed: of the order of batches.
        text: the prepared text, if the caller has it already; else it is prepared on first use.
    """

    def __init__(self, data: DataConfig, seed: int = 1, text: PreparedText | None = None) -> None:
        super().__init__()
        self.data = data
        self.seed = seed
        self._text = text

    @property
    def text(self) -> PreparedText:
        if self._text is None:
            self._text = prepare(self.data)
        return self._text

    def train_dataloader(self) -> Loader:
        return self._loader("train", train=True)

    def val_dataloader(self) -> Loader:
        return self._loader("valid", train=False)

    def val_part_dataloader(self, batches: int) -> Loader | Part:
        """So many batches of the validation split, or all of it if it has no more or `batches` is 0."""
        whole = self.val_dataloader()
        if not 0 < batches < len(whole):
            return whole
        part = Part(whole, batches, spread=self.data.stream == "windows")
        part.taken = part.taken[:batches]
        return part

    def test_dataloader(self) -> Loader:
        return self._loader("test", train=False)

    def train_part_dataloader(self) -> Part:
        """A part of the training split about as large as the validation split, in evaluation order."""
        whole = self._loader("train", train=False)
        return Part(whole, len(self.val_dataloader()), spread=self.data.stream == "windows")

    def _loader(self, split: str, *, train: bool) -> Loader:
        text, data = self.text, self.data
        if not train and data.stream == "windows":
            # No row sees another in evaluation, so larger batches change nothing but the time; a stateful stream
            # keeps its rows, whose number decides how often the state restarts.
            rows = LARGEST_LOGITS // (text.length * text.vocabulary)
            data = dataclasses.replace(data, batch_size=max(data.batch_size, min(4 * data.batch_size, rows)))
        rank, world = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        return make_loader(text, data, split, train=train, seed=self.seed, rank=rank, world=world)


class WholeRun:
    """All epochs of a run as one, so that an optimizer step never falls short of micro-batches at an epoch's end.

    Args:
        loader: one epoch after the other.
        batches: of the whole run.
    """

    def __init__(self, loader: Loader, batches: int) -> None:
        self.loader = loader
        self.batches = batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield from self.loader

    def state_dict(self) -> dict[str, int]:
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.loader.load_state_dict(state)


class Part:
    """A fixed part of the evaluation of a split.

    Args:
        loader: the whole.
        batches: about how many of its batches.
        spread: evenly spaced batches; False takes the first ones, as a carried state needs (their rows are spread
            over the whole text anyway).
    """

    def __init__(self, loader: Loader, batches: int, *, spread: bool) -> None:
        self.loader = loader
        stride = max(1, len(loader) // batches) if spread else 1
        self.taken = range(0, len(loader) if spread else min(batches, len(loader)), stride)

    def __len__(self) -> int:
        return len(self.taken)

    def __iter__(self) -> Iterator[Batch]:
        return itertools.islice(self.loader, self.taken.start, self.taken.stop, self.taken.step)
