"""Loss on texts longer than those of training, and by position in them.

Shape suffixes: B rows, T time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from normlab.config import InputError, require_choice
from normlab.data.batches import Batch
from normlab.probes.base import Measurement, Probe, Row, Subject, prediction_nats

__all__ = ["ByLength"]

MULTIPLES = (1, 2, 5, 10)


@dataclass(frozen=True)
class ByLength(Probe):
    """Loss of the same tokens after more and more text, in evaluation mode: language models.

    With L the training length, the last L tokens of windows of k L tokens are predicted for k = 1, 2, 5 and 10 (and
    `longest`), the state carried from the window's beginning; the windows of all k end at the same places, so that
    every k predicts the same tokens. Norms with statistics per time step meet steps that training never had from
    k = 2 on. By position: the mean loss at each position of the longest windows.

    Args:
        longest: largest k.
        rows: windows, evenly spaced over the split (fewer if it has no room).
        split: whose text.
    """

    longest: int = 10
    rows: int = 64
    split: str = "test"

    def __post_init__(self) -> None:
        self.require_positive("longest", "rows")

    @torch.no_grad()
    def measure(self, subject: Subject) -> Measurement:
        if not subject.is_language_model:
            raise InputError("by_length is for language models; the texts of a classifier have lengths of their own")
        require_choice("split", self.split, subject.text.splits)
        length, ids = subject.text.length, torch.from_numpy(subject.text.splits[self.split].ids)
        whole = length * self.longest
        if len(ids) <= whole:
            raise InputError(
                f"--longest {self.longest} needs more than {self.longest} x data.length={length} tokens, and the "
                f"{self.split} split has {len(ids)}; lower --longest"
            )
        last_start = len(ids) - 1 - whole
        starts = np.unique(np.linspace(0, last_start, min(self.rows, last_start // length + 1)).astype(np.int64))
        window_BT = ids[torch.from_numpy(starts)[:, None] + torch.arange(whole + 1)].to(subject.device)
        rows: list[Row] = []
        summary: dict[str, float] = {"length": length}
        loss_BT = torch.empty(0)
        for multiple in sorted({k for k in MULTIPLES if k < self.longest} | {self.longest}):
            loss_BT = self._losses(subject, window_BT[:, whole - multiple * length :])
            loss_nats = float(loss_BT[:, -length:].mean())
            summary[f"loss_nats_at_{multiple}x"] = loss_nats
            tokens = len(loss_BT) * length
            rows.append({"kind": "multiple", "multiple": multiple, "loss_nats": loss_nats, "tokens": tokens})
        by_position = loss_BT.mean(0).tolist()
        rows += [{"kind": "position", "position": t, "loss_nats": loss} for t, loss in enumerate(by_position)]
        return Measurement(summary, rows)

    def _losses(self, subject: Subject, window_BT: Tensor) -> Tensor:
        """Loss of each token but the first of each row, B x T; few rows at a time, so that scores stay in memory."""
        count = max(1, 2**24 // (window_BT.shape[1] * subject.text.vocabulary))
        parts: list[Tensor] = []
        for part in window_BT.split(count):
            batch = Batch(part[:, :-1], None, part[:, 1:])
            output = subject.model(*batch.model_inputs())
            parts.append(prediction_nats(output.logits, batch).double().view_as(part[:, 1:]))
        return torch.cat(parts)
