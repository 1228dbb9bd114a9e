"""Layer normalization (Ba, Kiros & Hinton 2016, arXiv 1607.06450)."""

from __future__ import annotations

from typing import final

from torch import Tensor

from normlab.norms.base import Norm, Shares, Step
from normlab.norms.moments import Prefix, moments, zero_padding


@final
class LayerNorm(Norm):
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the features of each entry; equals torch.nn.LayerNorm.

    With affine=False it is LN-simple (Xu et al. 2019, arXiv 1911.07013).
    """

    formula = "(x - mean_F) / sqrt(var_F + eps) * weight + bias"
    paper = "Ba, Kiros & Hinton 2016, arXiv 1607.06450"
    scale_invariant = True
    shift_invariant = True
    shares = Shares(features="all")

    def normalize(
        self, x_BTF: Tensor, mask_BT: Tensor | None = None, step: Step = 0, carry: Prefix | None = None
    ) -> tuple[Tensor, None, None]:
        x = zero_padding(x_BTF, mask_BT)
        mean, var, _ = moments(x, None, (-1,))
        return self.standardize(x, mean, var), None, None
