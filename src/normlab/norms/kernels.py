"""Calls the functions of kernels.c, which machine/c_kernels.py builds.

Shape suffixes: B batch, T time, F features.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from normlab.machine.c_kernels import Kernels

__all__ = ["PREFIX", "SAVED_SECONDS", "PrefixCall"]

SAVED_SECONDS = 5e-9
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
        *((name, _POINTER) for name in ("count_before", "mean_before", "square_before")),
        *((name, _Strided) for name in ("x", "y")),
        *((name, _POINTER) for name in ("count", "mean", "square")),
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


class PrefixCall:
    """One call of the kernels, for forward and then backward; what it computes says `by_prefix` of standardized.py.

    Args:
        x_BTF: on a CPU, in the precision of `library`; anything at padding.
        carry: count, mean and square of the columns before, taken without gradient.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        x_BTF: Tensor,
        mask_BT: Tensor | None,
        carry: tuple[Tensor, Tensor, Tensor] | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> None:
        self._library = library
        self._x = x = _features_side_by_side(x_BTF)
        rows, steps, features = x.shape
        self._threads = torch.get_num_threads() if x.numel() >= SMALLEST_PARALLEL else 1
        self._told = _Prefix(rows=rows, steps=steps, features=features, threads=self._threads, eps=eps, x=_strided(x))
        mask = None if mask_BT is None else mask_BT.expand(rows, steps)
        count, mean, square = carry or (None, None, None)
        self._given = {"mask": mask, "weight": weight, "bias": bias}
        self._given |= {"count_before": count, "mean_before": mean, "square_before": square}
        for name, value in self._given.items():
            if value is not None:
                # Held on to, since the kernels get the address.
                self._given[name] = value = (value if name == "mask" else value.to(x.dtype)).contiguous()
                setattr(self._told, name, value.data_ptr())

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """y, and count, mean and square of the carry for the columns to come."""
        told, y = self._told, torch.empty_like(self._x)
        count, mean, square = (y.new_empty(len(y), 1, features) for features in (1, y.shape[-1], y.shape[-1]))
        told.y, told.count, told.mean, told.square = _strided(y), count.data_ptr(), mean.data_ptr(), square.data_ptr()
        self._library.prefix_forward(told)
        return y, count, mean, square

    def backward(self, d_y: Tensor, d_mean: Tensor, d_square: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The gradients of x, weight and bias; None for what there is none of."""
        told, threads = self._told, self._threads
        d_y, d_mean, d_square = _features_side_by_side(d_y), d_mean.contiguous(), d_square.contiguous()
        d_x = torch.empty_like(self._x)
        block = ctypes.c_int64.in_dll(self._library, "prefix_block").value
        shift, scale = d_x.new_empty(2, threads, told.steps, block)
        d_weight, d_bias = (
            None if self._given[name] is None else d_x.new_zeros(threads, told.features) for name in ("weight", "bias")
        )
        told.d_y, told.d_x = _strided(d_y), _strided(d_x)
        told.d_mean, told.d_square = d_mean.data_ptr(), d_square.data_ptr()
        told.shift, told.scale = shift.data_ptr(), scale.data_ptr()
        told.d_weight, told.d_bias = (None if total is None else total.data_ptr() for total in (d_weight, d_bias))
        self._library.prefix_backward(told)
        return d_x, None if d_weight is None else d_weight.sum(0), None if d_bias is None else d_bias.sum(0)


def _features_side_by_side(x_BTF: Tensor) -> Tensor:
    return x_BTF if x_BTF.stride(-1) == 1 else x_BTF.contiguous()


def _strided(x_BTF: Tensor) -> _Strided:
    return _Strided(x_BTF.data_ptr(), x_BTF.stride(0), x_BTF.stride(1))
