"""Backward passes written by hand are the derivatives, first and second, and equal the plain forms in value.

Shape suffixes: B batch, T time, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from normlab.machine.c_kernels import left_out
from normlab.norms import fused
from normlab.norms.moments import moments, prefix_moments, zero_padding
from normlab.norms.standardized import by_last_dimension, by_prefix

B, T, F = 2, 5, 3
MASK = torch.tensor([[True] * 5, [True, False, True, False, False]])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rescaled(*args: Tensor | None) -> Tensor:
    x, mean, scale, weight, bias = args
    assert x is not None
    assert scale is not None
    return fused.rescale(x, mean, scale, weight, bias)


def masked_moments(x: Tensor, dims: tuple[int, ...], center: bool) -> tuple[Tensor, Tensor]:
    return moments(zero_padding(x, MASK), MASK, dims, center=center)[:2]


def masked_prefix(x: Tensor, over_batch: bool) -> tuple[Tensor, Tensor]:
    return prefix_moments(zero_padding(x, MASK), MASK, over_batch, None)[0][:2]


def prefix_with_carry(
    x: Tensor, masked: bool, in_torch: bool, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, ...]:
    mask = MASK if masked else None
    with left_out("a test") if in_torch else nullcontext():
        y, carry = by_prefix(x, mask, None, weight, bias, 1e-5)
    return y, carry.mean, carry.square


Case = tuple[Callable[..., Any], tuple[Any, ...]]
STATISTICS: dict[str, tuple[int, ...]] = {"feature": (1, 1, F), "token": (B, T, 1), "entry": (B, T, F)}
CASES: dict[str, Case] = {
    **{
        f"rescale by {name}{', no mean' * bare}{', no gain' * bare}": (
            rescaled,
            (drawn(B, T, F), None if bare else drawn(*shape, seed=1), drawn(*shape, seed=2))
            + ((None, None) if bare else (drawn(F, seed=3), drawn(F, seed=4))),
        )
        for name, shape in STATISTICS.items()
        for bare in (False, True)
    },
    **{
        f"moments over {dims}, centred {center}": (masked_moments, (drawn(B, T, F), dims, center))
        for dims in ((0,), (0, 1), (1,))
        for center in (True, False)
    },
    **{f"prefix, over batch {over}": (masked_prefix, (drawn(B, T, F), over)) for over in (True, False)},
    **{
        f"by last dimension{', bare' * bare}": (
            by_last_dimension,
            (drawn(B, 2, 2, F), *((None, None) if bare else (drawn(2, F, seed=1), drawn(2, F, seed=2))), 1e-5),
        )
        for bare in (False, True)
    },
    **{
        f"by prefix{', masked' * masked}{', bare' * bare}{', in torch' * in_torch}": (
            prefix_with_carry,
            (drawn(B, T, F), masked, in_torch, *((None, None) if bare else (drawn(F, seed=1), drawn(F, seed=2)))),
        )
        for in_torch in (False, True)
        for masked in (False, True)
        for bare in (False, True)
    },
    "running sum": (fused.running_sum, (drawn(B, 18, 2),)),
    "sum to come": (lambda x: fused.running_sum(x, reverse=True), (drawn(B, 18, 2),)),
    **{
        f"local response, window {window}": (fused.local_response, (drawn(B, 2, 4), window, 0.5, 0.75, 1.0))
        for window in (1, 4, 5, 11)
    },
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@every_case
def test_first_and_second_derivatives(case: Case):
    function, args = case
    args = tuple(arg.clone().requires_grad_() if isinstance(arg, Tensor) else arg for arg in args)
    assert torch.autograd.gradcheck(function, args)
    assert torch.autograd.gradgradcheck(function, args)


@every_case
def test_equal_to_the_plain_form(case: Case, monkeypatch: pytest.MonkeyPatch):
    function, args = case
    found = function(*args)
    monkeypatch.setattr(fused, "applies", lambda: False)
    torch.testing.assert_close(found, function(*args))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("steps", [1, 15, 16, 17, 32, 50])
def test_running_sum_in_blocks(steps: int, reverse: bool):
    x = drawn(3, steps, 2)
    expected = x.flip(1).cumsum(1).flip(1) if reverse else x.cumsum(1)
    torch.testing.assert_close(fused.running_sum(x, reverse=reverse), expected)


def test_the_plain_form_where_it_must_serve():
    x, scale = drawn(B, T, F), drawn(1, 1, F)

    def function(x: Tensor) -> Tensor:
        return fused.rescale(x, None, scale, None, None)

    assert fused.applies()
    torch.testing.assert_close(torch.func.jvp(function, (x,), (x,))[1], x * scale)
    torch.testing.assert_close(torch.func.vmap(function)(x.unsqueeze(1)).squeeze(1), x * scale)
    with torch.autograd.forward_ad.dual_level():
        dual = function(torch.autograd.forward_ad.make_dual(x, x))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, x * scale)


def test_sums_of_squares_beyond_fp32():
    x = torch.full((1, 20, 2), 1e30).mul(torch.arange(20).remainder(2).view(1, -1, 1)).requires_grad_()
    statistics, _ = prefix_moments(x, None, False, None)
    assert statistics.var.isfinite().all()
    (grad,) = torch.autograd.grad((statistics.var + 1e-5).rsqrt().sum(), x)
    assert not grad.isnan().any()


def test_local_response_where_squares_overflow():
    """All that is left of such entries is 0, and so is its derivative, in either form."""

    def total(x: Tensor) -> Tensor:
        return fused.local_response(x, 3, 1.0, 0.75, 1.0).sum()

    x = torch.tensor([1e30, 1.0, -1e30, 0.0]).requires_grad_()
    (grad,) = torch.autograd.grad(total(x), x)
    torch.testing.assert_close(grad, torch.zeros(4))
    torch.testing.assert_close(torch.func.grad(total)(x.detach()), torch.zeros(4))


@pytest.mark.parametrize("in_torch", [False, True])
def test_by_prefix_where_sums_of_squares_overflow(monkeypatch: pytest.MonkeyPatch, in_torch: bool):
    """Every second entry of the last three features is 1e30; the first feature is ordinary, to see that it stays so."""
    x = drawn(1, 20, 4).float()
    x[:, 1::2, 1:] = 1e30
    weight = torch.rand(1, 20, 4)

    def gradient() -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        y, _ = by_prefix(leaf, None, None, None, None, 1e-5)
        return y.detach(), torch.autograd.grad((y * weight).sum(), leaf)[0]

    with left_out("a test") if in_torch else nullcontext():
        found = gradient()
    assert all(value.isfinite().all() for value in found)
    monkeypatch.setattr(fused, "applies", lambda: False)
    torch.testing.assert_close(found, gradient(), rtol=1e-4, atol=1e-5)


def test_running_sums_know_nothing_of_what_they_do_not_sum():
    """Step 31 is in a block with steps before it."""
    x = drawn(2, 40, 3).detach()
    for far in (1e9, torch.inf):
        late, early = x.clone(), x.clone()
        late[:, 31:], early[:, :9] = far, far
        assert torch.equal(fused.running_sum(late)[:, :31], fused.running_sum(x)[:, :31])
        assert torch.equal(fused.running_sum(early, reverse=True)[:, 9:], fused.running_sum(x, reverse=True)[:, 9:])
