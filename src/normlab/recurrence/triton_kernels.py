"""One time step of a normalized LSTM layer in Triton, forward and backward, all but the matrix products.

Needs `triton`, which torch brings along where it is built for a GPU. The arithmetic is that of reference.py; cuda.py
says what the buffers are and calls these.

A program owns a tile of the B x H hidden units with the entries of all four gates. What a norm pools must lie in one
tile: statistics of a row (ln, rms, gn) need a tile as wide as H, those over the batch (bn, bn_step) one as tall as B.
No program reads what it or another one wrote in the same launch. A norm's `weight` and `bias` are always given, as ones
and zeros where it has none.

Shape suffixes: R rows and U hidden units of a tile; the values of a gate are R x U.
"""

# Its type checker sees `triton.jit` without running it, takes tuples for nothing, and numbers for no constexpr.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

NONE = tl.constexpr(0)  # as in kernels.c
ROWS = tl.constexpr(1)
BATCH = tl.constexpr(2)
STORED = tl.constexpr(3)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _tanh(x):
    """By exp, but near 0 by its series, where 1 - exp would cancel; Triton's own is not in its interpreter."""
    size = tl.abs(x)
    shrunk = tl.exp(-2 * size)
    far = (1 - shrunk) / (1 + shrunk)
    square = size * size
    series = 0.02186948853615520282 + square * -0.00886323552990219657
    series = -0.05396825396825396825 + square * series
    series = 0.13333333333333333333 + square * series
    series = -0.33333333333333333333 + square * series
    y = tl.where(size < 0.2, size + size * square * series, far)
    return tl.where(x < 0, -y, y)


@triton.jit
def _load_gates(ptr, offset, inside, hidden: tl.constexpr, GATES: tl.constexpr = 4):
    x = ()
    for gate in tl.static_range(GATES):
        x += (tl.load(ptr + offset + gate * hidden, mask=inside, other=0),)
    return x


@triton.jit
def _store_gates(ptr, offset, inside, hidden: tl.constexpr, x, GATES: tl.constexpr = 4):
    for gate in tl.static_range(GATES):
        tl.store(ptr + offset + gate * hidden, x[gate], mask=inside)


@triton.jit
def _tile(
    time, down, across, rows, hidden: tl.constexpr, mask_ptr, count_ptr, MASKED: tl.constexpr, R: tl.constexpr,
    U: tl.constexpr,
):  # fmt: skip
    """Rows and hidden units of a tile, which of its entries exist and which are real, and the time step's real rows."""
    row_R1 = (down * R + tl.arange(0, R))[:, None]
    unit_1U = (across * U + tl.arange(0, U))[None, :]
    exists = (row_R1 < rows) & (unit_1U < hidden)
    real, count = exists, rows
    if MASKED:
        real = exists & (tl.load(mask_ptr + time * rows + row_R1, mask=row_R1 < rows, other=0) != 0)
        count = tl.load(count_ptr + time)
    return row_R1, unit_1U, exists, real, count


# Statistics of a row, pooled over its features (GATES x H, in a tuple of GATES) or over equal groups of them.


