"""The LightningDataModule: one text in batches, for any `pl.Trainer`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytorch_lightning as pl

from normlab.config import DataConfig
from normlab.data.batches import Batch, Loader, make_loader
from normlab.data.prepared import EncodedSplit, PreparedText, prepare

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
        return self._loader(self.text, "train", train=True)

    def val_dataloader(self) -> Loader:
        return self._loader(self.text, "valid", train=False)

    def test_dataloader(self) -> Loader:
        return self._loader(self.text, "test", train=False)

    def train_part_dataloader(self) -> Loader:
        """The first part of the training split, as large as the validation split, in evaluation order."""
        part = _first_part(self.text.splits["train"], self.text.splits["valid"])
        text = dataclasses.replace(self.text, splits={**self.text.splits, "train": part})
        return self._loader(text, "train", train=False)

    def _loader(self, text: PreparedText, split: str, *, train: bool) -> Loader:
        data = self.data
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


def _first_part(whole: EncodedSplit, like: EncodedSplit) -> EncodedSplit:
    if whole.labels is None:
        count = min(len(whole.ids), len(like.ids))
        return dataclasses.replace(whole, ids=whole.ids[:count], lengths=whole.lengths.clip(max=count))
    count = min(len(whole.starts), len(like.starts))
    return dataclasses.replace(
        whole, starts=whole.starts[:count], lengths=whole.lengths[:count], labels=whole.labels[:count]
    )
