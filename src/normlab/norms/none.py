"""No norm: the control arm."""

from __future__ import annotations

from typing import final

from torch import Tensor

from normlab.norms.base import Norm, Step
from normlab.norms.moments import Prefix


@final
class NoNorm(Norm):
    """y = x itself: no parameters, no stored values, no statistics. The options of other norms do not apply."""

    formula = "x"
    paper = ""
    scale_invariant = False
    shift_invariant = False
    identity = True

    def __init__(self, dim: int, *, bias: bool = True, gain: float = 1.0) -> None:
        super().__init__(dim, affine=False, bias=bias, gain=gain)

    def normalize(
        self, x_BTF: Tensor, mask_BT: Tensor | None = None, step: Step = 0, carry: Prefix | None = None
    ) -> tuple[Tensor, None, None]:
        return x_BTF, None, None

    def extra_repr(self) -> str:
        return f"{self.dim}, site={self.site}" if self.site else f"{self.dim}"
