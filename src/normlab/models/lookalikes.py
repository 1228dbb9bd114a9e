"""Recognizes LayerNorm and RMSNorm by what they compute, whatever their class is called.

Shapes: B batch, T time, F features.
"""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normlab.norms.base import Norm

__all__ = ["Lookalike", "recognize"]

TOLERANCE = 1e-5
"""Largest relative deviation: above that of arithmetic in fp32, below a Bessel correction up to 10,000 features."""

USUAL_EPS = (1e-5, 1e-6, 1e-8, 1e-12)
"""Tried after the module's attributes: some norms (OLMo's) have theirs in the formula."""


class Lookalike(NamedTuple):
    """The LayerNorm (`centered`) or RMSNorm that a module computes; `weight` is what it multiplies with."""

    centered: bool
    dim: int
    eps: float
    weight: Tensor | None
    bias: Tensor | None


def recognize(module: nn.Module) -> Lookalike | str | None:
    """What `module` computes; the reason if it has the parameters of a norm but is none; None if it has not.

    Candidates are modules without children and buffers whose only parameters are a one-dimensional `weight` and a
    `bias` of its shape, or none at all where `normalized_shape` tells the number of features. They are run on random
    numbers, also on numbers as small as the root of eps: another eps, or eps in another place, is another norm.
    """
    if isinstance(module, Norm):
        return "is one of normlab's norms already"
    if any(True for _ in module.children()) or any(True for _ in module.buffers()):
        return None
    parameters = dict(module.named_parameters(recurse=False))
    shape = getattr(module, "normalized_shape", None)
    sizes = [tuple(parameter.shape) for parameter in parameters.values()]
    if isinstance(shape, (tuple, list)) and len(shape) > 1:
        return f"normalizes over the last {len(shape)} dimensions, not over features alone"
    if not sizes and isinstance(shape, (tuple, list, int)):
        sizes = [tuple(shape) if not isinstance(shape, int) else (shape,)]
    if not set(parameters) <= {"weight", "bias"} or len(set(sizes)) != 1 or len(sizes[0]) != 1 or sizes[0][0] < 2:
        return None
    if len(inspect.signature(module.forward).parameters) != 1:
        return "takes more than one input"
    found = _compare(module, int(sizes[0][0]))
    return found if found is not None else "computes neither LayerNorm nor RMSNorm over the last dimension"


@torch.no_grad()
def _compare(module: nn.Module, F: int) -> Lookalike | None:
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    own = weight if weight is not None else torch.empty(0)
    for dtype in (torch.float64, torch.float32):  # some devices and kernels have no fp64
        try:
            probe = copy.deepcopy(module).to(dtype).eval()
        except (RuntimeError, TypeError):
            continue
        draw = torch.Generator().manual_seed(0)
        # Another gain and bias: those of a fresh model (ones and zeros) would hide what is done with them.
        for parameter in probe.parameters():
            parameter.copy_(torch.randn(F, generator=draw))
        x_BTF = torch.randn(2, 3, F, generator=draw, dtype=torch.float64) + 0.5
        for eps in _eps(module, dtype):
            for centered in (True, False):
                for one in (0, 1):
                    if _agrees(probe, x_BTF.to(own.device, dtype), eps, centered, one):
                        if getattr(module, "eps", 0.0) is None:  # torch.nn.RMSNorm: that of the input's precision
                            eps = torch.finfo(own.dtype).eps
                        gain = None if weight is None else weight.detach() + one
                        return Lookalike(centered, F, eps, gain, None if bias is None else bias.detach())
    return None


def _eps(module: nn.Module, dtype: torch.dtype) -> list[float]:
    values: list[Any] = [value for value in vars(module).values() if isinstance(value, float) and 0 <= value < 1]
    if getattr(module, "eps", 0.0) is None:
        values.append(torch.finfo(dtype).eps)
    values += USUAL_EPS
    return list(dict.fromkeys(values))


def _agrees(probe: nn.Module, x_BTF: Tensor, eps: float, centered: bool, one: int) -> bool:
    weight, bias = getattr(probe, "weight", None), getattr(probe, "bias", None)
    for scale in (1.0, math.sqrt(eps)) if eps else (1.0,):
        x = x_BTF * scale
        try:
            with torch.random.fork_rng(devices=[]):
                y = probe(x)
        except Exception:
            return False
        deviation = x - x.mean(-1, keepdim=True) if centered else x
        expected = deviation * torch.rsqrt(deviation.square().mean(-1, keepdim=True) + eps)
        if weight is not None:
            expected = expected * (weight + one)
        elif one:
            return False
        if bias is not None:
            expected = expected + bias
        if not isinstance(y, Tensor) or y.shape != expected.shape:
            return False
        if float((y - expected).abs().max()) > TOLERANCE * float(expected.abs().max()):
            return False
    return True
