"""One time step of a normalized GRU or RNN layer in Triton, forward and backward, all but the matrix products.

As triton_kernels.py has it for the LSTM: what a program owns, and what a norm must find in it, is said there. Here the
input is already normalized and has its bias; only the norm of the product with h is left. cuda_cells.py says what the
buffers are and calls these.

Shape suffixes: R rows and U hidden units of a tile; what each gate has of it stands in a tuple.
"""

# Its type checker sees `triton.jit` without running it, and takes tuples it returns for nothing.
# pyright: reportGeneralTypeIssues=false, reportOptionalSubscript=false

from __future__ import annotations

import triton
import triton.language as tl

from normlab.recurrence.triton_kernels import (
    NONE,
    _affine_backward,
    _load_gates,
    _sigmoid,
    _site,
    _store_gates,
    _tanh,
    _tile,
)

TANH = tl.constexpr(0)  # as in kernels.c


@triton.jit
def _product(
    product_ptr, weight_ptr, bias_ptr, normalized_ptr, real, exists, row_R1, unit_1U, time, rows, hidden: tl.constexpr,
    count, statistics, site: tl.constexpr, KEPT: tl.constexpr, GATES: tl.constexpr,
):  # fmt: skip
    """The product with h, normalized, with weight and bias; stores what `_product_backward` needs."""
    here = row_R1 * GATES * hidden + unit_1U
    x = _load_gates(product_ptr, here, real, hidden, GATES)
    x = _site(x, real, row_R1, unit_1U, time, rows, hidden, count, statistics, site, GATES)
    if KEPT and site[0] != NONE:
        size = tl.cast(rows * hidden, tl.int64)
        _store_gates(normalized_ptr + time * GATES * size, here, exists, hidden, x, GATES)
    weight = _load_gates(weight_ptr, unit_1U, unit_1U < hidden, hidden, GATES)
    bias = _load_gates(bias_ptr, unit_1U, unit_1U < hidden, hidden, GATES)
    y = ()
    for gate in tl.static_range(GATES):
        y += (x[gate] * weight[gate] + bias[gate],)
    return y


@triton.jit
def _product_backward(
    d, weight_ptr, normalized_ptr, d_product_ptr, real, exists, row_R1, unit_1U, time, rows, hidden: tl.constexpr,
    count, statistics, site: tl.constexpr, GATES: tl.constexpr,
):  # fmt: skip
    """Stores the gradient of the product with h, from that of what `_product` gave."""
    here = time * GATES * tl.cast(rows * hidden, tl.int64) + row_R1 * GATES * hidden + unit_1U
    d = _affine_backward(
        d, normalized_ptr, weight_ptr, here, real, row_R1, unit_1U, time, rows, hidden, count, statistics, site, GATES
    )
    _store_gates(d_product_ptr, here, exists, hidden, d, GATES)


@triton.jit
def _store_state(states_ptr, low_states_ptr, time, size, state, exists, real, h, before, MASKED: tl.constexpr):
    if MASKED:
        h = tl.where(real, h, before)
    tl.store(states_ptr + (time + 1) * size + state, h, mask=exists)
    if low_states_ptr is not None:
        tl.store(low_states_ptr + (time + 1) * size + state, h, mask=exists)