@triton.jit
def _in_group(inside, feature, group, width, GROUPS: tl.constexpr):
    if GROUPS > 1:
        inside = inside & (feature // width == group)
    return inside


@triton.jit
def _zeros(x, GATES: tl.constexpr):
    y = ()
    for gate in tl.static_range(GATES):
        y += (tl.zeros_like(x[gate]),)
    return y


@triton.jit
def _times(x, y, GATES: tl.constexpr):
    product = ()
    for gate in tl.static_range(GATES):
        product += (x[gate] * y[gate],)
    return product


@triton.jit
def _row_mean(x, real, unit_1U, hidden: tl.constexpr, group, GROUPS: tl.constexpr, GATES: tl.constexpr):
    """Of a row's features in `group`, over all gates together."""
    width = GATES * hidden // GROUPS
    total = tl.zeros_like(x[0])
    for gate in tl.static_range(GATES):
        total += tl.where(_in_group(real, unit_1U + gate * hidden, group, width, GROUPS), x[gate], 0)
    return tl.sum(total, 1, keep_dims=True) / width


@triton.jit
def _rows(x, real, row_R1, unit_1U, rows, hidden: tl.constexpr, spread_ptr, site: tl.constexpr, GATES: tl.constexpr):
    """`x` normalized, 0 where nothing is real; stores scale = 1 / sqrt(var + eps)."""
    GROUPS: tl.constexpr = site[1]
    width = GATES * hidden // GROUPS
    y = _zeros(x, GATES)
    for group in range(GROUPS):
        deviation = x
        if site[2]:
            mean = _row_mean(x, real, unit_1U, hidden, group, GROUPS, GATES)
            deviation = ()
            for gate in tl.static_range(GATES):
                deviation += (x[gate] - mean,)
        var = _row_mean(_times(deviation, deviation, GATES), real, unit_1U, hidden, group, GROUPS, GATES)
        scale = tl.rsqrt(var + site[3])
        tl.store(spread_ptr + row_R1 * GROUPS + group, scale, mask=row_R1 < rows)
        done = ()
        for gate in tl.static_range(GATES):
            inside = _in_group(real, unit_1U + gate * hidden, group, width, GROUPS)
            done += (tl.where(inside, deviation[gate] * scale, y[gate]),)
        y = done
    return y


@triton.jit
def _rows_backward(
    d, y, real, row_R1, unit_1U, rows, hidden: tl.constexpr, spread_ptr, site: tl.constexpr, GATES: tl.constexpr
):
    """The gradient of `x` from that of the normalized `y`, both 0 where nothing is real."""
    GROUPS: tl.constexpr = site[1]
    width = GATES * hidden // GROUPS
    d_x = _zeros(d, GATES)
    for group in range(GROUPS):
        scale = tl.load(spread_ptr + row_R1 * GROUPS + group, mask=row_R1 < rows, other=0)
        along = _row_mean(_times(d, y, GATES), real, unit_1U, hidden, group, GROUPS, GATES)
        mean = tl.zeros_like(along)
        if site[2]:
            mean = _row_mean(d, real, unit_1U, hidden, group, GROUPS, GATES)
        done = ()
        for gate in tl.static_range(GATES):
            inside = _in_group(real, unit_1U + gate * hidden, group, width, GROUPS)
            done += (tl.where(inside, (d[gate] - mean - y[gate] * along) * scale, d_x[gate]),)
        d_x = done
    return d_x


# Statistics of a feature: over the rows of this time step, or stored.


@triton.jit
def _column(x, real, feature_1U, unit_1U, time, hidden: tl.constexpr, features, count, statistics, site: tl.constexpr):
    """`x` normalized; a batch's mean and var are stored. `statistics`: as `_Statistics.arguments` of cuda.py."""
    mean_ptr, spread_ptr, stored_mean_ptr, stored_scale_ptr, stored_stride = statistics
    exists = unit_1U < hidden
    if site[0] == BATCH:
        share = tl.maximum(count, 1)
        mean = tl.sum(tl.where(real, x, 0), 0, keep_dims=True) / share
        deviation = tl.where(real, x - mean, 0)
        var = tl.sum(deviation * deviation, 0, keep_dims=True) / share
        tl.store(mean_ptr + time * features + feature_1U, mean, mask=exists)
        tl.store(spread_ptr + time * features + feature_1U, var, mask=exists)
        scale = tl.rsqrt(var + site[3])
        if stored_mean_ptr is not None:
            alone = count <= 1
            at = time * stored_stride + feature_1U
            mean = tl.where(alone, tl.load(stored_mean_ptr + at, mask=exists, other=0), mean)
            scale = tl.where(alone, tl.load(stored_scale_ptr + at, mask=exists, other=0), scale)
    else:
        at = time * stored_stride + feature_1U
        mean = tl.load(stored_mean_ptr + at, mask=exists, other=0)
        scale = tl.load(stored_scale_ptr + at, mask=exists, other=0)
    return (x - mean) * scale


@triton.jit
def _column_backward(
    d, y, real, feature_1U, unit_1U, time, hidden: tl.constexpr, features, count, statistics, site: tl.constexpr
):
    """The gradient of `x` from that of the normalized `y`, both 0 where nothing is real."""
    _, spread_ptr, _, stored_scale_ptr, stored_stride = statistics
    exists = unit_1U < hidden
    if site[0] == BATCH:
        scale = tl.rsqrt(tl.load(spread_ptr + time * features + feature_1U, mask=exists, other=0) + site[3])
        share = tl.maximum(count, 1)
        mean = tl.sum(tl.where(real, d, 0), 0, keep_dims=True) / share
        along = tl.sum(tl.where(real, d * y, 0), 0, keep_dims=True) / share
        d_x = (d - mean - y * along) * scale
        if stored_scale_ptr is not None:
            stored = tl.load(stored_scale_ptr + time * stored_stride + feature_1U, mask=exists, other=0)
            d_x = tl.where(count <= 1, d * stored, d_x)
    else:
        d_x = d * tl.load(stored_scale_ptr + time * stored_stride + feature_1U, mask=exists, other=0)
    return tl.where(real, d_x, 0)


# A site, whatever its kind. `site`: the first four of `_Fixed` of cuda.py.


@triton.jit
def _site(
    x, real, row_R1, unit_1U, time, rows, hidden: tl.constexpr, count, statistics, site: tl.constexpr,
    GATES: tl.constexpr,
):  # fmt: skip
    """`x` normalized, whatever the kind of `site`: the first four of `_Fixed` of cuda.py."""
    y = x
    if site[0] == ROWS:
        spread_ptr = statistics[1] + time * rows * site[1]
        y = _rows(x, real, row_R1, unit_1U, rows, hidden, spread_ptr, site, GATES)
    elif site[0] != NONE:
        y = ()
        for gate in tl.static_range(GATES):
            at = unit_1U + gate * hidden
            y += (_column(x[gate], real, at, unit_1U, time, hidden, GATES * hidden, count, statistics, site),)
    return y


@triton.jit
def _site_backward(
    d, y, real, row_R1, unit_1U, time, rows, hidden: tl.constexpr, count, statistics, site: tl.constexpr,
    GATES: tl.constexpr,
):  # fmt: skip
    """The gradient of `x` from that of `y`; not for a bare site."""
    if site[0] == ROWS:
        spread_ptr = statistics[1] + time * rows * site[1]
        d_x = _rows_backward(d, y, real, row_R1, unit_1U, rows, hidden, spread_ptr, site, GATES)
    else:
        d_x = ()
        for gate in tl.static_range(GATES):
            at = unit_1U + gate * hidden
            d_gate = _column_backward(
                d[gate], y[gate], real, at, unit_1U, time, hidden, GATES * hidden, count, statistics, site
            )
            d_x += (d_gate,)
    return d_x


@triton.jit
def _affine_backward(
    d, normalized_ptr, weight_ptr, here, real, row_R1, unit_1U, time, rows, hidden: tl.constexpr, count, statistics,
    site: tl.constexpr, GATES: tl.constexpr,
):  # fmt: skip
    """The gradient of what a site took, from that of what it gave, with weight and bias."""
    if site[0] != NONE:
        y = _load_gates(normalized_ptr, here, real, hidden, GATES)
        d = _times(d, _load_gates(weight_ptr, unit_1U, unit_1U < hidden, hidden, GATES), GATES)
        d = _site_backward(d, y, real, row_R1, unit_1U, time, rows, hidden, count, statistics, site, GATES)
    return d


@triton.jit
def normalize_input(
    rows, hidden: tl.constexpr, mask_ptr, count_ptr, x_ptr, normalized_ptr, statistics,
    site: tl.constexpr, MASKED: tl.constexpr, R: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """The input site, T x B x 4H, before weight and bias; grid (T x tiles down) x tiles across.

    CUDA allows 65,535 programs along all but the first dimension.
    """
    tiles_down = tl.cdiv(rows, R)
    time = (tl.program_id(0) // tiles_down).to(tl.int64)
    row_R1, unit_1U, exists, real, count = _tile(
        time, tl.program_id(0) % tiles_down, tl.program_id(1), rows, hidden, mask_ptr, count_ptr, MASKED, R, U
    )
    here = (time * rows + row_R1) * 4 * hidden + unit_1U
    x = _load_gates(x_ptr, here, real, hidden)
    y = _site(x, real, row_R1, unit_1U, time, rows, hidden, count, statistics, site, 4)
    _store_gates(normalized_ptr, here, exists, hidden, y)


@triton.jit
def normalize_input_backward(
    rows, hidden: tl.constexpr, mask_ptr, count_ptr, d_gates_ptr, normalized_ptr, weight_ptr, d_x_ptr, statistics,
    site: tl.constexpr, MASKED: tl.constexpr, R: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """The gradient of the input projection, from those of the gates; grid as in `normalize_input`."""
    tiles_down = tl.cdiv(rows, R)
    time = (tl.program_id(0) // tiles_down).to(tl.int64)
    row_R1, unit_1U, exists, real, count = _tile(
        time, tl.program_id(0) % tiles_down, tl.program_id(1), rows, hidden, mask_ptr, count_ptr, MASKED, R, U
    )
    here = (time * rows + row_R1) * 4 * hidden + unit_1U
    d_x = _affine_backward(
        _load_gates(d_gates_ptr, here, real, hidden), normalized_ptr, weight_ptr, here, real, row_R1, unit_1U, time,
        rows, hidden, count, statistics, site, 4,
    )  # fmt: skip
    _store_gates(d_x_ptr, here, exists, hidden, d_x)


@triton.jit(do_not_specialize=["time"])
def forward_step(
    time, rows, hidden: tl.constexpr, mask_ptr, count_ptr,
    input_ptr, input_weight_ptr, bias_ptr, products_ptr, hidden_weight_ptr, cell_weight_ptr, cell_bias_ptr,
    hidden_statistics, cell_statistics,
    cells_ptr, states_ptr, low_states_ptr, gates_ptr, squashed_ptr, hidden_normalized_ptr, cell_normalized_ptr,
    cells_held, hidden_site: tl.constexpr, cell_site: tl.constexpr, MASKED: tl.constexpr, KEPT: tl.constexpr,
    R: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """h and c of one time step, and what backward needs, from the recurrent product B x 4H; grid tiles down x across.

    `cells` and `states` begin with those before the first time step. Without `states` h is known and left out, and
    `products` are those of all time steps.
    """
    time = time.to(tl.int64)
    row_R1, unit_1U, exists, real, count = _tile(
        time, tl.program_id(0), tl.program_id(1), rows, hidden, mask_ptr, count_ptr, MASKED, R, U
    )
    column = unit_1U < hidden
    state = row_R1 * hidden + unit_1U
    gates = row_R1 * 4 * hidden + unit_1U
    size = tl.cast(rows * hidden, tl.int64)
    c = tl.load(cells_ptr + (time % cells_held) * size + state, mask=exists, other=0)

    if states_ptr is None:
        products_ptr += time * 4 * size
    product = _load_gates(products_ptr, gates, real, hidden)
    y = _site(product, real, row_R1, unit_1U, time, rows, hidden, count, hidden_statistics, hidden_site, 4)
    if KEPT and hidden_site[0] != NONE:
        _store_gates(hidden_normalized_ptr + time * 4 * size, gates, exists, hidden, y)
    i, f, g, o = y
    x_i, x_f, x_g, x_o = _load_gates(input_ptr + time * 4 * size, gates, real, hidden)
    w_i, w_f, w_g, w_o = _load_gates(hidden_weight_ptr, unit_1U, column, hidden)
    v_i, v_f, v_g, v_o = _load_gates(input_weight_ptr, unit_1U, column, hidden)
    b_i, b_f, b_g, b_o = _load_gates(bias_ptr, unit_1U, column, hidden)
    i = _sigmoid(i * w_i + x_i * v_i + b_i)
    f = _sigmoid(f * w_f + x_f * v_f + b_f)
    g = _tanh(g * w_g + x_g * v_g + b_g)
    o = _sigmoid(o * w_o + x_o * v_o + b_o)
    new_c = f * c + i * g

    (y,) = _site((new_c,), real, row_R1, unit_1U, time, rows, hidden, count, cell_statistics, cell_site, 1)
    if KEPT and cell_site[0] != NONE:
        tl.store(cell_normalized_ptr + time * size + state, y, mask=exists)
    w = tl.load(cell_weight_ptr + unit_1U, mask=column, other=0)
    b = tl.load(cell_bias_ptr + unit_1U, mask=column, other=0)
    squashed = _tanh(y * w + b)
    if KEPT:
        _store_gates(gates_ptr + time * 4 * size, gates, exists, hidden, (i, f, g, o))
        tl.store(squashed_ptr + time * size + state, squashed, mask=exists)
    if MASKED:
        new_c = tl.where(real, new_c, c)
    tl.store(cells_ptr + ((time + 1) % cells_held) * size + state, new_c, mask=exists)
    if states_ptr is not None:
        h = o * squashed
        if MASKED:
            h = tl.where(real, h, tl.load(states_ptr + time * size + state, mask=exists, other=0))
        tl.store(states_ptr + (time + 1) * size + state, h, mask=exists)
        if low_states_ptr is not None:
            tl.store(low_states_ptr + (time + 1) * size + state, h, mask=exists)


@triton.jit(do_not_specialize=["time"])
def backward_step(
    time, rows, hidden: tl.constexpr, mask_ptr, count_ptr,
    hidden_weight_ptr, cell_weight_ptr, hidden_statistics, cell_statistics,
    cells_ptr, gates_ptr, squashed_ptr, hidden_normalized_ptr, cell_normalized_ptr,
    d_output_ptr, d_next_ptr, d_h_ptr, d_c_ptr, d_gates_ptr, d_product_ptr, d_cell_ptr,
    hidden_site: tl.constexpr, cell_site: tl.constexpr, MASKED: tl.constexpr, R: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Gradients of one time step; grid as in `forward_step`.

    `d_next`: of its h by way of the next step's product. `d_h` and `d_c` (2 x B x H): what later steps pass on to
    this h past padding, and to this c; read from one half and written to the other in turns. `d_cell`: of the cell
    site's output.
    """
    time = time.to(tl.int64)
    row_R1, unit_1U, exists, real, count = _tile(
        time, tl.program_id(0), tl.program_id(1), rows, hidden, mask_ptr, count_ptr, MASKED, R, U
    )
    state = row_R1 * hidden + unit_1U
    size = tl.cast(rows * hidden, tl.int64)
    here = time * size + state
    gates = time * 4 * size + row_R1 * 4 * hidden + unit_1U
    taken, passed = ((time + 1) % 2) * size + state, (time % 2) * size + state

    i, f, g, o = _load_gates(gates_ptr, gates, real, hidden)
    squashed = tl.load(squashed_ptr + here, mask=real, other=0)
    c = tl.load(cells_ptr + here, mask=real, other=0)
    d_c_later = tl.load(d_c_ptr + taken, mask=exists, other=0)
    d_h = tl.load(d_output_ptr + here, mask=exists, other=0) + tl.load(d_next_ptr + state, mask=exists, other=0)
    if MASKED:
        d_h += tl.load(d_h_ptr + taken, mask=exists, other=0)
        tl.store(d_h_ptr + passed, tl.where(real, 0, d_h), mask=exists)
        d_h = tl.where(real, d_h, 0)

    d_o = d_h * squashed * o * (1 - o)
    d_y = d_h * o * (1 - squashed * squashed)
    if cell_site[0] != NONE:
        tl.store(d_cell_ptr + here, d_y, mask=exists)
    (d_c,) = _affine_backward(
        (d_y,), cell_normalized_ptr, cell_weight_ptr, here, real, row_R1, unit_1U, time, rows, hidden, count,
        cell_statistics, cell_site, 1,
    )  # fmt: skip
    d_c = tl.where(real, d_c + d_c_later, 0)
    d_i = d_c * g * i * (1 - i)
    d_f = d_c * c * f * (1 - f)
    d_g = d_c * i * (1 - g * g)
    tl.store(d_c_ptr + passed, tl.where(real, d_c * f, d_c_later), mask=exists)
    d = (d_i, d_f, d_g, d_o)
    _store_gates(d_gates_ptr, gates, exists, hidden, d)
    if d_product_ptr is not None:
        d_product = _affine_backward(
            d, hidden_normalized_ptr, hidden_weight_ptr, gates, real, row_R1, unit_1U, time, rows, hidden, count,
            hidden_statistics, hidden_site, 4,
        )  # fmt: skip
        _store_gates(d_product_ptr, gates, exists, hidden, d_product)
