/* What one step did to the quantised weights, on a CPU, in one call for all of them: each of weight, gradient, weight
   before and intended update is read once, and the codes are written over those of the step before.

   What is counted is said by the torch code beside it (tally.py); here are the same operations, so the same counts,
   and the same sums but for their order. A format's arithmetic comes as functions over blocks
   (altgrad_core.native.BlockLoops). Sums are float64, taken by chunks in a fixed order: the same with any number of
   threads.

   Nothing here may be contracted or reassociated: compile with -ffp-contract=off and without -ffast-math. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define PIECE 256   /* elements of a block: what is known of them stays in a core's first cache */
#define CHUNK 65536 /* elements that a thread takes at a time */

typedef void (*Rungs)(const float *, int32_t *, int32_t, const void *);
typedef void (*Spacings)(const float *, float *, int32_t, float, const void *);

#define EACH for (int32_t i = 0; i < n; i++)
#define SIMD _Pragma("omp simd")
#define INLINE static inline __attribute__((always_inline))

enum {
    WORDS = 1,    /* codes are int16, else int8 */
    RECODE = 2,   /* the codes before the step are those of `before` under the scale of then, left where they belong */
    STALL = 4,    /* count moves, and sum what is expected to be lost */
    DESCENT = 8,  /* sum products */
    IN_RUNGS = 16 /* `intended` is in rungs */
};

typedef struct {
    const float *now, *gradient;
    const float *before;   /* NULL where none of RECODE, STALL and DESCENT is asked for */
    const float *intended; /* NULL: now - before */
    void *codes_before, *codes; /* may be the same memory */
    Rungs rungs;
    Spacings spacings;
    const void *context;
    const float *scale;            /* element i has scale[i / columns * down + i % columns * across] */
    int64_t columns, down, across; /* columns 0: one scale for all */
    const float *scale_before;     /* of the same columns; read under RECODE only */
    int64_t down_before, across_before;
    int64_t flags;
    int64_t n, first; /* elements, and number of the first chunk */
} Weight;

typedef struct {
    int64_t flips, updates, both; /* codes that changed, elements with a gradient, both */
    int64_t stayed, moved;        /* elements that moved without changing their code; that moved */
} Counts;

typedef struct {
    double lost;            /* updated elements that are expected to keep their code */
    double product, square; /* <intended, actual>, |intended|^2 */
} Sums;

typedef struct {
    Counts counts;
    Sums sums;
} Found;

/* --- scales -------------------------------------------------------------------------------------------------- */

static void scales_of(const float *scale, int64_t columns, int64_t down, int64_t across, int64_t at, int32_t n,
                      float *scales) {
    int64_t row = at / columns, column = at % columns;
    for (int32_t i = 0; i < n; row++, column = 0)
        for (; column < columns && i < n; column++, i++) scales[i] = scale[row * down + column * across];
}

/* scale: the one for all; scales: one for each element, where there are columns. */
INLINE void multiply(const Weight *t, const float *x, const float *scale, const float *scales, float *out, int32_t n) {
    const float one = *scale;
    if (t->columns)
        SIMD EACH out[i] = x[i] * scales[i];
    else
        SIMD EACH out[i] = x[i] * one;
}

/* --- answers to yes-or-no questions, a byte each, 0 or 1, summed eight at a time ------------------------------- */

typedef struct {
    uint64_t words[PIECE / 8];
} Answers;

static inline uint8_t *bytes_of(Answers *answers) { return (uint8_t *)answers->words; }

static inline int64_t sum_of(uint64_t bytes) { /* each of them at most PIECE / 8 */
    const uint64_t pairs = (bytes & 0x00FF00FF00FF00FFu) + (bytes >> 8 & 0x00FF00FF00FF00FFu);
    return (int64_t)(pairs * 0x0001000100010001u >> 48);
}

INLINE int64_t yes(const Answers *one) {
    uint64_t bytes = 0;
    _Pragma("omp simd reduction(+ : bytes)")
    for (int32_t i = 0; i < PIECE / 8; i++) bytes += one->words[i];
    return sum_of(bytes);
}

INLINE int64_t both_yes(const Answers *one, const Answers *other) {
    uint64_t bytes = 0;
    _Pragma("omp simd reduction(+ : bytes)")
    for (int32_t i = 0; i < PIECE / 8; i++) bytes += one->words[i] & other->words[i];
    return sum_of(bytes);
}

static void are_not_zero(const float *x, Answers *answers, int32_t n) {
    uint8_t *out = bytes_of(answers);
    SIMD EACH out[i] = x[i] != 0;
}

