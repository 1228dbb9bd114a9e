"""The loss of each task, as sums with their counts so that any grouping of batches gives the same mean.

Shapes: B batch, T time, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LOSSES", "Losses", "classification_loss", "language_modelling_loss"]


class Losses(NamedTuple):
    """Sums over the predictions of one batch.

    Attributes:
        nats: summed cross-entropy, differentiable.
        predictions: how many predictions were made (tokens, or texts).
        correct: how many were right.
    """

    nats: Tensor
    predictions: Tensor
    correct: Tensor

    @property
    def mean_nats(self) -> Tensor:
        """Nats per prediction."""
        return self.nats / self.predictions


def language_modelling_loss(logits_BTV: Tensor, targets_BT: Tensor, mask_BT: Tensor | None) -> Losses:
    """Cross-entropy of the next token, over the valid positions.

    Args:
        logits_BTV: scores of the next token.
        targets_BT: the next token.
        mask_BT: True where there is a token to predict; None if everywhere.
    """
    if mask_BT is not None:
        logits_BTV, targets_BT = logits_BTV[mask_BT], targets_BT[mask_BT]
    return _cross_entropy(logits_BTV.flatten(0, -2), targets_BT.flatten())


def classification_loss(logits_BC: Tensor, labels_B: Tensor, mask_BT: Tensor | None) -> Losses:
    """Cross-entropy of the class of each text; the mask has already done its work inside the model."""
    del mask_BT
    return _cross_entropy(logits_BC, labels_B)


def _cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Losses:
    logits_NV = logits_NV.float() if logits_NV.dtype in (torch.bfloat16, torch.float16) else logits_NV
    nats = F.cross_entropy(logits_NV, targets_N, reduction="sum")
    correct = (logits_NV.detach().argmax(-1) == targets_N).sum()
    return Losses(nats, torch.tensor(targets_N.numel(), device=nats.device), correct)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor | None], Losses]] = {
    "classification": classification_loss,
    "language_modelling": language_modelling_loss,
}
