/* One time step of a normalized LSTM layer, forward and backward, all but the matrix products.

Compiled once per precision by kernels.py, which mirrors the two structures below. The arithmetic is that of
reference.py; fast.py says what the buffers are.

A step is cut by rows where statistics belong to a row (ln, rms, gn), by columns where they belong to a hidden unit
(bn, bn_step): each part then needs nothing of the others, and one parallel region does a whole step. Loops that
vectorize say so with `omp simd`, which promises that buffers overlap at equal indices or not at all. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef NORMLAB_DOUBLE
typedef double real;
#else
typedef float real;
#endif

enum { NONE, ROWS, BATCH, STORED };
#define BLOCK 64

typedef struct {
    int64_t kind, features, groups, centered, stored_stride;
    double eps;
    const real *weight, *bias;               /* features, or NULL */
    real *mean, *spread;                     /* ROWS: T x B x groups, 1 / sqrt(var + eps); BATCH: T x features, var */
    const real *stored_mean, *stored_scale;  /* (T or 1) x features, 1 / sqrt(var + eps) */
    real *normalized;                        /* (T or 1) x B x features: before weight and bias */
    real *d_weight, *d_bias;                 /* threads x features */
} site;

typedef struct {
    int64_t rows, hidden, threads, by_columns;
    int64_t kept;             /* 1: buffers hold all time steps; 0: the current one alone */
    const uint8_t *mask;      /* T x B, or NULL */
    const int64_t *count;     /* T, or NULL: all rows */
    real *projected;          /* T x B x 4H; overwritten where the input site is normalized */
    const real *bias;         /* 4H, or NULL */
    const real *first_h, *first_c;
    real *gates, *cell, *squashed; /* after their nonlinearities; c; tanh of the cell site's output */
    real *output;             /* T x B x H */
    const real *d_output;     /* T x B x H */
    real *d_gates;            /* (T or 1) x B x 4H */
    int64_t d_gates_kept;
    real *d_product, *d_projected; /* T x B x 4H */
    real *d_h, *d_cell, *d_squashed; /* B x H: what padding passes on; c; scratch */
    real *d_bias;             /* threads x 4H */
    site input_site, hidden_site, cell_site;
} sequence;

#ifdef NORMLAB_DOUBLE
static inline real sigmoid(real x) { return 1 / (1 + exp(-x)); }
static inline real tangent(real x) { return tanh(x); }
static inline real root(real x) { return sqrt(x); }
#else
/* exp(x) - 1 by a polynomial, which any compiler vectorizes; relative error about 1e-7 near 0 too. */
static inline float less_one(float x) {
    x = x > 87.0f ? 87.0f : x;
    x = x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * (r * r) + r;
    union { int32_t bits; float value; } power = {((int32_t)n + 127) << 23};
    return power.value * p + (power.value - 1);
}
static inline float sigmoid(float x) { return 1 / (2 + less_one(-x)); }
static inline float tangent(float x) {
    float e = less_one(x + x);
    return e / (e + 2);
}
static inline float root(float x) { return sqrtf(x); }
#endif

/* y += weight * x + bias */
static void add_affine(const real *x, const real *weight, const real *bias, real *y, int64_t n) {
    if (weight && bias) {
#pragma omp simd
        for (int64_t j = 0; j < n; j++) y[j] += x[j] * weight[j] + bias[j];
    } else if (weight) {
#pragma omp simd
        for (int64_t j = 0; j < n; j++) y[j] += x[j] * weight[j];
    } else {
#pragma omp simd
        for (int64_t j = 0; j < n; j++) y[j] += x[j];
    }
}

static void add_products(real *total, const real *x, const real *y, int64_t n) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) total[j] += x[j] * y[j];
}

static void add(real *total, const real *x, int64_t n) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) total[j] += x[j];
}

static inline const real *at(const real *vector, int64_t index) { return vector ? vector + index : 0; }

static inline const real *stored_at(const real *stored, const site *s, int64_t t) { return stored + t * s->stored_stride; }