static void differ(const float *x, const float *y, Answers *answers, int32_t n) {
    uint8_t *out = bytes_of(answers);
    SIMD EACH out[i] = x[i] != y[i];
}

/* --- codes --------------------------------------------------------------------------------------------------- */

/* NAME_of: codes as they are stored, the lower bits of the rungs, and the lowest integer for NaN.
   coded_NAME: writes the codes of scaled values, and says which are others than before. */
#define CODES(name, type, lowest)                                                                       \
    static void name##_of(const Weight *t, const float *scaled, type *codes, int32_t n) {               \
        int32_t rungs[PIECE], nan = 0;                                                                  \
        t->rungs(scaled, rungs, n, t->context);                                                         \
        _Pragma("omp simd reduction(| : nan)") EACH nan |= scaled[i] != scaled[i];                      \
        if (nan)                                                                                        \
            SIMD EACH rungs[i] = scaled[i] != scaled[i] ? lowest : rungs[i];                            \
        SIMD EACH codes[i] = (type)rungs[i];                                                            \
    }                                                                                                   \
    static void coded_##name(const Weight *t, int64_t at, const float *now, const float *then, int32_t n, \
                             Answers *changed) {                                                        \
        type codes[PIECE], *before = (type *)t->codes_before + at, *after = (type *)t->codes + at;      \
        uint8_t *out = bytes_of(changed);                                                               \
        if (t->flags & RECODE) name##_of(t, then, before, n);                                           \
        name##_of(t, now, codes, n);                                                                    \
        SIMD EACH out[i] = codes[i] != before[i];                                                       \
        SIMD EACH after[i] = codes[i];                                                                  \
    }

CODES(byte, int8_t, INT8_MIN)
CODES(word, int16_t, INT16_MIN)

/* --- sums ---------------------------------------------------------------------------------------------------- */

/* The part of an updated element that is expected to be lost; size: of its update in spacings. NaN stays NaN. */
static inline double lost_by(float size, float gradient) {
    const float part = 1.0f - (size > 1.0f ? 1.0f : size);
    return (double)(part * (gradient != 0 ? 1.0f : 0.0f));
}

static double lost_in_rungs(const float *intended, const float *gradient, int32_t n) {
    double lost = 0;
    _Pragma("omp simd reduction(+ : lost)")
    EACH lost += lost_by(fabsf(intended[i]), gradient[i]);
    return lost;
}

static double lost_in_units(const Weight *t, const float *intended, const float *gradient, const float *scales,
                            const float *old, int32_t n) {
    float spacing[PIECE], size[PIECE];
    double lost = 0;
    multiply(t, intended, t->scale, scales, size, n); /* the sign is no matter yet */
    t->spacings(old, spacing, n, 1.0f, t->context);
    _Pragma("omp simd reduction(+ : lost)")
    EACH lost += lost_by(fabsf(size[i]) / spacing[i], gradient[i]);
    return lost;
}

static void products_in_rungs(const Weight *t, const float *intended, const float *scaled, const float *old, int32_t n,
                              Sums *sums) {
    int32_t rungs[PIECE], rungs_before[PIECE];
    double product = 0, square = 0;
    t->rungs(scaled, rungs, n, t->context);
    t->rungs(old, rungs_before, n, t->context);
    _Pragma("omp simd reduction(+ : product, square)")
    EACH {
        const double aim = intended[i], nan = scaled[i] != scaled[i] || old[i] != old[i] ? NAN : 0;
        product += aim * ((double)(rungs[i] - rungs_before[i]) + nan);
        square += aim * aim;
    }
    sums->product += product;
    sums->square += square;
}

static void products_in_units(const float *intended, const float *now, const float *before, int32_t n, Sums *sums) {
    double product = 0, square = 0;
    _Pragma("omp simd reduction(+ : product, square)")
    EACH {
        const double aim = intended[i];
        product += aim * ((double)now[i] - (double)before[i]);
        square += aim * aim;
    }
    sums->product += product;
    sums->square += square;
}

/* --- a piece of a weight, and all of them -------------------------------------------------------------------- */

/* Has a piece of an array fetched while the one before it is worked on, an array at a time: they are read in short runs,
   which the processor does not foresee, and it can wait for a few lines only. */
INLINE void fetch(const void *array, int64_t at, const Weight *t, size_t size) {
    const int64_t end = at + PIECE < t->n ? at + PIECE : t->n;
    const char *from = (const char *)array + (size_t)at * size, *to = (const char *)array + (size_t)end * size;
    if (array)
        for (; from < to; from += 64) __builtin_prefetch(from);
}

