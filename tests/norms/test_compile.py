"""`torch.compile(fullgraph=True)` of a whole training step: the same numbers and the same stored values."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from variants import MASK, B, F, T, every_variant

from normlab.config import available_norms
from normlab.norms import build_norm, norm_class


class Net(nn.Module):
    def __init__(self, name: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.before, self.norm, self.after = nn.Linear(F, F), build_norm(name, F, **options), nn.Linear(F, 3)

    def forward(self, x: Tensor, mask_BT: Tensor | None) -> Tensor:
        y = self.after(torch.tanh(self.norm(self.before(x), mask_BT)))
        return (y if mask_BT is None else y * mask_BT.unsqueeze(-1)).square().mean()


def train(model: nn.Module, call: Any, masked: bool, steps: int = 3) -> list[Tensor]:
    """Losses, gradients and stored values over some steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found: list[Tensor] = []
    for seed in range(steps):
        x = torch.randn(B, T, F, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        loss = call(x, MASK if masked else None)
        optimizer.zero_grad()
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
        found += [buffer.clone() for buffer in model.buffers()]
    return found


def assert_compiled_is_same(model: nn.Module, backend: str, masked: bool) -> None:
    model = model.double()
    twin = copy.deepcopy(model)
    torch.compiler.reset()  # each norm is one more version of the same `forward`; torch allows 8
    found = train(model, torch.compile(model, backend=backend, fullgraph=True), masked)
    for one, other in zip(found, train(twin, twin, masked), strict=True):
        torch.testing.assert_close(one, other)


@every_variant
@pytest.mark.parametrize("masked", [False, True])
def test_compiled_training_step_is_whole_and_the_same(name: str, options: dict[str, Any], masked: bool) -> None:
    assert_compiled_is_same(Net(name, options), "aot_eager", masked)


class Several(nn.Module):
    """One net for each norm that stores statistics; one loss."""

    def __init__(self) -> None:
        super().__init__()
        storing = [name for name in available_norms() if norm_class(name).needs_statistics]
        self.nets = nn.ModuleList([Net(name, {}) for name in storing])

    def forward(self, x: Tensor, mask_BT: Tensor | None) -> Tensor:
        return torch.stack([net(x, mask_BT) for net in self.nets]).sum()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None and shutil.which("gcc") is None, reason="inductor needs a C compiler")
def test_compiled_by_inductor_is_the_same() -> None:
    """The norms that change buffers, which its partitioner must not read again, in one model: one compilation of C."""
    assert_compiled_is_same(Several(), "inductor", masked=True)
