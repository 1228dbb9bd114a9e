"""Arguments that are true or false by mathematics, computed on random float64 tensors: one function per statement.

`checks()` runs them all (a second); `make exact` writes `results/exact.json`, and `tests/test_exact.py` computes them
again. A statement that bounds a value from below says what an argument leaves out, or that a check of equality could
fail.

Shape suffixes: B batch, T time, F features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

from normlab.norms import build_norm
from normlab.norms.base import Norm
from normlab.records.checks import ExactCheck

__all__ = ["CHECKS", "checks"]

CHECKS: dict[str, Callable[[], ExactCheck]] = {}
EPS = 1e-12
"""Of all norms here: what they add to the variance must not hide in the bounds."""
ROUNDING = 1e-9
BATCH, TIME, FEATURES = 8, 5, 6


def _check(function: Callable[[], ExactCheck]) -> Callable[[], ExactCheck]:
    CHECKS[function.__name__] = lambda: dataclasses.replace(function(), name=function.__name__)
    return function


def checks() -> list[ExactCheck]:
    """All of them, in the order of this file."""
    return [check() for check in CHECKS.values()]


def _at_most(statement: str, value: float, bound: float) -> ExactCheck:
    return ExactCheck("", statement, value, f"<= {bound:g}", value <= bound)


def _at_least(statement: str, value: float, bound: float) -> ExactCheck:
    return ExactCheck("", statement, value, f">= {bound:g}", value >= bound)


def _correlated() -> Tensor:
    """B x T x F: features of unlike means and scales, half of the variance of each from a part that all share."""
    parts = _normal(BATCH, TIME, FEATURES + 1)
    return (parts[..., 1:] + parts[..., :1]) * torch.linspace(0.5, 3, FEATURES) + torch.linspace(-2, 4, FEATURES)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _build(name: str, dim: int, **options: object) -> Norm:
    """In training, without gain and bias unless `options` say otherwise."""
    return build_norm(name, dim, **{"affine": False, "eps": EPS, **options}).double().train()


def _norm(name: str, x_BTF: Tensor, **options: object) -> Tensor:
    return _build(name, x_BTF.shape[-1], **options)(x_BTF)


def _standardized(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The definition, in place of any layer."""
    mean = x.mean(dims, keepdim=True)
    return (x - mean) / ((x - mean) ** 2).mean(dims, keepdim=True).add(EPS).sqrt()


def _difference(a: Tensor, b: Tensor | float) -> float:
    return float((a - b).detach().abs().max())


def _correlations(x_BTF: Tensor) -> Tensor:
    """Of all pairs of features, over examples and time."""
    return torch.corrcoef(x_BTF.flatten(0, 1).t())[tuple(torch.triu_indices(FEATURES, FEATURES, 1))]


# A1


@_check
def bn_mean_and_variance() -> ExactCheck:
    x_BTF = _correlated()
    worst = 0.0
    for pool, dims in (("batch", (0,)), ("batch_time", (0, 1))):
        y_BTF = _norm("bn", x_BTF, pool=pool)
        worst = max(worst, _difference(y_BTF.mean(dims), 0.0), _difference(y_BTF.var(dims, correction=0), 1.0))
    statement = (
        "largest distance of a feature's mean from 0 and of its variance from 1 after bn, over the examples (of each "
        "time step, or of all)"
    )
    return _at_most(statement, worst, ROUNDING)


@_check
def bn_keeps_correlations() -> ExactCheck:
    x_BTF = _correlated()
    change = _difference(_correlations(_norm("bn", x_BTF, pool="batch_time")), _correlations(x_BTF))
    return _at_most("largest change by bn of the correlation of two features", change, ROUNDING)


@_check
def bn_output_is_correlated() -> ExactCheck:
    after = _difference(_correlations(_norm("bn", _correlated(), pool="batch_time")), 0.0)
    statement = "largest correlation of two features after bn, of features that share half of their variance"
    return _at_least(statement, after, 0.3)


# A2


