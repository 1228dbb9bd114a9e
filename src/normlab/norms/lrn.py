"""Local response normalization (Krizhevsky et al. 2012), across features."""

from __future__ import annotations

from typing import final

from torch import Tensor

from normlab.norms.base import Norm, Shares, Step
from normlab.norms.fused import local_response
from normlab.norms.moments import Prefix, for_statistics, zero_padding


@final
class LocalResponseNorm(Norm):
    """y = x / (k + alpha * mean(x^2 over the `window` features around each one))^beta; torch.nn.LocalResponseNorm.

    Features count as neighbours by their index, as channels did in the paper; beyond the ends stand zeros.

    Args:
        affine: published without; a gain and bias follow if asked for.
        window: number of features (torch's `size`).
        alpha: strength. The default is the published one, made for activations of images: with activations around
            1 it changes next to nothing.
        beta: exponent.
        k: added constant.
    """

    formula = "x / (k + alpha * mean_window(x^2))^beta"
    paper = "Krizhevsky, Sutskever & Hinton 2012, NeurIPS 25"
    shares = Shares(features="window")
    scale_invariant = False
    shift_invariant = False

    def __init__(
        self,
        dim: int,
        *,
        affine: bool = False,
        bias: bool = True,
        gain: float = 1.0,
        window: int = 5,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 1.0,
    ) -> None:
        super().__init__(dim, affine=affine, bias=bias, gain=gain, eps=0.0)
        self.window, self.alpha, self.beta, self.k = window, alpha, beta, k

    def normalize(
        self, x_BTF: Tensor, mask_BT: Tensor | None = None, step: Step = 0, carry: Prefix | None = None
    ) -> tuple[Tensor, None, None]:
        x = for_statistics(zero_padding(x_BTF, mask_BT))
        y = local_response(x, self.window, self.alpha, self.beta, self.k)
        return self.gain_and_bias(y, x_BTF.dtype), None, None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window={self.window}, alpha={self.alpha:g}, beta={self.beta:g}, k={self.k:g}"
