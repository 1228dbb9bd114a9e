"""Root mean square normalization (Zhang & Sennrich 2019, arXiv 1910.07467)."""

from __future__ import annotations

from typing import final

from torch import Tensor

from normlab.norms.base import Norm, Shares, Step
from normlab.norms.moments import Prefix, moments, zero_padding


@final
class RMSNorm(Norm):
    """y = x / sqrt(mean(x^2) + eps) * weight over the features of each entry; equals torch.nn.RMSNorm. Never a bias.

    Args:
        bias: accepted, since sites ask for one, and ignored: the published norm has none.
    """

    formula = "x / sqrt(mean_F(x^2) + eps) * weight"
    paper = "Zhang & Sennrich 2019, arXiv 1910.07467"
    scale_invariant = True
    shift_invariant = False
    shares = Shares(features="all")

    def __init__(
        self, dim: int, *, affine: bool = True, bias: bool = True, gain: float = 1.0, eps: float = 1e-5
    ) -> None:
        super().__init__(dim, affine=affine, bias=False, gain=gain, eps=eps)

    def normalize(
        self, x_BTF: Tensor, mask_BT: Tensor | None = None, step: Step = 0, carry: Prefix | None = None
    ) -> tuple[Tensor, None, None]:
        x = zero_padding(x_BTF, mask_BT)
        return self.standardize(x, None, moments(x, None, (-1,), center=False).var), None, None
