"""What every norm must do, over all discovered norms and all their pools: declarations hold in both directions.

Shape suffixes: B batch, T time, F features.
"""

from __future__ import annotations

import copy
import typing
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from normlab.config import InputError, NormOptions, available_norms
from normlab.norms import build_norm, norm_options
from normlab.norms.base import Norm

B, T, F = 4, 5, 16
POOLS = [pool for part in typing.get_args(typing.get_type_hints(NormOptions)["pool"]) for pool in typing.get_args(part)]


def variants() -> list[tuple[str, dict[str, str]]]:
    """Every norm with its default, and with every pool that it takes."""
    found: list[tuple[str, dict[str, str]]] = []
    for name in available_norms():
        found.append((name, {}))
        for pool in POOLS if "pool" in norm_options(name) else ():
            try:
                build_norm(name, F, pool=pool)
            except InputError:
                continue
            found.append((name, {"pool": pool}))
    return found


every_norm = pytest.mark.parametrize(
    ("name", "options"), variants(), ids=lambda value: value if isinstance(value, str) else "-".join(value.values())
)


def build(name: str, options: dict[str, str], **more: object) -> Norm:
    """In float64, with random gain and bias, and with stored values that two training batches left."""
    torch.manual_seed(0)
    norm = build_norm(name, F, **options, **{key: value for key, value in more.items() if key in norm_options(name)})
    norm.double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter, mean=1.0)
    for _ in range(2):
        norm(torch.randn(B, T, F, dtype=torch.float64) * 2 + 1)
    return norm


def sample(seed: int = 1) -> Tensor:
    return torch.randn(B, T, F, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def influence(norm: Norm, outputs: tuple[slice, ...], inputs: tuple[slice, ...]) -> bool:
    """Whether any of these outputs depends on any of these inputs, by autograd."""
    x = sample().requires_grad_()
    y = norm(x)
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
    (grad,) = torch.autograd.grad((y * weights)[outputs].sum(), x)
    return bool(grad[inputs].abs().max() > 1e-9)


@every_norm
def test_declared_invariances(name: str, options: dict[str, str]) -> None:
    norm = build(name, options, eps=1e-14)
    # The first column of a prefix has a single entry per set, and a row's only entry is normalized to 0 exactly.
    plain, scaled, shifted = norm(sample()), norm(3 * sample()), norm(sample() + 3)
    assert torch.allclose(plain, scaled, atol=1e-6) == norm.scale_invariant
    assert torch.allclose(plain, shifted, atol=1e-6) == norm.shift_invariant


@every_norm
def test_declared_independence_of_rows_and_later_columns(name: str, options: dict[str, str]) -> None:
    norm = build(name, options)
    all_, future, past = slice(None), slice(3, None), slice(0, 3)
    assert influence(norm, (slice(0, 1),), (slice(1, None),)) == (not norm.batch_independent)
    assert influence(norm, (all_, past), (all_, future)) == (not norm.causal)
    norm.eval()
    assert not influence(norm, (slice(0, 1),), (slice(1, None),))
    assert influence(norm, (all_, past), (all_, future)) == (not norm.causal and not norm.needs_statistics)


@every_norm
def test_declared_stored_values(name: str, options: dict[str, str]) -> None:
    norm = build(name, options)
    assert norm.needs_statistics == (len(list(norm.buffers())) > 0)
    before = copy.deepcopy(norm.state_dict())
    norm.eval()
    norm(sample())
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())
    # Stored values per time step show: the same input at another time step gives another output.
    assert norm.per_step == (not torch.allclose(norm(sample(), None, 0), norm(sample(), None, 1)))
    norm.train()
    norm(sample())
    changed = any(not torch.equal(before[key], value) for key, value in norm.state_dict().items())
    assert changed == norm.needs_statistics


@every_norm
def test_declared_batch_of_one_row(name: str, options: dict[str, str]) -> None:
    norm = build(name, options)
    if norm.works_at_batch_1:
        assert norm(sample()[:1]).isfinite().all()
    else:
        with pytest.raises(InputError, match="at least 2 rows"):
            norm(sample()[:1])


@every_norm
def test_identity_is_declared(name: str, options: dict[str, str]) -> None:
    norm = build_norm(name, F, **options)
    x = torch.randn(B, T, F)
    assert (norm(x) is x) == norm.identity
    assert not norm.identity or not norm.state_dict()
    assert norm.name == name
    assert norm.formula


COUNTERPARTS: dict[tuple[str, str | None], Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    ("ln", None): lambda x, w, b: nn.functional.layer_norm(x, (F,), w, b, 1e-5),
    ("rms", None): lambda x, w, b: nn.functional.rms_norm(x, (F,), w, 1e-5),
    ("gn", None): lambda x, w, b: nn.functional.group_norm(x.reshape(-1, F), 8, w, b, 1e-5).view_as(x),
    ("inorm", "time"): lambda x, w, b: nn.functional.instance_norm(x.mT, weight=w, bias=b, eps=1e-5).mT,
    ("bn", "batch_time"): lambda x, w, b: nn.functional.batch_norm(x.mT, None, None, w, b, True, eps=1e-5).mT,
    ("bn", "batch"): lambda x, w, b: torch.stack(
        [nn.functional.batch_norm(column, None, None, w, b, True, eps=1e-5) for column in x.unbind(1)], 1
    ),
    ("bn_step", None): lambda x, w, b: torch.stack(
        [nn.functional.batch_norm(column, None, None, w, b, True, eps=1e-5) for column in x.unbind(1)], 1
    ),
}


