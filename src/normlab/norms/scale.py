"""ScaleNorm (Nguyen & Salazar 2019, arXiv 1910.05895)."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn

from normlab.norms.base import Norm, Shares, Step
from normlab.norms.moments import Prefix, for_statistics, zero_padding


@final
class ScaleNorm(Norm):
    """y = weight * x / sqrt(sum(x^2) + eps): on a sphere whose radius `weight` is one learned scalar. Never a bias.

    Args:
        affine: False fixes the radius at its initial value.
        bias: accepted, since sites ask for one, and ignored: the published norm has none.
        gain: initial radius in units of sqrt(F), the published start: at 1 an entry's root mean square is 1, as behind
            other norms.
    """

    formula = "weight * x / ||x||, one scalar weight"
    paper = "Nguyen & Salazar 2019, arXiv 1910.05895"
    shares = Shares(features="all")
    scale_invariant = True
    shift_invariant = False

    def __init__(
        self, dim: int, *, affine: bool = True, bias: bool = True, gain: float = 1.0, eps: float = 1e-5
    ) -> None:
        super().__init__(dim, affine=False, bias=False, gain=gain, eps=eps)
        self.radius = gain * math.sqrt(dim)
        self.weight = nn.Parameter(torch.tensor([self.radius])) if affine else None

    def normalize(
        self, x_BTF: Tensor, mask_BT: Tensor | None = None, step: Step = 0, carry: Prefix | None = None
    ) -> tuple[Tensor, None, None]:
        x = for_statistics(zero_padding(x_BTF, mask_BT))
        radius = self.radius if self.weight is None else self.weight
        scale = radius * torch.rsqrt(x.square().sum(-1, keepdim=True) + self.eps)
        return (x * scale).to(x_BTF.dtype), None, None