static void by_stored(const site *s, int64_t t, int64_t first, int64_t n, const real *x, real *normalized) {
    const real *mean = stored_at(s->stored_mean, s, t) + first, *scale = stored_at(s->stored_scale, s, t) + first;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) normalized[j] = (x[j] - mean[j]) * scale[j];
}

static void by_stored_backward(const site *s, int64_t t, int64_t first, int64_t n, const real *d_y, real *d_x) {
    const real *weight = at(s->weight, first), *scale = stored_at(s->stored_scale, s, t) + first;
    if (weight) {
#pragma omp simd
        for (int64_t j = 0; j < n; j++) d_x[j] = d_y[j] * weight[j] * scale[j];
    } else {
#pragma omp simd
        for (int64_t j = 0; j < n; j++) d_x[j] = d_y[j] * scale[j];
    }
}

/* y += N(x) for one row. */
static void normalize_row(const site *s, int64_t t, int64_t r, int64_t rows, const real *x, real *normalized, real *y) {
    int64_t features = s->features, width = features / s->groups;
    if (s->kind == NONE) {
        add(y, x, features);
        return;
    }
    if (s->kind == STORED) {
        by_stored(s, t, 0, features, x, normalized);
    } else {
        for (int64_t g = 0; g < s->groups; g++) {
            const real *from = x + g * width;
            real *to = normalized + g * width, mean = 0, square = 0;
            if (s->centered) {
#pragma omp simd reduction(+ : mean)
                for (int64_t j = 0; j < width; j++) mean += from[j];
                mean /= width;
            }
#pragma omp simd reduction(+ : square)
            for (int64_t j = 0; j < width; j++) square += (from[j] - mean) * (from[j] - mean);
            real scale = 1 / root(square / width + (real)s->eps);
#pragma omp simd
            for (int64_t j = 0; j < width; j++) to[j] = (from[j] - mean) * scale;
            s->spread[(t * rows + r) * s->groups + g] = scale;
        }
    }
    add_affine(normalized, s->weight, s->bias, y, features);
}

/* d_x from d_y (which may be the same place) for one row. */
static void normalize_row_backward(const site *s, int64_t t, int64_t r, int64_t rows, int64_t part,
                                   const real *normalized, const real *d_y, real *d_x) {
    int64_t features = s->features, width = features / s->groups;
    if (s->kind == NONE) {
        if (d_x != d_y) memcpy(d_x, d_y, features * sizeof(real));
        return;
    }
    if (s->d_weight) add_products(s->d_weight + part * features, d_y, normalized, features);
    if (s->d_bias) add(s->d_bias + part * features, d_y, features);
    if (s->kind == STORED) {
        by_stored_backward(s, t, 0, features, d_y, d_x);
        return;
    }
    for (int64_t g = 0; g < s->groups; g++) {
        const real *from = d_y + g * width, *unit = normalized + g * width, *weight = at(s->weight, g * width);
        real *to = d_x + g * width, first = 0, second = 0;
        if (weight) {
#pragma omp simd reduction(+ : first, second)
            for (int64_t j = 0; j < width; j++) {
                real d = from[j] * weight[j];
                first += d;
                second += d * unit[j];
                to[j] = d;
            }
        } else {
#pragma omp simd reduction(+ : first, second)
            for (int64_t j = 0; j < width; j++) {
                first += from[j];
                second += from[j] * unit[j];
                to[j] = from[j];
            }
        }
        first = s->centered ? first / width : 0;
        second /= width;
        real scale = s->spread[(t * rows + r) * s->groups + g];
#pragma omp simd
        for (int64_t j = 0; j < width; j++) to[j] = (to[j] - first - unit[j] * second) * scale;
    }
}

