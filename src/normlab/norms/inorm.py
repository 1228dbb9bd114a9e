"""Instance normalization (Ulyanov et al. 2016, arXiv 1607.08022) of text: each example and feature over time."""

from __future__ import annotations

from typing import final

from torch import Tensor

from normlab.config import require_choice
from normlab.norms.base import Norm, Shares, Step
from normlab.norms.moments import Prefix, for_statistics, moments, zero_padding
from normlab.norms.standardized import by_prefix


@final
class InstanceNorm(Norm):
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the time steps of each example and feature.

    Args:
        causal: decides the default of `pool`: "prefix" if True, else "time".
        pool: "prefix" (time steps up to this one; the first is normalized to 0) or "time" (all of them: sees the
            future; equals torch.nn.InstanceNorm1d).
    """

    formula = "(x - mean_T) / sqrt(var_T + eps) * weight + bias"
    paper = "Ulyanov et al. 2016, arXiv 1607.08022"
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
        causal: bool = True,
        pool: str | None = None,
    ) -> None:
        super().__init__(dim, affine=affine, bias=bias, gain=gain, eps=eps)
        self.pool = pool or ("prefix" if causal else "time")
        require_choice("inorm pool", self.pool, ("prefix", "time"))
        self.shares = Shares(time="prefix" if self.pool == "prefix" else "sequence")
        self.has_kernels = self.pool == "prefix"

    @classmethod
    def stepwise_pool(cls, pool: str | None) -> str | None:
        return "prefix"

    def normalize(
        self, x_BTF: Tensor, mask_BT: Tensor | None = None, step: Step = 0, carry: Prefix | None = None
    ) -> tuple[Tensor, None, Prefix | None]:
        if self.pool == "time":
            x = zero_padding(x_BTF, mask_BT)
            mean, var, _ = moments(x, mask_BT, (1,))
            return self.standardize(x, mean, var), None, None
        y, carry = by_prefix(for_statistics(x_BTF), mask_BT, carry, self.weight, self.bias, self.eps)
        return y.to(x_BTF.dtype), None, carry

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pool={self.pool}"
