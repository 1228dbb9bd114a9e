"""Distribution of the outputs of every norm site: mean, spread, percentiles, share of large values.

The middle percentiles are those of Ioffe & Szegedy 2015 (arXiv 1502.03167, figure 1b): 15th, 50th, 85th.

Shape suffixes: B batch, T time, F features.
"""

from __future__ import annotations

import functools
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from normlab.models.recurrent import Recurrent
from normlab.norms.base import Norm

__all__ = ["SiteActivations"]

SAMPLE_SIZE = 2**15
PERCENTILES = (15, 50, 85)
SATURATED_BEYOND = 2.0
"""Where a sigmoid's slope is below 0.105 (0.25 at most) and that of tanh below 0.071 (1 at most)."""


class SiteActivations:
    """Watches the outputs of all norms in `model` while the context is open, bare sites included.

    All calls within the context are pooled: a norm in a recurrence is called once per time step. Padding is left
    out. Recurrences run on the reference backend meanwhile, because a fused kernel has no sites to watch. Nothing the
    model computes is changed, nor any global random state.
    """

    def __init__(self, model: nn.Module) -> None:
        self._norms = {name: module for name, module in model.named_modules() if isinstance(module, Norm)}
        self._sites = {name: _Distribution() for name in self._norms}
        self._backends = [(module, module.backend) for module in model.modules() if isinstance(module, Recurrent)]

    def __enter__(self) -> SiteActivations:
        # `normalize` and not a forward hook: recurrences call it directly.
        for name, norm in self._norms.items():
            object.__setattr__(norm, "normalize", _watched(norm.normalize, self._sites[name]))
        for module, _ in self._backends:
            module.backend = "reference"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for norm in self._norms.values():
            object.__delattr__(norm, "normalize")
        for module, backend in self._backends:
            module.backend = backend

    def summary(self) -> dict[str, float]:
        """Per site that was called, `activations/<path of the norm>/<statistic>`.

        Statistics: mean, std (biased), p15, p50, p85 (of all outputs, or of a sample of about 16,384 or more),
        saturated (share of outputs beyond +-2).
        """
        return {
            f"activations/{name or 'norm'}/{statistic}": value
            for name, site in self._sites.items()
            for statistic, value in site.statistics().items()
        }


def _watched(normalize: Any, distribution: _Distribution) -> Any:
    @functools.wraps(normalize)
    def watched(x_BTF: Tensor, mask_BT: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        result = normalize(x_BTF, mask_BT, *args, **kwargs)
        distribution.add(result[0], mask_BT)
        return result

    return watched


class _Distribution:
    """Moments (merged as in Chan et al. 1979) and an even, bounded sample of all the values it was given."""

    def __init__(self) -> None:
        self._count = 0
        self._mean: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0
        self._beyond: Tensor | float = 0.0
        self._sample: list[Tensor] = []
        self._sample_size = 0
        self._rate = 1.0
        # Its own generator: the model's dropout must see the same random numbers with and without the probe.
        self._generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def add(self, y_BTF: Tensor, mask_BT: Tensor | None) -> None:
        y = y_BTF.detach()
        y = (y if mask_BT is None else y[mask_BT]).float().flatten()
        count = y.numel()
        if count == 0:
            return
        var, mean = torch.var_mean(y, correction=0)
        var, mean = var.double(), mean.double()
        total = self._count + count
        shift = mean - self._mean
        self._squares = self._squares + var * count + shift**2 * (self._count * count / total)
        self._mean = self._mean + shift * (count / total)
        self._beyond = self._beyond + (y.abs() > SATURATED_BEYOND).sum()
        self._count = total
        self._take_sample(y)

    def _take_sample(self, y: Tensor) -> None:
        """Keep a random share of `y`; every value ever added has the same chance to be in the sample."""
        while self._sample_size + y.numel() * self._rate > SAMPLE_SIZE:
            self._rate /= 2
            if self._sample:
                kept = torch.cat(self._sample)
                self._sample = [kept[self._draw(kept, (len(kept) + 1) // 2)]]
                self._sample_size = self._sample[0].numel()
        if self._rate < 1:
            # At least one per call, so that short calls are not left out.
            count = max(1, round(y.numel() * self._rate))
            y = y[torch.randint(y.numel(), (count,), generator=self._generator).to(y.device)]
        self._sample.append(y.clone())
        self._sample_size += y.numel()

    def _draw(self, values: Tensor, size: int) -> Tensor:
        return torch.randperm(len(values), generator=self._generator)[:size].to(values.device)

    def statistics(self) -> dict[str, float]:
        if self._count == 0:
            return {}
        sample = torch.cat(self._sample)
        levels = torch.tensor(PERCENTILES, dtype=sample.dtype, device=sample.device) / 100
        percentiles = torch.quantile(sample, levels).tolist()
        return {
            "mean": float(self._mean),
            "std": (float(self._squares) / self._count) ** 0.5,
            **{f"p{level}": value for level, value in zip(PERCENTILES, percentiles, strict=True)},
            "saturated": float(self._beyond) / self._count,
        }
