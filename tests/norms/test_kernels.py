"""The C kernels of running statistics do what torch operators do, on any shape, and see nothing of later steps.

Shape suffixes: B batch, T time, F features.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from normlab.machine.c_kernels import compiler, left_out
from normlab.norms import build_norm, kernels
from normlab.norms.kernels import PREFIX
from normlab.norms.moments import Prefix
from normlab.norms.standardized import by_prefix

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C compiler on this machine")
FLOAT64 = {"rtol": 1e-9, "atol": 1e-9}
EPS = 1e-5


@pytest.fixture(autouse=True)
def built() -> None:
    assert PREFIX.load(torch.float32) is not None
    assert PREFIX.load(torch.float64) is not None


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def on(engine: str, x: Tensor, mask: Tensor | None = None, carry: Prefix | None = None, *affine: Any) -> list[Tensor]:
    """y, the carry and the gradients of everything, from one engine; `affine` is weight and bias."""
    leaves = [None if value is None else value.detach().clone().requires_grad_() for value in (*affine, None, None)[:2]]
    # As a view of the same strides: `clone` would lay out anew what is not dense.
    leaf = x.detach().requires_grad_()
    with ExitStack() as stack:
        if engine == "torch":
            stack.enter_context(left_out("a test"))
        y, after = by_prefix(leaf, mask, carry, leaves[0], leaves[1], EPS)
    assert type(y.grad_fn).__name__.startswith("_ByPrefixOnKernels") == (engine == "c")
    wanted = [leaf, *(value for value in leaves if value is not None)]
    felt = [y, after.mean, after.square]
    seeds = [drawn(*value.shape, seed=10 + place, dtype=x.dtype) for place, value in enumerate(felt)]
    return [y.detach(), *(value.detach() for value in after), *torch.autograd.grad(felt, wanted, seeds)]


@st.composite
def inputs(draw: st.DrawFn) -> dict[str, Any]:
    rows, steps = draw(st.integers(1, 4)), draw(st.sampled_from([2, 3, 16, 40]))
    features = draw(st.sampled_from([1, 3, 64, 129, 256]))
    seed = draw(st.integers(0, 100))
    x = drawn(rows, steps, features, seed=seed) * draw(st.sampled_from([1e-3, 1.0])) + draw(st.sampled_from([0.0, 1e4]))
    layout = draw(st.sampled_from(["dense", "time first", "features first", "every second"]))
    if layout == "time first":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "features first":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "every second":
        x = x.repeat_interleave(2, 1)[:, ::2]
    mask = None
    if draw(st.booleans()):
        kept = draw(st.sampled_from([0.0, 0.5, 0.9]))
        mask = torch.rand(rows, steps, generator=torch.Generator().manual_seed(seed)) < kept
        x = x.masked_fill(~mask[..., None], draw(st.sampled_from([0.0, torch.nan, torch.inf])))
    affine = [drawn(features, seed=1) + 2, drawn(features, seed=2)]
    present = draw(st.sampled_from([(True, True), (True, False), (False, False)]))
    carry = None
    if draw(st.booleans()):
        count = torch.arange(rows, dtype=torch.float64).view(-1, 1, 1)  # the first row has seen nothing
        carry = Prefix(count, drawn(rows, 1, features) * (count > 0), drawn(rows, 1, features).square() * count)
    return {
        "x": x,
        "mask": mask,
        "carry": carry,
        "affine": [value if there else None for value, there in zip(affine, present, strict=True)],
    }


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(inputs())
def test_equal_to_torch_operators_in_float64(case: dict[str, Any]) -> None:
    args = (case["x"], case["mask"], case["carry"], *case["affine"])
    # Far from 0 an entry itself is known to 1e-12 alone, and standardizing values of 1e-3 enlarges that.
    tolerance = FLOAT64 if case["x"].nan_to_num(0, 0, 0).abs().max() < 100 else {"rtol": 1e-6, "atol": 1e-6}
    for found, expected in zip(on("c", *args), on("torch", *args), strict=True):
        torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("steps", [40, 2000])
def test_as_exact_in_float32_as_torch_operators(offset: float, steps: int) -> None:
    """Against float64 on the same numbers, wherever the mean lies."""
    x = drawn(3, steps, 5, dtype=torch.float32) + offset
    weight, bias = (drawn(5, seed=seed, dtype=torch.float32) for seed in (1, 2))
    mask = torch.rand(3, steps, generator=torch.Generator().manual_seed(0)) < 0.7

    def errors(engine: str) -> list[float]:
        found = on(engine, x, mask, None, weight, bias)
        exact = on("torch", x.double(), mask, None, weight.double(), bias.double())
        return [float((one - other).norm() / other.norm()) for one, other in zip(found, exact, strict=True)]

    for ours, theirs in zip(errors("c"), errors("torch"), strict=True):
        assert ours <= max(2 * theirs, 3e-7)
        assert ours < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_bit_of_an_output_depends_on_later_steps(dtype: torch.dtype) -> None:
    x = drawn(2, 40, 131, dtype=dtype)
    mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(1)) < 0.8
    mask[:, 0] = True
    norm = build_norm("inorm", 131).to(dtype)
    for keep in (None, mask):
        for far in (0.0, 1e9, torch.inf, torch.nan):
            late = x.clone()
            late[:, 31:] = far
            assert torch.equal(norm(late, keep)[:, :31], norm(x, keep)[:, :31])
        # Nor does the gradient of an output reach them.
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(norm(leaf, keep)[:, :31].sum(), leaf)
        assert not grad[:, 31:].any()
        assert grad[:, :31].any()


def test_rows_and_parts_of_a_sequence_are_worth_the_whole() -> None:
    """A row alone, whatever the threads; and a sequence cut in two, with the carry between them."""
    x, mask = drawn(64, 8, 64), torch.ones(64, 8, dtype=torch.bool)
    mask[1:, 5:] = False
    assert x.numel() >= kernels.SMALLEST_PARALLEL
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        whole = on("c", x, mask, None, drawn(64, seed=1), drawn(64, seed=2))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(whole, on("torch", x, mask, None, drawn(64, seed=1), drawn(64, seed=2)), **FLOAT64)
    y, after = by_prefix(x[:1], None, None, drawn(64, seed=1), drawn(64, seed=2), EPS)
    assert torch.equal(y, whole[0][:1])
    first, carry = by_prefix(x[:1, :3], None, None, drawn(64, seed=1), drawn(64, seed=2), EPS)
    second, again = by_prefix(x[:1, 3:], None, carry, drawn(64, seed=1), drawn(64, seed=2), EPS)
    torch.testing.assert_close(torch.cat([first, second], 1), y, **FLOAT64)
    torch.testing.assert_close(tuple(again), tuple(after), **FLOAT64)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked of the kernels."""
    asked: list[str] = []
    for name in ("find", "load"):
        true = getattr(PREFIX, name)
        monkeypatch.setattr(PREFIX, name, lambda dtype, name=name, true=true: asked.append(name) or true(dtype))
    return asked


