"""`torch.compile(fullgraph=True)` of a training step of whole models, with every norm at its usual sites."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_transformer import build, config, mask_of, tokens
from torch import Tensor, nn

from normlab.config import available_norms
from normlab.models.transformer import TransformerModel
from normlab.norms import build_norm, norm_options
from normlab.recurrence.reference import SiteNorms, Weights, lstm_layer

B, T, I, H = 3, 2, 4, 8  # noqa: E741


def steps(model: nn.Module, loss_of: nn.Module | object, count: int = 2) -> list[Tensor]:
    """Losses, gradients and stored values over some training steps."""
    found: list[Tensor] = []
    for _ in range(count):
        model.zero_grad()
        loss = loss_of()  # pyright: ignore[reportCallIssue]
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        found += [buffer.clone() for buffer in model.buffers()]
    return found


@pytest.mark.parametrize("norm", available_norms())
def test_compiled_transformer_is_whole_and_the_same(norm: str) -> None:
    model: TransformerModel = build(config(norm=norm, layers=1))
    twin, batch, mask = copy.deepcopy(model), tokens(4, 6), mask_of([6, 3, 5, 2], 6)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = [
        steps(owner, lambda call=call: call(batch, mask).logits[mask].square().mean())
        for owner, call in ((model, compiled), (twin, twin))
    ]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("norm", available_norms())
def test_compiled_recurrence_is_whole_and_the_same(norm: str) -> None:
    options = {"groups": 2} if "groups" in norm_options(norm) else {}
    sites = nn.ModuleList(
        [build_norm(norm, 4 * H, bias=False, **options) for _ in range(2)] + [build_norm(norm, H, **options)]
    )
    sites.register_parameter("input", nn.Parameter(torch.randn(4 * H, I)))
    sites.register_parameter("hidden", nn.Parameter(torch.randn(4 * H, H)))
    sites.double()
    twin = copy.deepcopy(sites)
    x_TBI, zeros = torch.randn(T, B, I).double(), torch.zeros(B, H).double()
    torch.compiler.reset()
    compiled = torch.compile(lstm_layer, backend="aot_eager", fullgraph=True)

    def loss(part: nn.ModuleList, layer: object) -> Tensor:
        weights = Weights(part.input, part.hidden, None, None)  # pyright: ignore[reportArgumentType]
        out, *_ = layer(x_TBI, None, zeros, zeros, weights, SiteNorms(*part))  # pyright: ignore
        return out.square().mean()

    results = [
        steps(part, lambda part=part, layer=layer: loss(part, layer))
        for part, layer in ((sites, compiled), (twin, lstm_layer))
    ]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
