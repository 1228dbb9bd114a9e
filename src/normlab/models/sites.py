"""From the config's sites to norm modules: models ask by site name and never name a norm."""

from __future__ import annotations

import dataclasses
from typing import Any

from normlab.config import MODEL_NORM, InputError, LSTMSites, MLPSites, NormOptions, SiteConfig, TransformerSites
from normlab.norms import build_norm, norm_class, norm_options
from normlab.norms.base import Norm


class NormFactory:
    """Builds the norm of each site.

    Args:
        norm: the norm of the model.
        sites: what stands where.
        options: options of the norm; one that no norm at any site takes is refused, others go to those that take them.
        causal: the model is autoregressive.
        max_steps: number of time steps with stored statistics of their own, unless `options` says another.

    Raises:
        InputError: an option that no norm in use takes.
    """

    def __init__(
        self,
        norm: str,
        sites: LSTMSites | TransformerSites | MLPSites,
        options: NormOptions,
        *,
        causal: bool,
        max_steps: int,
    ) -> None:
        self.norm, self.sites, self.causal, self.max_steps = norm, sites, causal, max_steps
        self.options = {key: value for key, value in dataclasses.asdict(options).items() if value is not None}
        used = sorted({self.name_at(field.name) for field in dataclasses.fields(sites)})
        taken = {option for name in used for option in norm_options(name)}
        for option in self.options:
            if option not in taken:
                raise InputError(
                    f"model.norm_options.{option} is set, but no norm in use ({', '.join(used)}) takes it; "
                    "set it to null or use another norm"
                )

    def name_at(self, site: str) -> str:
        """Name of the norm that stands at `site`."""
        name = self._site(site).norm
        return self.norm if name == MODEL_NORM else name

    def __call__(
        self, site: str, dim: int, *, bias: bool = True, recurrent: bool = False, stepwise: bool = False
    ) -> Norm:
        """The norm at `site` over `dim` features.

        Args:
            bias: whether the norm may have a bias there.
            recurrent: it belongs to a recurrent cell: the gain is the one published for such cells.
            stepwise: it is called one time step at a time: statistics cannot wait for later ones.
        """
        name = self.name_at(site)
        cls, takes = norm_class(name), norm_options(name)
        options: dict[str, Any] = {key: value for key, value in self.options.items() if key in takes}
        if "max_steps" in takes:
            options.setdefault("max_steps", self.max_steps)
        if stepwise and "pool" in takes:
            options["pool"] = cls.stepwise_pool(options.get("pool"))
        asked = self._site(site).gain
        gain = (cls.recurrent_gain if recurrent else 1.0) if asked is None else asked
        norm = build_norm(name, dim, causal=self.causal, bias=bias, gain=gain, **options)
        if asked is not None and norm.weight is None:
            raise InputError(
                f"model.sites.{site}.gain is set, but {name} has no gain there"
                f"{'; set model.norm_options.affine=true, or the gain' if 'affine' in takes else '; set it'} to null"
            )
        norm.site = site
        return norm

    def _site(self, site: str) -> SiteConfig:
        return getattr(self.sites, site)
