"""What bn and bn_step store, and what they take from it in evaluation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normlab.config import InputError
from normlab.norms import build_norm
from normlab.norms.moments import Moments, moments, pooled, prefix_moments

F = 3
MASK = torch.arange(5) < torch.tensor([[5], [3], [2], [1]])


def test_bn_unbiased_buffers_equal_batchnorm1d() -> None:
    mine = build_norm("bn", F, pool="batch_time", unbiased=True).double()
    theirs = nn.BatchNorm1d(F).double()
    for seed in range(3):
        x = torch.randn(2, 1, F, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(mine(x), theirs(x.mT).mT)
    torch.testing.assert_close(mine.running_mean, theirs.running_mean)
    torch.testing.assert_close(mine.running_var, theirs.running_var)
    x = torch.randn(2, 4, F, dtype=torch.float64)
    torch.testing.assert_close(mine.eval()(x), theirs.eval()(x.mT).mT)


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
    assert norm.seen.tolist() == [True] * 5 + [False] * 3


def test_bn_step_evaluation_falls_back_to_the_nearest_earlier_step() -> None:
    norm = build_norm("bn_step", F, max_steps=8)
    norm(torch.randn(4, 5, F))
    norm.eval()
    x = torch.randn(4, 1, F)
    assert not torch.equal(norm(x, None, 3), norm(x, None, 4))
    for later in (5, 7, 8, 1000):
        assert torch.equal(norm(x, None, later), norm(x, None, 4))


def test_bn_step_pools_the_steps_that_share_the_last_slot() -> None:
    norm = build_norm("bn_step", F, max_steps=3).double()
    x = torch.randn(4, 5, F, dtype=torch.float64)
    norm(x)
    torch.testing.assert_close(norm.running_mean[2], x[:, 2:].mean((0, 1)))
    torch.testing.assert_close(norm.running_var[2], x[:, 2:].flatten(0, 1).var(0, correction=0))


def test_bn_step_rows_at_different_steps_do_not_mix() -> None:
    norm = build_norm("bn_step", F, max_steps=8).double()
    x = torch.randn(5, 2, F, dtype=torch.float64)
    y = norm(x, None, torch.tensor([0, 3, 0, 3, 3]))
    twin = build_norm("bn_step", F, max_steps=8).double()
    torch.testing.assert_close(y[[0, 2]], twin(x[[0, 2]], None, 0))
    torch.testing.assert_close(y[[1, 3, 4]], twin(x[[1, 3, 4]], None, 3))
    torch.testing.assert_close(norm.running_mean, twin.running_mean)
    torch.testing.assert_close(norm.running_var, twin.running_var)
    assert norm.seen.tolist() == [True, True, False, True, True, False, False, False]
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
    mean, var, count = moments(x, MASK, (0,))
    joint = pooled(Moments(mean[0], var[0], count.flatten()))
    torch.testing.assert_close(joint.mean, x[MASK].mean(0))
    torch.testing.assert_close(joint.var, x[MASK].var(0, correction=0))
    assert joint.count == MASK.sum()


def test_groups_must_divide_the_features() -> None:
    with pytest.raises(InputError, match="cannot cut 10 features into 4"):
        build_norm("gn", 10, groups=4)
    with pytest.raises(InputError, match="groups of one feature"):
        build_norm("gn", 8)


def test_prefix_has_second_derivatives_through_the_carry() -> None:
    x = torch.randn(2, 4, F, dtype=torch.float64, requires_grad=True)

    def chunked(x: torch.Tensor) -> torch.Tensor:
        _, carry = prefix_moments(x[:, :2], None, False, None)
        part, _ = prefix_moments(x[:, 2:], None, False, carry)
        return part.var

    assert torch.autograd.gradcheck(chunked, (x,))
    assert torch.autograd.gradgradcheck(chunked, (x,))
