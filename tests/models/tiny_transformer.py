"""Small double-precision Transformers for the tests of this folder."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from normlab.config import SiteConfig, TransformerConfig, TransformerSites
from normlab.models.transformer import TransformerModel
from normlab.norms.base import Norm

VOCABULARY = 11
EVERYWHERE = TransformerSites(*(SiteConfig() for _ in dataclasses.fields(TransformerSites)))
BARE = TransformerSites(*(SiteConfig(norm="none") for _ in dataclasses.fields(TransformerSites)))
PLACEMENTS = ("pre", "post", "peri")


def config(**fields: Any) -> TransformerConfig:
    return TransformerConfig(**{"width": 32, "layers": 2, "heads": 2, **fields})


def build(settings: TransformerConfig, classes: int | None = None, length: int = 12) -> TransformerModel:
    return TransformerModel(settings, VOCABULARY, classes=classes, length=length).double()


def randomize(model: nn.Module, std: float = 0.3) -> None:
    """Every parameter away from its initial value, so that gains of 1 and biases of 0 hide nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * std)


def tokens(B: int, T: int) -> Tensor:
    return torch.randint(VOCABULARY, (B, T))


def mask_of(lengths: list[int], T: int) -> Tensor:
    return torch.arange(T) < torch.tensor(lengths)[:, None]


def norms_of(model: nn.Module) -> list[Norm]:
    return [module for module in model.modules() if isinstance(module, Norm)]
