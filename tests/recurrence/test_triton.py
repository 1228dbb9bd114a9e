"""The GPU's recurrence against the reference: on a GPU if there is one, else in Triton's interpreter.

The interpreter replaces Triton in a whole process, so one test starts a pytest of its own, on this file and on
test_triton_cells.py.

Shape suffixes: B batch, T time, I input features, H hidden.
"""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from derivatives import require_first_alone
from torch import Tensor, nn
from triton_device import (
    DEVICE,
    EXACT,
    GPU,
    HALF,
    INTERPRETED,
    SINGLE,
    compiled_for_an_absent_gpu,
    lowered,
    on_either,
    on_gpu,
    require_close,
    to_compile,
)

from normlab.models.lstm import LSTM
from normlab.norms import build_norm
from normlab.probes.cost import SavedBytes
from normlab.recurrence import cuda, fast, graphs, reference
from normlab.recurrence.reference import SiteNorms, Weights

BY_ROW, BY_COLUMN = ("none", "ln", "rms", "gn"), ("none", "bn", "bn_step")
MAX_STEPS = 4


def build(names: tuple[str, str, str], inputs: int, hidden: int, *, bias: bool, affine: bool, seed: int) -> Any:
    torch.manual_seed(seed)
    norms = []
    for name, dim, site_bias in zip(names, (4 * hidden, 4 * hidden, hidden), (True, False, True), strict=True):
        options: dict[str, Any] = {} if name == "none" else {"affine": affine, "bias": site_bias}
        # Groups that begin inside a gate, too.
        options |= {"gn": {"groups": 3 if hidden % 3 == 0 else 2}, "bn_step": {"max_steps": MAX_STEPS}}.get(name, {})
        norm = build_norm(name, dim, **options)
        for parameter in norm.parameters():
            nn.init.normal_(parameter, 1.0, 0.3)
        norms.append(norm.to(DEVICE, torch.float64))
    sizes = ((4 * hidden, inputs), (4 * hidden, hidden), (4 * hidden,))
    weights = [(torch.randn(size) * 0.5).to(DEVICE, torch.float64).requires_grad_() for size in sizes]
    return Weights(weights[0], weights[1], weights[2] if bias else None, None), SiteNorms(*norms)


def inputs_of(rows: int, length: int, inputs: int, hidden: int, masked: bool) -> Any:
    sizes = ((length, rows, inputs), (rows, hidden), (rows, hidden))
    x, h, c = (torch.randn(size).to(DEVICE, torch.float64).requires_grad_() for size in sizes)
    # Not only at the end; time steps with one row or none come up.
    mask = (torch.rand(rows, length) < 0.5).to(DEVICE) if masked else None
    return x, mask, h, c


