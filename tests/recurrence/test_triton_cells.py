"""The GPU's GRU and RNN against the reference: on a GPU if there is one, else in Triton's interpreter.

A test of test_triton.py starts the interpreter for both files.

Shape suffixes: B batch, T time, H hidden.
"""

from __future__ import annotations

import copy
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import GATES, MAX_STEPS, NORMS, SMALL, assert_close, build, layer, results
from derivatives import require_first_alone
from torch import Tensor
from triton_device import (
    DEVICE,
    HALF,
    SINGLE,
    compiled_for_an_absent_gpu,
    lowered,
    on_either,
    on_gpu,
    require_close,
    to_compile,
)

from normlab.models.gru import GRU
from normlab.models.lstm import LSTM
from normlab.models.rnn import RNN
from normlab.norms import build_norm
from normlab.recurrence import cuda, cuda_cells, fast, fast_cells, graphs, reference
from normlab.recurrence.graphs import Tape

CELLS = sorted(GATES)
LOOPS = [*((norm, "training") for norm in NORMS), ("bn", "evaluation"), ("bn_step", "evaluation")]


def drawn(cell: str, *names: str, **changes: Any) -> Any:
    """Weights, norms, x, mask, h of a small layer. The interpreter is slow where rows are programs of their own."""
    return build({**SMALL, "rows": 3, "length": 2, "hidden": 6, "cell": cell, "names": names, **changes}, DEVICE)


@on_either
@pytest.mark.parametrize(("hidden_norm", "mode"), LOOPS)
@pytest.mark.parametrize("cell", CELLS)
def test_float64_equals_the_reference(cell: str, hidden_norm: str, mode: str) -> None:
    # All norms of the loop, all else drawn. Not by hypothesis, which needs more examples than the interpreter has time.
    draw = random.Random(f"{cell} {hidden_norm} {mode}")
    training = mode == "training"
    weights, norms, x, mask, h = drawn(
        cell,
        draw.choice(NORMS),
        hidden_norm,
        rows=draw.randint(2 if training else 1, 4 if "bn" in hidden_norm else 2),
        length=draw.randint(2, 3),
        hidden=draw.choice((4, 6, 18)),
        masked=draw.random() < 0.6,
        bias=draw.random() < 0.7,
        affine=draw.random() < 0.7,
        site_biases=(draw.random() < 0.5, draw.random() < 0.5),
    )
    step = draw.randint(0, MAX_STEPS + 1)
    if len(h) > 1:  # stored values that are not those of a new norm
        layer(reference, cell)(torch.randn_like(x), None, h.detach(), weights, norms, 1)
    for norm in norms:
        norm.train(training)
    assert not fast_cells.never_for(norms, weights)
    assert not fast_cells.not_now_for(x, h, weights, norms, step)
    exact = results(layer(reference, cell), weights, copy.deepcopy(norms), x, mask, h, step)
    for one, other in zip(results(layer(fast_cells, cell), weights, norms, x, mask, h, step), exact, strict=True):
        assert_close(one, other)


@on_either
@pytest.mark.parametrize(("cell", "norm"), [("gru", "ln"), ("tanh", "bn_step"), ("relu", "none")])
def test_float32_is_close_to_the_reference_in_float64(cell: str, norm: str) -> None:
    weights, norms, x, mask, h = drawn(cell, norm, norm, rows=8 if norm == "bn_step" else 3, hidden=20)
    weights_32, norms_32, x_32, h_32 = lowered(weights, norms, x, h)
    found = results(layer(fast_cells, cell), weights_32, norms_32, x_32, mask, h_32, 0)
    require_close(found, results(layer(reference, cell), weights, norms, x, mask, h, 0), SINGLE)