/* y += N(x) for features [first, first + n) of all rows, n <= BLOCK. */
static void normalize_columns(const site *s, int64_t t, const sequence *q, int64_t first, int64_t n, const real *x,
                              real *normalized, real *y) {
    int64_t rows = q->rows, features = s->features;
    const uint8_t *keep = q->mask ? q->mask + t * rows : 0;
    int64_t count = q->count ? q->count[t] : rows;
    x += first, normalized += first, y += first;
    real scale[BLOCK], none[BLOCK];
    const real *mean = none;
    if (s->kind == NONE) {
        for (int64_t r = 0; r < rows; r++)
            if (!keep || keep[r]) add(y + r * features, x + r * features, n);
        return;
    }
    if (s->kind == BATCH) {
        real *batch_mean = s->mean + t * features + first, *batch_var = s->spread + t * features + first;
        real total[BLOCK], square[BLOCK], share = (real)1 / (count > 1 ? count : 1);
        memset(total, 0, sizeof total), memset(square, 0, sizeof square);
        for (int64_t r = 0; r < rows; r++)
            if (!keep || keep[r]) add(total, x + r * features, n);
        for (int64_t j = 0; j < n; j++) total[j] *= share;
        for (int64_t r = 0; r < rows; r++) {
            const real *row = x + r * features;
            if (keep && !keep[r]) continue;
#pragma omp simd
            for (int64_t j = 0; j < n; j++) square[j] += (row[j] - total[j]) * (row[j] - total[j]);
        }
        for (int64_t j = 0; j < n; j++) {
            batch_mean[j] = total[j];
            batch_var[j] = square[j] * share;
            scale[j] = 1 / root(batch_var[j] + (real)s->eps);
        }
        mean = batch_mean;
    }
    int stored = s->kind == STORED || count <= 1;
    for (int64_t r = 0; r < rows; r++) {
        const real *row = x + r * features;
        real *to = normalized + r * features;
        if (keep && !keep[r]) continue;
        if (stored) {
            by_stored(s, t, first, n, row, to);
        } else {
#pragma omp simd
            for (int64_t j = 0; j < n; j++) to[j] = (row[j] - mean[j]) * scale[j];
        }
        add_affine(to, at(s->weight, first), at(s->bias, first), y + r * features, n);
    }
}

/* d_x from d_y (which may be the same place) for features [first, first + n) of all rows. */
static void normalize_columns_backward(const site *s, int64_t t, const sequence *q, int64_t part, int64_t first,
                                       int64_t n, const real *normalized, const real *d_y, real *d_x) {
    int64_t rows = q->rows, features = s->features;
    const uint8_t *keep = q->mask ? q->mask + t * rows : 0;
    int64_t count = q->count ? q->count[t] : rows;
    real sum[BLOCK], product[BLOCK], scale[BLOCK];
    normalized += first, d_y += first, d_x += first;
    if (s->kind == NONE) {
        for (int64_t r = 0; r < rows && d_x != d_y; r++)
            if (!keep || keep[r]) memcpy(d_x + r * features, d_y + r * features, n * sizeof(real));
        return;
    }
    memset(sum, 0, sizeof sum), memset(product, 0, sizeof product);
    for (int64_t r = 0; r < rows; r++) {
        if (keep && !keep[r]) continue;
        add(sum, d_y + r * features, n);
        add_products(product, d_y + r * features, normalized + r * features, n);
    }
    if (s->d_weight) add(s->d_weight + part * features + first, product, n);
    if (s->d_bias) add(s->d_bias + part * features + first, sum, n);
    if (s->kind == STORED || count <= 1) {
        for (int64_t r = 0; r < rows; r++)
            if (!keep || keep[r]) by_stored_backward(s, t, first, n, d_y + r * features, d_x + r * features);
        return;
    }
    const real *var = s->spread + t * features + first;
    for (int64_t j = 0; j < n; j++) {
        scale[j] = (s->weight ? s->weight[first + j] : 1) / root(var[j] + (real)s->eps);
        sum[j] /= count;
        product[j] /= count;
    }
    for (int64_t r = 0; r < rows; r++) {
        const real *from = d_y + r * features, *unit = normalized + r * features;
        real *to = d_x + r * features;
        if (keep && !keep[r]) continue;
#pragma omp simd
        for (int64_t j = 0; j < n; j++) to[j] = (from[j] - sum[j] - unit[j] * product[j]) * scale[j];
    }
}

