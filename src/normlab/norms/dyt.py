"""Dynamic tanh (Zhu et al. 2025, arXiv 2503.10622)."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from normlab.norms.base import Norm, Step
from normlab.norms.moments import Prefix, for_statistics, zero_padding


@final
class DynamicTanh(Norm):
    """y = tanh(alpha * x) * weight + bias, elementwise: no statistics. `alpha` is one learned scalar.

    Args:
        affine: False leaves out gain and bias; alpha is learned all the same.
        alpha: its initial value.
    """

    formula = "tanh(alpha x) * weight + bias, one scalar alpha"
    paper = "Zhu et al. 2025, arXiv 2503.10622"
    scale_invariant = False
    shift_invariant = False

    def __init__(
        self, dim: int, *, affine: bool = True, bias: bool = True, gain: float = 1.0, alpha: float = 0.5
    ) -> None:
        super().__init__(dim, affine=affine, bias=bias, gain=gain, eps=0.0)
        self.initial_alpha = alpha
        self.alpha = nn.Parameter(torch.tensor([float(alpha)]))

    def normalize(
        self, x_BTF: Tensor, mask_BT: Tensor | None = None, step: Step = 0, carry: Prefix | None = None
    ) -> tuple[Tensor, None, None]:
        x = for_statistics(zero_padding(x_BTF, mask_BT))
        return self.gain_and_bias(torch.tanh(self.alpha * x), x_BTF.dtype), None, None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.initial_alpha:g}"
