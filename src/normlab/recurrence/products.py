"""Matrix products in oneDNN, which at the shapes of an LSTM takes 60 to 90 % of the time of torch's default ones.

The choice does not rest on a measurement: the same seed must give the same numbers in every run.

Shape suffixes: N rows, I and O features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Product", "product"]

_FEWEST_STEPS = 8
"""Below, arranging the weights anew takes longer than it saves."""


def _onednn(x: Tensor) -> bool:
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def product(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """x @ weight.T, without gradient."""
    if x_NI.numel() and _onednn(x_NI):
        return torch.ops.mkldnn._linear_pointwise(x_NI, weight_OI, None, "none", [], "")
    return x_NI @ weight_OI.t()


class Product:
    """`product` with the same weight many times over, arranged once in the order that oneDNN reads it."""

    def __init__(self, weight_OI: Tensor, rows: int, times: int) -> None:
        packs = rows > 0 and _onednn(weight_OI) and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        self._packed: Any = None
        if packs and times >= _FEWEST_STEPS:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), rows)
        self._weight = weight_OI

    def __call__(self, x_NI: Tensor) -> Tensor:
        """N x O, in memory of its own."""
        if self._packed is None:
            return product(x_NI, self._weight)
        return torch.ops.mkldnn._linear_pointwise(x_NI, self._packed, None, "none", [], "")