/* Weights before the step, scaled as they were then. */
static void scale_before_step(const Weight *t, int64_t at, const float *before, float *out, int32_t n) {
    float scales[PIECE];
    if (t->columns) scales_of(t->scale_before, t->columns, t->down_before, t->across_before, at, n, scales);
    multiply(t, before, t->scale_before, scales, out, n);
}

static void piece_of(const Weight *t, int64_t at, int32_t n, Found *found) {
    float scales[PIECE], scaled[PIECE], old[PIECE], then[PIECE], actual[PIECE];
    Answers changed, updated, moved;
    const float *now = t->now + at, *gradient = t->gradient + at;
    const float *before = t->before ? t->before + at : 0, *intended = t->intended ? t->intended + at : actual;
    const int64_t next = at + PIECE;
    if (n < PIECE) changed = updated = moved = (Answers){{0}};
    if (t->columns) scales_of(t->scale, t->columns, t->down, t->across, at, n, scales);
    multiply(t, now, t->scale, scales, scaled, n);
    fetch(t->now, next, t, sizeof(float));
    if (before) multiply(t, before, t->scale, scales, old, n);
    if (t->flags & RECODE) scale_before_step(t, at, before, then, n);
    fetch(t->before, next, t, sizeof(float));
    if (t->flags & WORDS) coded_word(t, at, scaled, then, n, &changed);
    else coded_byte(t, at, scaled, then, n, &changed);
    fetch(t->codes_before, next, t, t->flags & WORDS ? sizeof(int16_t) : sizeof(int8_t));
    are_not_zero(gradient, &updated, n);
    fetch(t->gradient, next, t, sizeof(float));
    found->counts.flips += yes(&changed);
    found->counts.updates += yes(&updated);
    found->counts.both += both_yes(&changed, &updated);
    if (!t->intended && before) SIMD EACH actual[i] = now[i] - before[i];
    fetch(t->intended, next, t, sizeof(float));
    if (t->flags & STALL) {
        differ(now, before, &moved, n);
        const int64_t moves = yes(&moved);
        found->counts.moved += moves;
        found->counts.stayed += moves - both_yes(&moved, &changed);
        found->sums.lost += t->flags & IN_RUNGS ? lost_in_rungs(intended, gradient, n)
                                                : lost_in_units(t, intended, gradient, scales, old, n);
    }
    if ((t->flags & DESCENT) && (t->flags & IN_RUNGS)) products_in_rungs(t, intended, scaled, old, n, &found->sums);
    else if (t->flags & DESCENT) products_in_units(intended, now, before, n, &found->sums);
}

static Found chunk_of(const Weight *t, int64_t begin, int64_t end) {
    Found found = {{0, 0, 0, 0, 0}, {0, 0, 0}};
    for (int64_t at = begin; at < end; at += PIECE)
        piece_of(t, at, (int32_t)(end - at < PIECE ? end - at : PIECE), &found);
    return found;
}

static void add(Found *whole, const Found *part) {
    whole->counts.flips += part->counts.flips;
    whole->counts.updates += part->counts.updates;
    whole->counts.both += part->counts.both;
    whole->counts.stayed += part->counts.stayed;
    whole->counts.moved += part->counts.moved;
    whole->sums.lost += part->sums.lost;
    whole->sums.product += part->sums.product;
    whole->sums.square += part->sums.square;
}

/* Counts and sums of each weight what its flags say. chunks: of all weights together; founds: room for each of them. */
void tally(int64_t count, const Weight *weights, int64_t chunks, Found *founds, Counts *counts, Sums *sums) {
    _Pragma("omp parallel for schedule(dynamic)")
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const Weight *t = weights;
        while (t + 1 < weights + count && t[1].first <= chunk) t++;
        const int64_t begin = (chunk - t->first) * CHUNK, end = begin + CHUNK;
        founds[chunk] = chunk_of(t, begin, end < t->n ? end : t->n);
    }
    for (int64_t each = 0; each < count; each++) {
        const int64_t last = each + 1 < count ? weights[each + 1].first : chunks;
        Found whole = {{0, 0, 0, 0, 0}, {0, 0, 0}};
        for (int64_t chunk = weights[each].first; chunk < last; chunk++) add(&whole, &founds[chunk]);
        counts[each] = whole.counts;
        sums[each] = whole.sums;
    }
}
