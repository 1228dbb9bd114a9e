"""What every norm must do, over all discovered norms and their options: declarations hold in both directions.

Shape suffixes: B batch, T time, F features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from variants import MASK, B, F, T, build, every_norm, every_variant, label, refuses, sample, variants

import normlab.norms
from normlab.config import InputError
from normlab.norms import build_norm, norm_class, norm_options
from normlab.norms.base import Norm, Shares

Place = tuple[slice, ...]
ALL = slice(None)


# A warm-up that ends while `build` trains leaves a norm between two behaviours.
settled = pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name, options in variants() if options.get("warmup") != 1], ids=label
)


# What a norm does, found out from its behaviour alone.


def output(norm: Norm, x: Tensor) -> Tensor:
    """Of a copy, since a training step changes stored values."""
    return copy.deepcopy(norm)(x)


def influence(norm: Norm, outputs: Place, inputs: Place) -> bool:
    """Whether any of these outputs depends on any of these inputs: by moving the inputs, and by autograd."""
    x = sample()
    moved = x.clone()
    moved[inputs] += 0.1 * sample(4)[inputs]
    seen = bool((output(norm, moved) - output(norm, x))[outputs].abs().max() > 1e-9)
    x.requires_grad_()
    (grad,) = torch.autograd.grad((output(norm, x) * sample(2))[outputs].sum(), x)
    felt = bool(grad[inputs].abs().max() > 1e-9)
    # An approximate backward pass may leave out what the values show, or show what they do not.
    assert seen == felt or not norm.exact_gradient
    return seen or felt


def batch_independent(norm: Norm) -> bool:
    return not influence(norm.train(), (slice(0, 1),), (slice(1, None),))


def causal(norm: Norm) -> bool:
    return not influence(norm.train(), (ALL, slice(0, 3)), (ALL, slice(3, None)))


def causal_in_evaluation(norm: Norm) -> bool:
    return not influence(norm.eval(), (ALL, slice(0, 3)), (ALL, slice(3, None)))


def scale_invariant(norm: Norm) -> bool:
    return torch.allclose(output(norm.train(), sample()), output(norm, 3 * sample()), atol=1e-6)


def shift_invariant(norm: Norm) -> bool:
    return torch.allclose(output(norm.train(), sample()), output(norm, sample() + 3), atol=1e-6)


def needs_statistics(norm: Norm) -> bool:
    """Training changes what evaluation gives, with the same parameters."""
    before = copy.deepcopy(norm).eval()(sample())
    norm.train()(sample(3))
    return not torch.equal(before, norm.eval()(sample()))


def per_step(norm: Norm) -> bool:
    norm.eval()
    return not torch.allclose(norm(sample(), None, 0), norm(sample(), None, 1))


def works_at_batch_1(norm: Norm) -> bool:
    if refuses(norm.train(), sample()[:1]):
        return False
    return bool(norm(sample()[:1]).isfinite().all())


def exact_gradient(norm: Norm) -> bool:
    for seed in (5, 6):  # some backward passes go by what earlier ones left
        (norm.train()(sample(seed).requires_grad_()) * sample(7)).sum().backward()
    x = sample()[:3, :3].clone().requires_grad_()
    return torch.autograd.gradcheck(
        lambda value: copy.deepcopy(norm.train())(value, MASK[:3, :3]), (x,), raise_exception=False
    )


def identity(norm: Norm) -> bool:
    x = sample()
    return norm(x) is x


OBSERVED: dict[str, Callable[[Norm], bool]] = {
    check.__name__: check
    for check in (
        batch_independent,
        causal,
        causal_in_evaluation,
        scale_invariant,
        shift_invariant,
        needs_statistics,
        per_step,
        works_at_batch_1,
        exact_gradient,
        identity,
    )
}


def built(name: str, options: dict[str, Any], declared: str) -> Norm:
    """For invariances without eps, and past the warm-up, while which some norms have more than they declare."""
    more: dict[str, Any] = {}
    if declared in ("scale_invariant", "shift_invariant"):
        more = {"eps": 1e-14}
    if declared in ("scale_invariant", "shift_invariant", "exact_gradient"):
        more |= {key: 0 for key in ("warmup", "ramp") if key not in options}
    return build(name, options, **more)


@settled
@pytest.mark.parametrize("declared", OBSERVED)
def test_declarations_hold(name: str, options: dict[str, Any], declared: str) -> None:
    norm = built(name, options, declared)
    assert OBSERVED[declared](norm) == getattr(norm, declared)


@every_norm
@pytest.mark.parametrize("declared", OBSERVED)
def test_a_false_declaration_fails(name: str, declared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above, of a class that declares the contrary."""
    cls = norm_class(name)
    truth = getattr(built(name, {}, declared), declared)

    class Liar(cls):  # pyright: ignore[reportGeneralTypeIssues]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            vars(self).pop(declared, None)

    setattr(Liar, declared, not truth)
    Liar.__module__ = cls.__module__
    monkeypatch.setattr(normlab.norms, "norm_class", lambda _: Liar)
    with pytest.raises(AssertionError):
        test_declarations_hold(name, {}, declared)


