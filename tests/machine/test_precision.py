"""On a GPU cuDNN's recurrences round their products where those of cuBLAS are rounded. The switches need no GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from normlab.machine.precision import cudnn_as_cublas


@pytest.fixture
def switches() -> Iterator[None]:
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = cudnn


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(("precision", "allowed"), [("highest", False), ("high", True)])
def test_cudnn_takes_tf32_where_cublas_does(switches: None, precision: str, allowed: bool, before: bool) -> None:
    torch.backends.cudnn.allow_tf32 = before
    torch.set_float32_matmul_precision(precision)
    cudnn_as_cublas()
    assert torch.backends.cudnn.allow_tf32 is allowed
    assert torch.backends.cudnn.rnn.fp32_precision == ("tf32" if allowed else "none")
