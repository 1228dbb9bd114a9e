"""`recompute_statistics`: exact, per step, masked, count-weighted, and nothing else is touched.

Shape suffixes: B batch, T time, F features.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from variants import F, build, sample

import normlab
from normlab.config import (
    InputError,
    LSTMConfig,
    LSTMSites,
    NormOptions,
    SiteConfig,
    TransformerConfig,
    available_norms,
)
from normlab.data.batches import Batch
from normlab.models.lstm_model import LSTMModel
from normlab.models.transformer import TransformerModel
from normlab.norms import norm_class
from normlab.norms.base import Norm
from normlab.norms.batch_statistics import BatchStatisticsNorm
from normlab.norms.recompute import recompute_statistics, stores_statistics

STORING = [name for name in available_norms() if norm_class(name).needs_statistics]
SIZES = ((4, 5), (2, 3), (7, 6), (1, 6))


def batches() -> list[tuple[Tensor, Tensor]]:
    """Of unlike sizes, masked; the last is a single row."""
    found = []
    for seed, (rows, columns) in enumerate(SIZES):
        lengths = torch.randint(1, columns + 1, (rows,), generator=torch.Generator().manual_seed(seed))
        mask = torch.arange(columns) < lengths.unsqueeze(1)
        x = sample(seed, rows, columns, F) * (seed + 1) + seed
        found.append((x.masked_fill(~mask.unsqueeze(-1), torch.nan), mask))
    return found


def moments_of(entries: list[Tensor], centered: bool) -> tuple[Tensor, Tensor]:
    values = torch.stack(entries)
    return values.mean(0), values.var(0, correction=0) if centered else values.square().mean(0)


def stored(norm: BatchStatisticsNorm) -> tuple[Tensor | None, Tensor]:
    mean = norm.running_mean
    return None if mean is None else mean.view(norm.sets, -1), norm.running_var.view(norm.sets, -1)


@pytest.mark.parametrize("name", STORING)
@pytest.mark.parametrize(
    "options", [{}, {"pool": "batch_time"}, {"pool": "prefix"}, {"ghost_rows": 2}, {"max_steps": 3}]
)
def test_it_is_exact(name: str, options: dict[str, Any]) -> None:
    taken = normlab.norms.norm_options(name)
    options = {key: value for key, value in options.items() if key in taken}
    # Rows left alone at a time step are no statistic to normalize with, but part of the data all the same.
    works = [(x, mask) for x, mask in batches() if len(x) > 1]
    norm: Any = build(name, options)
    before = copy.deepcopy(norm)
    gaps = recompute_statistics(norm, works)
    mean, var = stored(norm)
    counted = 0
    for slot in range(norm.sets):
        steps = [slot] if norm.per_step else range(6)
        if norm.per_step and norm.beyond == "pooled" and slot == norm.max_steps:
            steps = range(slot, 6)
        entries = [
            row[t]
            for x, mask in works
            for row in x.unbind(0)
            for t in steps
            if t < len(row) and not row[t].isnan().any()
        ]
        if len(entries) < 2:
            old_mean, old_var = stored(before)
            assert mean is None or mean[slot].equal(old_mean[slot])
            assert var[slot].equal(old_var[slot])
            continue
        counted += len(entries)
        exact_mean, exact_var = moments_of(entries, norm.centered)
        torch.testing.assert_close(var[slot], exact_var, rtol=1e-10, atol=1e-12)
        if mean is not None:
            torch.testing.assert_close(mean[slot], exact_mean, rtol=1e-10, atol=1e-12)
    assert set(gaps) == {""}
    assert gaps[""].entries == counted
    again = recompute_statistics(norm, works)[""]
    assert again.mean < 1e-7
    assert again.std < 1e-7


def test_the_gap_is_what_it_says() -> None:
    norm: Any = normlab.build_norm("bn", F, unbiased=True).double()
    x = sample(0, 50, 3, F) * 2 + 1
    gap = recompute_statistics(norm, [x])[""]
    entries = x.flatten(0, 1)
    sigma = (entries.var(0) + norm.eps).sqrt()
    assert gap.mean == pytest.approx(float((entries.mean(0).abs() / sigma).mean()))
    assert gap.std == pytest.approx(float(((1 + norm.eps) ** 0.5 / sigma - 1).abs().mean()))
    assert gap.entries == 150
    torch.testing.assert_close(norm.running_var, entries.var(0))


def test_the_gap_of_a_time_step_never_seen_is_to_what_stood_in_for_it() -> None:
    x = sample(0, 400, 6, F)
    for seen in (6, 3):  # time steps do not differ, so neither does the gap
        norm: Any = normlab.build_norm("bn_step", F, max_steps=8).double()
        norm(x[:200, :seen])
        gap = recompute_statistics(norm, [x[200:]])[""]
        assert gap.mean < 0.2
        assert gap.std < 0.2
        assert gap.entries == 1200


def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    found: dict[str, nn.Module] = {}
    for name in STORING:
        lstm = LSTMConfig(norm=name, width=8, layers=2, dropout=0.3, state_noise=0.5)
        found[f"lstm {name}"] = LSTMModel(lstm, 11, classes=None, length=6).double()
        both = LSTMConfig(norm=name, width=8, layers=2, dropout=0.3, bidirectional=True)
        found[f"lstm both ways {name}"] = LSTMModel(both, 11, classes=3, length=6).double()
        for cell in ("none", "ln"):
            sites = LSTMSites(cell=SiteConfig(norm=cell))
            mixed = LSTMConfig(norm=name, sites=sites, width=8)
            found[f"lstm, {cell} at the cell, {name}"] = LSTMModel(mixed, 11, classes=None, length=6).double()
        transformer = TransformerConfig(norm=name, width=16, layers=2, dropout=0.3, norm_options=NormOptions())
        found[f"transformer {name}"] = TransformerModel(transformer, 11, classes=None, length=6).double()
    return found


MODELS = models()


def tokens() -> list[Batch]:
    found = []
    for seed, (rows, columns) in enumerate(SIZES[:3]):
        generator = torch.Generator().manual_seed(seed)
        mask = torch.arange(columns) < torch.randint(1, columns + 1, (rows, 1), generator=generator)
        found.append(Batch(torch.randint(11, (rows, columns), generator=generator), mask))
    return found


@pytest.mark.parametrize("key", MODELS)
def test_every_site_of_a_model_gets_the_moments_of_what_it_sees(key: str) -> None:
    model = copy.deepcopy(MODELS[key])
    for seed in range(2):
        torch.manual_seed(seed)
        model.train()(torch.randint(11, (4, 6)))
    twin = copy.deepcopy(model)
    gaps = recompute_statistics(model, tokens())

    # By hand: norms in training mode but never storing, the rest in evaluation; every input of every norm is kept.
    seen: dict[str, dict[int, list[Tensor]]] = {}
    for name, norm in twin.eval().named_modules():
        if isinstance(norm, BatchStatisticsNorm):
            seen[name] = {}
            object.__setattr__(norm, "normalize", keeping(norm, norm.normalize, seen[name]))
            object.__setattr__(norm, "store", lambda *_: None)
            norm.train()
    for batch in tokens():
        twin(batch.tokens_BT, batch.mask_BT)
    assert set(gaps) == set(seen)
    assert all(gap.entries > 0 for gap in gaps.values())
    for name, norm in model.named_modules():
        if isinstance(norm, BatchStatisticsNorm):
            mean, var = stored(norm)
            for slot, entries in seen[name].items():
                if len(entries) > 1:
                    exact_mean, exact_var = moments_of(entries, norm.centered)
                    torch.testing.assert_close(var[slot], exact_var)
                    assert mean is None or torch.allclose(mean[slot], exact_mean)


def keeping(norm: Any, normalize: Any, seen: dict[int, list[Tensor]]) -> Any:
    def kept(x: Tensor, mask: Tensor | None = None, step: Any = 0, carry: Any = None) -> Any:
        for b, row in enumerate(x.detach().unbind(0)):
            for t, entry in enumerate(row):
                if mask is None or mask[b, t]:
                    time = step + t if isinstance(step, int) else int(step[b]) + t
                    seen.setdefault(min(time, norm.max_steps) if norm.per_step else 0, []).append(entry)
        return normalize(x, mask, step, carry)

    return kept


@pytest.mark.parametrize("key", MODELS)
def test_everything_else_is_as_it_was_bit_by_bit(key: str) -> None:
    model = copy.deepcopy(MODELS[key])
    model(torch.randint(11, (4, 6))).logits.square().mean().backward()
    bystander = nn.BatchNorm1d(3)
    model.add_module("bystander", bystander.eval())
    model.train()
    next(iter(model.children())).eval()  # a mixture of modes
    modes = [module.training for module in model.modules()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    recompute_statistics(model, tokens(), lambda batch: (torch.rand(3), model(*batch.model_inputs())))
    assert modes == [module.training for module in model.modules()]
    assert torch.get_rng_state().equal(random)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert (grad is None) == (parameter.grad is None)
        assert grad is None or grad.equal(parameter.grad)
    changed = {name for name, value in model.state_dict().items() if not value.equal(state[name])}
    assert changed
    assert {name.rpartition(".")[2] for name in changed} <= {"running_mean", "running_var", "seen"}
    assert not any(norm.collected for norm in model.modules() if isinstance(norm, BatchStatisticsNorm))


def test_a_batch_that_fails_leaves_all_as_it_was() -> None:
    model = copy.deepcopy(MODELS["lstm bn_step"]).train()
    state = copy.deepcopy(model.state_dict())

    def one_good_one() -> Any:
        yield tokens()[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recompute_statistics(model, one_good_one())
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    assert model.training
    model(torch.randint(11, (4, 6)))
    assert not all(value.equal(state[name]) for name, value in model.state_dict().items())


def test_batches_of_every_kind() -> None:
    results = []
    x, mask = batches()[0]
    x = x.nan_to_num()
    for batch in ((x, mask), [x, mask], {"x_BTF": x, "mask_BT": mask}):
        norm: Any = build("bn", {})
        recompute_statistics(norm, [batch])
        results.append(norm.running_mean)
    norm = build("bn", {})
    recompute_statistics(norm, [5], lambda number: norm(x[:number], mask))
    results.append(norm.running_mean)
    assert all(result.equal(results[0]) for result in results)
    norm = build("bn", {})
    recompute_statistics(norm, [x])
    assert not norm.running_mean.equal(results[0])


def test_nothing_to_do_and_nothing_to_do_it_with() -> None:
    def unread() -> Any:
        raise AssertionError
        yield

    assert recompute_statistics(nn.Linear(2, 2), unread()) == {}
    assert recompute_statistics(build("ln", {}), unread()) == {}
    with pytest.raises(InputError, match="got no batches"):
        recompute_statistics(build("bn", {}), [])


def test_what_stores_statistics() -> None:
    for name in available_norms():
        norm: Norm = normlab.build_norm(name, F)
        assert stores_statistics(nn.Sequential(norm)) == norm.needs_statistics
