"""Group normalization (Wu & He 2018, arXiv 1803.08494): groups of features share statistics."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from normlab.config import InputError, require_choice
from normlab.norms.base import Norm, Shares, Step
from normlab.norms.fused import rescale
from normlab.norms.moments import Prefix, for_statistics, moments, prefix_moments, zero_padding
from normlab.norms.standardized import by_last_dimension


@final
class GroupNorm(Norm):
    """y = (x - mean) / sqrt(var + eps) * weight + bias over each group of features of each example.

    Args:
        groups: number of groups; must divide `dim` and leave at least 2 features to each. One group is layer
            normalization if pool="token".
        pool: time steps that share a statistic: "token" (this one; torch.nn.GroupNorm applied to every token by
            itself), "prefix" (up to this one), "time" (all of them: sees the future; torch.nn.GroupNorm over
            B x F x T, as published for images).
    """

    formula = "(x - mean_group) / sqrt(var_group + eps) * weight + bias"
    paper = "Wu & He 2018, arXiv 1803.08494"
    scale_invariant = True
    shift_invariant = True

    def __init__(
        self,
        dim: int,
        *,
        affine: bool = True,
        bias: bool = True,
        gain: float = 1.0,
        eps: float = 1e-5,
        groups: int = 8,
        pool: str | None = None,
    ) -> None:
        super().__init__(dim, affine=affine, bias=bias, gain=gain, eps=eps)
        if dim % groups:
            raise InputError(
                f"gn cannot cut {dim} features into {groups} equal groups; "
                f"set model.norm_options.groups to a divisor of {dim}"
            )
        self.groups, self.pool = groups, pool or "token"
        require_choice("gn pool", self.pool, ("token", "prefix", "time"))
        if groups == dim and self.pool == "token":
            raise InputError(
                f"gn with {groups} groups of one feature makes every entry 0; set model.norm_options.groups below {dim}"
            )
        time = {"token": "step", "prefix": "prefix", "time": "sequence"}
        self.shares = Shares(time=time[self.pool], features="group")  # pyright: ignore[reportArgumentType]

    @classmethod
    def stepwise_pool(cls, pool: str | None) -> str | None:
        return "prefix" if pool == "time" else pool

    def normalize(
        self, x_BTF: Tensor, mask_BT: Tensor | None = None, step: Step = 0, carry: Prefix | None = None
    ) -> tuple[Tensor, None, Prefix | None]:
        x = zero_padding(x_BTF, mask_BT)
        grouped = for_statistics(x).unflatten(-1, (self.groups, -1))
        weight, bias = (
            None if value is None else value.unflatten(-1, (self.groups, -1)) for value in (self.weight, self.bias)
        )
        if self.pool == "token":
            y = by_last_dimension(grouped, weight, bias, self.eps)
        else:
            token = moments(grouped, None, (-1,))
            # Tokens are equally large parts of their group, so the variance of all is that of the tokens' means plus
            # the mean of their variances: means and variances are pooled over time as if they were 2 x groups features.
            # Bounded far beyond any real variance, so that sums over time stay finite.
            inner = token.var.squeeze(-1).clamp(max=1e-6 * torch.finfo(token.var.dtype).max)
            both = torch.cat([token.mean.squeeze(-1), inner], -1)
            if self.pool == "time":
                over_time = moments(both, mask_BT, (1,))
            else:
                over_time, carry = prefix_moments(both, mask_BT, False, carry)
            mean, inner = over_time.mean.chunk(2, -1)
            mean, var = mean.unsqueeze(-1), (inner + over_time.var[..., : self.groups]).unsqueeze(-1)
            y = rescale(grouped, mean, torch.rsqrt(var + self.eps), weight, bias)
        return y.flatten(-2).to(x.dtype), None, carry

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}, pool={self.pool}"