/* Nonlinearities of the gates in place, and the new cell, for n hidden units of a row. */
static void cell_forward(real *gates, int64_t hidden, const real *before, real *cell, int64_t n) {
    real *i = gates, *f = gates + hidden, *g = gates + 2 * hidden, *o = gates + 3 * hidden;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        i[j] = sigmoid(i[j]);
        f[j] = sigmoid(f[j]);
        g[j] = tangent(g[j]);
        o[j] = sigmoid(o[j]);
        cell[j] = f[j] * before[j] + i[j] * g[j];
    }
}

static void output_forward(const real *o, real *squashed, real *output, int64_t n) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        squashed[j] = tangent(squashed[j]);
        output[j] = o[j] * squashed[j];
    }
}

/* Gradient of the cell site's output, and of the output gate's input. */
static void output_backward(const real *o, const real *squashed, const real *d_output, const real *d_next, real *d_h,
                            real *d_squashed, real *d_o, int64_t n) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        real d = d_output[j] + (d_next ? d_next[j] : 0) + (d_h ? d_h[j] : 0);
        d_squashed[j] = d * o[j] * (1 - squashed[j] * squashed[j]);
        d_o[j] = d * squashed[j] * o[j] * (1 - o[j]);
    }
    if (d_h) memset(d_h, 0, n * sizeof(real));
}

static void cell_backward(const real *gates, int64_t hidden, const real *before, const real *d_new, real *d_cell,
                          real *d_gates, int64_t n) {
    const real *i = gates, *f = gates + hidden, *g = gates + 2 * hidden;
    real *d_i = d_gates, *d_f = d_gates + hidden, *d_g = d_gates + 2 * hidden;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        real d = d_cell[j] + d_new[j];
        d_i[j] = d * g[j] * i[j] * (1 - i[j]);
        d_f[j] = d * before[j] * f[j] * (1 - f[j]);
        d_g[j] = d * i[j] * (1 - g[j] * g[j]);
        d_cell[j] = d * f[j];
    }
}

typedef struct {
    real *gates, *cell, *squashed, *output, *in, *hidden, *inner;
    const real *h_before, *c_before;
} place;

/* Where the buffers of step t begin. */
static place locate(const sequence *q, int64_t t) {
    int64_t state = q->rows * q->hidden, now = q->kept ? t : 0, ago = q->kept ? t - 1 : 0;
    place p = {
        q->gates + now * 4 * state,
        q->cell + now * state,
        q->squashed + now * state,
        q->output ? q->output + t * state : 0,
        q->projected ? q->projected + t * 4 * state : 0,
        q->hidden_site.normalized ? q->hidden_site.normalized + now * 4 * state : 0,
        q->cell_site.normalized ? q->cell_site.normalized + now * state : 0,
        t ? q->output + (t - 1) * state : q->first_h,
        t ? q->cell + ago * state : q->first_c,
    };
    return p;
}

static void begin_gates(const sequence *q, real *gates, int64_t first, int64_t n) {
    if (q->bias)
        memcpy(gates, q->bias + first, n * sizeof(real));
    else
        memset(gates, 0, n * sizeof(real));
}

static void forward_row(const sequence *q, int64_t t, const place *p, const real *product, int64_t r) {
    int64_t rows = q->rows, H = q->hidden, G = 4 * H;
    real *gates = p->gates + r * G, *cell = p->cell + r * H, *squashed = p->squashed + r * H;
    real *output = p->output + r * H, *in = p->in + r * G;
    if (q->mask && !q->mask[t * rows + r]) {
        memmove(cell, p->c_before + r * H, H * sizeof(real));
        memcpy(output, p->h_before + r * H, H * sizeof(real));
        return;
    }
    begin_gates(q, gates, 0, G);
    normalize_row(&q->input_site, t, r, rows, in, in, gates);
    normalize_row(&q->hidden_site, t, r, rows, product + r * G, p->hidden + r * G, gates);
    cell_forward(gates, H, p->c_before + r * H, cell, H);
    memset(squashed, 0, H * sizeof(real));
    normalize_row(&q->cell_site, t, r, rows, cell, p->inner + r * H, squashed);
    output_forward(gates + 3 * H, squashed, output, H);
}

