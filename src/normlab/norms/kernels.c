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
#include <string.h>

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
    tensor x, y;                 /* x may hold anything at padding */
    real *mean, *square;         /* rows x features: after the last step, the mean and the sum of squared deviations */
    tensor d_y, d_x;
    const real *d_mean, *d_square; /* rows x features, or NULL */
    real *shift, *scale;         /* threads x steps x BLOCK: scratch of backward */
    real *d_weight, *d_bias;     /* threads x features, 0 at first; or NULL */
} prefix;

/* Features [first, first + n) of a row, and their sums so far. */
typedef struct {
    const uint8_t *keep;
    const real *x;
    int64_t n;
    real pivot[BLOCK], weight[BLOCK];
    sum of_first[BLOCK], of_second[BLOCK];
} block;

static inline int kept(const block *b, int64_t t) { return !b->keep || b->keep[t]; }

static void begin(block *b, const prefix *p, int64_t row, int64_t first, int64_t n) {
    b->n = n;
    b->keep = p->mask ? p->mask + row * p->steps : 0;
    b->x = p->x.data + row * p->x.row + first;
    int64_t t = 0;
    while (t < p->steps && !kept(b, t)) t++;
    for (int64_t j = 0; j < n; j++) {
        b->pivot[j] = t < p->steps ? b->x[t * p->x.step + j] : 0;
        b->weight[j] = p->weight ? p->weight[first + j] : 1;
        b->of_first[j] = b->of_second[j] = 0;
    }
}

/* From the pivot, at padding as if x were 0 there. */
static inline real deviation(const block *b, const real *x, int is_kept, int64_t j) {
    return (is_kept ? x[j] : 0) - b->pivot[j];
}

/* Where the sum of squares has left its precision, inf - inf would be NaN; any statistic that large gives 0. */
static inline real spread(sum second, sum shift, sum inverse, real eps) {
    real var = (real)(second * inverse - shift * shift);
    var = var > 0 ? var : 0;
    var = second <= LARGEST ? var : LARGEST;
    return 1 / root(var + eps);
}

/* Statistics up to and including step t, of which `count` are real. */
static inline void advance(block *b, const real *x, int is_kept, int64_t count, real eps, real *shift, real *scale) {
    sum inverse = 1 / (sum)(count ? count : 1);
    if (is_kept) {
#pragma omp simd
        for (int64_t j = 0; j < b->n; j++) {
            sum deviation = x[j] - b->pivot[j];
            b->of_first[j] += deviation;
            b->of_second[j] += deviation * deviation;
        }
    }
#pragma omp simd
    for (int64_t j = 0; j < b->n; j++) {
        sum mean = b->of_first[j] * inverse;
        shift[j] = (real)mean;
        scale[j] = spread(b->of_second[j], mean, inverse, eps);
    }
}

static void forward_block(const prefix *p, int64_t row, int64_t first, int64_t n) {
    block b;
    real bias[BLOCK], shift[BLOCK], scale[BLOCK];
    begin(&b, p, row, first, n);
    for (int64_t j = 0; j < n; j++) bias[j] = p->bias ? p->bias[first + j] : 0;
    int64_t count = 0;
    for (int64_t t = 0; t < p->steps; t++) {
        const real *x = b.x + t * p->x.step;
        real *y = p->y.data + row * p->y.row + t * p->y.step + first;
        int is_kept = kept(&b, t);
        count += is_kept;
        advance(&b, x, is_kept, count, (real)p->eps, shift, scale);
        if (is_kept) {
#pragma omp simd
            for (int64_t j = 0; j < n; j++) y[j] = (x[j] - b.pivot[j] - shift[j]) * scale[j] * b.weight[j] + bias[j];
        } else {
#pragma omp simd
            for (int64_t j = 0; j < n; j++) y[j] = (-b.pivot[j] - shift[j]) * scale[j] * b.weight[j] + bias[j];
        }
    }
    sum divisor = count ? count : 1;
    for (int64_t j = 0; j < n; j++) {
        sum mean = b.of_first[j] / divisor, var = b.of_second[j] / divisor - mean * mean;
        var = var > 0 ? var : 0;
        var = b.of_second[j] <= LARGEST ? var : LARGEST;
        p->mean[row * p->features + first + j] = b.pivot[j] + mean;
        p->square[row * p->features + first + j] = var * count;
    }
}

static void backward_block(const prefix *p, int64_t part, int64_t row, int64_t first, int64_t n) {
    block b;
    sum later_first[BLOCK], later_second[BLOCK], d_weight[BLOCK], d_bias[BLOCK];
    real *shifts = p->shift + part * p->steps * BLOCK, *scales = p->scale + part * p->steps * BLOCK;
    real least = 1 / root(LARGEST + (real)p->eps); /* nothing is felt of a variance that was put there */
    begin(&b, p, row, first, n);
    int64_t count = 0;
    for (int64_t t = 0; t < p->steps; t++) {
        count += kept(&b, t);
        advance(&b, b.x + t * p->x.step, kept(&b, t), count, (real)p->eps, shifts + t * BLOCK, scales + t * BLOCK);
    }
    const real *last_shift = shifts + (p->steps - 1) * BLOCK, *last_scale = scales + (p->steps - 1) * BLOCK;
    for (int64_t j = 0; j < n; j++) {
        int64_t here = row * p->features + first + j;
        int felt = p->d_square && count && last_scale[j] > least;
        later_second[j] = felt ? -2 * (sum)p->d_square[here] : 0;
        later_first[j] = -later_second[j] * last_shift[j];
        if (p->d_mean) later_first[j] -= (sum)p->d_mean[here] / (count ? count : 1);
        d_weight[j] = d_bias[j] = 0;
    }
    for (int64_t t = p->steps - 1; t >= 0; t--) {
        const real *x = b.x + t * p->x.step, *d_y = p->d_y.data + row * p->d_y.row + t * p->d_y.step + first;
        const real *shift = shifts + t * BLOCK, *scale = scales + t * BLOCK;
        real *d_x = p->d_x.data + row * p->d_x.row + t * p->d_x.step + first;
        real inverse = 1 / (real)(count ? count : 1);
        int is_kept = kept(&b, t);
        count -= is_kept;
#define STEP(deviation_of_it, d_x_of_it)                              \
    _Pragma("omp simd") for (int64_t j = 0; j < n; j++) {             \
        real deviation = deviation_of_it;                             \
        real unit = (deviation - shift[j]) * scale[j];                \
        d_weight[j] += d_y[j] * unit;                                 \
        d_bias[j] += d_y[j];                                          \
        real direct = d_y[j] * b.weight[j] * scale[j];                \
        real second = unit * scale[j] * (direct * inverse);           \
        second = scale[j] > least ? second : 0;                       \
        later_first[j] += direct * inverse - second * shift[j];       \
        later_second[j] += second;                                    \
        d_x[j] = d_x_of_it;                                           \
    }
        if (is_kept) {
            STEP(x[j] - b.pivot[j], direct - (real)(later_first[j] + deviation * later_second[j]))
        } else {
            STEP(-b.pivot[j], 0)
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
