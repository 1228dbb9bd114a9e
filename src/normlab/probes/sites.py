"""Watching what goes through the norm sites of a model.

Shape suffixes: B batch, T time, F features.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from normlab.models.recurrent import Recurrent
from normlab.norms.base import Norm, Step

__all__ = ["Call", "Site", "freeze_stored", "layer_of", "model_sites", "on_reference", "set_norms_training", "watched"]


@dataclass(frozen=True)
class Site:
    """Where a norm stands.

    Attributes:
        site: its name, such as "cell"; of a norm put into another model, the last part of its path.
        layer: from 0; -1 where there are no layers.
        path: of the norm in the model.
    """

    site: str
    layer: int
    path: str

    def columns(self) -> dict[str, Any]:
        """What identifies it in a row."""
        return asdict(self)


@dataclass(frozen=True)
class Call:
    """One call of a norm.

    Attributes:
        x_BTF: what came in.
        y_BTF: what came out.
        mask_BT: True = real entry; None = no padding.
        first: time step of the first column; None if the rows are at steps of their own.
    """

    x_BTF: Tensor
    y_BTF: Tensor
    mask_BT: Tensor | None
    first: int | None


def model_sites(model: nn.Module) -> dict[str, tuple[Site, Norm]]:
    """Every norm in `model` by its path, bare sites included."""
    return {path: (_site(path, norm), norm) for path, norm in model.named_modules() if isinstance(norm, Norm)}


def _site(path: str, norm: Norm) -> Site:
    return Site(norm.site or path.rpartition(".")[2] or "norm", layer_of(path), path)


def layer_of(path: str) -> int:
    """The layer in a module's path (`lstm.norms.l1.cell`, `blocks.1.ffn_norm`: 1); -1 if there is none."""
    found = re.search(r"(?:^|\.)l?(\d+)(?:_reverse)?(?:\.|$)", path)
    return int(found[1]) if found else -1


def set_norms_training(model: nn.Module, training: bool = True) -> None:
    """Put every norm in training (or evaluation) mode, and nothing else: dropout stays as it is."""
    for _, norm in model_sites(model).values():
        norm.train(training)


def freeze_stored(model: nn.Module) -> None:
    """From now on no norm takes anything into its stored values: measuring leaves what is measured as it was.

    Some norms use stored values in training too (`brn`, `pn`), or count the sequences that they were given.
    """
    for _, norm in model_sites(model).values():
        object.__setattr__(norm, "store", lambda statistics, step=0: None)


@contextmanager
def on_reference(model: nn.Module) -> Iterator[None]:
    """Recurrences run on the reference backend, because a fused kernel has no sites to watch."""
    backends = [(module, module.backend) for module in model.modules() if isinstance(module, Recurrent)]
    for recurrent, _ in backends:
        recurrent.backend = "reference"
    try:
        yield
    finally:
        for recurrent, backend in backends:
            recurrent.backend = backend


@contextmanager
def watched(model: nn.Module, see: Callable[[Site, Call], None]) -> Iterator[None]:
    """`see` is told of every call of every norm in `model`; nothing the model computes is changed."""
    sites = model_sites(model)
    # `normalize` and not a forward hook: recurrences call it directly.
    for site, norm in sites.values():
        object.__setattr__(norm, "normalize", _telling(norm.normalize, site, see))
    try:
        with on_reference(model):
            yield
    finally:
        for _, norm in sites.values():
            object.__delattr__(norm, "normalize")


def _telling(normalize: Any, site: Site, see: Callable[[Site, Call], None]) -> Any:
    @functools.wraps(normalize)
    def telling(x_BTF: Tensor, mask_BT: Tensor | None = None, step: Step = 0, *args: Any, **kwargs: Any) -> Any:
        result = normalize(x_BTF, mask_BT, step, *args, **kwargs)
        see(site, Call(x_BTF.detach(), result[0].detach(), mask_BT, _first(step)))
        return result

    return telling


def _first(step: Step) -> int | None:
    if isinstance(step, int):
        return step
    return int(step[0]) if bool((step == step[0]).all()) else None
