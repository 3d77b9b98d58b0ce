/* What one step did to the quantised weights, on a CPU, in one call for all of them: each of weight, gradient, weight
   before and intended update is read once, and the codes are written over those of the step before; so are the
   weights, where they are kept.

   What is counted is said by the torch code beside it (tally.py); here are the same operations, so the same counts,
   and the same sums but for their order. A format's arithmetic comes as functions over blocks
   (altgrad_core.native.BlockLoops). Loops are over 32 bits throughout, a mask of all ones being -1: what a
   processor does at once is then the same number of elements in all of them. Sums are taken by chunks in a fixed
   order: the same with any number of threads.

   Nothing here may be contracted or reassociated: compile with -ffp-contract=off and without -ffast-math. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define PIECE 192   /* elements of a block: what is known of them stays in a core's first cache; see WHOLE */
#define CHUNK 61440 /* elements that a thread takes at a time, in whole blocks */

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
    float *kept;           /* NULL, or where `now` is left for the next step; may be the memory of `before` */
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

/* Writes the scale of each of n elements, or the one for all of them. */
static void scales_of(const float *scale, int64_t columns, int64_t down, int64_t across, int64_t at, int32_t n,
                      float *scales) {
    if (!columns) {
        EACH scales[i] = *scale;
        return;
    }
    int64_t row = at / columns, column = at % columns;
    for (int32_t i = 0; i < n; row++, column = 0)
        for (; column < columns && i < n; column++, i++) scales[i] = scale[row * down + column * across];
}

/* Returns whether a product is NaN. */
INLINE int32_t multiply(const float *x, const float *scales, float *out, int32_t n) {
    int32_t nan = 0;
    _Pragma("omp simd reduction(| : nan)")
    EACH {
        const float product = x[i] * scales[i];
        nan |= product != product ? -1 : 0;
        out[i] = product;
    }
    return nan;
}

/* --- codes --------------------------------------------------------------------------------------------------- */

/* Rungs of scaled values, whose lower bits are the codes; of NaN the lowest integer that a code can be. */
INLINE void rungs_of(const Weight *t, const float *x, const float *scales, int32_t *rungs, int32_t n) {
    const int32_t lowest = t->flags & WORDS ? INT16_MIN : INT8_MIN;
    float scaled[PIECE];
    const int32_t nan = multiply(x, scales, scaled, n);
    t->rungs(scaled, rungs, n, t->context);
    if (nan)
        SIMD EACH rungs[i] = scaled[i] != scaled[i] ? lowest : rungs[i];
}

#define CODES(name, type)                                                                                   \
    static void read_##name(const type *codes, int32_t *rungs, int32_t n) { SIMD EACH rungs[i] = codes[i]; }        \
    static void write_##name(const int32_t *rungs, type *codes, int32_t n) { SIMD EACH codes[i] = (type)rungs[i]; }

CODES(bytes, int8_t)
CODES(words, int16_t)

static void read_codes(const Weight *t, const void *codes, int64_t at, int32_t *rungs, int32_t n) {
    if (t->flags & WORDS) read_words((const int16_t *)codes + at, rungs, n);
    else read_bytes((const int8_t *)codes + at, rungs, n);
}

static void write_codes(const Weight *t, const int32_t *rungs, void *codes, int64_t at, int32_t n) {
    if (t->flags & WORDS) write_words(rungs, (int16_t *)codes + at, n);
    else write_bytes(rungs, (int8_t *)codes + at, n);
}

/* --- counts, and what is expected to be lost ----------------------------------------------------------------- */

/* Of one piece; pointers that are not needed may be anything. */
typedef struct {
    const int32_t *rungs, *rungs_before; /* equal in the lower `bits` where the codes are */
    const float *now, *before, *gradient, *intended, *scales, *spacings;
    int32_t bits;
} Piece;

/* A whole element, in the unit of what is lost: 1 - size in float32 is a multiple of 2^-24, so that counting is exact. */
#define WHOLE 0x1p24f
_Static_assert((int64_t)PIECE << 24 <= UINT32_MAX, "what is lost in a piece is counted in 32 bits");

/* given: whether the update is `intended`, else the actual one. in_rungs: it is in rungs. NaN stays NaN. */
INLINE void count(const Piece *p, int32_t n, Found *found, const int stall, const int given, const int in_rungs) {
    int32_t same = 0, updates = 0, updated_same = 0, moved = 0, stayed = 0, nan = 0; /* negative: a mask is -1 */
    uint32_t lost = 0;
    _Pragma("omp simd reduction(+ : same, updates, updated_same, moved, stayed, lost) reduction(| : nan)")
    EACH {
        const int32_t is_same = ((p->rungs[i] ^ p->rungs_before[i]) & p->bits) == 0 ? -1 : 0;
        const int32_t is_updated = p->gradient[i] != 0 ? -1 : 0;
        same += is_same;
        updates += is_updated;
        updated_same += is_updated & is_same;
        if (stall) {
            const int32_t has_moved = p->now[i] != p->before[i] ? -1 : 0;
            const float aim = given ? p->intended[i] : p->now[i] - p->before[i];
            const float size = in_rungs ? fabsf(aim) : fabsf(aim) / p->spacings[i];
            const float part = WHOLE - size * WHOLE;
            moved += has_moved;
            stayed += has_moved & is_same;
            lost += (uint32_t)((int32_t)(part > 0 ? part : 0) & is_updated);
            nan |= size != size ? -1 : 0;
        }
    }
    found->counts.flips += n + same;
    found->counts.updates -= updates;
    found->counts.both += updated_same - updates;
    found->counts.moved -= moved;
    found->counts.stayed -= stayed;
    found->sums.lost += nan ? NAN : lost / (double)WHOLE;
}

