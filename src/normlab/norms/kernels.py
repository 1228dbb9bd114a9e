"""Calls the functions of kernels.c, which machine/c_kernels.py builds.

Shape suffixes: B batch, T time, F features.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from normlab.machine.c_kernels import Kernels

__all__ = ["PREFIX", "SAVED_SECONDS", "by_prefix", "by_prefix_backward"]

SAVED_SECONDS = 6e-9
"""Of an entry of B x T x F, forward and backward, over torch operators, with 2 cores of 2024: passes over memory."""
SMALLEST_PARALLEL = 16384
"""Entries below which a call is not worth waking a second thread for."""
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64


class _Strided(ctypes.Structure):
    """`tensor` of kernels.c."""

    _fields_ = (("data", _POINTER), ("row", _INT), ("step", _INT))


class _Prefix(ctypes.Structure):
    """`prefix` of kernels.c."""

    _fields_ = (
        *((name, _INT) for name in ("rows", "steps", "features", "threads")),
        ("eps", ctypes.c_double),
        *((name, _POINTER) for name in ("mask", "weight", "bias")),
        *((name, _Strided) for name in ("x", "y")),
        *((name, _POINTER) for name in ("mean", "square")),
        *((name, _Strided) for name in ("d_y", "d_x")),
        *((name, _POINTER) for name in ("d_mean", "d_square", "shift", "scale", "d_weight", "d_bias")),
    )


PREFIX = Kernels(
    Path(__file__).with_name("kernels.c"),
    name="inorm",
    without="inorm over a prefix runs on torch operators, more slowly",
    functions=("prefix_forward", "prefix_backward"),
    arguments=(ctypes.POINTER(_Prefix),),
    build_seconds=0.7,
)


class _Call:
    """What forward and backward are told; holds the tensors whose addresses it gives."""

    def __init__(
        self, x_BTF: Tensor, mask_BT: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> None:
        self.x = _features_side_by_side(x_BTF)
        self.mask = None if mask_BT is None else mask_BT.expand(x_BTF.shape[:2]).contiguous()
        self.weight, self.bias = (None if value is None else value.to(self.x).contiguous() for value in (weight, bias))
        rows, steps, features = self.x.shape
        self.threads = torch.get_num_threads() if self.x.numel() >= SMALLEST_PARALLEL else 1
        self.told = _Prefix(rows=rows, steps=steps, features=features, threads=self.threads, eps=eps)
        self.told.x = _strided(self.x)
        for name in ("mask", "weight", "bias"):
            value = getattr(self, name)
            setattr(self.told, name, None if value is None else value.data_ptr())


def by_prefix(
    library: ctypes.CDLL,
    x_BTF: Tensor,
    mask_BT: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `by_prefix` of standardized.py says, without gradient: y, and `mean` and `square` of the carry (B x 1 x F).

    Args:
        x_BTF: on a CPU, in the precision of `library`; anything at padding.
    """
    call = _Call(x_BTF, mask_BT, weight, bias, eps)
    y = torch.empty_like(call.x)
    mean, square = y.new_empty(2, len(y), 1, y.shape[-1])
    call.told.y, call.told.mean, call.told.square = _strided(y), mean.data_ptr(), square.data_ptr()
    library.prefix_forward(call.told)
    return y, mean, square


def by_prefix_backward(
    library: ctypes.CDLL,
    x_BTF: Tensor,
    mask_BT: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    grads: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias from those of y, mean and square."""
    call, told = (made := _Call(x_BTF, mask_BT, weight, bias, eps)), made.told
    d_y, d_mean, d_square = _features_side_by_side(grads[0]), grads[1].contiguous(), grads[2].contiguous()
    d_x = torch.empty_like(call.x)
    block = ctypes.c_int64.in_dll(library, "prefix_block").value
    shift, scale = d_x.new_empty(2, call.threads, told.steps, block)
    told.d_y, told.d_x = _strided(d_y), _strided(d_x)
    told.d_mean, told.d_square = d_mean.data_ptr(), d_square.data_ptr()
    told.shift, told.scale = shift.data_ptr(), scale.data_ptr()
    found: list[Tensor | None] = []
    for name, parameter in (("d_weight", weight), ("d_bias", bias)):
        found.append(None if parameter is None else d_x.new_zeros(call.threads, told.features))
        setattr(told, name, None if found[-1] is None else found[-1].data_ptr())
    library.prefix_backward(told)
    d_weight, d_bias = (
        None if total is None or parameter is None else total.sum(0).to(parameter.dtype)
        for total, parameter in zip(found, (weight, bias), strict=True)
    )
    return d_x, d_weight, d_bias


def _features_side_by_side(x_BTF: Tensor) -> Tensor:
    return x_BTF if x_BTF.stride(-1) == 1 else x_BTF.contiguous()


def _strided(x_BTF: Tensor) -> _Strided:
    return _Strided(x_BTF.data_ptr(), x_BTF.stride(0), x_BTF.stride(1))
