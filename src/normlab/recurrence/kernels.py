"""Mirrors the structures of kernels.c, which machine/c_kernels.py builds."""

from __future__ import annotations

import ctypes
from pathlib import Path

from normlab.machine.c_kernels import Kernels, compiler, left_out

__all__ = ["LSTM", "Sequence", "Site", "absence", "compiler", "find", "left_out", "load"]

BUILD_SECONDS = 1.0
"""One precision, on one core of 2024."""
SAVED_SECONDS = 350e-6
"""Of a time step, forward and backward, over torch operators: mostly what starting those costs, whatever the sizes."""
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64


class Site(ctypes.Structure):
    """`site` of kernels.c."""

    _fields_ = (
        *((name, _INT) for name in ("kind", "features", "groups", "centered", "stored_stride")),
        ("eps", ctypes.c_double),
        *((name, _POINTER) for name in ("weight", "bias", "mean", "spread", "stored_mean", "stored_scale")),
        *((name, _POINTER) for name in ("normalized", "d_weight", "d_bias")),
    )


class Sequence(ctypes.Structure):
    """`sequence` of kernels.c."""

    _fields_ = (
        *((name, _INT) for name in ("rows", "hidden", "threads", "by_columns", "kept")),
        *((name, _POINTER) for name in ("mask", "count", "projected", "bias", "first_h", "first_c")),
        *((name, _POINTER) for name in ("gates", "cell", "squashed", "output", "d_output", "d_gates")),
        ("d_gates_kept", _INT),
        *((name, _POINTER) for name in ("d_product", "d_projected", "d_h", "d_cell", "d_squashed", "d_bias")),
        *((name, Site) for name in ("input_site", "hidden_site", "cell_site")),
    )


LSTM = Kernels(
    Path(__file__).with_name("kernels.c"),
    name="LSTM",
    without="normalized LSTMs run without their faster kernels",
    functions=[f"{cell}{way}" for cell in ("", "gru_", "tanh_", "relu_") for way in ("forward", "backward")],
    arguments=(ctypes.POINTER(Sequence), _INT, _POINTER),
    build_seconds=BUILD_SECONDS,
)
find, load, absence = LSTM.find, LSTM.load, LSTM.absence
