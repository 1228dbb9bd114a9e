"""Drawn shapes, masks, time steps and extreme values: no NaN from finite input; fp32 statistics hold under bf16.

Magnitudes go to 1e30: beyond, squares and sums leave fp32 altogether, and so do torch's own norms.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from variants import every_norm, every_variant, refuses

from normlab.norms import build_norm, norm_options
from normlab.norms.base import GatheredPenalties

MAGNITUDES = st.sampled_from([0.0, 1e-45, 1e-30, 1e-8, 1.0, 1e4, 1e15, 1e30])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])


@st.composite
def inputs(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, int | Tensor]:
    """x, mask and step: rows that agree, constant rows, rows of nothing but padding, unlike magnitudes."""
    rows, columns, width = draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.sampled_from([4, 8, 24]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    x = torch.randn(rows, columns, width, generator=generator)
    if draw(st.booleans()):
        x = x[:1].expand_as(x).clone()
    if draw(st.booleans()):
        x = x[..., :1].expand_as(x).clone()
    scale = torch.tensor([draw(MAGNITUDES) for _ in range(rows)])
    x = (x.clamp(-3, 3) / 3) * scale[:, None, None] + draw(st.sampled_from([0.0, 1.0, -1e6]))
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(rows, columns, generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.9]))
    step: int | Tensor = draw(st.integers(0, 9))
    if draw(st.booleans()):
        step = torch.randint(0, 9, (rows,), generator=generator)
    return x.to(draw(DTYPES)), mask, step


@every_variant
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(drawn=inputs())
def test_finite_in_finite_out(name: str, options: dict[str, Any], drawn: tuple[Tensor, Tensor | None, Any]) -> None:
    x, mask, step = drawn
    more = {"groups": 2, "max_steps": 7}
    options = {**{key: value for key, value in more.items() if key in norm_options(name)}, **options}
    norm = build_norm(name, x.shape[-1], **options)
    norm = norm.double() if x.dtype == torch.float64 else norm
    for training in (True, True, False):
        norm.train(training)
        leaf = x.clone().requires_grad_()
        if refuses(norm, leaf, mask, step):
            continue
        with GatheredPenalties(norm) as gathered:
            y = norm(leaf, mask, step)
        assert y.dtype == x.dtype
        assert y.shape == x.shape
        assert y.isfinite().all()
        total = gathered.total()
        assert total is None or not total.isnan()
        (grad,) = torch.autograd.grad(y.sum(), leaf)
        assert not grad.isnan().any()
        assert not any(value.isnan().any() for value in norm.state_dict().values())


@every_variant
def test_statistics_are_fp32_under_bf16(name: str, options: dict[str, Any]) -> None:
    """Mean 1e4 with variance 1 fits no bf16, and no difference of squares in fp32."""
    torch.manual_seed(0)
    norm = build_norm(name, 16, **options)
    for _ in range(3):
        x = torch.randn(64, 8, 16) + 1e4
        exact = copy.deepcopy(norm).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            y = norm(x)
        assert y.dtype == torch.float32
        # On average: fp32 at 1e4 has a grain of 1e-3, which shows where the few entries of a set nearly agree.
        assert (y - exact).abs().mean() < 0.01 * exact.abs().mean().clamp(min=1)
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    assert all(buffer.dtype != torch.bfloat16 for buffer in norm.buffers())


@every_norm
def test_a_variance_of_1_at_a_mean_of_1e4(name: str) -> None:
    """The statistic itself: to 1 %, where E[x^2] - E[x]^2 in fp32 is off by several times its value."""
    options = {"pool": "batch_time"} if name in ("bn", "rbn", "brn") else {}
    norm = build_norm(name, 256, **options)
    if not norm.shift_invariant and name != "brn":
        pytest.skip("not centred")
    x = torch.randn(64, 32, 256, generator=torch.Generator().manual_seed(0)) + 1e4
    y = norm(x).detach()
    if name == "inorm":
        y = y[:, 16:]  # the first columns of a prefix are over few entries
    assert y.std() == pytest.approx(1, rel=0.05)
    naive = x.square().mean() - x.mean().square()
    assert abs(float(naive) - 1) > 0.5
