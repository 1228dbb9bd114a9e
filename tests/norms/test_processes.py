"""Two processes give what one process gives on the joined batch: outputs, gradients, stored values."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import normlab.models.lstm
from normlab.config import available_norms
from normlab.norms import build_norm, norm_class

F = 3
LENGTHS = torch.tensor([5, 4, 2, 3, 3])
MASK = torch.arange(5) < LENGTHS.unsqueeze(1)
PARTS = (slice(0, 2), slice(2, 5))  # unequal rows; the second part's longest row is shorter


def batch_norms() -> list[str]:
    return [name for name in available_norms() if not norm_class(name).batch_independent]


def results(rows: slice) -> dict[str, list[Tensor]]:
    """Outputs and input gradients of these rows, and stored values after, for each batch norm and an LSTM with it."""
    found: dict[str, list[Tensor]] = {}
    for name in batch_norms():
        x, target = torch.randn(2, 5, 5, F, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        norm = build_norm(name, F).double()
        own = x[rows].clone().requires_grad_()
        y = norm(own, MASK[rows]) * MASK[rows].unsqueeze(-1)
        (grad,) = torch.autograd.grad((y * target[rows]).sum(), own)
        found[name] = [y.detach(), grad, *norm.buffers()]

        torch.manual_seed(0)
        lstm = normlab.models.lstm.LSTM(F, F, norm=name, batch_first=True, dtype=torch.float64)
        lengths = LENGTHS[rows]
        longest = int(lengths.max())
        own = x[rows, :longest].clone().requires_grad_()
        out, _ = lstm(own, lengths=lengths)
        assert isinstance(out, Tensor)
        (grad,) = torch.autograd.grad((out * target[rows, :longest]).sum(), own)
        found["lstm " + name] = [out.detach(), grad, *lstm.buffers()]
    return found


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(results(PARTS[rank]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    joined = results(slice(None))
    for rank, rows in enumerate(PARTS):
        for key, values in torch.load(tmp_path / f"{rank}.pt").items():
            y, grad, *buffers = joined[key]
            longest = values[0].shape[1]
            torch.testing.assert_close(values[0], y[rows, :longest])
            torch.testing.assert_close(values[1], grad[rows, :longest])
            for one, other in zip(values[2:], buffers, strict=True):
                torch.testing.assert_close(one, other)