static void count_piece(const Weight *t, const Piece *p, int32_t n, Found *found) {
    if (!(t->flags & STALL)) count(p, n, found, 0, 0, 0);
    else if (t->flags & IN_RUNGS) count(p, n, found, 1, 1, 1);
    else if (p->intended) count(p, n, found, 1, 1, 0);
    else count(p, n, found, 1, 0, 0);
}

/* --- products ------------------------------------------------------------------------------------------------ */

/* Rungs before the step are those under the scale of now here, which may not be those that are kept. */
static void products_in_rungs(const Weight *t, const Piece *p, int32_t n, Sums *sums) {
    const float *intended = p->intended, *now = p->now, *before = p->before;
    const int32_t *rungs = p->rungs;
    int32_t rungs_before[PIECE];
    double product = 0, square = 0;
    rungs_of(t, before, p->scales, rungs_before, n);
    _Pragma("omp simd reduction(+ : product, square)")
    EACH {
        const double aim = intended[i], nan = now[i] != now[i] || before[i] != before[i] ? NAN : 0;
        product += aim * ((double)(rungs[i] - rungs_before[i]) + nan);
        square += aim * aim;
    }
    sums->product += product;
    sums->square += square;
}

static void products_in_units(const Piece *p, int32_t n, Sums *sums) {
    const float *intended = p->intended, *now = p->now, *before = p->before;
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

/* The rungs before the step: as they are kept, or of the values before it under the scale of then, left to be kept. */
static void rungs_before_step(const Weight *t, int64_t at, int32_t *rungs, int32_t n) {
    float scales[PIECE];
    if (!(t->flags & RECODE)) {
        read_codes(t, t->codes_before, at, rungs, n);
        return;
    }
    scales_of(t->scale_before, t->columns, t->down_before, t->across_before, at, n, scales);
    rungs_of(t, t->before + at, scales, rungs, n);
    write_codes(t, rungs, t->codes_before, at, n);
}

/* The spacings at x, in weight units. */
static void spacings_of(const Weight *t, const float *x, const float *scales, float *spacings, int32_t n) {
    float scaled[PIECE];
    if (!t->columns) {
        t->spacings(x, spacings, n, *t->scale, t->context);
        return;
    }
    multiply(x, scales, scaled, n);
    t->spacings(scaled, spacings, n, 1.0f, t->context);
    SIMD EACH spacings[i] /= scales[i];
}

static void piece_of(const Weight *t, int64_t at, int32_t n, const float *scales, Found *found) {
    float spacings[PIECE], actual[PIECE];
    int32_t rungs[PIECE], rungs_before[PIECE];
    const float *now = t->now + at, *before = t->before ? t->before + at : 0;
    const float *intended = t->intended ? t->intended + at : 0;
    rungs_of(t, now, scales, rungs, n);
    rungs_before_step(t, at, rungs_before, n);
    write_codes(t, rungs, t->codes, at, n);
    if ((t->flags & STALL) && !(t->flags & IN_RUNGS)) spacings_of(t, before, scales, spacings, n);
    if (before && !intended && t->flags & (DESCENT | IN_RUNGS)) {
        SIMD EACH actual[i] = now[i] - before[i];
        intended = actual;
    }
    const int32_t bits = t->flags & WORDS ? UINT16_MAX : UINT8_MAX;
    const Piece piece = {rungs, rungs_before, now, before, t->gradient + at, intended, scales, spacings, bits};
    count_piece(t, &piece, n, found);
    if ((t->flags & DESCENT) && (t->flags & IN_RUNGS)) products_in_rungs(t, &piece, n, &found->sums);
    else if (t->flags & DESCENT) products_in_units(&piece, n, &found->sums);
    if (t->kept) memcpy(t->kept + at, now, (size_t)n * sizeof(float));
}

static Found chunk_of(const Weight *t, int64_t begin, int64_t end) {
    Found found = {{0, 0, 0, 0, 0}, {0, 0, 0}};
    float scales[PIECE];
    for (int64_t at = begin; at < end; at += PIECE) {
        const int32_t n = (int32_t)(end - at < PIECE ? end - at : PIECE);
        if (t->columns || at == begin) scales_of(t->scale, t->columns, t->down, t->across, at, n, scales);
        piece_of(t, at, n, scales, &found);
    }
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
