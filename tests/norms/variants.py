"""Every discovered norm with its defaults and with each option that changes which entries it uses or stores."""

from __future__ import annotations

import copy
import typing
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normlab.config import InputError, NormOptions, available_norms
from normlab.norms import build_norm, norm_options
from normlab.norms.base import Norm

B, T, F = 4, 5, 16
LENGTHS = torch.tensor([5, 3, 2, 1])
MASK = torch.arange(T) < LENGTHS.unsqueeze(1)
POOLS = [pool for part in typing.get_args(typing.get_type_hints(NormOptions)["pool"]) for pool in typing.get_args(part)]
OTHERS: list[dict[str, Any]] = [
    {"affine": True},
    {"warmup": 0, "ramp": 0},
    {"warmup": 1, "ramp": 2},
    {"group_scaling": 4},
    {"ghost_rows": 2},
    {"memory_batches": 2, "pool": "batch_time"},
    {"memory_batches": 2},
    {"max_steps": 2},
    {"max_steps": 2, "beyond": "last"},
]


def variants(dim: int = F) -> list[tuple[str, dict[str, Any]]]:
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in available_norms():
        takes = norm_options(name)
        for options in [{}, *({"pool": pool} for pool in POOLS), *OTHERS]:
            options = {key: value for key, value in options.items() if key in takes}
            try:
                norm = build_norm(name, dim, **options)
            except InputError:
                continue
            found.setdefault(makeup(norm), (name, options))
    return list(found.values())


def makeup(norm: Norm) -> str:
    """All that a new norm consists of: the same for options that say what is the default anyway."""
    own = {key: value for key, value in vars(norm).items() if key not in vars(nn.Module())}
    return repr((type(norm), own, norm._parameters, norm._buffers))


def label(value: Any) -> str:
    return value if isinstance(value, str) else "-".join(f"{key}={given}" for key, given in value.items())


every_variant = pytest.mark.parametrize(("name", "options"), variants(), ids=label)
every_norm = pytest.mark.parametrize("name", available_norms())


def build(name: str, options: dict[str, Any], **more: Any) -> Norm:
    """In float64, with random gain and bias, and with stored values that two training batches left."""
    torch.manual_seed(0)
    norm = build_norm(name, F, **options, **{key: value for key, value in more.items() if key in norm_options(name)})
    norm.double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter, mean=1.0)
    batches = [torch.randn(B, T, F, dtype=torch.float64) * 2 + 1 for _ in range(2)]
    for batch in batches:
        norm(batch)
    norm.history = batches  # pyright: ignore[reportAttributeAccessIssue]
    return norm


def sample(seed: int = 1, *shape: int) -> Tensor:
    return torch.randn(*(shape or (B, T, F)), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def refuses(norm: Norm, x: Tensor, *more: Any) -> bool:
    """Whether a copy of `norm` refuses the batch `x` for want of rows."""
    try:
        copy.deepcopy(norm)(x, *more)
    except InputError as error:
        if "at least 2 rows" not in str(error):
            raise
        return True
    return False
