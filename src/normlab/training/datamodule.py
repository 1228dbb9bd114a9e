"""The LightningDataModule: one text in batches, for any `pl.Trainer`."""

from __future__ import annotations

import pytorch_lightning as pl

from normlab.config import DataConfig
from normlab.data.batches import BatchStream, evaluation_stream, training_stream
from normlab.data.prepared import PreparedText, prepare

__all__ = ["TextDataModule"]


class TextDataModule(pl.LightningDataModule):
    """Batches of one corpus, assembled from one array in memory: nothing is left for worker processes to do.

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

    def train_dataloader(self) -> BatchStream:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        return training_stream(self.text, self.data, seed=self.seed, rank=rank, world=world)

    def val_dataloader(self) -> BatchStream:
        return self._evaluation("valid")

    def test_dataloader(self) -> BatchStream:
        return self._evaluation("test")

    def train_evaluation_dataloader(self) -> BatchStream:
        """A fixed part of the training split, as large as the validation split."""
        return self._evaluation("train")

    def _evaluation(self, split: str) -> BatchStream:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        return evaluation_stream(self.text, self.data, split, rank=rank, world=world)
