"""What bn and bn_step store, and what they take from it in evaluation."""

from __future__ import annotations

import copy

import pytest
import torch

from normlab.norms import build_norm
from normlab.norms.moments import Moments, moments, pooled, prefix_moments, zero_padding

F = 3
MASK = torch.arange(5) < torch.tensor([[5], [3], [2], [1]])


@pytest.mark.parametrize("pool", ["batch", "batch_time", "prefix"])
def test_bn_stores_all_valid_entries_of_the_sequence_once(pool: str) -> None:
    norm = build_norm("bn", F, pool=pool, momentum=0.25).double()
    x = torch.randn(4, 5, F, dtype=torch.float64)
    norm(x, MASK)
    valid = x[MASK]
    torch.testing.assert_close(norm.running_mean, 0.25 * valid.mean(0))
    torch.testing.assert_close(norm.running_var, 0.75 + 0.25 * valid.var(0, correction=0))


def test_bn_step_first_update_is_whole_then_count_weighted() -> None:
    norm = build_norm("bn_step", F, max_steps=8, momentum=0.5).double()
    full, x = torch.randn(4, 5, F, dtype=torch.float64), torch.randn(4, 5, F, dtype=torch.float64)
    norm(full)
    torch.testing.assert_close(norm.running_mean[:5], full.mean(0))
    torch.testing.assert_close(norm.running_var[:5], full.var(0, correction=0))
    norm(x, MASK)  # 4, 3, 2, 1, 1 rows
    for t, rows in enumerate((4, 3, 2)):
        rate = 0.5 * rows / 4
        expected = (1 - rate) * full[:, t].mean(0) + rate * x[:rows, t].mean(0)
        torch.testing.assert_close(norm.running_mean[t], expected)
    # A single row has no variance: no update.
    torch.testing.assert_close(norm.running_mean[3:5], full.mean(0)[3:5])
    assert norm.seen.tolist() == [True] * 5 + [False] * 4


def test_bn_step_evaluation_falls_back_to_the_nearest_earlier_step() -> None:
    norm = build_norm("bn_step", F, max_steps=8)
    norm(torch.randn(4, 5, F))
    norm.eval()
    x = torch.randn(4, 1, F)
    assert not torch.equal(norm(x, None, 3), norm(x, None, 4))
    for later in (5, 7, 8, 1000):
        assert torch.equal(norm(x, None, later), norm(x, None, 4))


def test_bn_step_pools_the_steps_beyond_the_distinct_ones() -> None:
    norm = build_norm("bn_step", F, max_steps=2).double()
    x = torch.randn(4, 5, F, dtype=torch.float64)
    norm(x)
    torch.testing.assert_close(norm.running_mean[:2], x[:, :2].mean(0))
    torch.testing.assert_close(norm.running_mean[2], x[:, 2:].mean((0, 1)))
    torch.testing.assert_close(norm.running_var[2], x[:, 2:].flatten(0, 1).var(0, correction=0))
    norm.eval()
    assert torch.equal(norm(x[:, :1], None, 2), norm(x[:, :1], None, 100))


def test_bn_step_takes_the_last_distinct_step_beyond() -> None:
    norm = build_norm("bn_step", F, max_steps=2, beyond="last").double()
    x = torch.randn(4, 5, F, dtype=torch.float64)
    norm(x)
    torch.testing.assert_close(norm.running_mean, x[:, :2].mean(0))
    norm(x[:, 3:], None, 3)
    torch.testing.assert_close(norm.running_mean, x[:, :2].mean(0))
    norm.eval()
    assert torch.equal(norm(x[:, :1], None, 1), norm(x[:, :1], None, 100))
    assert not torch.equal(norm(x[:, :1], None, 0), norm(x[:, :1], None, 1))


def test_rows_beyond_and_within_the_distinct_steps_do_not_mix() -> None:
    for beyond in ("pooled", "last"):
        norm = build_norm("bn_step", F, max_steps=3, beyond=beyond).double()
        x = torch.randn(4, 2, F, dtype=torch.float64)
        norm(x, None, torch.tensor([1, 1, 7, 7]))
        torch.testing.assert_close(norm.running_mean[1:3], x[:2].mean(0))
        if beyond == "pooled":
            torch.testing.assert_close(norm.running_mean[3], x[2:].mean((0, 1)))


def test_ghost_batches_equal_batches_of_their_own_and_store_the_whole() -> None:
    x = torch.randn(7, 5, F, dtype=torch.float64)
    for name, options in (("bn", {"pool": "batch_time"}), ("bn", {}), ("bn_step", {}), ("pnv", {})):
        norm = build_norm(name, F, ghost_rows=3, **options).double()
        whole = build_norm(name, F, **options).double()
        alone = [build_norm(name, F, **options).double()(x[rows]) for rows in (slice(0, 3), slice(3, 7))]
        torch.testing.assert_close(norm(x), torch.cat(alone))
        whole(x)
        for one, other in zip(norm.buffers(), whole.buffers(), strict=True):
            torch.testing.assert_close(one, other)
    steps = torch.tensor([0, 0, 0, 4, 4, 4, 4])
    norm, twin = build_norm("bn_step", F, ghost_rows=3).double(), build_norm("bn_step", F).double()
    torch.testing.assert_close(norm(x, None, steps), twin(x, None, steps))


