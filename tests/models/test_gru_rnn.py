"""`normlab.GRU` and `normlab.RNN`: torch's without a norm; with one, right by formula, under padding and in chunks.

Shape suffixes: B batch, T time.
"""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from normlab.config import InputError, LSTMSites, NormOptions, SiteConfig, available_norms
from normlab.machine import c_kernels
from normlab.models.gru import GRU
from normlab.models.recurrent import HiddenState, Recurrent
from normlab.models.rnn import RNN
from normlab.norms.base import Norm
from normlab.probes.activations import SiteActivations

IN, H, B, T, MAX_STEPS = 5, 16, 8, 6, 8
# Rows and groups large enough that no statistic is nearly 0: rounding would show.
LENGTHS = torch.tensor([4, 6, 6, 3, 6, 6, 1, 6])
FAST = {"none", "ln", "rms", "gn", "bn", "bn_step"}

CELLS: dict[str, Any] = {
    "gru": (GRU, nn.GRU),
    "tanh": (RNN, nn.RNN),
    "relu": (partial(RNN, nonlinearity="relu"), partial(nn.RNN, nonlinearity="relu")),
}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "bidirectional": {"bidirectional": True, "num_layers": 2},
    "no_bias": {"bias": False, "num_layers": 3},
}


def build(cell: str, norm: str, **shape: Any) -> Recurrent:
    torch.manual_seed(0)
    if norm == "gn":
        shape.setdefault("norm_options", NormOptions(groups=2))
    module = CELLS[cell][0](IN, H, norm=norm, max_steps=MAX_STEPS, dtype=torch.float64, batch_first=True, **shape)
    # A published gain of 0.1 would hide mistakes.
    for part in module.modules():
        if isinstance(part, Norm) and part.weight is not None:
            nn.init.normal_(part.weight, 1.0, 0.3)
    return module


