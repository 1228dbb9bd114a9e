"""Dynamic erf (Chen et al. 2025, arXiv 2512.10938)."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from normlab.norms.base import Norm, Step
from normlab.norms.moments import Prefix, for_statistics, zero_padding


@final
class DynamicErf(Norm):
    """y = erf(alpha * x + shift) * weight + bias, elementwise: no statistics. `alpha` and `shift` are learned scalars.

    Args:
        affine: False leaves out gain and bias; alpha and shift (from 0) are learned all the same.
        alpha: its initial value.
    """

    formula = "erf(alpha x + shift) * weight + bias, scalars alpha and shift"
    paper = "Chen et al. 2025, arXiv 2512.10938"
    scale_invariant = False
    shift_invariant = False

    def __init__(
        self, dim: int, *, affine: bool = True, bias: bool = True, gain: float = 1.0, alpha: float = 0.5
    ) -> None:
        super().__init__(dim, affine=affine, bias=bias, gain=gain, eps=0.0)
        self.initial_alpha = alpha
        self.alpha = nn.Parameter(torch.tensor([float(alpha)]))
        self.shift = nn.Parameter(torch.zeros(1))

    def normalize(
        self, x_BTF: Tensor, mask_BT: Tensor | None = None, step: Step = 0, carry: Prefix | None = None
    ) -> tuple[Tensor, None, None]:
        x = for_statistics(zero_padding(x_BTF, mask_BT))
        return self.gain_and_bias(torch.erf(self.alpha * x + self.shift), x_BTF.dtype), None, None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.initial_alpha:g}"