@_check
def affine_restores_the_input() -> ExactCheck:
    x_BTF = _correlated()
    norm = _build("bn", FEATURES, affine=True, pool="batch_time")
    assert norm.weight is not None
    assert norm.bias is not None
    with torch.no_grad():
        norm.weight.copy_(x_BTF.std((0, 1), correction=0))
        norm.bias.copy_(x_BTF.mean((0, 1)))
    statement = "largest distance of bn's output from its input, with gain = standard deviation and bias = mean"
    return _at_most(statement, _difference(norm(x_BTF), x_BTF), ROUNDING)


@_check
def bn_without_affine_loses_mean_and_scale() -> ExactCheck:
    x_BTF = _correlated()
    scale_F, shift_F = torch.linspace(0.1, 10, FEATURES), torch.linspace(-5, 5, FEATURES)
    moved_BTF = x_BTF * scale_F + shift_F
    change = _difference(_norm("bn", moved_BTF, pool="batch_time"), _norm("bn", x_BTF, pool="batch_time"))
    statement = (
        "largest change of bn's output, without gain and bias, when each feature of the input is scaled by 0.1 to 10 "
        "and shifted by -5 to 5: it does not say which input it was"
    )
    return _at_most(statement, change, ROUNDING)


# A3


def _active_shares(x_BTF: Tensor) -> Tensor:
    """Share of entries that a ReLU lets pass, by feature."""
    return (x_BTF > 0).double().mean((0, 1))


def _mostly_positive() -> Tensor:
    return _normal(2000, 1, 8) + 2


def _skewed() -> Tensor:
    """Exponential with mean 1, all positive."""
    return -torch.special.log_ndtr(_normal(2000, 1, 8))


@_check
def mostly_positive_before_bn() -> ExactCheck:
    least = _active_shares(_mostly_positive()).min().item()
    statement = "smallest active share of a feature of ReLU inputs with mean 2 and standard deviation 1 (normal)"
    return _at_least(statement, least, 0.95)


@_check
def half_active_after_bn() -> ExactCheck:
    y_BTF = _norm("bn", _mostly_positive(), pool="batch_time")
    statement = "largest distance from 1/2 of a feature's active share, of those inputs after bn without gain and bias"
    return _at_most(statement, _difference(_active_shares(y_BTF), 0.5), 0.05)


@_check
def skewed_inputs_are_not_half_active() -> ExactCheck:
    y_BTF = _norm("bn", _skewed(), pool="batch_time")
    least = float((_active_shares(y_BTF) - 0.5).abs().min())
    statement = (
        "smallest distance from 1/2 of a feature's active share after bn without gain and bias, of exponential inputs "
        "(all positive before): one half is of symmetric inputs, here it is 1/e"
    )
    return _at_least(statement, least, 0.05)


# A4


@_check
def bn_pools_examples_per_feature() -> ExactCheck:
    x_BTF = _correlated()
    worst = max(
        _difference(_norm("bn", x_BTF, pool="batch"), _standardized(x_BTF, (0,))),
        _difference(_norm("bn", x_BTF, pool="batch_time"), _standardized(x_BTF, (0, 1))),
    )
    statement = "bn against standardizing each feature over examples (pool=batch), or examples and time (batch_time)"
    return _at_most(statement, worst, ROUNDING)


@_check
def inorm_pools_positions_of_one_example() -> ExactCheck:
    x_BTF = _correlated()
    difference = _difference(_norm("inorm", x_BTF, pool="time"), _standardized(x_BTF, (1,)))
    return _at_most("inorm against standardizing each feature over the time steps of one example", difference, ROUNDING)


@_check
def ln_pools_features_of_one_example() -> ExactCheck:
    x_BTF = _correlated()
    difference = _difference(_norm("ln", x_BTF), _standardized(x_BTF, (2,)))
    return _at_most("ln against standardizing over the features of one example, at one time step", difference, ROUNDING)