def sample(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("backend", ["auto", "fast", "reference"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("cell", CELLS)
def test_none_equals_torch(cell: str, shape: dict[str, Any], backend: str) -> None:
    mine = CELLS[cell][0](IN, H, **shape, dtype=torch.float64, backend=backend)
    theirs = CELLS[cell][1](IN, H, **shape, dtype=torch.float64)
    theirs.load_state_dict(mine.state_dict())
    x = torch.randn(B, T, IN, dtype=torch.float64, requires_grad=True)
    unbatched = torch.randn(T, IN, dtype=torch.float64, requires_grad=True)
    rows = x.shape[0 if theirs.batch_first else 1]
    packed = pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
    for given, leaf, batch in ((x, x, (rows,)), (unbatched, unbatched, ()), (packed, x, (B,))):
        count = theirs.num_layers * (2 if theirs.bidirectional else 1)
        for hx in (None, torch.randn(count, *batch, H, dtype=torch.float64, requires_grad=True)):
            results: list[list[Tensor]] = []
            for module in (mine, theirs):
                out, h = module(given, hx)
                data = out.data if isinstance(out, PackedSequence) else out
                loss = (data * torch.linspace(-1, 1, data.numel(), dtype=data.dtype).view_as(data)).sum()
                inputs = [leaf, *module.parameters(), *(() if hx is None else (hx,))]
                grads = torch.autograd.grad(loss + h.square().sum(), inputs, retain_graph=True)
                results.append([data, h.as_subclass(Tensor), *grads])
            for one, other in zip(*results, strict=True):
                torch.testing.assert_close(one, other)


def test_torchs_defaults_and_positional_arguments() -> None:
    assert RNN(3, 4).nonlinearity == "tanh"
    module = RNN(3, 4, 2, "relu", False, True)
    assert (module.num_layers, module.nonlinearity, module.bias, module.batch_first) == (2, "relu", False, True)
    assert GRU(3, 4, 2, False, True).bias is False
    assert list(dict(GRU(3, 4).named_parameters())) == list(dict(nn.GRU(3, 4).named_parameters()))
    with pytest.raises(ValueError, match="nonlinearity"):
        RNN(3, 4, nonlinearity="sigmoid")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_one_step_of_a_normalized_gru_by_formula(backend: Any) -> None:
    gru = build("gru", "ln", backend=backend)
    x, h = np.random.default_rng(0).normal(size=(2, 3, H))
    x = x[:, :IN]
    w = {name: value.detach().numpy() for name, value in gru.named_parameters()}

    def norm(y: Any, site: str) -> Any:
        scale = np.sqrt(y.var(axis=1, keepdims=True) + 1e-5)
        return (y - y.mean(axis=1, keepdims=True)) / scale * w[f"norms.l0.{site}.weight"]

    def sigmoid(y: Any) -> Any:
        return 1 / (1 + np.exp(-y))

    of_x = np.split(norm(x @ w["weight_ih_l0"].T, "input_to_hidden") + w["bias_ih_l0"], 3, axis=1)
    of_h = np.split(norm(h @ w["weight_hh_l0"].T, "hidden_to_hidden") + w["bias_hh_l0"], 3, axis=1)
    r, z = sigmoid(of_x[0] + of_h[0]), sigmoid(of_x[1] + of_h[1])
    expected = (1 - z) * np.tanh(of_x[2] + r * of_h[2]) + z * h
    out, _ = gru(torch.from_numpy(x).unsqueeze(1), torch.from_numpy(h).unsqueeze(0))
    np.testing.assert_allclose(out.detach().squeeze(1).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_two_steps_of_a_normalized_rnn_by_formula(nonlinearity: str) -> None:
    rnn = build(nonlinearity, "bn")
    w = dict(rnn.named_parameters())
    x, h = sample(B, 2, IN), torch.zeros(B, H, dtype=torch.float64)

    def norm(y: Tensor, site: str) -> Tensor:
        return (y - y.mean(0)) / (y.var(0, correction=0) + 1e-5).sqrt() * w[f"norms.l0.{site}.weight"]

    for t in range(2):
        total = norm(x[:, t] @ w["weight_ih_l0"].T, "input_to_hidden") + w["bias_ih_l0"] + w["bias_hh_l0"]
        # At step 0 all rows have the same product, whose variance is 0.
        h = getattr(torch, nonlinearity)(total + norm(h @ w["weight_hh_l0"].T, "hidden_to_hidden"))
    torch.testing.assert_close(rnn(x)[0][:, 1], h)


def run(module: Recurrent, lengths: Tensor | None) -> list[Tensor]:
    """Two chunks in training, the second beyond `max_steps`, then one in evaluation: all it gives and changes."""
    torch.manual_seed(1)
    x = torch.randn(B, 3 * T, IN, dtype=torch.float64).requires_grad_()
    found: list[Tensor] = []
    state: Any = None
    for number, chunk in enumerate(x.split(T, 1)):
        module.train(number < 2)
        out, state = module(chunk, state, lengths=lengths)
        assert isinstance(out, Tensor)
        found += [out, state.as_subclass(Tensor), state.step.double()]
    loss = torch.stack([(value * torch.arange(value.numel()).view_as(value).cos()).sum() for value in found]).sum()
    found += torch.autograd.grad(loss, [x, *module.parameters()])
    return found + list(module.buffers())


@pytest.mark.parametrize("norm", available_norms())
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "padded"])
@pytest.mark.parametrize("cell", CELLS)
def test_auto_equals_the_reference(cell: str, norm: str, lengths: Tensor | None) -> None:
    auto = build(cell, norm, num_layers=2, bidirectional=True)
    assert auto.backend_choice()[0] == ("fused" if norm == "none" else "fast" if norm in FAST else "reference")
    if norm not in FAST:
        return  # it is the reference
    plain = copy.deepcopy(auto)
    plain.backend = "reference"
    for one, other in zip(run(auto, lengths), run(plain, lengths), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_the_choice_names_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert build("gru", "ln", backend="reference").backend_choice() == ("reference", "asked for")
    assert build("tanh", "none").backend_choice() == ("fused", "every site is bare")
    assert build("relu", "ln").backend_choice() == ("fast", "C kernels")
    assert build("gru", "lrn").backend_choice() == ("reference", "lrn at hidden_to_hidden has no fast form")
    recomputing = build("gru", "ln", recompute=True).backend_choice()
    assert recomputing == ("reference", "recompute is set, on a cpu device")
    monkeypatch.setattr(c_kernels, "_libraries", {})
    monkeypatch.setattr(c_kernels, "compiler", lambda: None)
    assert build("gru", "ln").backend_choice() == ("reference", "no C compiler that works")


@pytest.mark.parametrize("norm", available_norms())
@pytest.mark.parametrize("cell", CELLS)
def test_padded_equals_packed_equals_its_rows(cell: str, norm: str) -> None:
    module = build(cell, norm, bidirectional=True, num_layers=2)
    module(sample(B, 12, IN) + 1)
    module.eval()
    x = sample(B, T, IN)
    for row, length in enumerate(LENGTHS.tolist()):
        x[row, length:] = torch.nan
    out, state = module(x, lengths=LENGTHS)
    packed, packed_state = module(pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False))
    torch.testing.assert_close(pad_packed_sequence(packed, batch_first=True)[0], out)
    assert state.step.tolist() == packed_state.step.tolist() == LENGTHS.tolist()
    for row, length in enumerate(LENGTHS.tolist()):
        alone, h = module(x[row, :length])
        torch.testing.assert_close(out[row, :length], alone)
        assert (out[row, length:] == 0).all()
        torch.testing.assert_close(state[:, row], h[:])
        torch.testing.assert_close(packed_state[:, row], h[:])


@pytest.mark.parametrize("norm", available_norms())
@pytest.mark.parametrize("cell", CELLS)
def test_chunks_with_the_state_equal_one_sequence(cell: str, norm: str) -> None:
    module = build(cell, norm, num_layers=2)
    module(sample(B, 12, IN) + 1)
    module.eval()
    x = sample(B, 12, IN)
    whole, h = module(x)
    state: Any = None
    parts = []
    for chunk in x.split([5, 1, 6], dim=1):
        out, state = module(chunk, state)
        state = HiddenState.from_dict(state.detach().to("cpu").to_dict())
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state[:], h[:])
    assert state.step.tolist() == [12] * B
    # A plain h has no time step: norms that count them must then differ, and no others.
    first = module(x[:, :5])[1]
    again = module(x[:, 5:], first[:])[0]
    remembers = first.carry is not None or module.counts_steps
    assert torch.allclose(again, whole[:, 5:]) == (not remembers)


def test_restart_puts_rows_back_to_the_start() -> None:
    module = build("gru", "bn_step")
    module(sample(B, 12, IN) + 1)
    module.eval()
    x = sample(B, 8, IN)
    start = HiddenState.of([torch.zeros(1, B, H, dtype=torch.float64)], torch.zeros(B, dtype=torch.long))
    fresh = torch.arange(B) % 2 == 0
    out, after = module(x[:, 5:], module(x[:, :5])[1].restart(fresh, start))
    torch.testing.assert_close(out[fresh], module(x[:, 5:])[0][fresh])
    torch.testing.assert_close(out[~fresh], module(x)[0][~fresh, 5:])
    assert after.step.tolist() == [3, 8] * (B // 2)


def test_the_state_is_a_tensor_and_what_is_made_of_it_too() -> None:
    _, state = build("tanh", "ln")(sample(B, T, IN))
    assert isinstance(state, HiddenState)
    assert state.requires_grad
    for made in (state + 1, state[0], state.clone(), torch.stack([state])):
        assert type(made) is Tensor
    cut = state.detach()
    assert isinstance(cut, HiddenState)
    assert not cut.requires_grad
    single = cut.to(torch.float32)
    assert (single.dtype, single.step.dtype) == (torch.float32, torch.long)
    for twin in (copy.deepcopy(cut), pickle.loads(pickle.dumps(cut))):
        assert isinstance(twin, HiddenState)
        assert twin[:].equal(state[:])
        assert twin.step.tolist() == [T] * B


def test_wrong_inputs_say_what_is_right() -> None:
    for cell, name in (("gru", "GRU"), ("tanh", "RNN")):
        with pytest.raises(InputError, match=f"model.sites.cell is set, but {name} has no c"):
            build(cell, "ln", sites=LSTMSites(cell=SiteConfig(norm="ln")))
        with pytest.raises(InputError, match=f"unknown {name} backend"):
            build(cell, "ln", backend="quick")
        with pytest.raises(RuntimeError, match="Expected hidden size"):
            build(cell, "ln")(sample(B, T, IN), torch.zeros(1, B, H + 1, dtype=torch.float64))


@pytest.mark.parametrize("cell", CELLS)
def test_activations_are_watched_on_the_reference(cell: str) -> None:
    module = build(cell, "ln")
    with SiteActivations(module) as watching:
        module(sample(B, T, IN))
    sites = {key.rpartition("/")[0] for key in watching.summary()}
    assert sites == {f"activations/norms.l0.{site}" for site in ("input_to_hidden", "hidden_to_hidden")}
    assert module.backend == "auto"
