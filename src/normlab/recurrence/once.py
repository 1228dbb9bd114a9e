"""Gradients written by hand that have no derivative themselves, and say so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["added", "differentiated_once"]


class _Once(torch.autograd.Function):
    """Identity that refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            'the fast layer has no second derivative; build it with backend="reference", which differentiates twice'
        )


def differentiated_once(gradients: list[Any]) -> list[Any]:
    """`gradients` (tensors or None), which raise RuntimeError where something differentiates them."""
    if not torch.is_grad_enabled():
        return gradients
    given = [place for place, gradient in enumerate(gradients) if gradient is not None]
    once: Any = _Once.apply(*(gradients[place].detach().requires_grad_() for place in given))
    found = list(gradients)
    for place, gradient in zip(given, once, strict=True):
        found[place] = gradient
    return found


def added(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    """Both parts of a gradient together, in the memory of `total`; None is no part."""
    return more if total is None or more is None else total.add_(more)
