"""Every norm against torch's own in float64, and against plain formulas over ragged rows: the truth about masks.

A formula takes rows of unequal length, entry by entry, and knows no padding. Outputs, all gradients and stored values
must be the same for a padded batch, whatever stands in the padding.

Shape suffixes: B batch, T time, F features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from variants import LENGTHS, MASK, B, F, T, build, every_variant, sample

from normlab.config import available_norms
from normlab.norms import build_norm
from normlab.norms.base import Norm

Rows = list[Tensor]

# Torch's own.

TORCHS: dict[str, tuple[str, dict[str, Any], Callable[[Tensor, Any, Any], Tensor]]] = {
    "LayerNorm": ("ln", {}, lambda x, w, b: nn.functional.layer_norm(x, (F,), w, b, 1e-5)),
    "LayerNorm, not affine": ("ln", {"affine": False}, lambda x, w, b: nn.LayerNorm(F, elementwise_affine=False)(x)),
    "RMSNorm": ("rms", {}, lambda x, w, b: nn.functional.rms_norm(x, (F,), w, 1e-5)),
    "GroupNorm of tokens": (
        "gn",
        {"groups": 4},
        lambda x, w, b: nn.functional.group_norm(x.reshape(-1, F), 4, w, b, 1e-5).view_as(x),
    ),
    "GroupNorm": (
        "gn",
        {"groups": 4, "pool": "time"},
        lambda x, w, b: nn.functional.group_norm(x.mT, 4, w, b, 1e-5).mT,
    ),
    "GroupNorm, one group": ("ln", {}, lambda x, w, b: nn.functional.group_norm(x.reshape(-1, F), 1, w, b).view_as(x)),
    "GroupNorm, groups of one": (
        "inorm",
        {"pool": "time"},
        lambda x, w, b: nn.functional.group_norm(x.mT, F, w, b, 1e-5).mT,
    ),
    "InstanceNorm1d": (
        "inorm",
        {"pool": "time"},
        lambda x, w, b: nn.functional.instance_norm(x.mT, weight=w, bias=b, eps=1e-5).mT,
    ),
    "BatchNorm1d": (
        "bn",
        {"pool": "batch_time"},
        lambda x, w, b: nn.functional.batch_norm(x.mT, None, None, w, b, True, eps=1e-5).mT,
    ),
    "BatchNorm1d of each column": (
        "bn_step",
        {},
        lambda x, w, b: torch.stack(
            [nn.functional.batch_norm(column, None, None, w, b, True, eps=1e-5) for column in x.unbind(1)], 1
        ),
    ),
    "LocalResponseNorm": (
        "lrn",
        {"alpha": 0.7},
        lambda x, w, b: nn.LocalResponseNorm(5, alpha=0.7)(x.flatten(0, 1).unsqueeze(-1)).view_as(x),
    ),
    "LocalResponseNorm, even window": (
        "lrn",
        {"alpha": 0.7, "window": 4, "beta": 0.5, "k": 2.0},
        lambda x, w, b: nn.LocalResponseNorm(4, 0.7, 0.5, 2.0)(x.flatten(0, 1).unsqueeze(-1)).view_as(x),
    ),
}


def assert_same(mine: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "options", "theirs"), TORCHS.values(), ids=TORCHS)
def test_equals_torch(name: str, options: dict[str, Any], theirs: Callable[..., Tensor]) -> None:
    norm = build(name, options)
    x, target = sample().requires_grad_(), sample(3)

    def with_gradients(y: Tensor) -> list[Tensor]:
        return [y, *torch.autograd.grad((y * target).sum(), [x, *norm.parameters()])]

    assert_same(with_gradients(norm(x)), with_gradients(theirs(x, norm.weight, norm.bias)))


def test_equals_batchnorm1d_in_training_evaluation_and_buffers() -> None:
    mine = build_norm("bn", F, pool="batch_time", unbiased=True, momentum=0.3).double()
    theirs = nn.BatchNorm1d(F, momentum=0.3).double()
    theirs.load_state_dict(mine.state_dict(), strict=False)
    for seed, shape in enumerate([(4, 5, F), (2, 1, F), (3, 7, F)]):
        results = []
        for norm, turn in ((mine, lambda x: x), (theirs, lambda x: x.mT)):
            x = sample(seed, *shape).requires_grad_()
            y = turn(norm(turn(x)))
            results.append([y, *torch.autograd.grad((y * sample(9, *shape)).sum(), [x, *norm.parameters()])])
        assert_same(*results)
        assert_same(
            [mine.get_buffer("running_mean"), mine.get_buffer("running_var")], [theirs.running_mean, theirs.running_var]
        )
    x = sample(4)
    torch.testing.assert_close(mine.eval()(x), theirs.eval()(x.mT).mT)


# Plain formulas over ragged rows.


def shared(norm: Any, rows: Rows, b: int, t: int) -> Rows:
    """The entries that share a training statistic with entry (b, t) in a batch norm, each of shape F."""
    pool = "batch" if norm.per_step else norm.pool
    last = {"batch": t, "prefix": t, "batch_time": T - 1}[pool]
    first = t if pool == "batch" else 0
    batches = [rows]
    if norm.ghost_rows is not None:
        ghost = min(b // norm.ghost_rows, len(rows) // norm.ghost_rows - 1)
        end = len(rows) if ghost == len(rows) // norm.ghost_rows - 1 else (ghost + 1) * norm.ghost_rows
        batches = [rows[ghost * norm.ghost_rows : end]]
    if norm.memory_batches:
        batches += norm.history[-norm.memory_batches :]
        if norm.per_step and t >= norm.max_steps - (norm.beyond == "last"):
            first, last = norm.max_steps - (norm.beyond == "last"), T - 1
    return [row[s] for batch in batches for row in batch for s in range(first, min(last + 1, len(row)))]


def stored(norm: Any, t: int) -> tuple[Tensor, Tensor]:
    """Stored mean and mean square or variance for time step t."""
    if not norm.per_step:
        return getattr(norm, "running_mean", None), norm.running_var
    slot = min(t, norm.max_steps - (norm.beyond == "last"))
    return norm.running_mean[slot], norm.running_var[slot]


def scaled(norm: Any, x: Tensor) -> Tensor:
    if getattr(norm, "group_scaling", None) is None:
        return x
    return torch.cat([part / (part.square().mean() + norm.eps).sqrt() for part in x.chunk(norm.group_scaling)])


def batch_norm(norm: Any, rows: Rows, b: int, t: int, *, center: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """The entry, and the mean and variance to use for it."""
    entries = torch.stack([scaled(norm, x) for x in shared(norm, rows, b, t)])
    x = scaled(norm, rows[b][t])
    if len(entries) < 2:
        mean, var = stored(norm, t)
        return x, mean if center else torch.zeros_like(x), var
    mean = entries.mean(0) if center else torch.zeros_like(x)
    return x, mean, (entries - mean).square().mean(0)


def standardized(norm: Any, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return (x - mean) / (var + norm.eps).sqrt()


def renormalized(norm: Any, rows: Rows, b: int, t: int) -> Tensor:
    x, mean, var = batch_norm(norm, rows, b, t)
    opened = min(1.0, max(0.0, (int(norm.updates) - norm.warmup) / max(1, norm.ramp)))
    r_max, d_max = 1 + (norm.r_max - 1) * opened, norm.d_max * opened
    sigma, running = (var + norm.eps).sqrt(), (norm.running_var + norm.eps).sqrt()
    r = (sigma / running).clamp(1 / r_max, r_max).detach()
    d = ((mean - norm.running_mean) / running).clamp(-d_max, d_max).detach()
    return (x - mean) / sigma * r + d


def power(norm: Any, rows: Rows, b: int, t: int) -> Tensor:
    x, _, square = batch_norm(norm, rows, b, t, center=False)
    psi = ((square.detach() if norm.updates < norm.warmup else norm.running_var) + norm.eps).sqrt()
    hat, nu = x / psi, norm.nu.clone()
    hat.register_hook(lambda grad: grad - nu * hat.detach())
    return hat


def instance(norm: Any, rows: Rows, b: int, t: int) -> Tensor:
    seen = rows[b] if norm.pool == "time" else rows[b][: t + 1]
    return standardized(norm, rows[b][t], seen.mean(0), seen.var(0, correction=0))


def grouped(norm: Any, rows: Rows, b: int, t: int) -> Tensor:
    seen = {"token": rows[b][t : t + 1], "prefix": rows[b][: t + 1], "time": rows[b]}[norm.pool]
    parts = zip(rows[b][t].chunk(norm.groups), seen.chunk(norm.groups, 1), strict=True)
    return torch.cat([standardized(norm, x, part.mean(), part.var(correction=0)) for x, part in parts])


def local_response(norm: Any, rows: Rows, b: int, t: int) -> Tensor:
    x = rows[b][t]
    near = [x[max(0, f - 2) : f + 3].square().sum() / norm.window for f in range(F)]
    return x / (norm.k + norm.alpha * torch.stack(near)) ** norm.beta


FORMULAS: dict[str, Callable[[Any, Rows, int, int], Tensor]] = {
    "none": lambda norm, rows, b, t: rows[b][t],
    "ln": lambda norm, rows, b, t: standardized(norm, (x := rows[b][t]), x.mean(), x.var(correction=0)),
    "rms": lambda norm, rows, b, t: (x := rows[b][t]) / (x.square().mean() + norm.eps).sqrt(),
    "scale": lambda norm, rows, b, t: (x := rows[b][t]) / (x.square().sum() + norm.eps).sqrt(),
    "dyt": lambda norm, rows, b, t: torch.tanh(norm.alpha * rows[b][t]),
    "derf": lambda norm, rows, b, t: torch.erf(norm.alpha * rows[b][t] + norm.shift),
    "lrn": local_response,
    "gn": grouped,
    "inorm": instance,
    "bn": lambda norm, rows, b, t: standardized(norm, *batch_norm(norm, rows, b, t)),
    "bn_step": lambda norm, rows, b, t: standardized(norm, *batch_norm(norm, rows, b, t)),
    "rbn": lambda norm, rows, b, t: standardized(norm, *batch_norm(norm, rows, b, t)),
    "pnv": lambda norm, rows, b, t: standardized(norm, *batch_norm(norm, rows, b, t, center=False)),
    "brn": renormalized,
    "pn": power,
}


def after_training(norm: Any, rows: Rows) -> list[Tensor]:
    """Stored values after one training batch."""
    if not norm.needs_statistics:
        return []
    center = getattr(norm, "running_mean", None) is not None
    mean, var = (getattr(norm, "running_mean", None), norm.running_var.clone())
    mean = mean.clone() if center else None
    slots = range(norm.max_steps + (norm.beyond == "pooled")) if norm.per_step else [0]
    steps = [[row[t] for row in rows if len(row) > t] for t in range(T)]
    for slot in slots:
        if norm.per_step:
            tail = norm.beyond == "pooled" and slot == norm.max_steps
            own = [
                entries for t, entries in enumerate(steps) if (t == slot or (tail and t > slot)) and len(entries) > 1
            ]
        else:
            own = steps
        entries = [scaled(norm, entry) for step in own for entry in step]
        if len(entries) < 2:
            continue
        rate = norm.momentum
        if norm.per_step:
            rate = norm.momentum * min(1, len(entries) / len(steps[0])) if norm.seen[slot] else 1.0
        index = slot if norm.per_step else slice(None)
        values = torch.stack(entries).detach()
        if center:
            mean[index] += rate * (values.mean(0) - mean[index])
        new = values.var(0, correction=0) if center else values.square().mean(0)
        var[index] += rate * (new - var[index])
    return [value for value in (mean, var) if value is not None]


def results(norm: Norm, x: Tensor, valid: Tensor) -> list[Tensor]:
    """Outputs, and gradients of x and all parameters."""
    inputs = [x, *norm.parameters()]
    grads = torch.autograd.grad((valid * sample(3)[MASK]).sum(), inputs, allow_unused=True)
    return [valid.detach(), grads[0][MASK], *(grad for grad in grads[1:] if grad is not None)]


def test_every_norm_has_a_formula() -> None:
    assert set(FORMULAS) == set(available_norms())


@every_variant
@pytest.mark.parametrize("pad", [0.0, 1e3, float("nan"), float("inf")])
def test_a_padded_batch_equals_the_formula_on_ragged_rows(name: str, options: dict[str, Any], pad: float) -> None:
    # Over one or two entries a variance is near 0, and a small eps magnifies rounding by 1 / sqrt(eps).
    norm = build(name, options, eps=1e-3)
    if hasattr(norm, "nu"):
        nn.init.normal_(norm.get_buffer("nu"))
    x = sample().masked_fill(~MASK.unsqueeze(-1), pad).requires_grad_()
    rows = [x[b, :length] for b, length in enumerate(LENGTHS)]
    hats = [FORMULAS[name](norm, rows, b, t) for b, length in enumerate(LENGTHS) for t in range(length)]
    expected = torch.stack(hats)
    expected = expected if norm.weight is None else expected * norm.weight
    expected = expected if norm.bias is None else expected + norm.bias
    reference, after = results(norm, x, expected), after_training(norm, rows)
    # What the padding holds is cut off before the formula; with NaN the comparison would fail if it were not.
    mine = results(norm, x, norm(x, MASK)[MASK])
    assert_same(mine, reference)
    names = [key for key in ("running_mean", "running_var") if getattr(norm, key, None) is not None]
    buffers = [norm.get_buffer(key) for key in names]
    limit = norm.max_steps + (norm.beyond == "pooled") if norm.per_step else None
    assert_same([buffer[:limit] for buffer in buffers], [value[:limit] for value in after])


@every_variant
def test_evaluation_of_a_padded_batch_equals_its_rows(name: str, options: dict[str, Any]) -> None:
    norm = build(name, options).eval()
    x = sample().masked_fill(~MASK.unsqueeze(-1), float("nan")).requires_grad_()
    alone = torch.cat([norm(x[row : row + 1, :length])[0] for row, length in enumerate(LENGTHS.tolist())])
    assert_same(results(norm, x, norm(x, MASK)[MASK]), results(norm, x, alone))


@every_variant
def test_a_batch_of_nothing_but_padding_changes_nothing(name: str, options: dict[str, Any]) -> None:
    norm = build(name, options)
    before = copy.deepcopy(norm.state_dict())
    x = sample().requires_grad_()
    y = norm(x, torch.zeros(B, T, dtype=torch.bool))
    if not norm.identity:
        assert y.isfinite().all()
    counters = ("updates", "recent_mean", "recent_var", "recent_count")
    assert all(torch.equal(before[k], v) for k, v in norm.state_dict().items() if k not in counters)


def test_power_norms_running_product_follows_the_paper() -> None:
    norm: Any = build("pn", {"warmup": 0, "pool": "batch_time"})
    nu = sample(7, F)
    norm.nu.copy_(nu)
    psi = (norm.running_var + norm.eps).sqrt()
    x = sample().requires_grad_()
    target = sample(3)
    (norm(x, MASK) * target)[MASK].sum().backward()
    assert norm.nu.equal(nu)
    norm(sample(8))  # the next sequence takes it in
    hat, grad = (x.detach() / psi)[MASK], (target * norm.weight.detach())[MASK]
    count = MASK.sum()
    product, square = (grad * hat).sum(0) / count, hat.square().sum(0) / count
    torch.testing.assert_close(norm.nu, nu * (1 - 0.1 * square) + 0.1 * product)


def test_regularized_batch_norm_gives_the_published_penalty() -> None:
    from normlab.norms.base import GatheredPenalties

    norm: Any = build("rbn", {"pool": "batch_time", "penalty_mean": 0.3, "penalty_var": 0.7})
    bystander = build("ln", {})
    model = nn.ModuleList([norm, bystander])
    x = sample().requires_grad_()
    entries = x[MASK]
    expected = 0.3 * (norm.running_mean - entries.mean(0)).square().sum()
    expected = expected + 0.7 * (norm.running_var - entries.var(0, correction=0)).abs().sum()
    with GatheredPenalties(model) as gathered:
        bystander(norm(x, MASK))
    total = gathered.total()
    assert total is not None
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(torch.autograd.grad(total, x), torch.autograd.grad(expected, x))
    norm(x, MASK)
    assert norm.penalties is None
    with GatheredPenalties(model.eval()) as gathered:
        norm(x, MASK)
    assert gathered.total() is None


def test_power_norm_in_a_recurrence_moves_its_product_once_a_sequence() -> None:
    whole: Any = build("pn", {"warmup": 0})
    parts: Any = copy.deepcopy(whole)
    x, target = sample().requires_grad_(), sample(3)
    (whole(x) * target).sum().backward()
    y = torch.cat([parts.normalize(column, None, t)[0] for t, column in enumerate(x.split(1, 1))], 1)
    (y * target).sum().backward()
    torch.testing.assert_close(parts.gathered, whole.gathered)
    for norm in (whole, parts):
        norm(sample(8))
    torch.testing.assert_close(parts.nu, whole.nu)
    assert whole.nu.abs().max() > 0