@every_norm
@pytest.mark.parametrize("false", [Shares(), Shares(True), Shares(False, "prefix"), Shares(features="all")])
def test_false_shares_fail(name: str, false: Shares, monkeypatch: pytest.MonkeyPatch) -> None:
    if build_norm(name, F).shares == false:
        return
    monkeypatch.setattr(
        norm_class(name), "shares", property(lambda self: false, lambda self, value: None), raising=False
    )
    with pytest.raises(AssertionError):
        test_shares_are_the_entries_that_change_the_statistic(name, {})


@settled
def test_shares_are_the_entries_that_change_the_statistic(name: str, options: dict[str, Any]) -> None:
    """Which rows, time steps and features entry (0, 2, 5) depends on."""
    norm = build(name, options)
    x = sample()
    before = output(norm, x)[0, 2, 5]
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(output(norm, leaf)[0, 2, 5], leaf)

    def counts(place: Place) -> bool:
        """Whether an entry in this place does; each moves in its own way, so that none makes up for others."""
        moved = x.clone()
        moved[place] += 0.5 * sample(4)[place]
        return bool((output(norm, moved)[0, 2, 5] - before).abs() > 1e-9) or bool(grad[place].abs().max() > 1e-9)

    rows, steps, features = (
        [index for index in range(size) if counts((*[ALL] * axis, slice(index, index + 1)))]
        for axis, size in enumerate((B, T, F))
    )
    ghost = norm.shares.batch and "ghost_rows" in options
    assert rows == (list(range(2 if ghost else B)) if norm.shares.batch else [0])
    assert steps == {"step": [2], "prefix": [0, 1, 2], "sequence": list(range(T))}[norm.shares.time]
    expected = {"one": [5], "window": [3, 4, 5, 6, 7], "all": list(range(F))}
    width = F // getattr(norm, "groups", options.get("group_scaling", F))
    expected["group"] = [f for f in range(F) if f // width == 5 // width]
    assert features == expected[norm.shares.features]


def test_what_leaks_is_said() -> None:
    assert build_norm("bn", F).leaks == ""
    assert build_norm("bn", F, causal=False).leaks == (
        "in training each output depends on later time steps of every row of the batch"
    )
    assert build_norm("inorm", F, pool="time").leaks == (
        "in training and in evaluation each output depends on later time steps of its row"
    )


@every_norm
def test_the_default_is_causal_where_the_model_is(name: str) -> None:
    assert build_norm(name, F).causal
    assert Shares(time="sequence") != build_norm(name, F).shares


@every_variant
def test_evaluation_changes_nothing(name: str, options: dict[str, Any]) -> None:
    norm = build(name, options).eval()
    before = copy.deepcopy(norm.state_dict())
    norm(sample())
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())
    assert not norm.identity or not before
    assert norm.name == name
    assert norm.formula
    assert norm.paper or norm.identity


