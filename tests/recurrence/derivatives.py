"""What every layer with a backward by hand does when it is differentiated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


def require_first_alone(loss: Tensor, x: Tensor, weight: Tensor) -> None:
    """Backward goes twice with the graph kept, and there is never a second derivative."""
    first = torch.autograd.grad(loss, [x, weight], retain_graph=True)
    second = torch.autograd.grad(loss, [x, weight], retain_graph=True)
    assert all(one.equal(other) for one, other in zip(first, second, strict=True))
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    assert grad.equal(first[0])
    with pytest.raises(RuntimeError, match='no second derivative; build it with backend="reference"'):
        grad.sum().backward()