static void forward_columns(const sequence *q, int64_t t, const place *p, const real *product, int64_t first,
                            int64_t n) {
    int64_t rows = q->rows, H = q->hidden, G = 4 * H;
    const uint8_t *keep = q->mask ? q->mask + t * rows : 0;
    for (int64_t gate = 0; gate < 4; gate++) {
        int64_t from = gate * H + first;
        for (int64_t r = 0; r < rows; r++) begin_gates(q, p->gates + r * G + from, from, n);
        normalize_columns(&q->input_site, t, q, from, n, p->in, p->in, p->gates);
        normalize_columns(&q->hidden_site, t, q, from, n, product, p->hidden, p->gates);
    }
    for (int64_t r = 0; r < rows; r++) {
        int64_t here = r * H + first;
        if (keep && !keep[r]) {
            memmove(p->cell + here, p->c_before + here, n * sizeof(real));
            memcpy(p->output + here, p->h_before + here, n * sizeof(real));
            continue;
        }
        cell_forward(p->gates + r * G + first, H, p->c_before + here, p->cell + here, n);
        memset(p->squashed + here, 0, n * sizeof(real));
    }
    normalize_columns(&q->cell_site, t, q, first, n, p->cell, p->inner, p->squashed);
    for (int64_t r = 0; r < rows; r++) {
        int64_t here = r * H + first;
        if (!keep || keep[r])
            output_forward(p->gates + r * G + 3 * H + first, p->squashed + here, p->output + here, n);
    }
}

static void backward_row(const sequence *q, int64_t t, const place *p, const real *d_next, int64_t part, int64_t r) {
    int64_t rows = q->rows, H = q->hidden, G = 4 * H, here = t * rows + r;
    const real *gates = p->gates + r * G, *d_output = q->d_output + here * H;
    real *d_gates = q->d_gates + (q->d_gates_kept ? here : r) * G, *d_squashed = q->d_squashed + r * H;
    real *d_h = q->d_h ? q->d_h + r * H : 0;
    d_next = at(d_next, r * H);
    if (q->mask && !q->mask[here]) {
        add(d_h, d_output, H);
        if (d_next) add(d_h, d_next, H);
        memset(q->d_product + here * G, 0, G * sizeof(real));
        memset(q->d_projected + here * G, 0, G * sizeof(real));
        return;
    }
    output_backward(gates + 3 * H, p->squashed + r * H, d_output, d_next, d_h, d_squashed, d_gates + 3 * H, H);
    normalize_row_backward(&q->cell_site, t, r, rows, part, p->inner + r * H, d_squashed, d_squashed);
    cell_backward(gates, H, p->c_before + r * H, d_squashed, q->d_cell + r * H, d_gates, H);
    if (q->d_bias) add(q->d_bias + part * G, d_gates, G);
    /* Where a site is bare its gradient is d_gates itself: the other one must not be written over it first. */
    normalize_row_backward(&q->hidden_site, t, r, rows, part, p->hidden + r * G, d_gates, q->d_product + here * G);
    normalize_row_backward(&q->input_site, t, r, rows, part, at(p->in, r * G), d_gates, q->d_projected + here * G);
}