@every_variant
def test_identical_rows_give_finite_gradients(name: str, options: dict[str, Any]) -> None:
    norm = build_norm(name, F, **options)
    x = torch.zeros(B, T, F, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(value.isfinite().all() for value in norm.state_dict().values())


@every_variant
def test_stored_values_survive_casts_copies_and_moves(name: str, options: dict[str, Any]) -> None:
    norm = build(name, options).float()
    loaded = build_norm(name, F, **options)
    loaded.load_state_dict(norm.state_dict())
    assert copy.deepcopy(norm).eval()(sample().float()).equal(loaded.eval()(sample().float()))
    # Training goes on the same from a loaded state: counters and remembered batches are in it.
    for seed in (5, 6):
        assert norm.train()(sample(seed).float()).equal(loaded.train()(sample(seed).float()))
    before = [buffer.clone() for buffer in norm.buffers()]
    norm.bfloat16()
    assert all(one.equal(other) for one, other in zip(before, norm.buffers(), strict=True))
    moved = copy.deepcopy(norm).to("meta")
    assert all(value.is_meta for value in (*moved.parameters(), *moved.buffers()))
    assert moved.train()(torch.empty(B, T, F, device="meta")).shape == (B, T, F)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_variant
def test_a_gpu_gives_the_same(name: str, options: dict[str, Any]) -> None:
    norm = build(name, options)
    there = copy.deepcopy(norm).to("cuda")
    torch.testing.assert_close(there(sample().cuda(), MASK.cuda())[MASK.cuda()].cpu(), norm(sample(), MASK)[MASK])
    for one, other in zip(there.buffers(), norm.buffers(), strict=True):
        torch.testing.assert_close(one.cpu(), other)


@every_norm
def test_unknown_option_names_the_right_ones(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} has no option 'grops'; it takes: .*gain"):
        build_norm(name, F, grops=1)
    with pytest.raises(InputError, match="did you mean"):
        build_norm(name + "x", F)


@every_norm
def test_affine_off_leaves_no_gain_and_no_bias(name: str) -> None:
    takes = norm_options(name)
    if "affine" in takes:
        norm = build_norm(name, F, affine=False)
        assert norm.weight is None
        assert norm.bias is None
        norm = build_norm(name, F, affine=True, bias=False, gain=0.3)
        assert norm.weight is not None
        assert norm.bias is None
        # A gain of 0.3 gives 0.3 times what a gain of 1 gives.
        torch.testing.assert_close(norm(sample().float()), 0.3 * build_norm(name, F, bias=False)(sample().float()))
    else:
        assert not list(build_norm(name, F).parameters())


def test_groups_must_divide_the_features() -> None:
    with pytest.raises(InputError, match="cannot cut 10 features into 4"):
        build_norm("gn", 10, groups=4)
    with pytest.raises(InputError, match="groups of one feature"):
        build_norm("gn", 8)
    with pytest.raises(InputError, match="pn cannot cut 10 features into 4"):
        build_norm("pn", 10, group_scaling=4)


def test_contradicting_options_are_refused() -> None:
    with pytest.raises(InputError, match="set one of them"):
        build_norm("bn_step", F, ghost_rows=2, memory_batches=1)
    with pytest.raises(InputError, match="cannot join batches with pool=batch"):
        build_norm("bn", F, memory_batches=1)
    with pytest.raises(InputError, match="no ghost batches with pool=prefix"):
        build_norm("bn", F, ghost_rows=2, pool="prefix")


def test_options_are_tried() -> None:
    """The list of variants covers every option that decides what is pooled or stored."""
    tried = {key for _, options in variants() for key in options}
    assert tried >= {"pool", "warmup", "ramp", "group_scaling", "ghost_rows", "memory_batches", "max_steps", "beyond"}
    assert len({label(options) + name for name, options in variants()}) == len(variants())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gn", {"groups": 0}),
        ("bn", {"ghost_rows": 0}),
        ("bn", {"ghost_rows": 1}),
        ("bn_step", {"memory_batches": -1}),
        ("bn_step", {"max_steps": 0}),
        ("lrn", {"window": 0}),
        ("ln", {"eps": "a"}),
        ("ln", {"eps": -1}),
        ("bn", {"momentum": 2}),
        ("brn", {"r_max": 0.5}),
    ],
)
def test_values_that_cannot_be_are_refused_in_python_too(name: str, options: dict[str, Any]) -> None:
    (option,) = options
    with pytest.raises(InputError, match=rf"model\.norm_options\.{option} "):
        build_norm(name, F, **options)


@pytest.mark.parametrize(("name", "options"), variants(), ids=label)
def test_a_printed_norm_shows_its_options(name: str, options: dict[str, Any]) -> None:
    """Records of runs name the norm at a site by this."""
    shown = repr(build(name, options))
    for option, value in options.items():
        assert ("gain=" if option == "affine" else f"{option}={value}") in shown
