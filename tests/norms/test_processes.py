"""Two processes give what one process gives on the joined batch: outputs, gradients, stored values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from variants import label, variants

import normlab.models.lstm
from normlab.config import InputError, NormOptions
from normlab.norms import build_norm
from normlab.norms.base import GatheredPenalties
from normlab.norms.recompute import recompute_statistics

F = 4
LENGTHS = torch.tensor([5, 4, 2, 3, 3, 5])
MASK = torch.arange(5) < LENGTHS.unsqueeze(1)
SHORT = torch.tensor([2, 3, 5, 2, 4, 3])
PARTS = (slice(0, 2), slice(2, 6))  # unequal rows; the first part's shortest row is longer than the second's


def batch_norms() -> list[tuple[str, dict[str, Any]]]:
    """Norms that see other rows, with every option of theirs that says which."""
    return [
        (name, options)
        for name, options in variants(F)
        if not build_norm(name, F, **options).batch_independent or "warmup" in options
    ]


def results(rows: slice) -> dict[str, list[Tensor]]:
    """Two training steps on these rows: outputs, gradients of inputs, penalties, and stored values after."""
    found: dict[str, list[Tensor]] = {}
    for name, options in batch_norms():
        x, target = torch.randn(2, 6, 5, F, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        norm = build_norm(name, F, **options).double()
        for _ in range(2):
            own = x[rows].clone().requires_grad_()
            with GatheredPenalties(norm) as gathered:
                y = norm(own, MASK[rows]) * MASK[rows].unsqueeze(-1)
            # Processes add their losses; each has the whole penalty.
            penalty = gathered.total()
            share = len(own) / len(x)
            loss = (y * target[rows]).sum() + (0 if penalty is None else penalty * share)
            (grad,) = torch.autograd.grad(loss, own)
        found[name + label(options)] = [y.detach(), grad, *norm.buffers()]

        if "memory_batches" in options and name != "bn_step":
            continue  # inside a recurrence statistics are per time step, and these norms remember none of those
        torch.manual_seed(0)
        fields = {key: value for key, value in options.items() if key != "pool"}
        lstm = normlab.models.lstm.LSTM(
            F, F, norm=name, norm_options=NormOptions(**fields), batch_first=True, dtype=torch.float64
        )
        lengths = LENGTHS[rows]
        longest = int(lengths.max())
        own = x[rows, :longest].clone().requires_grad_()
        out, _ = lstm(own, lengths=lengths)
        assert isinstance(out, Tensor)
        (grad,) = torch.autograd.grad((out * target[rows, :longest]).sum(), own)
        found["lstm " + name + label(options)] = [out.detach(), grad, *lstm.buffers()]

        if name == "bn_step":  # rows at time steps of their own
            norm = build_norm(name, F, **options).double()
            own = x[rows].clone().requires_grad_()
            y = norm(own, None, torch.tensor([0, 3, 3, 0, 3, 0])[rows])
            (grad,) = torch.autograd.grad((y * target[rows]).sum(), own)
            found["steps " + label(options)] = [y.detach(), grad, *norm.buffers()]
    return found


def ragged(rows: slice) -> dict[str, list[Tensor]]:
    """Each process pads to its own longest row, outside a recurrence."""
    found: dict[str, list[Tensor]] = {}
    for name, options in batch_norms():
        x, target = torch.randn(2, 6, 5, F, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        columns = int(SHORT[rows].max())
        mask = torch.arange(columns) < SHORT[rows].unsqueeze(1)
        norm = build_norm(name, F, **options).double()
        own = x[rows, :columns].clone().requires_grad_()
        y = norm(own, mask) * mask.unsqueeze(-1)
        (grad,) = torch.autograd.grad((y * target[rows, :columns]).sum(), own)
        found[name + label(options)] = [y.detach(), grad, *norm.buffers()]
    return found


def recomputed(rows: slice, batches: int) -> list[Tensor]:
    norm = build_norm("bn_step", F).double()
    x = torch.randn(6, 5, F, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    recompute_statistics(norm, [(x[rows], MASK[rows])] * batches)
    return list(norm.buffers())


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(results(PARTS[rank]), f"{folder}/{rank}.pt")
    torch.save(ragged(PARTS[rank]), f"{folder}/ragged{rank}.pt")
    torch.save(recomputed(PARTS[rank], 2), f"{folder}/recomputed{rank}.pt")
    with pytest.raises(InputError, match="one more batch in 1 of 2 processes"):
        recomputed(PARTS[rank], 2 + rank)
    # A ghost batch of one row takes the stored values, as a step with one row does.
    ghost = build_norm("bn", F, ghost_rows=2)
    assert ghost(torch.ones(1 + rank, 2, F)).eq(0).all() == (rank == 1)
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        for one, other in zip(torch.load(tmp_path / f"recomputed{rank}.pt"), recomputed(slice(None), 2), strict=True):
            torch.testing.assert_close(one, other)
    compare(results(slice(None)), tmp_path, "")
    compare(ragged(slice(None)), tmp_path, "ragged")


def compare(joined: dict[str, list[Tensor]], folder: Path, kind: str) -> None:
    for rank, rows in enumerate(PARTS):
        for key, values in torch.load(folder / f"{kind}{rank}.pt").items():
            y, grad, *buffers = joined[key]
            longest = values[0].shape[1]
            torch.testing.assert_close(values[0], y[rows, :longest])
            torch.testing.assert_close(values[1], grad[rows, :longest])
            for one, other in zip(values[2:], buffers, strict=True):
                torch.testing.assert_close(one, other)