static void backward_columns(const sequence *q, int64_t t, const place *p, const real *d_next, int64_t part,
                             int64_t first, int64_t n) {
    int64_t rows = q->rows, H = q->hidden, G = 4 * H;
    const uint8_t *keep = q->mask ? q->mask + t * rows : 0;
    const real *d_output = q->d_output + t * rows * H;
    real *d_gates = q->d_gates + (q->d_gates_kept ? t * rows * G : 0);
    real *d_product = q->d_product + t * rows * G, *d_projected = q->d_projected + t * rows * G;
    for (int64_t r = 0; r < rows; r++) {
        int64_t here = r * H + first;
        if (keep && !keep[r]) {
            add(q->d_h + here, d_output + here, n);
            if (d_next) add(q->d_h + here, d_next + here, n);
            for (int64_t gate = 0; gate < 4; gate++) {
                memset(d_product + r * G + gate * H + first, 0, n * sizeof(real));
                memset(d_projected + r * G + gate * H + first, 0, n * sizeof(real));
            }
            continue;
        }
        output_backward(p->gates + r * G + 3 * H + first, p->squashed + here, d_output + here, at(d_next, here),
                        q->d_h ? q->d_h + here : 0, q->d_squashed + here, d_gates + r * G + 3 * H + first, n);
    }
    normalize_columns_backward(&q->cell_site, t, q, part, first, n, p->inner, q->d_squashed, q->d_squashed);
    for (int64_t r = 0; r < rows; r++) {
        int64_t here = r * H + first;
        if (keep && !keep[r]) continue;
        cell_backward(p->gates + r * G + first, H, p->c_before + here, q->d_squashed + here, q->d_cell + here,
                      d_gates + r * G + first, n);
        for (int64_t gate = 0; gate < 4 && q->d_bias; gate++)
            add(q->d_bias + part * G + gate * H + first, d_gates + r * G + gate * H + first, n);
    }
    for (int64_t gate = 0; gate < 4; gate++) {
        int64_t from = gate * H + first;
        normalize_columns_backward(&q->hidden_site, t, q, part, from, n, p->hidden, d_gates, d_product);
        normalize_columns_backward(&q->input_site, t, q, part, from, n, p->in, d_gates, d_projected);
    }
}

/* One time step: h, c and what backward needs, from the recurrent product B x 4H. */
void forward(const sequence *q, int64_t t, const real *product) {
    place p = locate(q, t);
#pragma omp parallel for num_threads(q->threads) schedule(static) if (q->threads > 1)
    for (int64_t part = 0; part < q->threads; part++) {
        int64_t all = q->by_columns ? q->hidden : q->rows;
        int64_t first = all * part / q->threads, last = all * (part + 1) / q->threads;
        if (q->by_columns)
            for (; first < last; first += BLOCK)
                forward_columns(q, t, &p, product, first, last - first < BLOCK ? last - first : BLOCK);
        else
            for (; first < last; first++) forward_row(q, t, &p, product, first);
    }
}

/* Gradients of one time step, from d_next (B x H, or NULL): the gradient of its h by way of the next step's product. */
void backward(const sequence *q, int64_t t, const real *d_next) {
    place p = locate(q, t);
#pragma omp parallel for num_threads(q->threads) schedule(static) if (q->threads > 1)
    for (int64_t part = 0; part < q->threads; part++) {
        int64_t all = q->by_columns ? q->hidden : q->rows;
        int64_t first = all * part / q->threads, last = all * (part + 1) / q->threads;
        if (q->by_columns)
            for (; first < last; first += BLOCK)
                backward_columns(q, t, &p, d_next, part, first, last - first < BLOCK ? last - first : BLOCK);
        else
            for (; first < last; first++) backward_row(q, t, &p, d_next, part, first);
    }
}

/* The cells without c. Their `projected` is already normalized and has its bias, once for all time steps; `bias` is
that of the product with h (GRU alone), `cell` holds n's part of that product with it. */

enum { TANH, RELU, GRU };

static inline int64_t gates_of(int cell) { return cell == GRU ? 3 : 1; }

static inline int kept_row(const sequence *q, int64_t t, int64_t r) { return !q->mask || q->mask[t * q->rows + r]; }

static inline const real *h_before(const sequence *q, int64_t t) {
    return t ? q->output + (t - 1) * q->rows * q->hidden : q->first_h;
}