def test_built_for_a_gradient_alone(calls: list[str]) -> None:
    norm = build_norm("inorm", 4).double()
    x = drawn(2, 5, 4)
    with torch.no_grad():
        norm(x)
    assert calls == ["find"]
    norm(x)
    assert calls[1] == "load"


def test_where_torch_operators_must_serve(calls: list[str]) -> None:
    norm = build_norm("inorm", 4).double().requires_grad_(False)
    x = drawn(2, 5, 4)
    expected = norm(x)
    calls.clear()
    torch.testing.assert_close(torch.func.vmap(norm)(x.unsqueeze(1)).squeeze(1), expected)
    along = torch.func.jvp(norm, (x,), (x,))[1]
    assert along.isfinite().all()
    norm(x[:, :1])
    assert norm(x[:0]).shape == (0, 5, 4)
    assert norm(x.to("meta")).shape == x.shape
    assert not calls
    carry = norm.normalize(x.clone().requires_grad_())[2]
    calls.clear()
    assert norm.normalize(x, carry=carry)[0].requires_grad
    assert not calls


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_a_mask_that_is_not_boolean_is_refused(dtype: torch.dtype) -> None:
    """As by all other norms; the kernels would read its bytes."""
    with pytest.raises(RuntimeError, match="boolean"):
        build_norm("inorm", 4)(drawn(2, 5, 4, dtype=torch.float32), torch.ones(2, 5, dtype=dtype))


def test_bfloat16_gets_statistics_of_float32() -> None:
    norm = build_norm("inorm", 4)
    x = drawn(2, 5, 4, dtype=torch.bfloat16)
    y = norm(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, norm(x.float()).bfloat16())
    half = build_norm("inorm", 4).bfloat16()
    half(x).sum().backward()
    assert half.weight is not None
    assert half.weight.grad is not None
    assert half.weight.grad.dtype == torch.bfloat16