def test_memory_joins_the_batches_before_without_gradient() -> None:
    first, second, third = (torch.randn(4, 5, F, dtype=torch.float64) for _ in range(3))
    for name, options, dims in (("bn", {"pool": "batch_time"}, (0, 1)), ("bn_step", {}, 0)):
        norm = build_norm(name, F, memory_batches=1, affine=False, **options).double()
        norm(first)
        norm(second)
        x = third.clone().requires_grad_()
        joint = torch.cat([second, x])
        var = joint.var(dims, correction=0)
        expected = (x - joint.mean(dims)) / (var + norm.eps).sqrt()
        y = norm(x)
        torch.testing.assert_close(y, expected)
        weights = torch.randn_like(y)
        grads = [torch.autograd.grad((value * weights).sum(), x)[0] for value in (y, expected)]
        torch.testing.assert_close(*grads)


def test_renorm_opens_its_clips_over_the_updates() -> None:
    norm = build_norm("brn", F, warmup=2, ramp=2, r_max=3.0, d_max=5.0).double()
    plain = build_norm("bn", F).double()
    x = torch.randn(6, 32, 5, F, dtype=torch.float64) * 2 + 1
    for batch in x[:3]:  # two of warm-up, and the first after it, whose clips have not begun to open
        torch.testing.assert_close(norm(batch), plain(batch))
    assert not torch.allclose(norm(x[3]), plain(x[3]))
    norm(x[4])
    # Open: nothing is clipped here, so training is evaluation.
    before = copy.deepcopy(norm).eval()
    torch.testing.assert_close(norm(x[5]), before(x[5]))


def test_bn_step_rows_at_different_steps_do_not_mix() -> None:
    norm = build_norm("bn_step", F, max_steps=8).double()
    x = torch.randn(5, 2, F, dtype=torch.float64)
    y = norm(x, None, torch.tensor([0, 3, 0, 3, 3]))
    twin = build_norm("bn_step", F, max_steps=8).double()
    torch.testing.assert_close(y[[0, 2]], twin(x[[0, 2]], None, 0))
    torch.testing.assert_close(y[[1, 3, 4]], twin(x[[1, 3, 4]], None, 3))
    torch.testing.assert_close(norm.running_mean, twin.running_mean)
    torch.testing.assert_close(norm.running_var, twin.running_var)
    assert norm.seen.tolist() == [True, True, False, True, True, False, False, False, False]
    norm.eval()
    mixed = norm(x, None, torch.tensor([0, 3, 0, 3, 4]))
    torch.testing.assert_close(mixed[4], norm(x[4:], None, 4)[0])


def test_prefix_moments_equal_a_loop_and_continue_through_the_carry() -> None:
    x = torch.randn(4, 5, F, dtype=torch.float64) + 1e4
    for over_batch in (False, True):
        whole, _ = prefix_moments(x, MASK, over_batch, None)
        carry, parts = None, []
        for columns in (slice(0, 2), slice(2, 3), slice(3, 5)):
            part, carry = prefix_moments(x[:, columns], MASK[:, columns], over_batch, carry)
            parts.append(part)
        for index in range(3):
            torch.testing.assert_close(torch.cat([part[index] for part in parts], 1), whole[index])
        for row in range(1 if over_batch else 4):
            for t in range(5):
                seen = (x[:, : t + 1] if over_batch else x[row : row + 1, : t + 1])[
                    MASK[:, : t + 1] if over_batch else MASK[row : row + 1, : t + 1]
                ]
                torch.testing.assert_close(whole.mean[row, t], seen.mean(0))
                torch.testing.assert_close(whole.var[row, t], seen.var(0, correction=0), rtol=1e-6, atol=1e-9)


def test_prefix_gradients_flow_through_the_carry() -> None:
    x = torch.randn(2, 4, F, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 4, F, dtype=torch.float64)
    whole, _ = prefix_moments(x, None, False, None)
    first, carry = prefix_moments(x[:, :1], None, False, None)
    means, variances = [first.mean], [first.var]
    for t in range(1, 4):
        part, carry = prefix_moments(x[:, t : t + 1], None, False, carry)
        means.append(part.mean)
        variances.append(part.var)
    one = torch.autograd.grad(((whole.mean + whole.var) * weights).sum(), x)
    two = torch.autograd.grad(((torch.cat(means, 1) + torch.cat(variances, 1)) * weights).sum(), x)
    torch.testing.assert_close(one, two)


def test_pooled_is_the_law_of_total_variance() -> None:
    x = torch.randn(4, 5, F, dtype=torch.float64)
    mean, var, count = moments(zero_padding(x, MASK), MASK, (0,))
    joint = pooled(Moments(mean, var, count), 1)
    torch.testing.assert_close(joint.mean[0, 0], x[MASK].mean(0))
    torch.testing.assert_close(joint.var[0, 0], x[MASK].var(0, correction=0))
    assert joint.count == MASK.sum()


def test_prefix_has_second_derivatives_through_the_carry() -> None:
    x = torch.randn(2, 4, F, dtype=torch.float64, requires_grad=True)

    def chunked(x: torch.Tensor) -> torch.Tensor:
        _, carry = prefix_moments(x[:, :2], None, False, None)
        part, _ = prefix_moments(x[:, 2:], None, False, carry)
        return part.var

    assert torch.autograd.gradcheck(chunked, (x,))
    assert torch.autograd.gradgradcheck(chunked, (x,))