/* Where the normalized product of step t goes. */
static inline real *product_place(const sequence *q, int cell, int64_t t) {
    int64_t state = q->rows * q->hidden;
    return cell == GRU ? q->gates + (q->kept ? t : 0) * 3 * state : q->output + t * state;
}

/* What the normalized product is added to, for hidden units [first, first + n) of row r; padding is done with here. */
static inline void begin_units(const sequence *q, int cell, int64_t t, int64_t r, int64_t first, int64_t n) {
    int64_t H = q->hidden, here = (t * q->rows + r) * H + first;
    if (!kept_row(q, t, r))
        memcpy(q->output + here, h_before(q, t) + r * H + first, n * sizeof(real));
    else if (cell == GRU)
        for (int64_t gate = 0; gate < 3; gate++)
            begin_gates(q, product_place(q, GRU, t) + (r * 3 + gate) * H + first, gate * H + first, n);
    else
        memcpy(q->output + here, q->projected + here, n * sizeof(real));
}

static inline void end_units(const sequence *q, int cell, int64_t t, int64_t r, int64_t first, int64_t n) {
    int64_t H = q->hidden, rows = q->rows;
    real *output = q->output + (t * rows + r) * H + first;
    if (!kept_row(q, t, r)) return;
    if (cell == TANH) {
#pragma omp simd
        for (int64_t j = 0; j < n; j++) output[j] = tangent(output[j]);
        return;
    }
    if (cell == RELU) {
#pragma omp simd
        for (int64_t j = 0; j < n; j++) output[j] = output[j] < 0 ? 0 : output[j]; /* NaN stays */
        return;
    }
    const real *in = q->projected + (t * rows + r) * 3 * H + first, *before = h_before(q, t) + r * H + first;
    real *reset = product_place(q, GRU, t) + r * 3 * H + first, *update = reset + H, *candidate = reset + 2 * H;
    real *inner = q->cell + ((q->kept ? t : 0) * rows + r) * H + first;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        inner[j] = candidate[j];
        reset[j] = sigmoid(in[j] + reset[j]);
        update[j] = sigmoid(in[H + j] + update[j]);
        candidate[j] = tangent(in[2 * H + j] + reset[j] * inner[j]);
        output[j] = candidate[j] + update[j] * (before[j] - candidate[j]);
    }
}

/* Gradients of the projected input and, of a GRU, of the normalized product; d_h: what passes by the product. */
static inline void units_backward(const sequence *q, int cell, int64_t t, const real *d_next, int64_t part, int64_t r,
                                  int64_t first, int64_t n) {
    int64_t H = q->hidden, rows = q->rows, gates = gates_of(cell), here = (t * rows + r) * H + first;
    const real *d_output = q->d_output + here;
    real *d_h = q->d_h ? q->d_h + r * H + first : 0;
    real *d_in = q->d_projected + (t * rows + r) * gates * H + first;
    real *d_product = q->d_product + (t * rows + r) * gates * H + first;
    d_next = at(d_next, r * H + first);
    if (!kept_row(q, t, r)) {
        add(d_h, d_output, n);
        if (d_next) add(d_h, d_next, n);
        for (int64_t gate = 0; gate < gates; gate++) {
            memset(d_in + gate * H, 0, n * sizeof(real));
            memset(d_product + gate * H, 0, n * sizeof(real));
        }
        return;
    }
    if (cell != GRU) {
        const real *output = q->output + here;
#pragma omp simd
        for (int64_t j = 0; j < n; j++) {
            real d = d_output[j] + (d_next ? d_next[j] : 0) + (d_h ? d_h[j] : 0);
            d_in[j] = cell == TANH ? d * (1 - output[j] * output[j]) : output[j] <= 0 ? 0 : d;
        }
        if (d_h) memset(d_h, 0, n * sizeof(real));
        return;
    }
    const real *reset = q->gates + (t * rows + r) * 3 * H + first, *update = reset + H, *candidate = reset + 2 * H;
    const real *inner = q->cell + here, *before = h_before(q, t) + r * H + first;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        real d = d_output[j] + (d_next ? d_next[j] : 0) + d_h[j];
        real d_candidate = d * (1 - update[j]) * (1 - candidate[j] * candidate[j]);
        real d_reset = d_candidate * inner[j] * reset[j] * (1 - reset[j]);
        real d_update = d * (before[j] - candidate[j]) * update[j] * (1 - update[j]);
        d_in[j] = d_product[j] = d_reset;
        d_in[H + j] = d_product[H + j] = d_update;
        d_in[2 * H + j] = d_candidate;
        d_product[2 * H + j] = d_candidate * reset[j];
        d_h[j] = d * update[j];
    }
    for (int64_t gate = 0; gate < 3 && q->d_bias; gate++)
        add(q->d_bias + (part * 3 + gate) * H + first, d_product + gate * H, n);
}