@pytest.mark.parametrize(
    ("key", "reference"), COUNTERPARTS.items(), ids=[f"{norm}-{pool}" for norm, pool in COUNTERPARTS]
)
def test_equals_torch_counterpart(key: tuple[str, str | None], reference: Callable[..., Tensor]) -> None:
    norm = build(key[0], {"pool": key[1]} if key[1] else {})
    x = sample().requires_grad_()
    inputs = [x, *norm.parameters()]
    w, b = norm.weight, norm.bias
    target = torch.randn(B, T, F, dtype=torch.float64)
    mine = norm(x)
    theirs = reference(x, w, b)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    for one, other in zip(
        torch.autograd.grad((mine * target).sum(), inputs),
        torch.autograd.grad((theirs * target).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


LENGTHS = torch.tensor([5, 3, 2, 1])
MASK = torch.arange(T) < LENGTHS.unsqueeze(1)


def values_and_gradients(norm: Norm, pad: float, rows: bool) -> list[Tensor]:
    """Outputs at valid entries, gradients and stored values; of the padded batch, or of each unpadded row alone."""
    x = sample().masked_fill(~MASK.unsqueeze(-1), pad).requires_grad_()
    target = sample(3)
    if rows:
        y = [norm(x[row : row + 1, :length])[0] for row, length in enumerate(LENGTHS.tolist())]
        valid = torch.cat(y)
    else:
        valid = norm(x, MASK)[MASK]
    inputs = [x, *norm.parameters()]
    grads = torch.autograd.grad((valid * target[MASK]).sum(), inputs)
    return [valid.detach(), grads[0][MASK], *grads[1:], *norm.buffers()]


@every_norm
@pytest.mark.parametrize("training", [True, False])
def test_padding_changes_nothing(name: str, options: dict[str, str], training: bool) -> None:
    norm = build(name, options).train(training)
    reference = copy.deepcopy(norm)
    # Rows alone are the truth wherever rows do not mix; where they do, other padding must give the same.
    alone = not training or norm.batch_independent
    expected = values_and_gradients(reference, 0.0 if alone else 1e3, rows=alone)
    # The identity passes padding on as it is; it has no parameters that NaN could reach.
    for mine, theirs in zip(values_and_gradients(norm, float("nan"), rows=False), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in available_norms() if norm_options(name).count("momentum")])
def test_padded_batch_statistics_equal_columns_alone(name: str) -> None:
    norm = build(name, {})
    stored = copy.deepcopy(norm).eval()
    x = sample()
    y = norm(x.masked_fill(~MASK.unsqueeze(-1), float("nan")), MASK)
    for column in range(T):
        rows = x[MASK[:, column], column]
        if len(rows) > 1:
            expected = (rows - rows.mean(0)) / (rows.var(0, correction=0) + norm.eps).sqrt() * norm.weight + norm.bias
        else:
            expected = stored(rows.unsqueeze(1), None, column).squeeze(1)
        torch.testing.assert_close(y[MASK[:, column], column], expected)


@every_norm
def test_gradcheck(name: str, options: dict[str, str]) -> None:
    norm = build(name, options)
    x = sample()[:3, :3].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda value: norm(value, MASK[:3, :3]), (x,))


@every_norm
def test_identical_rows_give_finite_gradients(name: str, options: dict[str, str]) -> None:
    norm = build_norm(name, F, **options)
    x = torch.zeros(B, T, F, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(value.isfinite().all() for value in norm.state_dict().values())


@every_norm
def test_statistics_are_fp32_under_bf16(name: str, options: dict[str, str]) -> None:
    norm = build_norm(name, F, **options)
    # Mean 1e4 with variance 1 does not fit bf16; fp32 input must come through, inside autocast too.
    x = torch.randn(64, 8, F) + 1e4
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    exact = copy.deepcopy(norm).double()(x.double())
    assert y.dtype == torch.float32
    # On average: fp32 at 1e4 has a grain of 1e-3, which shows where the few entries of a set nearly agree.
    assert (y - exact).abs().mean() < 0.01
    assert norm(x.bfloat16()).dtype == torch.bfloat16


@every_norm
def test_stored_values_survive_casts_and_copies(name: str, options: dict[str, str]) -> None:
    norm = build(name, options).float()
    loaded = build_norm(name, F, **options)
    loaded.load_state_dict(norm.state_dict())
    assert copy.deepcopy(norm).eval()(sample().float()).equal(loaded.eval()(sample().float()))
    before = [buffer.clone() for buffer in norm.buffers()]
    norm.bfloat16()
    assert all(one.equal(other) for one, other in zip(before, norm.buffers(), strict=True))


@pytest.mark.parametrize("name", available_norms())
def test_compiled_graph_is_whole(name: str) -> None:
    norm, twin = build(name, {}), build(name, {})
    torch.compiler.reset()  # each norm is one more version of the same `forward`; torch allows 8
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(sample()), twin(sample()))
    for one, other in zip(norm.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", available_norms())
def test_unknown_option_names_the_right_ones(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} has no option 'grops'; it takes: .*gain"):
        build_norm(name, F, grops=1)
    with pytest.raises(InputError, match="did you mean"):
        build_norm(name + "x", F)


@every_norm
def test_affine_off_has_no_parameters(name: str, options: dict[str, str]) -> None:
    if "affine" in norm_options(name):
        assert not list(build_norm(name, F, affine=False, **options).parameters())
        norm = build_norm(name, F, bias=False, gain=0.3, **options)
        assert [key for key, _ in norm.named_parameters()] == ["weight"]
        assert norm.weight is not None
        assert (norm.weight == 0.3).all()
    else:
        assert not list(build_norm(name, F).parameters())
