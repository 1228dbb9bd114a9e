"""Group normalization (Wu & He 2018, arXiv 1803.08494), per entry: groups of features share statistics."""

from __future__ import annotations

from typing import final

from torch import Tensor

from normlab.config import InputError
from normlab.norms.base import Norm, Step
from normlab.norms.moments import Prefix, moments, zero_padding


@final
class GroupNorm(Norm):
    """y = (x - mean) / sqrt(var + eps) * weight + bias over each group of features of each entry.

    Equals torch.nn.GroupNorm applied to every token by itself. One group is layer normalization.

    Args:
        groups: number of groups; must divide `dim` and leave at least 2 features to each.
    """

    formula = "(x - mean_group) / sqrt(var_group + eps) * weight + bias"
    scale_invariant = True
    shift_invariant = True
    batch_independent = True

    def __init__(
        self,
        dim: int,
        *,
        affine: bool = True,
        bias: bool = True,
        gain: float = 1.0,
        eps: float = 1e-5,
        groups: int = 8,
    ) -> None:
        super().__init__(dim, affine=affine, bias=bias, gain=gain, eps=eps)
        if dim % groups:
            raise InputError(
                f"gn cannot cut {dim} features into {groups} equal groups; "
                f"set model.norm_options.groups to a divisor of {dim}"
            )
        if groups == dim:
            raise InputError(
                f"gn with {groups} groups of one feature makes every entry 0; set model.norm_options.groups below {dim}"
            )
        self.groups = groups

    def normalize(
        self, x_BTF: Tensor, mask_BT: Tensor | None = None, step: Step = 0, carry: Prefix | None = None
    ) -> tuple[Tensor, None, None]:
        x = zero_padding(x_BTF, mask_BT)
        grouped = x.unflatten(-1, (self.groups, -1))
        mean, var, _ = moments(grouped, None, (-1,))
        width = self.dim // self.groups
        spread = [value.expand(*grouped.shape[:-1], width).flatten(-2) for value in (mean, var)]
        return self.standardize(x, spread[0], spread[1]), None, None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"
