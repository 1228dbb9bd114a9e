/* Standardization by running statistics, forward and backward: by_prefix of standardized.py, which says what is computed.

Compiled once per precision by machine/c_kernels.py; kernels.py mirrors the structures below.

One pass over time each way. The work is cut into blocks of features of one row, which need nothing of each other; the
sums of a block stay in the first cache. Backward finds the statistics anew, since that is faster than to have kept
them, and then goes back over time. Sums are in double precision: one pass then cancels nothing that counts, however
long it is. An output depends on what came before it alone, to the last bit. Loops that vectorize say so with
`omp simd`, which promises that buffers overlap at equal indices or not at all. */

#include <float.h>
#include <math.h>
#include <stdint.h>

#ifdef NORMLAB_DOUBLE
typedef double real;
#define LARGEST DBL_MAX
static inline real root(real x) { return sqrt(x); }
#else
typedef float real;
#define LARGEST FLT_MAX
static inline real root(real x) { return sqrtf(x); }
#endif
typedef double sum;

#define BLOCK 128
const int64_t prefix_block = BLOCK;

typedef struct {
    real *data;             /* rows x steps x features, the features side by side */
    int64_t row, step;      /* strides, in entries */
} tensor;

typedef struct {
    int64_t rows, steps, features, threads;
    double eps;
    const uint8_t *mask;         /* rows x steps, or NULL */
    const real *weight, *bias;   /* features, or NULL */
    const real *count_before, *mean_before, *square_before; /* rows, rows x features: of earlier calls, or NULL */
    tensor x, y;                 /* x may hold anything at padding */
    real *count, *mean, *square; /* as those before, for later calls */
    tensor d_y, d_x;
    const real *d_mean, *d_square; /* rows x features */
    real *shift, *scale;         /* threads x steps x BLOCK: scratch of backward */
    real *d_weight, *d_bias;     /* threads x features, 0 at first; or NULL */
} prefix;

/* Features [first, first + n) of a row: their sums so far, of `count` entries. */
typedef struct {
    const uint8_t *keep;
    const real *x;
    int64_t n;
    sum count;
    real pivot[BLOCK], weight[BLOCK];
    sum of_first[BLOCK], of_second[BLOCK];
} block;

static inline int kept(const block *b, int64_t t) { return !b->keep || b->keep[t]; }

/* Deviations are from a pivot, the mean so far, else the row's first entry: a mean far from 0 cancels nothing. */
static void begin(block *b, const prefix *p, int64_t row, int64_t first, int64_t n) {
    b->n = n;
    b->count = p->count_before ? p->count_before[row] : 0;
    b->keep = p->mask ? p->mask + row * p->steps : 0;
    b->x = p->x.data + row * p->x.row + first;
    int64_t t = 0;
    while (t < p->steps && !kept(b, t)) t++;
    for (int64_t j = 0; j < n; j++) {
        int64_t here = row * p->features + first + j;
        b->weight[j] = p->weight ? p->weight[first + j] : 1;
        b->of_first[j] = 0;
        b->of_second[j] = p->square_before ? p->square_before[here] : 0;
        b->pivot[j] = b->count > 0 ? p->mean_before[here] : t < p->steps ? b->x[t * p->x.step + j] : 0;
    }
}

static inline sum divisor(const block *b) { return b->count > 0 ? b->count : 1; }

/* Where the sum of squares has left its precision, inf - inf would be NaN; any statistic that large gives 0. */
static inline sum variance(sum second, sum shift, sum inverse) {
    sum var = second * inverse - shift * shift;
    var = var > 0 ? var : 0;
    return second <= LARGEST ? var : LARGEST;
}

static inline real inverse_root(real var, double eps) { return 1 / root(var + (real)eps); }

/* Takes in x of one more time step; mean (from the pivot) and 1 / sqrt(var + eps) with it. */
static inline void advance(block *b, const real *x, int is_kept, double eps, real *shift, real *scale) {
    if (is_kept) {
        b->count++;
#pragma omp simd
        for (int64_t j = 0; j < b->n; j++) {
            sum deviation = x[j] - b->pivot[j];
            b->of_first[j] += deviation;
            b->of_second[j] += deviation * deviation;
        }
    }
    sum inverse = 1 / divisor(b);
#pragma omp simd
    for (int64_t j = 0; j < b->n; j++) {
        sum mean = b->of_first[j] * inverse;
        shift[j] = (real)mean;
        scale[j] = inverse_root((real)variance(b->of_second[j], mean, inverse), eps);
    }
}

