"""The fast recurrence against the reference: outputs, states, all gradients, stored statistics.

Shape suffixes: B batch, T time, I input features, H hidden.
"""

from __future__ import annotations

import copy
import gc
import logging
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from derivatives import require_first_alone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from normlab.config import InputError
from normlab.machine import c_kernels
from normlab.norms import build_norm
from normlab.recurrence import fast, kernels, reference
from normlab.recurrence.reference import SiteNorms, Weights

NORMS = ("none", "ln", "rms", "gn", "bn", "bn_step")
BY_ROW, BY_COLUMN = ("none", "ln", "rms", "gn"), ("none", "bn", "bn_step")
EXACT = {"rtol": 1e-9, "atol": 1e-9}
# Float32: sums over B or 4H entries in another order, exp and tanh by other polynomials.
SINGLE = {"rtol": 2e-4, "atol": 2e-5}
MAX_STEPS = 6


@pytest.fixture(params=["c", "torch"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels, and what runs without them."""
    if request.param == "c" and kernels.compiler() is None:
        pytest.skip("no C compiler on this machine")
    with kernels.left_out("a test") if request.param == "torch" else nullcontext():
        yield request.param


def build(names: tuple[str, str, str], inputs: int, hidden: int, *, bias: bool, affine: bool, seed: int) -> Any:
    torch.manual_seed(seed)
    norms = []
    for name, dim, site_bias in zip(names, (4 * hidden, 4 * hidden, hidden), (True, False, True), strict=True):
        options: dict[str, Any] = {} if name == "none" else {"affine": affine, "bias": site_bias}
        options |= {"gn": {"groups": 2}, "bn_step": {"max_steps": MAX_STEPS}}.get(name, {})
        norm = build_norm(name, dim, **options).double()
        for parameter in norm.parameters():
            torch.nn.init.normal_(parameter, 1.0, 0.3)
        norms.append(norm)
    sizes = ((4 * hidden, inputs), (4 * hidden, hidden), (4 * hidden,))
    weights = [(torch.randn(size, dtype=torch.float64) * 0.5).requires_grad_() for size in sizes]
    return Weights(weights[0], weights[1], weights[2] if bias else None, None), SiteNorms(*norms)


def results(
    layer: Any, weights: Weights, norms: SiteNorms, x: Tensor, mask: Any, h: Tensor, c: Tensor, step: int
) -> Any:
    """Everything a layer gives: outputs, states, gradients, stored values."""
    out, last_h, last_c, _ = layer(x, mask, h, c, weights, norms, step)
    found: list[Tensor] = [out, last_h, last_c]
    leaves = [x, h, c, *weights, *(parameter for norm in norms for parameter in norm.parameters())]
    leaves = [leaf for leaf in leaves if leaf is not None]
    ramp = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).cos()
    loss = (out * ramp).sum() + last_h.square().sum() + last_c.sin().sum()
    found += torch.autograd.grad(loss, leaves)
    return found + [buffer for norm in norms for buffer in norm.buffers()]


def both(weights: Weights, norms: SiteNorms, *args: Any) -> Iterator[tuple[Tensor, Tensor]]:
    assert not fast.never_for(norms, weights)
    assert not fast.not_now_for(args[0], args[2], args[3], weights, norms, args[4])
    twins = copy.deepcopy(norms)
    return zip(
        results(fast.lstm_layer, weights, norms, *args),
        results(reference.lstm_layer, weights, twins, *args),
        strict=True,
    )


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    family = draw(st.sampled_from((BY_ROW, BY_COLUMN, NORMS)))
    return {
        "names": tuple(draw(st.sampled_from(family)) for _ in range(3)),
        "rows": draw(st.integers(2, 6)),
        "length": draw(st.integers(1, 9)),
        "inputs": draw(st.integers(1, 5)),
        # Beyond one block of columns too.
        "hidden": draw(st.sampled_from((4, 6, 18, 66, 130))),
        "masked": draw(st.booleans()),
        "training": draw(st.sampled_from((True, True, False))),
        "bias": draw(st.booleans()),
        "affine": draw(st.booleans()),
        "step": draw(st.integers(0, MAX_STEPS + 1)),
        "seed": draw(st.integers(0, 99)),
    }


def inputs_of(case: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    rows, length, hidden = case["rows"], case["length"], case["hidden"]
    x = torch.randn(length, rows, case["inputs"], dtype=torch.float64)
    mask = None
    if case["masked"]:
        # Not only at the end; columns with one row or none come up.
        mask = torch.rand(rows, length) < 0.5
    h, c = (torch.randn(rows, hidden, dtype=torch.float64).requires_grad_() for _ in range(2))
    return x.requires_grad_(), mask, h, c


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_float64_equals_the_reference(engine: str, case: dict[str, Any]) -> None:
    weights, norms = build(
        case["names"], case["inputs"], case["hidden"], bias=case["bias"], affine=case["affine"], seed=case["seed"]
    )
    x, mask, h, c = inputs_of(case)
    reference.lstm_layer(torch.randn_like(x), None, h.detach(), c.detach(), weights, norms, 1)
    for norm in norms:
        norm.train(case["training"])
    for one, other in both(weights, norms, x, mask, h, c, case["step"]):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("names", [("ln",) * 3, ("bn_step",) * 3])
def test_several_threads_equal_one(monkeypatch: pytest.MonkeyPatch, names: Any) -> None:
    weights, norms = build(names, 3, 130, bias=True, affine=True, seed=0)
    x, mask, h, c = inputs_of({"rows": 5, "length": 4, "inputs": 3, "hidden": 130, "masked": True})
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(fast, "_threads", lambda tape, threads=threads: threads)
        found.append(results(fast.lstm_layer, weights, copy.deepcopy(norms), x, mask, h, c, 0))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("names", [("ln", "ln", "ln"), ("bn_step",) * 3, ("bn", "none", "bn"), ("gn", "rms", "none")])
@pytest.mark.parametrize("masked", [False, True])
def test_float32_is_close_to_the_reference_in_float64(engine: str, names: Any, masked: bool) -> None:
    weights, norms = build(names, 24, 96, bias=True, affine=True, seed=0)
    case = {"rows": 16, "length": 12, "inputs": 24, "hidden": 96, "masked": masked}
    x, mask, h, c = inputs_of(case)

    def single(value: Any) -> Any:
        return None if value is None else value.detach().float().requires_grad_()

    norms_32 = copy.deepcopy(norms)
    for norm in norms_32:
        norm.float()
    weights_32 = Weights(*(single(weight) for weight in weights))
    found = results(fast.lstm_layer, weights_32, norms_32, single(x), mask, single(h), single(c), 0)
    exact = results(reference.lstm_layer, weights, norms, x, mask, h, c, 0)
    for one, other in zip(found, exact, strict=True):
        if one.is_floating_point():
            scale = other.abs().max().clamp(min=1e-30)
            torch.testing.assert_close(one.double() / scale, other / scale, **SINGLE)


@pytest.mark.parametrize(("rows", "length"), [(1, 3), (1, 20), (3, 1), (7, 9)])
def test_float32_products_of_all_sizes(engine: str, rows: int, length: int) -> None:
    """Short sequences do without arranged weights; strides of inputs and gains do not matter."""
    weights, norms = build(("ln", "rms", "ln"), 5, 8, bias=True, affine=True, seed=0)
    for norm in norms:
        norm.float()
        assert norm.weight is not None
        norm.weight = torch.nn.Parameter(norm.weight.detach().repeat_interleave(2)[::2])
    weights = Weights(*(None if w is None else w.detach().float().requires_grad_() for w in weights))
    x = torch.randn(rows, 5, length).permute(2, 0, 1).requires_grad_()
    h, c = (torch.randn(8, rows).t().requires_grad_() for _ in range(2))
    for one, other in both(weights, norms, x, None, h, c, 0):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_saturated_gates_and_far_values_stay_finite_and_right(engine: str) -> None:
    """exp of the kernels at both ends, and NaN that is not hidden."""
    _, norms = build(("none",) * 3, 1, 4, bias=False, affine=False, seed=0)
    values = [-1e30, -200.0, -88.0, -20.0, -1e-3, -1e-20, 0.0, 1e-6, 0.3, 15.0, 90.0, 1e30, float("nan")]
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor(values, dtype=dtype).view(1, -1, 1)
        unit = Weights(torch.ones(16, 1, dtype=dtype), torch.zeros(16, 4, dtype=dtype), None, None)
        zeros = torch.zeros(len(values), 4, dtype=dtype)
        ones = torch.ones_like(zeros)
        for one, other in zip(
            fast.lstm_layer(x, None, zeros, ones, unit, norms)[:3],
            reference.lstm_layer(x, None, zeros, ones, unit, norms)[:3],
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-30, equal_nan=True)


def test_without_gradient_the_same_numbers_and_stored_values(engine: str) -> None:
    for names in (("ln",) * 3, ("bn_step",) * 3, ("none", "bn", "none")):
        weights, norms = build(names, 3, 18, bias=True, affine=True, seed=0)
        x, mask, h, c = inputs_of({"rows": 5, "length": 7, "inputs": 3, "hidden": 18, "masked": True})
        for mask_BT in (None, mask):
            twins = copy.deepcopy(norms)
            with_gradient = fast.lstm_layer(x, mask_BT, h, c, weights, norms, 2)
            with torch.no_grad():
                without = fast.lstm_layer(x, mask_BT, h, c, weights, twins, 2)
            for one, other in zip(with_gradient[:3], without[:3], strict=True):
                torch.testing.assert_close(one, other, **EXACT)
            for one, other in zip(norms, twins, strict=True):
                assert all(a.equal(b) for a, b in zip(one.buffers(), other.buffers(), strict=True))


@pytest.mark.parametrize("options", [{"pool": "batch_time"}, {"pool": "prefix"}, {"ghost_rows": 2}])
def test_an_input_site_of_another_kind_runs_by_itself(engine: str, options: dict[str, Any]) -> None:
    weights, norms = build(("bn", "ln", "ln"), 3, 4, bias=True, affine=True, seed=0)
    norms = norms._replace(input_to_hidden=build_norm("bn", 16, **options).double())
    x, mask, h, c = inputs_of({"rows": 5, "length": 7, "inputs": 3, "hidden": 4, "masked": True})
    for one, other in both(weights, norms, x, mask, h, c, 0):
        torch.testing.assert_close(one, other, **EXACT)


def test_backward_twice_with_the_graph_kept_and_never_a_second_derivative(engine: str) -> None:
    weights, norms = build(("ln", "ln", "ln"), 3, 4, bias=True, affine=True, seed=0)
    x, _, h, c = inputs_of({"rows": 3, "length": 4, "inputs": 3, "hidden": 4, "masked": False})
    out = fast.lstm_layer(x, None, h, c, weights, norms)[0].square().sum()
    require_first_alone(out, x, weights.hidden)


def test_no_cycle_keeps_the_buffers_alive(engine: str) -> None:
    weights, norms = build(("ln", "ln", "ln"), 3, 4, bias=True, affine=True, seed=0)
    x, _, h, c = inputs_of({"rows": 3, "length": 4, "inputs": 3, "hidden": 4, "masked": False})
    out = fast.lstm_layer(x, None, h, c, weights, norms)[0]
    gone = weakref.ref(out)
    gc.disable()
    try:
        del out
        assert gone() is None
    finally:
        gc.enable()


def test_weights_changed_before_backward_are_refused(engine: str) -> None:
    weights, norms = build(("ln", "ln", "ln"), 3, 4, bias=True, affine=True, seed=0)
    x, _, h, c = inputs_of({"rows": 3, "length": 4, "inputs": 3, "hidden": 4, "masked": False})
    out = fast.lstm_layer(x, None, h, c, weights, norms)[0]
    with torch.no_grad():
        weights.hidden.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_what_it_leaves_to_the_reference() -> None:
    weights, norms = build(("bn_step", "bn_step", "bn_step"), 3, 4, bias=True, affine=True, seed=0)
    x, _, h, c = inputs_of({"rows": 3, "length": 4, "inputs": 3, "hidden": 4, "masked": False})

    def reason(step: Any = 0, x: Tensor = x) -> str:
        return fast.not_now_for(x, h, c, weights, norms, step)

    assert reason() == ""
    assert reason(torch.tensor([0, 1, 1])) == "rows are at time steps of their own"
    assert reason(x=x.float()) == "tensors are not all float32 or all float64"
    with torch.autocast("cpu", torch.bfloat16):
        assert reason() == "autocast is on"
    object.__setattr__(norms.cell, "normalize", norms.cell.normalize)
    assert reason() == "a norm is being watched"
    ghosts = norms._replace(cell=build_norm("bn_step", 4, ghost_rows=2))
    assert fast.never_for(ghosts, weights) == "bn_step at cell has no fast form with ghost_rows"
    assert "proj_size" in fast.never_for(norms, weights._replace(projection=weights.hidden))


def test_a_single_row_is_refused_as_the_reference_refuses_it() -> None:
    weights, norms = build(("none", "bn", "none"), 3, 4, bias=True, affine=True, seed=0)
    x, _, h, c = inputs_of({"rows": 1, "length": 4, "inputs": 3, "hidden": 4, "masked": False})
    with pytest.raises(InputError, match=r"bn needs at least 2 rows in training and got a batch of shape \(1, 1, 16\)"):
        fast.lstm_layer(x, None, h, c, weights, norms)


def as_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c_kernels, "_libraries", {})
    monkeypatch.setattr(c_kernels, "_failed", set())


class TestBuilding:
    """The kernels' way from source to library, in a cache of the test's own."""

    @pytest.fixture(autouse=True)
    def own_cache(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        as_a_new_process(monkeypatch)

    def test_built_once(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        if kernels.compiler() is None:
            pytest.skip("no C compiler on this machine")
        caplog.set_level(logging.INFO, "normlab.machine")
        assert kernels.load(torch.float32) is not None
        assert caplog.text.count("built the LSTM kernels") == 1
        built = list((tmp_path / "normlab").iterdir())
        assert [path.suffix for path in built] == [".so"]
        as_a_new_process(monkeypatch)
        assert kernels.load(torch.float32) is not None
        assert list((tmp_path / "normlab").iterdir()) == built
        assert caplog.text.count("building the LSTM kernels") == 1

    def test_built_at_the_first_call_with_gradient(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        if kernels.compiler() is None:
            pytest.skip("no C compiler on this machine")
        weights, norms = build(("ln", "ln", "ln"), 3, 4, bias=True, affine=True, seed=0)
        x, _, h, c = inputs_of({"rows": 3, "length": 4, "inputs": 3, "hidden": 4, "masked": False})
        to_come = "C kernels, which the first call with gradient builds"
        for _ in range(2):
            assert fast.engine(norms, torch.float64) == to_come
            with torch.no_grad():
                without = fast.lstm_layer(x, None, h, c, weights, norms)[0]
        assert not list((tmp_path / "normlab").glob("*.so"))
        with_gradient = fast.lstm_layer(x, None, h, c, weights, norms)[0]
        assert fast.engine(norms, torch.float64) == "C kernels"
        torch.testing.assert_close(without, with_gradient, **EXACT)
        as_a_new_process(monkeypatch)
        assert kernels.find(torch.float64) is not None
        assert kernels.find(torch.float32) is None

    def test_left_out(self, tmp_path: Path) -> None:
        _, norms = build(("ln", "ln", "ln"), 3, 4, bias=True, affine=True, seed=0)
        with kernels.left_out("one reason"):
            with kernels.left_out("another"):
                assert fast.engine(norms, torch.float32) == "torch operators: another"
            assert fast.engine(norms, torch.float32) == "torch operators: one reason"
            assert kernels.load(torch.float32) is None
        assert not list((tmp_path / "normlab").glob("*.so"))

    def test_the_line_while_building_is_seen_without_logging_set_up(self, tmp_path: Path) -> None:
        if kernels.compiler() is None:
            pytest.skip("no C compiler on this machine")
        code = "import torch, normlab; normlab.LSTM(2, 2, norm='ln')(torch.zeros(1, 1, 2))"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert run.stderr.count("building the LSTM kernels with") == 1
        assert run.stdout == ""

    def test_no_compiler(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CC", raising=False)
        caplog.set_level(logging.INFO, "normlab.machine")
        assert kernels.load(torch.float32) is None
        assert kernels.load(torch.float32) is None
        assert caplog.text.count("no C compiler found") == 1
        _, norms = build(("ln", "ln", "ln"), 3, 4, bias=True, affine=True, seed=0)
        assert fast.engine(norms, torch.float64) == "torch operators: no C compiler that works"

    def test_a_compiler_that_fails(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        broken = tmp_path / "broken-cc"
        broken.write_text('#!/bin/sh\ntest "$1" = --version || { echo it is broken >&2; exit 1; }\n')
        broken.chmod(0o755)
        monkeypatch.setenv("CC", str(broken))
        assert kernels.load(torch.float32) is None
        assert "it is broken" in caplog.text
        assert list((tmp_path / "normlab").iterdir()) == []
        _, norms = build(("ln", "ln", "ln"), 3, 4, bias=True, affine=True, seed=0)
        assert fast.engine(norms, torch.float32) == "torch operators: no C compiler that works"

    def test_a_cache_that_can_not_be_written(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        if kernels.compiler() is None:
            pytest.skip("no C compiler on this machine")
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert kernels.load(torch.float32) is not None
