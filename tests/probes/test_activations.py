"""The activation probe reports what passed through each site and changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normlab.config import InputError, available_norms
from normlab.norms import build_norm
from normlab.probes import activations as probe_module
from normlab.probes.activations import SAMPLE_SIZE, SiteActivations


class Model(nn.Module):
    """A norm called once on a sequence, with dropout, and one called once per time step through `normalize`."""

    def __init__(self, norm: str, dim: int = 16) -> None:
        super().__init__()
        self.outer = build_norm(norm, dim)
        self.inner = build_norm(norm, dim)
        self.linear = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x_BTF: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
        x_BTF = self.dropout(self.linear(self.outer(x_BTF, mask_BT)))
        columns, carry = [], None
        for time in range(x_BTF.shape[1]):
            keep = None if mask_BT is None else mask_BT[:, time : time + 1]
            y, _, carry = self.inner.normalize(x_BTF[:, time : time + 1], keep, time, carry)
            columns.append(y)
        y = self.dropout(torch.cat(columns, 1))
        return (y if mask_BT is None else y[mask_BT]).square().mean()


def mask_of(lengths: list[int], longest: int) -> torch.Tensor:
    return torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)


@pytest.mark.parametrize("norm", available_norms())
@pytest.mark.parametrize("padded", [False, True])
def test_losses_gradients_and_random_state_are_bit_identical(
    norm: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small, so that the probe has to draw random numbers of its own.
    monkeypatch.setattr(probe_module, "SAMPLE_SIZE", 100)
    mask_BT = mask_of([9, 7, 4, 9], 9) if padded else None

    def train(probe: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
        torch.manual_seed(0)
        model = Model(norm)
        x_BTF = torch.randn(4, 9, 16)
        results: list[torch.Tensor] = []
        for _ in range(3):
            if probe:
                with SiteActivations(model) as activations:
                    loss = model(x_BTF, mask_BT)
                assert len(activations.summary()) == 2 * 7
            else:
                loss = model(x_BTF, mask_BT)
            model.zero_grad()
            loss.backward()
            results += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        return [*results, *model.state_dict().values()], torch.get_rng_state()

    plain, plain_state = train(False)
    probed, probed_state = train(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, probed, strict=True))
    assert torch.equal(plain_state, probed_state)


def test_statistics_are_those_of_the_valid_outputs() -> None:
    torch.manual_seed(0)
    x_BTF = torch.randn(5, 11, 8) * 3 + 1
    mask_BT = mask_of([11, 2, 7, 5, 1], 11)
    x_BTF[~mask_BT] = torch.nan
    norm = build_norm("none", 8)
    with SiteActivations(norm) as activations:
        for time in range(11):
            norm.normalize(x_BTF[:, time : time + 1], mask_BT[:, time : time + 1])
    summary = activations.summary()
    valid = x_BTF[mask_BT].double().flatten()
    expected = {
        "mean": valid.mean(),
        "std": valid.std(correction=0),
        "p15": valid.quantile(0.15),
        "p50": valid.quantile(0.50),
        "p85": valid.quantile(0.85),
        "saturated": (valid.abs() > 2).double().mean(),
        "active": (valid > 0).double().mean(),
    }
    assert set(summary) == {f"activations/norm/{name}" for name in expected}
    for name, value in expected.items():
        assert summary[f"activations/norm/{name}"] == pytest.approx(value.item(), abs=1e-5), name


def test_large_streams_are_sampled_evenly_and_bounded() -> None:
    norm = build_norm("none", 64)
    # The level rises from call to call: a sample that prefers early or late calls shows.
    with SiteActivations(norm) as activations:
        for level in range(200):
            norm(torch.linspace(0, 1, 64).expand(1, 20, 64) + level)
    (site,) = activations._sites.values()
    assert SAMPLE_SIZE / 3 < site._sample_size <= SAMPLE_SIZE
    for percentile in (15, 50, 85):
        assert activations.summary()[f"activations/norm/p{percentile}"] == pytest.approx(2 * percentile, abs=3)
    with SiteActivations(norm) as once:
        norm(torch.randn(4, 20_000, 64))
    (site,) = once._sites.values()
    assert SAMPLE_SIZE / 3 < site._sample_size <= SAMPLE_SIZE


def test_norms_are_left_as_they_were() -> None:
    model = Model("ln")
    before = [dict(vars(module)) for module in model.modules()]
    activations = SiteActivations(model)
    with pytest.raises(InputError), activations:
        build_norm("no such norm", 8)
    with activations:
        assert "normalize" in vars(model.outer)
    assert all(list(vars(module)) == list(old) for module, old in zip(model.modules(), before, strict=True))
    assert activations.summary() == {}