static void forward_block(const prefix *p, int64_t row, int64_t first, int64_t n) {
    block b;
    real bias[BLOCK], shift[BLOCK], scale[BLOCK];
    begin(&b, p, row, first, n);
    for (int64_t j = 0; j < n; j++) bias[j] = p->bias ? p->bias[first + j] : 0;
    for (int64_t t = 0; t < p->steps; t++) {
        const real *x = b.x + t * p->x.step;
        real *y = p->y.data + row * p->y.row + t * p->y.step + first;
        advance(&b, x, kept(&b, t), p->eps, shift, scale);
        if (kept(&b, t)) {
#pragma omp simd
            for (int64_t j = 0; j < n; j++) y[j] = (x[j] - b.pivot[j] - shift[j]) * scale[j] * b.weight[j] + bias[j];
        } else { /* as if x were 0 */
#pragma omp simd
            for (int64_t j = 0; j < n; j++) y[j] = (-b.pivot[j] - shift[j]) * scale[j] * b.weight[j] + bias[j];
        }
    }
    sum inverse = 1 / divisor(&b);
    if (first == 0) p->count[row] = (real)b.count;
    for (int64_t j = 0; j < n; j++) {
        sum mean = b.of_first[j] * inverse;
        p->mean[row * p->features + first + j] = b.pivot[j] + mean;
        p->square[row * p->features + first + j] = variance(b.of_second[j], mean, inverse) * b.count;
    }
}

static void backward_block(const prefix *p, int64_t part, int64_t row, int64_t first, int64_t n) {
    block b;
    sum later_first[BLOCK], later_second[BLOCK], d_weight[BLOCK], d_bias[BLOCK];
    real *shifts = p->shift + part * p->steps * BLOCK, *scales = p->scale + part * p->steps * BLOCK;
    real least = inverse_root(LARGEST, p->eps); /* nothing is felt of a variance that was put there */
    begin(&b, p, row, first, n);
    for (int64_t t = 0; t < p->steps; t++)
        advance(&b, b.x + t * p->x.step, kept(&b, t), p->eps, shifts + t * BLOCK, scales + t * BLOCK);
    const real *last_shift = shifts + (p->steps - 1) * BLOCK, *last_scale = scales + (p->steps - 1) * BLOCK;
    for (int64_t j = 0; j < n; j++) {
        int64_t here = row * p->features + first + j;
        later_second[j] = b.count > 0 && last_scale[j] > least ? -2 * (sum)p->d_square[here] : 0;
        later_first[j] = -p->d_mean[here] / divisor(&b) - later_second[j] * last_shift[j];
        d_weight[j] = d_bias[j] = 0;
    }
    for (int64_t t = p->steps - 1; t >= 0; t--) {
        const real *x = b.x + t * p->x.step, *d_y = p->d_y.data + row * p->d_y.row + t * p->d_y.step + first;
        const real *shift = shifts + t * BLOCK, *scale = scales + t * BLOCK;
        real *d_x = p->d_x.data + row * p->d_x.row + t * p->d_x.step + first;
        real inverse = (real)(1 / divisor(&b));
/* `second` is twice what the sum of squares feels, and both have their sign turned. */
#define STEP_BACK(the_deviation, the_d_x)                          \
    _Pragma("omp simd") for (int64_t j = 0; j < n; j++) {          \
        real deviation = the_deviation;                            \
        real unit = (deviation - shift[j]) * scale[j];             \
        real direct = d_y[j] * b.weight[j] * scale[j];             \
        real second = unit * scale[j] * (direct * inverse);        \
        second = scale[j] > least ? second : 0;                    \
        d_weight[j] += d_y[j] * unit;                              \
        d_bias[j] += d_y[j];                                       \
        later_first[j] += direct * inverse - second * shift[j];    \
        later_second[j] += second;                                 \
        d_x[j] = the_d_x;                                          \
    }
        if (kept(&b, t)) {
            STEP_BACK(x[j] - b.pivot[j], direct - (real)(later_first[j] + deviation * later_second[j]))
            b.count--;
        } else {
            STEP_BACK(-b.pivot[j], 0)
        }
    }
    for (int64_t j = 0; j < n; j++) {
        if (p->d_weight) p->d_weight[part * p->features + first + j] += d_weight[j];
        if (p->d_bias) p->d_bias[part * p->features + first + j] += d_bias[j];
    }
}

static inline void run(const prefix *p, int forward) {
    int64_t across = (p->features + BLOCK - 1) / BLOCK, all = p->rows * across;
#pragma omp parallel for num_threads(p->threads) schedule(static) if (p->threads > 1)
    for (int64_t part = 0; part < p->threads; part++)
        for (int64_t at = all * part / p->threads; at < all * (part + 1) / p->threads; at++) {
            int64_t first = at % across * BLOCK, n = p->features - first < BLOCK ? p->features - first : BLOCK;
            if (forward)
                forward_block(p, at / across, first, n);
            else
                backward_block(p, part, at / across, first, n);
        }
}

void prefix_forward(const prefix *p) { run(p, 1); }

void prefix_backward(const prefix *p) { run(p, 0); }
