"""What outputs depend on that they should not: later inputs, and other rows of the batch.

Shape suffixes: B batch, T time, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normlab.config import InputError
from normlab.probes.base import Measurement, Probe, Row, Subject
from normlab.probes.sites import freeze_stored, set_norms_training

__all__ = ["Leak"]


@dataclass(frozen=True)
class Leak(Probe):
    """Gradients of outputs by inputs that they should not see, norms in training and in evaluation mode, no dropout.

    future_leak: of the outputs up to the middle of the text by later inputs, the largest gradient over the largest by
    the inputs up to there (language models). row_leak: of the outputs of one row by other rows, over that by its own.
    0 where nothing leaks. Outputs are weighted at random, so that gradients do not cancel.

    Args:
        rows: of the batch.
        length: in tokens.
    """

    rows: int = 4
    length: int = 12

    def __post_init__(self) -> None:
        if self.rows < 2 or self.length < 2:
            raise InputError(f"--rows and --length of the probe {self.name} must be at least 2")

    def measure(self, subject: Subject) -> Measurement:
        length = min(self.length, subject.text.length)
        if subject.is_language_model and length < 2:
            raise InputError(f"the run reads {length} token at a time (data.length); a leak from later ones takes 2")
        tokens_BT = torch.randint(subject.text.vocabulary, (self.rows, length)).to(subject.device)
        freeze_stored(subject.model)
        rows: list[Row] = []
        summary: dict[str, float] = {}
        for mode in ("train", "eval"):
            set_norms_training(subject.model, mode == "train")
            row: Row = {"mode": mode, **self._leaks(subject, tokens_BT)}
            rows.append(row)
            summary |= {f"{name}_{mode}": row[name] for name in row if name != "mode"}
        return Measurement(summary, rows)

    def _leaks(self, subject: Subject, tokens_BT: Tensor) -> dict[str, float]:
        embedding = next(part for part in subject.model.modules() if isinstance(part, nn.Embedding))
        inputs: list[Tensor] = []

        def enter(module: nn.Module, ids: object, x_BTE: Tensor) -> Tensor:
            inputs.append(x_BTE.detach().requires_grad_())
            return inputs[-1]

        hook = embedding.register_forward_hook(enter)
        logits = subject.model(tokens_BT).logits
        hook.remove()
        weighted = logits * torch.randn(logits.shape).to(logits.device)

        def sizes(part: Tensor) -> Tensor:
            """Largest gradient of these outputs by the inputs of each row and time step, B x T."""
            (gradient,) = torch.autograd.grad(part.sum(), inputs, retain_graph=True)
            return gradient.abs().amax(-1)

        by_row = sizes(weighted[0]).amax(1)
        leaks = {"row_leak": float(by_row[1:].max() / by_row[0])}
        if subject.is_language_model:
            middle = tokens_BT.shape[1] // 2
            by_step = sizes(weighted[:, :middle]).amax(0)
            leaks["future_leak"] = float(by_step[middle:].max() / by_step[:middle].max())
        return leaks