static inline void forward_cell(const sequence *q, int cell, int64_t t, const real *product) {
    int64_t rows = q->rows, H = q->hidden, gates = gates_of(cell), G = gates * H;
    real *normalized = q->hidden_site.normalized + (q->kept ? t : 0) * rows * G, *place = product_place(q, cell, t);
#pragma omp parallel for num_threads(q->threads) schedule(static) if (q->threads > 1)
    for (int64_t part = 0; part < q->threads; part++) {
        int64_t all = q->by_columns ? H : rows;
        int64_t first = all * part / q->threads, last = all * (part + 1) / q->threads;
        for (; first < last && !q->by_columns; first++) {
            begin_units(q, cell, t, first, 0, H);
            if (kept_row(q, t, first))
                normalize_row(&q->hidden_site, t, first, rows, product + first * G, normalized + first * G,
                              place + first * G);
            end_units(q, cell, t, first, 0, H);
        }
        for (; first < last; first += BLOCK) {
            int64_t n = last - first < BLOCK ? last - first : BLOCK;
            for (int64_t r = 0; r < rows; r++) begin_units(q, cell, t, r, first, n);
            for (int64_t gate = 0; gate < gates; gate++)
                normalize_columns(&q->hidden_site, t, q, gate * H + first, n, product, normalized, place);
            for (int64_t r = 0; r < rows; r++) end_units(q, cell, t, r, first, n);
        }
    }
}

static inline void backward_cell(const sequence *q, int cell, int64_t t, const real *d_next) {
    int64_t rows = q->rows, H = q->hidden, gates = gates_of(cell), G = gates * H;
    const real *normalized = q->hidden_site.normalized + t * rows * G;
    real *d_product = q->d_product + t * rows * G, *d_y = cell == GRU ? d_product : q->d_projected + t * rows * G;
#pragma omp parallel for num_threads(q->threads) schedule(static) if (q->threads > 1)
    for (int64_t part = 0; part < q->threads; part++) {
        int64_t all = q->by_columns ? H : rows;
        int64_t first = all * part / q->threads, last = all * (part + 1) / q->threads;
        for (; first < last && !q->by_columns; first++) {
            units_backward(q, cell, t, d_next, part, first, 0, H);
            if (kept_row(q, t, first))
                normalize_row_backward(&q->hidden_site, t, first, rows, part, normalized + first * G, d_y + first * G,
                                       d_product + first * G);
        }
        for (; first < last; first += BLOCK) {
            int64_t n = last - first < BLOCK ? last - first : BLOCK;
            for (int64_t r = 0; r < rows; r++) units_backward(q, cell, t, d_next, part, r, first, n);
            for (int64_t gate = 0; gate < gates; gate++)
                normalize_columns_backward(&q->hidden_site, t, q, part, gate * H + first, n, normalized, d_y, d_product);
        }
    }
}

#define CELL(name, cell)                                                                                  \
    void name##_forward(const sequence *q, int64_t t, const real *product) { forward_cell(q, cell, t, product); } \
    void name##_backward(const sequence *q, int64_t t, const real *d_next) { backward_cell(q, cell, t, d_next); }

CELL(tanh, TANH)
CELL(relu, RELU)
CELL(gru, GRU)