def results(
    layer: Any, weights: Weights, norms: SiteNorms, x: Tensor, mask: Any, h: Tensor, c: Tensor, step: int = 0,
    *, recompute: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Everything a layer gives: outputs, states, gradients, stored values."""
    out, last_h, last_c, _ = layer(x, mask, h, c, weights, norms, step, recompute=recompute)
    leaves = [x, h, c, *weights, *(parameter for norm in norms for parameter in norm.parameters())]
    leaves = [leaf for leaf in leaves if leaf is not None]
    ramp = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out).cos()
    loss = (out * ramp).sum() + last_h.square().sum() + last_c.sin().sum()
    found = [out, last_h, last_c, *torch.autograd.grad(loss, leaves)]
    return found + [buffer for norm in norms for buffer in norm.buffers()]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    files = [__file__, str(Path(__file__).with_name("test_triton_cells.py"))]
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", *files]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert run.returncode == 0, run.stdout[-5000:]
    assert " passed" in run.stdout


@on_either
@pytest.mark.parametrize("seed", range(27172, 27184))  # with these every norm comes up at every site
def test_float64_equals_the_reference(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not by hypothesis, which repeats itself where examples are few; one takes half a second in the interpreter.
    draw = random.Random(seed)
    recompute, recurrent, masked = bool(seed & 1), (BY_ROW, BY_COLUMN)[seed >> 1 & 1], bool(seed & 4)
    names = (draw.choice(BY_ROW + BY_COLUMN), draw.choice(recurrent), draw.choice(recurrent))
    training = draw.random() < 2 / 3
    fewest = 2 if training and {"bn", "bn_step"} & set(names) else 1
    rows, length = draw.randint(fewest, 4), draw.randint(*((3, 4) if recompute else (1, 3)))
    monkeypatch.setattr(fast, "SEGMENT", 2)
    inputs, hidden = draw.randint(1, 5), draw.choice((4, 6, 9, 18))
    affine, bias, step = draw.random() < 1 / 2, draw.random() < 1 / 2, draw.randint(0, MAX_STEPS + 1)
    weights, norms = build(names, inputs, hidden, bias=bias, affine=affine, seed=seed)
    x, mask, h, c = inputs_of(rows, length, inputs, hidden, masked)
    if rows > 1:
        reference.lstm_layer(torch.randn_like(x), None, h.detach(), c.detach(), weights, norms, 1)
    for norm in norms:
        norm.train(training)
    assert not fast.never_for(norms, weights)
    assert not fast.not_now_for(x, h, c, weights, norms, step)
    twins = copy.deepcopy(norms)
    found = results(fast.lstm_layer, weights, norms, x, mask, h, c, step, recompute=recompute)
    exact = results(reference.lstm_layer, weights, twins, x, mask, h, c, step)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@on_either
@pytest.mark.parametrize("names", [("ln",) * 3, ("bn_step",) * 3, ("gn", "none", "rms")])
def test_float32_is_close_to_the_reference_in_float64(names: Any) -> None:
    weights, norms = build(names, 5, 20, bias=True, affine=True, seed=0)
    x, mask, h, c = inputs_of(4, 4, 5, 20, names[0] == "bn_step")
    weights_32, norms_32, x_32, h_32, c_32 = lowered(weights, norms, x, h, c)
    found = results(fast.lstm_layer, weights_32, norms_32, x_32, mask, h_32, c_32)
    require_close(found, results(reference.lstm_layer, weights, norms, x, mask, h, c), SINGLE)


@on_either
@pytest.mark.parametrize("names", [("bn",) * 3, ("none", "none", "ln"), ("bn_step", "ln", "none")])
def test_bfloat16_products_with_states_and_statistics_in_float32(names: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, norms = build(names, 5, 20, bias=True, affine=True, seed=0)
    x, mask, h, c = inputs_of(8, 3, 5, 20, False)
    weights_32, norms_32, x_32, h_32, c_32 = lowered(weights, norms, x, h, c)
    monkeypatch.setattr(fast, "SEGMENT", 2)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert not fast.not_now_for(x_32, h_32, c_32, weights_32, norms_32, 0)
        found = results(fast.lstm_layer, weights_32, norms_32, x_32, mask, h_32, c_32, recompute=names[0] == "none")
    assert {value.dtype for value in found if value.is_floating_point()} == {torch.float32}
    exact = results(reference.lstm_layer, weights, norms, x, mask, h, c)
    require_close(found, exact, HALF)
    # And no closer: the products did lose bits.
    assert (found[0].double() - exact[0]).abs().max() > 1e-4


@on_either
def test_padding_of_nan_and_saturated_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "SEGMENT", 3)
    weights, norms = build(("ln", "bn", "bn_step"), 3, 4, bias=True, affine=True, seed=0)
    x, mask, h, c = inputs_of(5, 4, 3, 4, True)
    with torch.no_grad():
        x[0] *= 1e6
        x[1] *= 1e-6
        x.masked_fill_(~mask.t().unsqueeze(-1), float("nan"))
    twins = copy.deepcopy(norms)
    with torch.no_grad():
        found = fast.lstm_layer(x, mask, h, c, weights, norms)[:3]
        exact = reference.lstm_layer(x, mask, h, c, weights, twins)[:3]
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
    bare = build(("none",) * 3, 1, 4, bias=False, affine=False, seed=0)[1]
    values = [-1e30, -200.0, -20.0, -1e-3, -1e-20, 0.0, 1e-6, 0.19, 0.21, 15.0, 1e30, float("nan")]
    x = torch.tensor(values, dtype=torch.float32, device=DEVICE).view(1, -1, 1)
    ones = torch.ones(len(values), 4, device=DEVICE)
    unit = Weights(ones.new_ones(16, 1), ones.new_zeros(16, 4), None, None)
    found = fast.lstm_layer(x, None, ones, ones, unit, bare)[:3]
    exact = reference.lstm_layer(x, None, ones, ones, unit, bare)[:3]
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-30, equal_nan=True)


@on_either
@pytest.mark.parametrize("options", [{"pool": "batch_time"}, {"ghost_rows": 2}])
def test_an_input_site_of_another_kind_runs_by_itself(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "SEGMENT", 2)
    weights, norms = build(("bn", "ln", "ln"), 3, 4, bias=True, affine=True, seed=0)
    norms = norms._replace(input_to_hidden=build_norm("bn", 16, **options).to(DEVICE, torch.float64))
    x, mask, h, c = inputs_of(5, 3, 3, 4, True)
    twins = copy.deepcopy(norms)
    found = results(fast.lstm_layer, weights, norms, x, mask, h, c, recompute="pool" in options)
    for one, other in zip(found, results(reference.lstm_layer, weights, twins, x, mask, h, c), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@on_either
@pytest.mark.parametrize("recompute", [False, True])
def test_backward_twice_with_the_graph_kept_and_never_a_second_derivative(
    recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "SEGMENT", 1)
    weights, norms = build(("ln", "none", "rms"), 3, 4, bias=True, affine=True, seed=0)
    x, _, h, c = inputs_of(3, 2, 3, 4, False)
    out = fast.lstm_layer(x, None, h, c, weights, norms, recompute=recompute)[0].square().sum()
    require_first_alone(out, x, weights.hidden)


@on_either
@pytest.mark.parametrize("recompute", [False, True])
def test_weights_changed_before_backward_are_refused(recompute: bool) -> None:
    weights, norms = build(("none",) * 3, 3, 4, bias=True, affine=True, seed=0)
    x, _, h, c = inputs_of(3, 2, 3, 4, False)
    out = fast.lstm_layer(x, None, h, c, weights, norms, recompute=recompute)[0]
    with torch.no_grad():
        weights.hidden.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@on_either
def test_what_it_leaves_to_the_reference(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    weights, norms = build(("none", "bn", "ln"), 3, 4, bias=True, affine=True, seed=0)
    x, _, h, c = inputs_of(3, 2, 3, 4, False)

    def reason(norms: SiteNorms = norms) -> str:
        return fast.not_now_for(x, h, c, weights, norms, 0)

    assert reason() == "hidden_to_hidden and cell take statistics in different directions"
    alike = norms._replace(cell=norms.input_to_hidden)
    assert reason(alike) == ""
    with torch.autocast(DEVICE.type, torch.float16):
        assert reason(alike) == "autocast is to another dtype than bfloat16"
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert reason(alike) == "weights and state are not all float32, under autocast"
    monkeypatch.setattr(cuda, "MOST_ROWS", 2)
    assert reason(alike) == "a batch norm has more than 2 rows"
    monkeypatch.undo()
    monkeypatch.setattr(cuda, "takes", lambda device: True)
    for error, said in ((ImportError(), "Triton is not installed"), (OSError("no compiler"), "OSError: no compiler")):
        cuda._failure.cache_clear()
        monkeypatch.setattr(cuda, "_kernels", lambda error=error: (_ for _ in ()).throw(error))
        caplog.clear()
        assert said in reason(alike)
        results(fast.lstm_layer, weights, alike, x, None, h, c)
        assert caplog.text.count(said) == 1
    cuda._failure.cache_clear()


@on_either
def test_the_model_names_it() -> None:
    for recompute in (False, True):
        lstm = LSTM(3, 4, norm="ln", device=DEVICE, recompute=recompute)
        assert lstm.backend_choice(DEVICE.type) == ("fast", "Triton kernels")


@on_either
def test_what_is_kept_for_backward_is_counted() -> None:
    length, rows, hidden = 6, 4, 32
    lstm, x = LSTM(8, hidden, norm="ln", device=DEVICE), torch.randn(length, rows, 8, device=DEVICE)
    with SavedBytes(list(lstm.parameters())) as counted:
        out = lstm(x)[0]
    # 16 times B x T x H, as cuda.py says; h and c before the first step, one product, copies of weights, affine, bias,
    # a number for each row at each site, the input.
    numbers = 16 * length * rows * hidden + (2 + 4) * rows * hidden + 4 * hidden * hidden + 18 * hidden
    assert counted.bytes == 4 * (numbers + 3 * length * rows + length * rows * 8)
    before = graphs.leased_bytes()
    out.sum().backward()
    assert graphs.leased_bytes() < before


def trained(norm: str, steps: int, masked: bool = False) -> list[Tensor]:
    """Losses, parameters and buffers of a small model over steps of two calls each, the last 2 in evaluation."""
    torch.manual_seed(0)
    rows, length, hidden = (16, 10, 32) if GPU else (2, 2, 4)
    lstm = LSTM(8, hidden, norm=norm, device=DEVICE, max_steps=length)
    optimizer = torch.optim.SGD(lstm.parameters(), 0.1)
    found: list[Tensor] = []
    for step in range(steps):
        lstm.train(step < steps - 2)
        x, y = torch.randn(2, length, rows, 8).to(DEVICE)
        lengths = torch.randint(1, length + 1, (rows,)).to(DEVICE) if masked else None
        out_x, state = lstm(x, lengths=lengths)
        out_y, _ = lstm(y, state, lengths=lengths)
        loss = out_x.square().sum() + out_x.sin().sum() + out_y.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return [*found, *lstm.parameters(), *lstm.buffers()]


@pytest.mark.usefixtures("fresh_graphs")
class TestGraphs:
    @pytest.mark.parametrize(("norm", "masked"), [("ln", True), ("bn_step", False)])
    def test_they_change_nothing(
        self, norm: str, masked: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        with_graphs = trained(norm, 4, masked)
        assert caplog.text == ""
        # Called twice before backward; in evaluation bn_step has other kernels.
        captured = sum(home.captured for home in graphs._graphs.values())
        assert captured == (2 if norm == "ln" else 4)
        assert sum(len(home.idle) for home in graphs._graphs.values()) == captured
        monkeypatch.setenv("NORMLAB_CUDA_GRAPHS", "0")
        graphs._graphs.clear()
        for one, other in zip(with_graphs, trained(norm, 4, masked), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert not graphs._graphs

    def test_more_calls_before_backward_than_graphs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(graphs, "MOST_GRAPHS", 3)
        weights, norms = build(("ln",) * 3, 3, 4, bias=True, affine=True, seed=0)
        _, _, h, c = inputs_of(2, 2, 3, 4, False)
        xs = [torch.randn(2, 2, 3, dtype=torch.float64, device=DEVICE) for _ in range(6)]
        outs = [fast.lstm_layer(x, None, h, c, weights, norms)[0].square().sum() for x in xs]
        kept = [torch.autograd.grad(out, weights.hidden, retain_graph=True)[0] for out in outs]
        (home,) = graphs._graphs.values()
        assert (home.captured, len(home.idle)) == (3, 0)
        found = [torch.autograd.grad(out, weights.hidden)[0] for out in reversed(outs)][::-1]
        assert len(home.idle) == 3
        for x, one, other in zip(xs, kept, found, strict=True):
            out = reference.lstm_layer(x, None, h, c, weights, norms)[0].square().sum()
            torch.testing.assert_close(one, torch.autograd.grad(out, weights.hidden)[0], **EXACT)
            assert one.equal(other)

    def test_given_back_without_a_backward_and_what_was_returned_stays(self) -> None:
        weights, norms = build(("bn",) * 3, 3, 4, bias=True, affine=True, seed=0)
        twins = copy.deepcopy(norms)
        xs = [inputs_of(2, 2, 3, 4, False)[0].detach() for _ in range(6)]
        _, _, h, c = inputs_of(2, 2, 3, 4, False)

        def values(layer: Any, norms: SiteNorms) -> list[Tensor]:
            found = [value.detach() for x in xs for value in layer(x, None, h, c, weights, norms)[:3]]
            return found + [buffer for norm in norms for buffer in norm.buffers()]

        for one, other in zip(values(fast.lstm_layer, norms), values(reference.lstm_layer, twins), strict=True):
            torch.testing.assert_close(one, other, **EXACT)
        (home,) = graphs._graphs.values()
        # A second, since what the last call returned is there while the next one runs.
        assert (home.captured, len(home.idle)) == (2, 2)

    def test_equal_segments_replay_one_graph(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fast, "SEGMENT", 1)
        weights, norms = build(("bn", "none", "bn_step"), 3, 4, bias=True, affine=True, seed=0)
        twins = copy.deepcopy(norms)
        pairs: list[tuple[Tensor, Tensor]] = []
        for layer_calls in (1, 2):
            x, mask, h, c = inputs_of(3, 4, 3, 4, True)
            found = results(fast.lstm_layer, weights, norms, x, mask, h, c, recompute=True)
            exact = results(reference.lstm_layer, weights, twins, x, mask, h, c)
            pairs += zip(found, exact, strict=True)
            homes = {(shape.length, shape.recomputed): home for (_, shape), home in graphs._graphs.items()}
            assert set(homes) == {(1, False), (1, True)}
            for home in homes.values():
                # The third segment of the first call is captured already.
                assert (home.calls, home.captured, len(home.idle)) == (4 * layer_calls, 1, 1)
        # What the first call gave is still there after the second; the stored values are those of both.
        for one, other in pairs:
            torch.testing.assert_close(one, other, **EXACT)

    def test_forgotten_when_not_called_for_long(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(graphs, "CALLS_UNTIL_FORGOTTEN", 4)
        weights, norms = build(("none",) * 3, 3, 4, bias=True, affine=True, seed=0)
        for length in (1, 1, 1, 2, 2, 2, 2, 2):
            x, _, h, c = inputs_of(1, length, 3, 4, False)
            assert 1 in {shape.length for _, shape in graphs._graphs} or length == 1
            fast.lstm_layer(x, None, h, c, weights, norms)
        assert {shape.length for _, shape in graphs._graphs} == {2}

    def test_a_capture_that_fails_goes_on_without(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        with_graphs = trained("bn_step", 4)
        graphs._graphs.clear()
        record = graphs._record

        def failing(launch: Any, pool: Any = None) -> Any:
            def launch_and_fail() -> None:
                launch()
                raise RuntimeError("not in a capture")

            graph = record(launch_and_fail, pool)
            graph.replay()
            return graph

        monkeypatch.setattr(graphs, "_record", failing)
        for one, other in zip(with_graphs, trained("bn_step", 4), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert caplog.text.count("not in a capture") == 2  # in training, in evaluation


class TestOnAGpu:
    """What only a GPU can show; there, all tests above run on it too."""

    pytestmark = on_gpu

    def test_tf32_only_where_torch_is_told_to(self) -> None:
        weights, norms = build(("ln",) * 3, 64, 256, bias=True, affine=True, seed=0)
        x, _, h, c = inputs_of(64, 3, 64, 256, False)
        weights_32, norms_32, x_32, h_32, c_32 = lowered(weights, norms, x, h, c)
        exact = reference.lstm_layer(x, None, h, c, weights, norms)[0]

        def error() -> float:
            return float((fast.lstm_layer(x_32, None, h_32, c_32, weights_32, norms_32)[0] - exact).abs().max())

        before = torch.backends.cuda.matmul.fp32_precision
        try:
            torch.backends.cuda.matmul.fp32_precision = "ieee"
            single = error()
            assert single < 1e-4
            if torch.cuda.get_device_capability() >= (8, 0):
                torch.backends.cuda.matmul.fp32_precision = "tf32"
                assert error() > 3 * single
        finally:
            torch.backends.cuda.matmul.fp32_precision = before

    def test_a_bare_model_in_bfloat16_is_none_in_float16(self) -> None:
        lstm, x = LSTM(8, 16, device=DEVICE), torch.full((3, 2, 8), 1e6, device=DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            assert lstm.backend_choice(DEVICE.type)[0] == "fast"
            out = lstm(x)[0]
        assert out.dtype == torch.float32
        assert out.isfinite().all()

    @pytest.mark.parametrize("norm", ["ln", "bn_step"])
    def test_a_large_layer_in_float32(self, norm: str) -> None:
        weights, norms = build((norm,) * 3, 100, 1000, bias=True, affine=True, seed=0)
        # Smaller weights: the error of a step must not grow over 20 of them.
        weights = Weights(*(None if w is None else (w.detach() * 0.1).requires_grad_() for w in weights))
        x, mask, h, c = inputs_of(64, 20, 100, 1000, True)
        weights_32, norms_32, x_32, h_32, c_32 = lowered(weights, norms, x, h, c)
        found = results(fast.lstm_layer, weights_32, norms_32, x_32, mask, h_32, c_32)
        require_close(found, results(reference.lstm_layer, weights, norms, x, mask, h, c), 10 * SINGLE)


@to_compile
@pytest.mark.parametrize(
    ("capability", "kinds", "rows", "hidden", "product_dtype"),
    [
        (80, (cuda.NONE, cuda.ROWS, cuda.ROWS), 64, 512, torch.bfloat16),
        (90, (cuda.BATCH, cuda.BATCH, cuda.BATCH), 64, 1000, torch.float32),
        (90, (cuda.STORED, cuda.NONE, cuda.STORED), 1, 1, torch.float32),
    ],
)
def test_compiled_for_a_gpu_that_is_not_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: int, kinds: Any, rows: int, hidden: int,
    product_dtype: torch.dtype,
) -> None:  # fmt: skip
    """All the way to machine code, which needs no GPU: the interpreter accepts much that the compiler does not."""
    names = ("normalize_input", "normalize_input_backward", "forward_step", "backward_step")
    compiled = compiled_for_an_absent_gpu(monkeypatch, tmp_path, capability, cuda, names)
    sites = tuple(cuda._Fixed(kind, 1, True, 1e-5, 0 if kind == cuda.ROWS else 2) for kind in kinds)
    shape = cuda._Shape(DEVICE, 0, 1, rows, hidden, torch.float32, product_dtype, True, False, True, "none", sites)
    for other in (shape._replace(kept=False), shape._replace(recomputed=True)):
        cuda._Tape(other).launch_forward()
    tape = cuda._Tape(shape)
    gradients = tape.new_gradients()
    tape.launch_forward()
    tape.launch_backward(gradients)
    cuda._normalize_input(tape, tape.input)
    cuda._normalize_input_backward(tape, gradients.d_gates, gradients.d_gates)
    assert {name: len(results) for name, results in compiled.items()} == dict.fromkeys(names, 1) | {"forward_step": 3}
    # As many kernels: none is compiled a second time where another one was meant.
    assert len({result.asm["cubin"] for results in compiled.values() for result in results}) == 6
