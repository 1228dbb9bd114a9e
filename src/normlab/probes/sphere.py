"""Where the tokens' feature vectors lie before and after a norm's gain and bias.

Shape suffixes: B batch, T time, F features, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from normlab.norms.base import Norm
from normlab.probes.base import Measurement, Probe, Row, Subject, site_summary
from normlab.probes.sites import Call, Site, model_sites, watched

__all__ = ["Sphere", "geometry"]

QUANTITIES = ("token_mean", "token_variance", "sphere_distance", "anisotropy")


@dataclass(frozen=True)
class Sphere(Probe):
    """Distance of each norm site's output vectors to the sphere of radius sqrt(F), in evaluation mode.

    Per site and layer, before and after gain and bias: token_mean, the mean over tokens of |mean of its features|;
    token_variance, of the variance of its features; sphere_distance, of ||y| / sqrt(F) - 1|; anisotropy, the mean
    cosine between random pairs of different tokens (Ethayarajh 2019, arXiv 1909.00512).

    Args:
        tokens: at each site, at most, evenly spaced over as few batches as hold them.
        split: whose texts.
    """

    tokens: int = 2048
    split: str = "valid"

    def __post_init__(self) -> None:
        self.require_positive("tokens")

    @torch.no_grad()
    def measure(self, subject: Subject) -> Measurement:
        norms = {path: norm for path, (_, norm) in model_sites(subject.model).items()}
        found: dict[tuple[Site, str], list[Tensor]] = {}

        def see(site: Site, call: Call) -> None:
            norm = norms[site.path]
            keep = slice(None) if call.mask_BT is None else call.mask_BT
            plain_BTF = before_gain(norm, call)
            for when, y_BTF in (("before", plain_BTF), ("after", call.y_BTF)):
                found.setdefault((site, when), []).append(y_BTF[keep].flatten(0, -2))

        loader = subject.loader(self.split)
        taken = 0
        with watched(subject.model, see):
            batches = (subject.place(batch) for batch in loader)
            for batch, _ in subject.outputs(batches):
                taken += batch.tokens_BT.numel() if batch.mask_BT is None else int(batch.mask_BT.sum())
                if taken >= self.tokens:
                    break
        rows: list[Row] = []
        for (site, when), parts in found.items():
            y_NF = torch.cat(parts).double()
            y_NF = y_NF[torch.linspace(0, len(y_NF) - 1, min(self.tokens, len(y_NF))).round().long()]
            rows.append({**site.columns(), "when": when, **geometry(y_NF), "tokens": len(y_NF)})
        summary: dict[str, float] = {}
        for when in ("before", "after"):
            renamed = [
                {**row, **{f"{name}_{when}": row[name] for name in QUANTITIES}} for row in rows if row["when"] == when
            ]
            summary |= site_summary(renamed, [f"{name}_{when}" for name in QUANTITIES])
        return Measurement(summary, rows)


def before_gain(norm: Norm, call: Call) -> Tensor:
    """The output of `call` without gain and bias: (y - bias) / weight, with y where the weight is 0."""
    y = call.y_BTF
    if norm.bias is not None:
        y = y - norm.bias
    if norm.weight is None:
        return y
    return torch.where(norm.weight == 0, y, y / torch.where(norm.weight == 0, 1.0, norm.weight))


def geometry(y_NF: Tensor) -> dict[str, float]:
    """The four quantities of tokens N x F (see `Sphere`)."""
    count, features = y_NF.shape
    partner_N = (torch.arange(count) + torch.randint(1, max(2, count), (count,))) % count
    unit_NF = F.normalize(y_NF, dim=-1)
    return {
        "token_mean": float(y_NF.mean(-1).abs().mean()),
        "token_variance": float(y_NF.var(-1, correction=0).mean()),
        "sphere_distance": float((y_NF.norm(dim=-1) / features**0.5 - 1).abs().mean()),
        "anisotropy": float((unit_NF * unit_NF[partner_N]).sum(-1).mean()),
    }
