/* Weights back to their grids on a CPU, all in one call: each is read for its largest magnitude, and rounded while it is
   still in the cache if that magnitude lets its scale stay. A format's rounding comes as a function over blocks
   (altgrad_core.native.BlockLoops). */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define PIECE 16384 /* elements that are rounded at a time */

typedef void (*Quantize)(const float *, float *, int32_t, uint32_t, float, float, float, const uint32_t *, const void *);

typedef struct {
    float *w;
    const float *before; /* NULL, or the weights before the step */
    float *intended;     /* there the update before rounding is left */
    Quantize quantize;
    const void *context;
    const float *scale;
    const uint32_t *keys; /* NULL: to nearest even */
    int64_t n;
} Weight;

typedef struct {
    double low, high;             /* limits of the rounded values, times the scale */
    double quiet_low, quiet_high; /* the scale stays where low < amax <= high */
} Range;

static float largest_magnitude(const float *x, int64_t n) {
    int32_t largest = 0; /* as bits, which order magnitudes, NaN above all */
    _Pragma("omp simd reduction(max : largest)")
    for (int64_t i = 0; i < n; i++) {
        int32_t bits;
        memcpy(&bits, &x[i], sizeof(bits));
        bits &= 0x7FFFFFFF;
        largest = bits > largest ? bits : largest;
    }
    float size;
    memcpy(&size, &largest, sizeof(size));
    return size;
}

static int64_t size_of(const Weight *t, int64_t piece) {
    const int64_t rest = t->n - piece * PIECE;
    return rest < PIECE ? rest : PIECE;
}

static int64_t landed(const Weight *t, const Range *range, int split) {
    const int64_t pieces = (t->n + PIECE - 1) / PIECE;
    int64_t loud = 0; /* pieces with an element above the range */
    float amax = 0;
    _Pragma("omp parallel for schedule(static) reduction(max : amax) reduction(+ : loud) if (split)")
    for (int64_t piece = 0; piece < pieces; piece++) {
        const float size = largest_magnitude(t->w + piece * PIECE, size_of(t, piece));
        loud += !(size <= range->quiet_high); /* a NaN too */
        amax = size > amax ? size : amax;
    }
    if (loud || !(amax > range->quiet_low)) return 0;
    float low = (float)range->low, high = (float)range->high;
    const float most = amax * *t->scale;
    if (most <= high && -most >= low) { /* limits are on the grid: what is within them stays there, and rounds sooner */
        low = -INFINITY;
        high = INFINITY;
    }
    _Pragma("omp parallel for schedule(static) if (split)")
    for (int64_t piece = 0; piece < pieces; piece++) {
        const int64_t at = piece * PIECE;
        if (t->before)
            for (int64_t i = at; i < at + size_of(t, piece); i++) t->intended[i] = t->w[i] - t->before[i];
        t->quantize(t->w + at, t->w + at, (int32_t)size_of(t, piece), (uint32_t)at, *t->scale, low, high,
                    t->keys, t->context);
    }
    return 1;
}

/* Rounds each weight in place, unless its scale may have to change; done: whether it has been. Threads take a weight
   each, or with `split` share each one. */
void land(int64_t count, const Weight *weights, const Range *ranges, int32_t split, int64_t *done) {
    _Pragma("omp parallel for schedule(dynamic) if (!split)")
    for (int64_t each = 0; each < count; each++) done[each] = landed(&weights[each], &ranges[each], split);
}
