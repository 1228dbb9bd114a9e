"""Whether a GPU may multiply float32 numbers in TF32, whose products have 10 bits after the point in place of 23."""

from __future__ import annotations

import torch

__all__ = ["cudnn_as_cublas"]


def cudnn_as_cublas() -> None:
    """Let cuDNN use TF32 where cuBLAS may, and nowhere else.

    PyTorch's default is cuDNN, on which its LSTM, GRU and RNN run, but not cuBLAS, with which normalized ones multiply:
    a comparison would be one of precisions. `torch.set_float32_matmul_precision("high")` before is the option for both.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
