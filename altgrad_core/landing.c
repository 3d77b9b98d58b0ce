/* Weights back to their grids on a CPU, all in one call: each is read for its largest magnitude, and rounded while it is
   still in the cache if that magnitude lets its scale stay. A format's rounding comes as a function over blocks
   (altgrad_core.native.BlockLoops). */

#include "loops.h"

#define PIECE 16384 /* elements that are read at a time */

/* Somebody who is told of a weight; where `look` is NULL nobody is. */
typedef struct {
    Look look;
    void *context;
} Onlooker;

typedef struct {
    float *w;
    const float *before; /* NULL, or the weights before the step */
    float *intended;     /* there the update before rounding is left */
    Quantize quantize;
    const void *context;
    const float *scale;
    uint64_t number; /* of its random stream */
    int64_t n;
    const Onlooker *onlookers;
} Weight;

typedef struct {
    double low, high;             /* limits of the rounded values, times the scale */
    double quiet_low, quiet_high; /* the scale stays where low < amax <= high */
} Range;

static inline uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

#define PLACES 4

/* Reads in several places at once, which fetches from memory sooner than one after the other. */
static float largest_magnitude(const float *x, int64_t n) {
    uint32_t largest = 0; /* as bits */
    const int64_t apart = n / PLACES;
    _Pragma("omp simd reduction(max : largest)")
    for (int64_t i = 0; i < apart; i++)
        for (int64_t place = 0; place < PLACES; place++)
            largest = larger(largest, magnitude_of(x[place * apart + i]));
    for (int64_t i = PLACES * apart; i < n; i++) largest = larger(largest, magnitude_of(x[i]));
    return float_of((int32_t)largest);
}

static int64_t size_of(const Weight *t, int64_t piece) {
    const int64_t rest = t->n - piece * PIECE;
    return rest < PIECE ? rest : PIECE;
}

/* How a weight is rounded. */
typedef struct {
    float low, high;
    const Keys *keys; /* NULL: to nearest even */
    int64_t onlookers;
} Rounding;

/* Rounds a block of a weight, and tells its onlookers. */
static void block_of(const Weight *t, int64_t at, int32_t n, const Rounding *r) {
    float unrounded[LANDED], *w = t->w + at;
    if (t->before)
        EACH t->intended[at + i] = w[i] - t->before[at + i];
    if (r->onlookers) memcpy(unrounded, w, (size_t)n * sizeof(float));
    t->quantize(w, w, n, (uint32_t)at, *t->scale, r->low, r->high, r->keys, t->context);
    for (int64_t each = 0; each < r->onlookers; each++) {
        const Onlooker one = t->onlookers[each];
        if (one.look) one.look(unrounded, w, at, n, one.context);
    }
}

/* Rounds a weight, while it has the next one fetched: rounding waits for arithmetic, and reading for memory. */
static void rounded(const Weight *t, const Weight *next, const Rounding *r, int split) {
    _Pragma("omp parallel for schedule(static) if (split)")
    for (int64_t chunk = 0; chunk < t->n; chunk += CHUNK) {
        const int64_t end = t->n - chunk < CHUNK ? t->n : chunk + CHUNK;
        for (int64_t at = chunk; at < end; at += LANDED) {
            const int32_t n = (int32_t)(end - at < LANDED ? end - at : LANDED);
            if (next)
                for (int64_t i = at; i < at + n && i < next->n; i += LINE) __builtin_prefetch(next->w + i);
            block_of(t, at, n, r);
        }
    }
}

static int64_t landed(const Weight *t, const Weight *next, const Range *range, const uint64_t *state, int64_t onlookers,
                      int split) {
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
    const Keys keys = state ? keys_of(*state, t->number) : (Keys){0};
    Rounding r = {(float)range->low, (float)range->high, state ? &keys : 0, onlookers};
    const float most = amax * *t->scale;
    if (most <= r.high && -most >= r.low) { /* limits are on the grid: what is within them stays there, and rounds sooner */
        r.low = -INFINITY;
        r.high = INFINITY;
    }
    rounded(t, next, &r, split);
    return 1;
}

/* The first weight that a thread takes, so that each has about as many elements. */
static int64_t begin_of(int64_t thread, int64_t threads, int64_t count, const Weight *weights) {
    int64_t whole = 0, before = 0, each = 0;
    for (int64_t i = 0; i < count; i++) whole += weights[i].n;
    while (each < count && (before + weights[each].n / 2) * threads < whole * thread) before += weights[each++].n;
    return each;
}

static void land_from(int64_t each, int64_t end, const Weight *weights, const Range *ranges, const uint64_t *state,
                      int64_t onlookers, int split, int64_t *done) {
    for (; each < end; each++) {
        const Weight *next = each + 1 < end ? &weights[each + 1] : 0;
        done[each] = landed(&weights[each], next, &ranges[each], state, onlookers, split);
    }
}

/* Rounds each weight in place, unless its scale may have to change; done: whether it has been. Threads take a weight
   each, or with `split` share each one: not within a region of one thread, where threads would be made anew for each.
   state: of the random streams; NULL: to nearest even. onlookers: of each weight. */
void land(int64_t count, const Weight *weights, const Range *ranges, const uint64_t *state, int64_t onlookers,
          int32_t split, int64_t *done) {
    if (split) {
        land_from(0, count, weights, ranges, state, onlookers, split, done);
        return;
    }
    _Pragma("omp parallel")
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const int64_t begin = begin_of(thread, threads, count, weights);
        land_from(begin, begin_of(thread + 1, threads, count, weights), weights, ranges, state, onlookers, split, done);
    }
}
