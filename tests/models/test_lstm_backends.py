"""`normlab.LSTM` gives the same numbers on every backend: layers, directions, dropout, padding, chunks with the state.

Shape suffixes: B batch, T time.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normlab.config import LSTMSites, NormOptions, SiteConfig, available_norms
from normlab.machine import c_kernels
from normlab.models.lstm import LSTM, LSTMState
from normlab.norms.base import Norm
from normlab.probes.activations import SiteActivations
from normlab.recurrence import fast, reference

IN, H, B, T, MAX_STEPS = 5, 16, 8, 6, 8
# Rows and groups large enough that no statistic is nearly 0: rounding would show.
LENGTHS = torch.tensor([4, 6, 6, 3, 6, 6, 1, 6])
GROUPS = NormOptions(groups=2)
FAST = {"none", "ln", "rms", "gn", "bn", "bn_step"}


def build(norm: str, **shape: Any) -> LSTM:
    torch.manual_seed(0)
    if norm == "gn":
        shape.setdefault("norm_options", GROUPS)
    if norm == "none":
        # Torch's fused kernel draws its dropout in another order.
        shape["dropout"] = 0.0
    lstm = LSTM(IN, H, norm=norm, max_steps=MAX_STEPS, dtype=torch.float64, batch_first=True, **shape)
    for module in lstm.modules():
        if isinstance(module, Norm) and module.weight is not None:
            nn.init.normal_(module.weight, 1.0, 0.3)
    return lstm


def run(lstm: LSTM, lengths: Tensor | None) -> list[Tensor]:
    """Two chunks in training, the second beyond `max_steps`, then one in evaluation: all it gives and changes."""
    torch.manual_seed(1)
    x = torch.randn(B, 3 * T, IN, dtype=torch.float64).requires_grad_()
    found: list[Tensor] = []
    state: LSTMState | None = None
    for number, chunk in enumerate(x.split(T, 1)):
        lstm.train(number < 2)
        out, state = lstm(chunk, state, lengths=lengths)
        assert isinstance(out, Tensor)
        found += [out, *state, state.step.double()]
    assert state is not None
    loss = sum((value * torch.arange(value.numel()).view_as(value).cos()).sum() for value in found)
    assert isinstance(loss, Tensor)
    found += torch.autograd.grad(loss, [x, *lstm.parameters()])
    return found + list(lstm.buffers())


@pytest.mark.parametrize("norm", available_norms())
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "padded"])
@pytest.mark.parametrize(
    "shape", [{}, {"num_layers": 3, "dropout": 0.4, "bias": False}, {"num_layers": 2, "bidirectional": True}]
)
def test_auto_equals_the_reference(norm: str, lengths: Tensor | None, shape: dict[str, Any]) -> None:
    auto = build(norm, **shape)
    assert auto.backend_choice()[0] == ("fused" if norm == "none" else "fast" if norm in FAST else "reference")
    if norm not in FAST:
        return  # it is the reference
    plain = copy.deepcopy(auto)
    plain.backend = "reference"
    for one, other in zip(run(auto, lengths), run(plain, lengths), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", available_norms())
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "padded"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("shape", [{}, {"num_layers": 2, "bidirectional": True, "causal": False}])
def test_recomputing_changes_no_number(
    monkeypatch: pytest.MonkeyPatch, norm: str, lengths: Tensor | None, backend: str, shape: dict[str, Any]
) -> None:
    """Stored statistics included: they are taken twice and stored once, and backward sees those of before."""
    monkeypatch.setattr(fast, "SEGMENT", 4)
    monkeypatch.setattr(reference, "SEGMENT", 4)
    recomputing = build(norm, recompute=True, **shape)
    assert recomputing.backend_choice()[0] == ("fast" if norm in FAST else "reference")
    if backend == "auto" and norm not in FAST:
        return  # it is the reference
    plain = copy.deepcopy(recomputing)
    recomputing.backend = backend  # pyright: ignore[reportAttributeAccessIssue]
    plain.backend, plain.recompute = "reference", False
    for one, other in zip(run(recomputing, lengths), run(plain, lengths), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("causal", [True, False])
def test_sites_with_norms_of_unlike_directions(causal: bool) -> None:
    sites = LSTMSites(hidden_to_hidden=SiteConfig(norm="ln"), cell=SiteConfig(norm="bn_step"))
    auto = build("bn", sites=sites, causal=causal)
    plain = copy.deepcopy(auto)
    plain.backend = "reference"
    assert auto.backend_choice()[0] == "fast"
    assert "different directions" in auto.backend_choice()[1]
    for one, other in zip(run(auto, LENGTHS), run(plain, LENGTHS), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_the_choice_names_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert build("ln", backend="reference").backend_choice() == ("reference", "asked for")
    assert build("none").backend_choice() == ("fused", "every site is bare")
    assert build("none", backend="fast").backend_choice()[0] == "fast"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        for dtype, backend in ((torch.float16, {"fused"}), (torch.bfloat16, {"fast", "reference"})):
            patch.setattr(torch, "get_autocast_dtype", lambda device, dtype=dtype: dtype)
            assert build("none").backend_choice("cuda")[0] in backend
            assert build("none").backend_choice("cpu")[0] == "fused"
    assert build("ln", proj_size=3).backend_choice() == ("reference", "proj_size is set")
    assert build("ln").backend_choice("mps") == ("reference", "the input is neither on a CPU nor on a GPU but on mps")
    if not torch.cuda.is_available():
        assert build("ln").backend_choice("cuda") == ("reference", "there is no GPU")
    ghosts = build("bn", norm_options=NormOptions(ghost_rows=2))
    assert ghosts.backend_choice() == ("reference", "bn at hidden_to_hidden has no fast form with ghost_rows")
    assert build("none", recompute=True).backend_choice()[0] == "fast"
    monkeypatch.setattr(c_kernels, "compiler", lambda: None)
    assert build("ln").backend_choice() == ("fast", "torch operators: no C compiler that works")


@pytest.mark.parametrize("norm", sorted(FAST))
def test_activations_are_watched_on_the_reference(norm: str) -> None:
    lstm = build(norm)
    with SiteActivations(lstm) as watching:
        lstm(torch.randn(B, T, IN, dtype=torch.float64))
    assert len({key.rpartition("/")[0] for key in watching.summary()}) == 3
    assert lstm.backend == "auto"