@on_either
@pytest.mark.parametrize(("cell", "names"), [("gru", ("ln", "bn")), ("tanh", ("rms", "ln")), ("relu", ("bn", "none"))])
def test_bfloat16_products_with_states_and_statistics_in_float32(cell: str, names: Any) -> None:
    weights, norms, x, _, h = drawn(cell, *names, rows=8 if "bn" in names else 3, hidden=20, masked=False)
    weights_32, norms_32, x_32, h_32 = lowered(weights, norms, x, h)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert not fast_cells.not_now_for(x_32, h_32, weights_32, norms_32, 0)
        found = results(layer(fast_cells, cell), weights_32, norms_32, x_32, None, h_32, 0)
    assert {value.dtype for value in found if value.is_floating_point()} == {torch.float32}
    exact = results(layer(reference, cell), weights, norms, x, None, h, 0)
    require_close(found, exact, HALF)
    # And no closer: the products did lose bits.
    assert (found[0].double() - exact[0]).abs().max() > 1e-4


@on_either
@pytest.mark.parametrize("cell", CELLS)
def test_padding_may_hold_anything_and_nan_elsewhere_shows(cell: str) -> None:
    weights, norms, x, mask, h = drawn(cell, "ln", "bn_step")
    filled = x.detach().masked_fill(~mask.t().unsqueeze(-1), float("nan")).requires_grad_()
    plain = results(layer(reference, cell), weights, copy.deepcopy(norms), x, mask, h, 0)
    padded = results(layer(fast_cells, cell), weights, norms, filled, mask, h, 0)
    # The weight of the input, in fifth place, sums over x itself: callers put zeros there.
    for place, (one, other) in enumerate(zip(padded, plain, strict=True)):
        if place != 4:
            assert_close(one, other)
    weights, norms, x, _, h = drawn(cell, "none", "none")
    with torch.no_grad():
        x[0, 0] = float("nan")
        out = layer(fast_cells, cell)(x, None, h, weights, norms)[0]
    assert out[:, 0].isnan().all()
    assert out[:, 1:].isfinite().all()


@on_either
@pytest.mark.parametrize("cell", CELLS)
def test_backward_twice_with_the_graph_kept_and_never_a_second_derivative(cell: str) -> None:
    weights, norms, x, _, h = drawn(cell, "none", "bn")
    out = layer(fast_cells, cell)(x, None, h, weights, norms)[0].square().sum()
    require_first_alone(out, x, weights.hidden)


@on_either
def test_weights_changed_before_backward_are_refused() -> None:
    weights, norms, x, _, h = drawn("gru", "ln", "bn")
    out = fast_cells.gru_layer(x, None, h, weights, norms)[0]
    with torch.no_grad():
        weights.hidden.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@on_either
def test_what_it_leaves_to_the_reference(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    weights, norms, x, _, h = drawn("gru", "ln", "bn")

    def reason() -> str:
        return fast_cells.not_now_for(x, h, weights, norms, 0)

    assert reason() == ""  # statistics in different directions: the loop has one site
    with torch.autocast(DEVICE.type, torch.float16):
        assert reason() == "autocast is to another dtype than bfloat16"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "MOST_ROWS", 2)
        assert reason() == "a batch norm has more than 2 rows"
    monkeypatch.setattr(cuda_cells, "Recurrence", None)  # nothing below runs there
    assert fast_cells.gru_layer(x, None, h, weights, norms, recompute=True)[0].requires_grad
    monkeypatch.setattr(cuda_cells, "_kernels", lambda: (_ for _ in ()).throw(OSError("no compiler")))
    cuda._failure.cache_clear()
    caplog.clear()
    assert "OSError: no compiler" in reason()
    assert fast_cells.gru_layer(x, None, h, weights, norms)[0].requires_grad
    assert caplog.text.count("no compiler") == 1
    cuda._failure.cache_clear()


@on_either
def test_an_input_site_of_another_kind_runs_by_itself() -> None:
    weights, norms, x, mask, h = drawn("gru", "ln", "bn_step")
    norms = norms._replace(input_to_hidden=build_norm("bn", 18, pool="batch_time").to(DEVICE, torch.float64))
    exact = results(reference.gru_layer, weights, copy.deepcopy(norms), x, mask, h, 0)
    for one, other in zip(results(fast_cells.gru_layer, weights, norms, x, mask, h, 0), exact, strict=True):
        assert_close(one, other)


