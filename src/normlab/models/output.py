"""What every model returns."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class ModelOutput(NamedTuple):
    """`logits` B x T x V (language model) or B x C (classifier); `state` to carry to the next window, or None."""

    logits: Tensor
    state: Any | None
