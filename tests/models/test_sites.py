"""The factory of norms."""

from __future__ import annotations

import pytest

from normlab.config import InputError, LSTMSites, NormOptions, SiteConfig
from normlab.models.sites import NormFactory


def test_a_gain_without_an_affine_map_is_refused() -> None:
    sites = LSTMSites(cell=SiteConfig(gain=0.5))
    factory = NormFactory("ln", sites, NormOptions(affine=False), causal=True, max_steps=4)
    with pytest.raises(InputError, match=r"model\.sites\.cell\.gain is set"):
        factory("cell", 8)
    assert factory("hidden_to_hidden", 8).weight is None


def test_an_option_that_no_norm_in_use_takes_is_refused() -> None:
    with pytest.raises(InputError, match=r"model\.norm_options\.groups is set, but no norm in use \(ln\) takes it"):
        NormFactory("ln", LSTMSites(), NormOptions(groups=2), causal=True, max_steps=4)
    sites = LSTMSites(cell=SiteConfig(norm="gn"))
    assert NormFactory("ln", sites, NormOptions(groups=2), causal=True, max_steps=4)("cell", 8).name == "gn"
