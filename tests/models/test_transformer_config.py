"""Every field of the Transformer's config does something."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tiny_transformer import (
    EVERYWHERE,
    PLACEMENTS,
    VOCABULARY,
    build,
    config,
)
from torch import Tensor

from normlab.config import NormOptions, SiteConfig, TransformerConfig, TransformerSites

OTHER_VALUES: dict[str, Any] = {
    "norm": "rms",
    "sites": TransformerSites(ffn=SiteConfig(norm="none")),
    "norm_options": NormOptions(eps=0.1),
    "width": 16,
    "layers": 3,
    "heads": 4,
    "ffn_width": 24,
    "placement": "post",
    "positions": "learned",
    "activation": "swiglu",
    "dropout": 0.5,
    "tie_embeddings": True,
}


def signature(settings: TransformerConfig) -> tuple[list[tuple[int, ...]], Tensor]:
    """Shapes of the parameters and the logits in training, from fixed seeds."""
    torch.manual_seed(3)
    model = build(settings)
    batch = torch.arange(20).view(4, 5) % VOCABULARY
    torch.manual_seed(4)
    return [tuple(p.shape) for p in model.parameters()], model(batch).logits.detach()


def differ(a: TransformerConfig, b: TransformerConfig) -> bool:
    (a_shapes, a_logits), (b_shapes, b_logits) = signature(a), signature(b)
    return a_shapes != b_shapes or not torch.allclose(a_logits, b_logits, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(TransformerConfig) if f.name != "name"])
def test_every_field_changes_something(name: str) -> None:
    base = config()
    assert not differ(base, base)
    assert differ(base, dataclasses.replace(base, **{name: OTHER_VALUES[name]}))


@pytest.mark.parametrize("other", [SiteConfig(norm="rms"), SiteConfig(gain=0.5)])
@pytest.mark.parametrize("site", [f.name for f in dataclasses.fields(TransformerSites)])
def test_every_site_changes_something(site: str, other: SiteConfig) -> None:
    base = config(sites=EVERYWHERE)
    assert differ(base, dataclasses.replace(base, sites=dataclasses.replace(EVERYWHERE, **{site: other})))


@pytest.mark.parametrize("field", ["placement", "positions", "activation"])
def test_all_choices_differ(field: str) -> None:
    choices = {
        "placement": PLACEMENTS,
        "positions": ("rotary", "learned"),
        "activation": ("gelu", "relu", "sigmoid", "swiglu"),
    }[field]
    settings = [config(**{field: choice}) for choice in choices]
    assert all(differ(a, b) for i, a in enumerate(settings) for b in settings[:i])
