"""What counts as LayerNorm or RMSNorm is what computes it.

Shapes: B batch, T time, F features.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from normlab.models.lookalikes import Lookalike, recognize

F = 24
Formula = Callable[[nn.Module, Tensor], Tensor]


class EpsInTheFormula(nn.Module):
    """As OLMo's LayerNorm: no parameters, and eps is no attribute."""

    def __init__(self, eps: str) -> None:
        super().__init__()
        self.normalized_shape, self.eps_text = (F,), eps

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x.float(), self.normalized_shape, None, None, float(self.eps_text)).to(x.dtype)


class Custom(nn.Module):
    """A module with a gain and perhaps a bias that computes `formula`."""

    def __init__(self, formula: Formula, *, bias: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(F))
        if bias:
            self.bias = nn.Parameter(torch.zeros(F))
        self.variance_epsilon, self.formula = eps, formula

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(self, x)


def rms(module: nn.Module, x: Tensor) -> Tensor:
    return module.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon))


def one_plus(module: nn.Module, x: Tensor) -> Tensor:
    return (1 + module.weight) * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon))


def fp32(module: nn.Module, x: Tensor) -> Tensor:
    x32 = x.to(torch.float32)
    return module.weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + module.variance_epsilon)).to(
        x.dtype
    )


def ln(module: nn.Module, x: Tensor) -> Tensor:
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    return module.weight * (x - mean) * torch.rsqrt(var + module.variance_epsilon) + module.bias


def bessel(module: nn.Module, x: Tensor) -> Tensor:
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True)
    return module.weight * (x - mean) * torch.rsqrt(var + module.variance_epsilon) + module.bias


def eps_outside(module: nn.Module, x: Tensor) -> Tensor:
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True, correction=0)
    return module.weight * (x - mean) / (std + module.variance_epsilon) + module.bias


def hidden_eps(module: nn.Module, x: Tensor) -> Tensor:
    return module.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3))


def scale(module: nn.Module, x: Tensor) -> Tensor:
    return module.weight * x


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Custom(rms), (False, 1e-6, 0.0, False)),
        (Custom(fp32, eps=1e-5), (False, 1e-5, 0.0, False)),
        (Custom(one_plus), (False, 1e-6, 1.0, False)),
        (Custom(ln, bias=True, eps=1e-12), (True, 1e-12, 0.0, True)),
        (nn.LayerNorm(F, eps=1e-3), (True, 1e-3, 1.0, True)),
        (nn.LayerNorm(F, bias=False), (True, 1e-5, 1.0, False)),
        (nn.LayerNorm(F, elementwise_affine=False), (True, 1e-5, None, False)),
        *((EpsInTheFormula(eps), (True, float(eps), None, False)) for eps in ("1e-5", "1e-6", "1e-8", "1e-12")),
        (nn.RMSNorm(F, eps=1e-4), (False, 1e-4, 1.0, False)),
        (nn.RMSNorm(F), (False, torch.finfo(torch.float32).eps, 1.0, False)),
    ],
)
def test_a_norm_is_recognized(module: nn.Module, expected: tuple[bool, float, float | None, bool]):
    found = recognize(module)
    assert isinstance(found, Lookalike)
    gain = None if found.weight is None else float(found.weight.mean())
    assert (found.centered, found.eps, gain, found.bias is not None) == expected
    assert found.dim == F


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Custom(bessel, bias=True), "computes neither"),
        (Custom(eps_outside, bias=True), "computes neither"),
        (Custom(hidden_eps), "computes neither"),
        (Custom(scale), "computes neither"),
        (EpsInTheFormula("0"), "computes neither"),
        (nn.GroupNorm(1, F), "computes neither"),
        (nn.BatchNorm1d(3, track_running_stats=False), "computes neither"),
        (nn.LayerNorm((3, F)), "last 2 dimensions"),
    ],
)
def test_what_only_looks_like_one_is_not(module: nn.Module, reason: str):
    found = recognize(module)
    assert isinstance(found, str)
    assert reason in found


def test_a_norm_with_a_gate_is_left_alone():
    class Gated(Custom):
        def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
            return rms(self, x) if gate is None else rms(self, x) * gate

    assert recognize(Gated(rms)) == "takes more than one input"


def test_other_modules_are_no_candidates():
    for module in (nn.Linear(3, 3), nn.BatchNorm1d(3), nn.PReLU(), nn.ReLU(), nn.Sequential(nn.LayerNorm(3))):
        assert recognize(module) is None


def test_recognizing_changes_nothing():
    module = nn.Sequential(nn.LayerNorm(F))[0].to(torch.bfloat16).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    assert recognize(module) is not None
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert module.training