@on_either
@pytest.mark.parametrize("kind", [GRU, RNN])
def test_the_model_names_it(kind: Any) -> None:
    model = kind(3, 4, norm="ln", device=DEVICE)
    assert model.backend_choice(DEVICE.type) == ("fast", "Triton kernels")
    again = kind(3, 4, norm="ln", device=DEVICE, recompute=True)
    reason = f"recompute is set, for which a normlab.{kind.__name__} has no fast form"
    assert again.backend_choice(DEVICE.type) == ("reference", reason)


def trained(kind: Any, backend: str, steps: int) -> list[Tensor]:
    """Losses, parameters and buffers of a small model over steps of two calls each, the last one in evaluation."""
    torch.manual_seed(0)
    options = {"bidirectional": True, "max_steps": 3, "dtype": torch.float64, "device": DEVICE}
    model = kind(3, 4, norm="bn_step" if kind is GRU else "bn", backend=backend, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found: list[Tensor] = []
    for step in range(steps):
        model.train(step < steps - 1)
        x, y = torch.randn(2, 2, 3, 3, dtype=torch.float64).to(DEVICE)
        out_x, state = model(x, lengths=torch.tensor([2, 1, 2]).to(DEVICE))
        out_y, _ = model(y, state.detach())
        loss = out_x.square().sum() + out_x.sin().sum() + out_y.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return [*found, *model.parameters(), *model.buffers()]


@pytest.mark.usefixtures("fresh_graphs")
class TestGraphs:
    @pytest.mark.parametrize("kind", [GRU, RNN])
    def test_replayed_they_equal_the_reference(self, kind: Any, caplog: pytest.LogCaptureFixture) -> None:
        found = trained(kind, "fast", 3)
        assert caplog.text == ""
        captured = sum(home.captured for home in graphs._graphs.values())
        assert captured > 1
        assert sum(len(home.idle) for home in graphs._graphs.values()) == captured
        for one, other in zip(found, trained(kind, "reference", 3), strict=True):
            assert_close(one, other)

    def test_each_kind_has_its_own(self) -> None:
        # An RNN of tanh and one of relu are alike but for their kernels.
        for cell in ("tanh", "relu") * 3:
            weights, norms, x, _, h = drawn(cell, "none", "none", length=1)
            exact = layer(reference, cell)(x, None, h, weights, norms)[0]
            assert_close(layer(fast_cells, cell)(x, None, h, weights, norms)[0], exact)
        assert [home.captured for home in graphs._graphs.values()] == [1, 1]

    @pytest.mark.parametrize("cell", ["gru", "relu"])
    def test_what_was_returned_stays(self, cell: str) -> None:
        weights, norms, _, _, h = drawn(cell, "none", "none", rows=2)
        site = fast._site(norms.hidden_to_hidden, None, 0, 2, 1, h)
        returned: list[Tensor] = []
        copies: list[Tensor] = []
        for _ in range(4):
            projected = torch.randn(1, 2, len(weights.hidden), dtype=h.dtype, device=DEVICE, requires_grad=True)
            given = (projected, weights.hidden, weights.hidden_bias, h, None, None)
            out: Any = cuda_cells.Recurrence.apply((cell, site, None, None, True), *given)
            grads = torch.autograd.grad(out.square().sum(), [projected, weights.hidden, h])
            returned += [out, *grads]
            copies += [value.detach().clone() for value in (out, *grads)]
        (home,) = graphs._graphs.values()
        assert home.captured == 1
        assert all(one.equal(other) for one, other in zip(returned, copies, strict=True))

    def test_statistics_to_store_stay(self) -> None:
        weights, norms, _, _, h = drawn("tanh", "none", "bn", rows=2)
        site = fast._site(norms.hidden_to_hidden, None, 0, 2, 1, h)
        found: list[Any] = []
        for _ in range(4):
            projected = torch.randn(1, 2, len(weights.hidden), dtype=h.dtype, device=DEVICE)
            states = torch.randn_like(h)
            given = (projected, weights.hidden, None, states, site.weight, site.bias)
            with torch.no_grad():
                cuda_cells.Recurrence.apply(("tanh", site, None, None, False), *given)
            expected = (states @ weights.hidden.t()).mean(0, keepdim=True)
            found.append((site.mean, expected))
        (home,) = graphs._graphs.values()
        assert (home.captured, len(home.idle)) == (1, 1)
        for mean, expected in found:
            torch.testing.assert_close(mean, expected)

    @pytest.mark.parametrize("kind", [LSTM, GRU])
    def test_no_other_thread_captures_amid_a_backward(self, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        # Its launches would write the gradients that tapes of one shape share.
        def acquired() -> bool:
            free = graphs.one_at_a_time.acquire(blocking=False)
            if free:
                graphs.one_at_a_time.release()
            return free

        backward, found = Tape.backward, []

        def watched(tape: Tape, gradients: Any) -> None:
            with ThreadPoolExecutor(1) as other:
                found.append(other.submit(acquired).result())
            backward(tape, gradients)

        monkeypatch.setattr(Tape, "backward", watched)
        kind(3, 4, norm="none", backend="fast", device=DEVICE)(torch.randn(1, 1, 3, device=DEVICE))[0].sum().backward()
        assert found == [False]


class TestOnAGpu:
    """What only a GPU can show; there, all tests above run on it too."""

    pytestmark = on_gpu

    @pytest.mark.parametrize("norm", ["ln", "bn_step"])
    @pytest.mark.parametrize("cell", ["gru", "tanh"])
    def test_a_large_layer_in_float32(self, cell: str, norm: str) -> None:
        weights, norms, x, mask, h = drawn(cell, norm, norm, rows=64, length=20, inputs=100, hidden=1000)
        # Smaller weights: the error of a step must not grow over 20 of them.
        weights = type(weights)(*(None if w is None else (w.detach() * 0.2).requires_grad_() for w in weights))
        weights_32, norms_32, x_32, h_32 = lowered(weights, norms, x, h)
        found = results(layer(fast_cells, cell), weights_32, norms_32, x_32, mask, h_32, 0)
        require_close(found, results(layer(reference, cell), weights, norms, x, mask, h, 0), 10 * SINGLE)


@to_compile
@pytest.mark.parametrize(
    ("cell", "capability", "kind", "rows", "hidden", "product_dtype"),
    [
        ("gru", 80, cuda.ROWS, 64, 512, torch.bfloat16),
        ("gru", 90, cuda.BATCH, 64, 1000, torch.float32),
        ("tanh", 90, cuda.ROWS, 64, 1000, torch.float32),
        ("relu", 80, cuda.STORED, 1, 1, torch.bfloat16),
    ],
)
def test_compiled_for_a_gpu_that_is_not_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cell: str, capability: int, kind: int, rows: int, hidden: int,
    product_dtype: torch.dtype,
) -> None:  # fmt: skip
    names = tuple(f"{'gru' if cell == 'gru' else 'rnn'}_{way}_step" for way in ("forward", "backward"))
    compiled = compiled_for_an_absent_gpu(monkeypatch, tmp_path, capability, cuda_cells, names)
    site = cuda._Fixed(kind, 1, True, 1e-5, 0 if kind == cuda.ROWS else 2)
    shape = cuda_cells._Shape(DEVICE, 0, 1, rows, hidden, torch.float32, product_dtype, True, True, "none", site)
    cuda_cells._TAPES[cell](shape._replace(kept=False)).launch_forward()
    tape = cuda_cells._TAPES[cell](shape)
    tape.launch_forward()
    tape.launch_backward(tape.new_gradients())
    assert {name: len(results) for name, results in compiled.items()} == dict(zip(names, (2, 1), strict=True))
    # As many kernels: none is compiled a second time where another one was meant.
    assert len({result.asm["cubin"] for results in compiled.values() for result in results}) == 3