@_check
def gn_pools_groups_of_features() -> ExactCheck:
    x_BTF = _correlated()
    grouped = x_BTF.unflatten(-1, (3, 2))
    worst = max(
        _difference(_norm("gn", x_BTF, groups=3, pool="token"), _standardized(grouped, (3,)).flatten(-2)),
        _difference(_norm("gn", x_BTF, groups=3, pool="time"), _standardized(grouped, (1, 3)).flatten(-2)),
    )
    statement = (
        "gn with 3 groups against standardizing over groups of 2 features of one example, at one time step (token) or "
        "all (time)"
    )
    return _at_most(statement, worst, ROUNDING)


@_check
def gn_with_one_group_is_ln() -> ExactCheck:
    x_BTF = _correlated()
    # As in convolutional nets, LN over all entries of an example: what was B x T x F is one token of T F features.
    whole_BTF = _norm("ln", x_BTF.reshape(BATCH, 1, -1)).reshape(x_BTF.shape)
    worst = max(
        _difference(_norm("gn", x_BTF, groups=1, pool="token"), _norm("ln", x_BTF)),
        _difference(_norm("gn", x_BTF, groups=1, pool="time"), whole_BTF),
    )
    statement = "gn with 1 group against ln, over the features of one time step, and over all entries of one example"
    return _at_most(statement, worst, ROUNDING)


@_check
def gn_with_a_group_per_feature_is_inorm() -> ExactCheck:
    x_BTF = _correlated()
    worst = max(
        _difference(_norm("gn", x_BTF, groups=FEATURES, pool=pool), _norm("inorm", x_BTF, pool=pool))
        for pool in ("time", "prefix")
    )
    statement = (
        "gn with one group per feature against inorm, over the same time steps of one example (all, or those so far)"
    )
    return _at_most(statement, worst, ROUNDING)


@_check
def layers_differ() -> ExactCheck:
    x_BTF = _correlated()
    outputs = [
        _norm("bn", x_BTF, pool="batch_time"),
        _norm("inorm", x_BTF, pool="time"),
        _norm("ln", x_BTF),
        _norm("gn", x_BTF, groups=3, pool="token"),
    ]
    least = min(_difference(a, b) for a, b in combinations(outputs, 2))
    return _at_least("smallest of the largest differences between bn, inorm, ln and gn with 3 groups", least, 0.1)


# A5


def _change_by_companions(norm: Norm) -> float:
    """Largest change of the first example's output when all others are replaced, or some are left out."""
    x_BTF = _correlated()
    alone_TF = norm(x_BTF)[0]
    replaced_BTF = torch.cat([x_BTF[:1], x_BTF[1:].flip(0) * 3 - 1])
    return max(_difference(norm(other_BTF)[0], alone_TF) for other_BTF in (replaced_BTF, x_BTF[:2]))


@_check
def ln_ignores_companions() -> ExactCheck:
    statement = "largest change of an example's ln in training when the other rows of the batch are replaced or fewer"
    return _at_most(statement, _change_by_companions(_build("ln", FEATURES)), 0.0)


@_check
def bn_depends_on_companions() -> ExactCheck:
    statement = "largest change of an example's bn in training when the other rows of the batch are replaced or fewer"
    return _at_least(statement, _change_by_companions(_build("bn", FEATURES)), 0.1)


@_check
def bn_in_evaluation_ignores_companions() -> ExactCheck:
    norm = _build("bn", FEATURES)
    norm(_correlated())
    statement = "largest change of an example's bn in evaluation when the other rows of the batch are replaced or fewer"
    return _at_most(statement, _change_by_companions(norm.eval()), 0.0)


# E3


@_check
def ln_puts_tokens_on_a_sphere() -> ExactCheck:
    y_BTF = _norm("ln", _correlated())
    off_mean = _difference(y_BTF.mean(-1), 0.0)
    off_radius = _difference(y_BTF.norm(dim=-1) / FEATURES**0.5, 1.0)
    statement = (
        "largest distance of a token's mean from 0, and of its norm / sqrt(features) from 1, after ln without affine"
    )
    return _at_most(statement, max(off_mean, off_radius), ROUNDING)
