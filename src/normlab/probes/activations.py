"""Distribution of the outputs of every norm site: mean, spread, percentiles, shares of large and of positive values.

The middle percentiles are those of Ioffe & Szegedy 2015 (arXiv 1502.03167, figure 1b): 15th, 50th, 85th.

Shape suffixes: B batch, T time, F features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from normlab.config import require_choice
from normlab.models.transformer import FeedForward
from normlab.probes.base import Measurement, Probe, Row, Subject, site_summary
from normlab.probes.sites import Call, Site, freeze_stored, layer_of, model_sites, set_norms_training, watched

__all__ = ["ActivationStatistics", "SiteActivations"]

SAMPLE_SIZE = 2**15
PERCENTILES = (15, 50, 85)
STATISTICS = ("mean", "std", *(f"p{level}" for level in PERCENTILES), "saturated", "active")
SATURATED_BEYOND = 2.0
"""Where a sigmoid's slope is below 0.105 (0.25 at most) and that of tanh below 0.071 (1 at most)."""


class SiteActivations:
    """Watches the outputs of all norms in `model` while the context is open, bare sites included.

    All calls within the context are pooled: a norm in a recurrence is called once per time step. Padding is left
    out. Recurrences run on the reference backend meanwhile, because a fused kernel has no sites to watch. Nothing the
    model computes is changed, nor any global random state.
    """

    def __init__(self, model: nn.Module) -> None:
        self._sites = {path: _Distribution() for path in model_sites(model)}
        self._model = model

    def __enter__(self) -> SiteActivations:
        self._context = watched(self._model, lambda site, call: self._sites[site.path].add(call.y_BTF, call.mask_BT))
        self._context.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.__exit__(kind, error, trace)

    def summary(self) -> dict[str, float]:
        """Per site that was called, `activations/<path of the norm>/<statistic>`.

        Statistics: mean, std (biased), p15, p50, p85 (of all outputs, or of a sample of about 16,384 or more),
        saturated (share of outputs beyond +-2), active (share of outputs above 0, which a ReLU there lets pass).
        """
        return {
            f"activations/{name or 'norm'}/{statistic}": value
            for name, site in self._sites.items()
            for statistic, value in site.statistics().items()
        }


@dataclass(frozen=True)
class ActivationStatistics(Probe):
    """Distribution of the outputs of every norm site, and of what enters the Transformer's activation (`ffn_up`).

    Per site, layer and time step: mean, std, p15, p50, p85, saturated (share beyond +-2), active (share above 0: what
    a ReLU there lets pass).

    Args:
        split: whose texts.
        batches: of the run's batch size.
        mode: of the norms: eval, or train (with the batch's own statistics; no dropout either way).
    """

    split: str = "valid"
    batches: int = 4
    mode: str = "eval"

    def __post_init__(self) -> None:
        self.require_positive("batches")
        require_choice("mode", self.mode, ("eval", "train"))

    @torch.no_grad()
    def measure(self, subject: Subject) -> Measurement:
        set_norms_training(subject.model, self.mode == "train")
        freeze_stored(subject.model)  # which pn and brn normalize by: all batches see the same model
        found: dict[tuple[Site, int | None], _Distribution] = {}

        def see(site: Site, call: Call) -> None:
            steps = [] if call.first is None else range(call.first, call.first + call.y_BTF.shape[1])
            found.setdefault((site, None), _Distribution()).add(call.y_BTF, call.mask_BT)
            for column, step in enumerate(steps):
                keep = None if call.mask_BT is None else call.mask_BT[:, column]
                found.setdefault((site, step), _Distribution()).add(call.y_BTF[:, column], keep)

        hidden: list[tuple[Site, Tensor]] = []
        with watched(subject.model, see), _watched_feed_forward(subject.model, hidden):
            for batch, _ in subject.outputs(subject.batches(self.split, self.batches)):
                for site, up_BTF in hidden:
                    see(site, Call(up_BTF, up_BTF, batch.mask_BT, 0))
                hidden.clear()
        rows: list[Row] = [
            {**site.columns(), "step": step, **distribution.statistics()}
            for (site, step), distribution in found.items()
            if distribution.count
        ]
        return Measurement(site_summary([row for row in rows if row["step"] is None], STATISTICS), rows)


@contextmanager
def _watched_feed_forward(model: nn.Module, seen: list[tuple[Site, Tensor]]) -> Iterator[None]:
    """What enters the activation of each feed-forward sublayer (of SwiGLU, of its gate) is added to `seen`."""
    with ExitStack() as stack:
        for path, module in model.named_modules():
            if isinstance(module, FeedForward):
                site = Site("ffn_up", layer_of(path), f"{path}.up")
                gates = 2 if module.activation == "swiglu" else 1
                stack.callback(module.up.register_forward_hook(partial(_note, seen, site, gates)).remove)
        yield


def _note(seen: list[tuple[Site, Tensor]], site: Site, gates: int, module: nn.Module, x: Any, hidden: Tensor) -> None:
    seen.append((site, hidden.chunk(gates, -1)[0]))


class _Distribution:
    """Moments (merged as in Chan et al. 1979) and an even, bounded sample of all the values it was given."""

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0
        self._beyond: Tensor | float = 0.0
        self._positive: Tensor | float = 0.0
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
        total = self.count + count
        shift = mean - self._mean
        self._squares = self._squares + var * count + shift**2 * (self.count * count / total)
        self._mean = self._mean + shift * (count / total)
        self._beyond = self._beyond + (y.abs() > SATURATED_BEYOND).sum()
        self._positive = self._positive + (y > 0).sum()
        self.count = total
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
        if self.count == 0:
            return {}
        sample = torch.cat(self._sample)
        levels = torch.tensor(PERCENTILES, dtype=sample.dtype, device=sample.device) / 100
        percentiles = torch.quantile(sample, levels).tolist()
        return {
            "mean": float(self._mean),
            "std": (float(self._squares) / self.count) ** 0.5,
            **{f"p{level}": value for level, value in zip(PERCENTILES, percentiles, strict=True)},
            "saturated": float(self._beyond) / self.count,
            "active": float(self._positive) / self.count,
        }
