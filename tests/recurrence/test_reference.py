"""The reference loop against an independent one, written from the equations with a norm written out per site.

Shape suffixes: B batch, T time, I input features, H hidden, G gates (4H).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from normlab.config import available_norms
from normlab.norms import build_norm
from normlab.recurrence.reference import SiteNorms, Weights, lstm_layer, reverse_valid

B, T, I, H = 3, 4, 5, 16  # noqa: E741


def per_entry(x: Tensor) -> Tensor:
    return (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()


def per_batch(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()


def per_group(x: Tensor) -> Tensor:
    return per_entry(x.reshape(-1, x.shape[1] // 8)).view_as(x)


FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "ln": per_entry,
    "rms": lambda x: x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt(),
    "gn": per_group,
    "bn": per_batch,
    "bn_step": per_batch,
}


def build(name: str) -> tuple[Weights, SiteNorms]:
    torch.manual_seed(0)
    sizes = ((4 * H, I), (4 * H, H), (4 * H,))
    weights = Weights(*(torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes), None)
    options = {"groups": 8} if name == "gn" else {}
    norms = SiteNorms(
        build_norm(name, 4 * H, bias=False, **options),
        build_norm(name, 4 * H, bias=False, **options),
        build_norm(name, H, **options),
    )
    for norm in norms:
        norm.double()
        for parameter in norm.parameters():
            torch.nn.init.normal_(parameter, 1.0)
    return weights, norms


@pytest.mark.parametrize("name", FORMULAS)
def test_equals_the_equations(name: str) -> None:
    weights, norms = build(name)
    x_TBI, h, c = torch.randn(T, B, I).double(), torch.randn(B, H).double(), torch.randn(B, H).double()
    x_TBI.requires_grad_()
    out, last_h, last_c, _ = lstm_layer(x_TBI, None, h, c, weights, norms)

    formula = FORMULAS[name]
    gain_x, gain_h, gain_c = (1.0 if norm.weight is None else norm.weight for norm in norms)
    bias_c = 0.0 if norms.cell.bias is None else norms.cell.bias
    assert weights.bias is not None
    outputs = []
    for t in range(T):
        gates = formula(h @ weights.hidden.T) * gain_h + formula(x_TBI[t] @ weights.input.T) * gain_x + weights.bias
        i, f, g, o = gates[:, :H], gates[:, H : 2 * H], gates[:, 2 * H : 3 * H], gates[:, 3 * H :]
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * (formula(c) * gain_c + bias_c).tanh()
        outputs.append(h)
    torch.testing.assert_close(out, torch.stack(outputs))
    torch.testing.assert_close(last_h, h)
    torch.testing.assert_close(last_c, c)
    inputs = [x_TBI, *weights[:3], *(parameter for norm in norms for parameter in norm.parameters())]
    target = torch.randn_like(out)
    for one, other in zip(
        torch.autograd.grad((out * target).sum(), inputs),
        torch.autograd.grad((torch.stack(outputs) * target).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", available_norms())
def test_identical_rows_at_step_0_give_finite_gradients(name: str) -> None:
    weights, norms = build(name)
    x_TBI = torch.ones(T, B, I, dtype=torch.float64, requires_grad=True)
    out, *_ = lstm_layer(x_TBI, None, torch.zeros(B, H).double(), torch.zeros(B, H).double(), weights, norms)
    inputs = [x_TBI, *weights[:3], *(parameter for norm in norms for parameter in norm.parameters())]
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.square().sum(), inputs))


def test_stored_values_are_those_of_each_time_step() -> None:
    weights, norms = build("bn_step")
    x_TBI, h, c = torch.randn(T, B, I).double(), torch.randn(B, H).double(), torch.randn(B, H).double()
    out, *_ = lstm_layer(x_TBI, None, h, c, weights, norms, 2)
    before = torch.cat([h.unsqueeze(0), out[:-1]]) @ weights.hidden.T
    norm = norms.hidden_to_hidden
    torch.testing.assert_close(norm.get_buffer("running_mean")[2 : 2 + T], before.mean(1))
    torch.testing.assert_close(norm.get_buffer("running_var")[2 : 2 + T], before.var(1, correction=0))
    assert norm.get_buffer("seen")[: T + 3].tolist() == [False] * 2 + [True] * T + [False]
    for norm in norms:
        norm.eval()
    kept = norm.get_buffer("running_mean").clone()
    lstm_layer(x_TBI, None, h, c, weights, norms, 2)
    assert norm.get_buffer("running_mean").equal(kept)


def test_reverse_only_the_valid_part() -> None:
    x_TBI = torch.tensor([[1.0, 4], [2, 5], [3, 0]]).unsqueeze(-1)
    lengths = torch.tensor([3, 2])
    assert reverse_valid(x_TBI, lengths).squeeze(-1).tolist() == [[3, 5], [2, 4], [1, 0]]
    assert reverse_valid(x_TBI, None).squeeze(-1).tolist() == [[3, 0], [2, 5], [1, 4]]
