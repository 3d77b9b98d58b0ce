/* Weights back to their grids on a CPU, all in one call: each is read for its largest magnitude, and rounded while it is
   still in the cache if that magnitude lets its scale stay. A format's rounding comes as a function over blocks
   (altgrad_core.native.BlockLoops). */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define PIECE 16384 /* elements that are read at a time */
#define STEP 512    /* elements that are rounded at a time */
#define LINE 16     /* elements of a line of the cache */

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
#endif

typedef void (*Quantize)(const float *, float *, int32_t, uint32_t, float, float, float, const uint32_t *, const void *);

typedef struct {
    float *w;
    const float *before; /* NULL, or the weights before the step */
    float *intended;     /* there the update before rounding is left */
    Quantize quantize;
    const void *context;
    const float *scale;
    uint64_t number; /* of its random stream */
    int64_t n;
} Weight;

typedef struct {
    double low, high;             /* limits of the rounded values, times the scale */
    double quiet_low, quiet_high; /* the scale stays where low < amax <= high */
} Range;

static inline int32_t magnitude_bits(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits & 0x7FFFFFFF;
}

static inline int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

#define PLACES 4

/* Reads in several places at once, which fetches from memory sooner than one after the other. */
static float largest_magnitude(const float *x, int64_t n) {
    int32_t largest = 0; /* as bits, which order magnitudes, NaN above all */
    const int64_t apart = n / PLACES;
    _Pragma("omp simd reduction(max : largest)")
    for (int64_t i = 0; i < apart; i++)
        for (int64_t place = 0; place < PLACES; place++)
            largest = larger(largest, magnitude_bits(x[place * apart + i]));
    for (int64_t i = PLACES * apart; i < n; i++) largest = larger(largest, magnitude_bits(x[i]));
    float size;
    memcpy(&size, &largest, sizeof(size));
    return size;
}

static int64_t size_of(const Weight *t, int64_t piece) {
    const int64_t rest = t->n - piece * PIECE;
    return rest < PIECE ? rest : PIECE;
}

/* The keys of a stream, as altgrad_core.random_bits.stream_keys makes them of the state of seed and step. */
static void keys_of(uint64_t state, uint64_t number, uint32_t keys[2]) {
    uint64_t word = (state ^ number) + 0x9E3779B97F4A7C15u;
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9u;
    word = (word ^ word >> 27) * 0x94D049BB133111EBu;
    word ^= word >> 31;
    keys[0] = (uint32_t)word;
    keys[1] = (uint32_t)(word >> 32);
}

/* Rounds a weight, while it has the next one fetched: rounding waits for arithmetic, and reading for memory. */
static void rounded(const Weight *t, const Weight *next, float low, float high, const uint64_t *state, int split) {
    uint32_t keys[2];
    if (state) keys_of(*state, t->number, keys);
    _Pragma("omp parallel for schedule(static) if (split)")
    for (int64_t at = 0; at < t->n; at += STEP) {
        const int64_t end = t->n - at < STEP ? t->n : at + STEP;
        if (next)
            for (int64_t i = at; i < end && i < next->n; i += LINE) __builtin_prefetch(next->w + i);
        if (t->before)
            for (int64_t i = at; i < end; i++) t->intended[i] = t->w[i] - t->before[i];
        t->quantize(t->w + at, t->w + at, (int32_t)(end - at), (uint32_t)at, *t->scale, low, high, state ? keys : 0,
                    t->context);
    }
}

static int64_t landed(const Weight *t, const Weight *next, const Range *range, const uint64_t *state, int split) {
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
    rounded(t, next, low, high, state, split);
    return 1;
}

/* The first weight that a thread takes, so that each has about as many elements. */
static int64_t begin_of(int64_t thread, int64_t threads, int64_t count, const Weight *weights) {
    int64_t whole = 0, before = 0, each = 0;
    for (int64_t i = 0; i < count; i++) whole += weights[i].n;
    while (each < count && (before + weights[each].n / 2) * threads < whole * thread) before += weights[each++].n;
    return each;
}

/* Rounds each weight in place, unless its scale may have to change; done: whether it has been. Threads take a weight
   each, or with `split` share each one. state: of the random streams; NULL: to nearest even. */
void land(int64_t count, const Weight *weights, const Range *ranges, const uint64_t *state, int32_t split, int64_t *done) {
    _Pragma("omp parallel if (!split)")
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const int64_t end = begin_of(thread + 1, threads, count, weights);
        for (int64_t each = begin_of(thread, threads, count, weights); each < end; each++) {
            const Weight *next = each + 1 < end ? &weights[each + 1] : 0;
            done[each] = landed(&weights[each], next, &ranges[each], state, split);
        }
    }
}