@triton.jit(do_not_specialize=["time"])
def gru_forward_step(
    time, rows, hidden: tl.constexpr, mask_ptr, count_ptr, product_ptr, weight_ptr, bias_ptr, statistics,
    normalized_ptr, states_ptr, low_states_ptr, gates_ptr, inner_ptr,
    site: tl.constexpr, MASKED: tl.constexpr, KEPT: tl.constexpr, R: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """h of one time step, and what backward needs, from the recurrent product B x 3H; grid tiles down x across.

    `states` begins with the one before the first time step. `gates` hold the input until they are known.
    """
    time = time.to(tl.int64)
    row_R1, unit_1U, exists, real, count = _tile(
        time, tl.program_id(0), tl.program_id(1), rows, hidden, mask_ptr, count_ptr, MASKED, R, U
    )
    size = tl.cast(rows * hidden, tl.int64)
    state = row_R1 * hidden + unit_1U
    gates = time * 3 * size + row_R1 * 3 * hidden + unit_1U

    y_r, y_z, y_n = _product(
        product_ptr, weight_ptr, bias_ptr, normalized_ptr, real, exists, row_R1, unit_1U, time, rows, hidden, count,
        statistics, site, KEPT, 3,
    )  # fmt: skip
    x_r, x_z, x_n = _load_gates(gates_ptr, gates, real, hidden, 3)
    before = tl.load(states_ptr + time * size + state, mask=exists, other=0)
    r = _sigmoid(x_r + y_r)
    z = _sigmoid(x_z + y_z)
    n = _tanh(x_n + r * y_n)
    h = (1 - z) * n + z * before
    if KEPT:
        _store_gates(gates_ptr, gates, exists, hidden, (r, z, n), 3)
        tl.store(inner_ptr + time * size + state, y_n, mask=exists)
    _store_state(states_ptr, low_states_ptr, time, size, state, exists, real, h, before, MASKED)


@triton.jit(do_not_specialize=["time"])
def gru_backward_step(
    time, rows, hidden: tl.constexpr, mask_ptr, count_ptr, weight_ptr, statistics, normalized_ptr, states_ptr,
    d_output_ptr, d_next_ptr, d_h_ptr, d_input_ptr, d_product_ptr, gates_ptr, inner_ptr,
    site: tl.constexpr, MASKED: tl.constexpr, R: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Gradients of one time step; grid as in `gru_forward_step`.

    `d_next`: of its h by way of the next step's product. `d_h` (2 x B x H): what later steps pass on to this h past
    the product; read from one half and written to the other in turns.
    """
    time = time.to(tl.int64)
    row_R1, unit_1U, exists, real, count = _tile(
        time, tl.program_id(0), tl.program_id(1), rows, hidden, mask_ptr, count_ptr, MASKED, R, U
    )
    size = tl.cast(rows * hidden, tl.int64)
    state = row_R1 * hidden + unit_1U
    here = time * size + state
    gates = time * 3 * size + row_R1 * 3 * hidden + unit_1U

    r, z, n = _load_gates(gates_ptr, gates, real, hidden, 3)
    inner = tl.load(inner_ptr + here, mask=real, other=0)
    before = tl.load(states_ptr + here, mask=real, other=0)
    d_h = tl.load(d_output_ptr + here, mask=exists, other=0) + tl.load(d_next_ptr + state, mask=exists, other=0)
    d_h += tl.load(d_h_ptr + ((time + 1) % 2) * size + state, mask=exists, other=0)
    tl.store(d_h_ptr + (time % 2) * size + state, tl.where(real, d_h * z, d_h), mask=exists)
    d_h = tl.where(real, d_h, 0)
    d_z = d_h * (before - n) * z * (1 - z)
    d_n = d_h * (1 - z) * (1 - n * n)
    d_r = d_n * inner * r * (1 - r)
    _store_gates(d_input_ptr, gates, exists, hidden, (d_r, d_z, d_n), 3)
    _product_backward(
        (d_r, d_z, d_n * r), weight_ptr, normalized_ptr, d_product_ptr, real, exists, row_R1, unit_1U, time, rows,
        hidden, count, statistics, site, 3,
    )  # fmt: skip


@triton.jit(do_not_specialize=["time"])
def rnn_forward_step(
    time, rows, hidden: tl.constexpr, mask_ptr, count_ptr, product_ptr, weight_ptr, bias_ptr, statistics,
    normalized_ptr, states_ptr, low_states_ptr,
    site: tl.constexpr, MASKED: tl.constexpr, KEPT: tl.constexpr, R: tl.constexpr, U: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """h of one time step, and what backward needs, from the recurrent product B x H; grid tiles down x across.

    `states` begins with the one before the first time step. The others hold the input until they are known.
    """
    time = time.to(tl.int64)
    row_R1, unit_1U, exists, real, count = _tile(
        time, tl.program_id(0), tl.program_id(1), rows, hidden, mask_ptr, count_ptr, MASKED, R, U
    )
    size = tl.cast(rows * hidden, tl.int64)
    state = row_R1 * hidden + unit_1U

    y = _product(
        product_ptr, weight_ptr, bias_ptr, normalized_ptr, real, exists, row_R1, unit_1U, time, rows, hidden, count,
        statistics, site, KEPT, 1,
    )  # fmt: skip
    h = tl.load(states_ptr + (time + 1) * size + state, mask=real, other=0) + y[0]
    h = _tanh(h) if ACTIVATION == TANH else tl.where(h < 0, 0, h)  # NaN stays
    before = h
    if MASKED:
        before = tl.load(states_ptr + time * size + state, mask=exists, other=0)
    _store_state(states_ptr, low_states_ptr, time, size, state, exists, real, h, before, MASKED)


@triton.jit(do_not_specialize=["time"])
def rnn_backward_step(
    time, rows, hidden: tl.constexpr, mask_ptr, count_ptr, weight_ptr, statistics, normalized_ptr, states_ptr,
    d_output_ptr, d_next_ptr, d_h_ptr, d_input_ptr, d_product_ptr,
    site: tl.constexpr, MASKED: tl.constexpr, R: tl.constexpr, U: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Gradients of one time step; grid as in `rnn_forward_step`, `d_next` and `d_h` as in `gru_backward_step`.

    Without `d_product` the gradient of the product is that of the input.
    """
    time = time.to(tl.int64)
    row_R1, unit_1U, exists, real, count = _tile(
        time, tl.program_id(0), tl.program_id(1), rows, hidden, mask_ptr, count_ptr, MASKED, R, U
    )
    size = tl.cast(rows * hidden, tl.int64)
    state = row_R1 * hidden + unit_1U
    here = time * size + state

    h = tl.load(states_ptr + size + here, mask=real, other=0)
    d_h = tl.load(d_output_ptr + here, mask=exists, other=0) + tl.load(d_next_ptr + state, mask=exists, other=0)
    if MASKED:
        d_h += tl.load(d_h_ptr + ((time + 1) % 2) * size + state, mask=exists, other=0)
        tl.store(d_h_ptr + (time % 2) * size + state, tl.where(real, 0, d_h), mask=exists)
        d_h = tl.where(real, d_h, 0)
    d = d_h * (1 - h * h) if ACTIVATION == TANH else tl.where(h <= 0, 0, d_h)
    tl.store(d_input_ptr + here, d, mask=exists)
    if d_product_ptr is not None:
        _product_backward(
            (d,), weight_ptr, normalized_ptr, d_product_ptr, real, exists, row_R1, unit_1U, time, rows, hidden, count,
            statistics, site, 1,
        )  # fmt: skip
