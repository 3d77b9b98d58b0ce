/* What one step did to the quantised weights, on a CPU: each of weight, gradient, weight before and intended update is
   read once, and the codes are written over those of the step before; so are the weights, where they are kept. `tally`
   goes through all weights after a step; `tally_landing` takes blocks of a weight that is just being rounded to its
   grid, and reads neither copies of what was before nor updates: the codes say the one, and with it the other follows.

   What is counted is said by the torch code beside it (tally.py); here are the same operations, so the same counts,
   and the same sums but for their order; `lost` is summed in float32 within a piece. A format's arithmetic comes as functions over blocks
   (altgrad_core.native.BlockLoops). Loops are over 32 bits throughout, a mask of all ones being -1: what a
   processor does at once is then the same number of elements in all of them. Sums are taken by chunks in a fixed
   order: the same with any number of threads, and whoever goes through the weights. */

#include "loops.h"

#define PIECE 192 /* elements of a block: what is known of them stays in a core's first cache */

_Static_assert(LANDED % PIECE == 0 && CHUNK % LANDED == 0, "pieces are the same whoever goes through the weights");

enum {
    WORDS = 1,    /* codes are int16, else int8 */
    RECODE = 2,   /* the codes before the step are those of `before` under the scale of then, left where they belong */
    STALL = 4,    /* count moves, and sum what is expected to be lost */
    DESCENT = 8,  /* sum products */
    IN_RUNGS = 16 /* `intended` is in rungs */
};

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

typedef struct {
    const float *now, *gradient;
    const float *before;   /* NULL where none of RECODE, STALL and DESCENT is asked for; not read of what lands */
    const float *intended; /* NULL: now - before; not read of what lands */
    float *kept;           /* NULL, or where `now` is left for the next step; may be the memory of `before` */
    void *codes_before, *codes; /* may be the same memory */
    Rungs rungs;
    Values values;
    Spacings spacings;
    const void *context;
    const float *scale;            /* element i has scale[i / columns * down + i % columns * across] */
    int64_t columns, down, across; /* columns 0: one scale for all */
    const float *scale_before;     /* of the same columns; read under RECODE only */
    int64_t down_before, across_before;
    int64_t flags;
    int64_t n, first; /* elements, and number of the first chunk */
    Found *founds;    /* of its chunks */
} Weight;

/* --- scales -------------------------------------------------------------------------------------------------- */

/* Returns the scales of n elements, in `room` where there are several; else it is one number. */
static const float *scales_of(const float *scale, int64_t columns, int64_t down, int64_t across, int64_t at, int32_t n,
                              float *room) {
    if (!columns) return scale;
    int64_t row = at / columns, column = at % columns;
    for (int32_t i = 0; i < n; row++, column = 0)
        for (; column < columns && i < n; column++, i++) room[i] = scale[row * down + column * across];
    return room;
}

/* Returns whether a product is NaN. */
INLINE int32_t multiply(const float *x, const float *scales, float *out, int32_t n, const int one) {
    const float scale = *scales;
    int32_t nan = 0;
    _Pragma("omp simd reduction(| : nan)")
    EACH {
        const float product = x[i] * (one ? scale : scales[i]);
        nan |= product != product ? -1 : 0;
        out[i] = product;
    }
    return nan;
}

/* --- codes --------------------------------------------------------------------------------------------------- */

/* The lowest integer that a code can be: what NaN has. */
static int32_t nan_code(const Weight *t) { return t->flags & WORDS ? INT16_MIN : INT8_MIN; }

/* Rungs of scaled values, whose lower bits are the codes. */
INLINE void rungs_of(const Weight *t, const float *x, const float *scales, int32_t *rungs, int32_t n) {
    const int32_t lowest = nan_code(t);
    float scaled[PIECE];
    const int32_t nan = t->columns ? multiply(x, scales, scaled, n, 0) : multiply(x, scales, scaled, n, 1);
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
    const float *now, *before, *gradient;
    const float *intended;  /* NULL: now - before */
    const float *unrounded; /* NULL, or of what lands: before + intended */
    const float *scales, *spacings;
    int32_t bits;
} Piece;

/* What is counted of updates beside flips: nothing; or how much is lost of the actual ones, of those given, of those given
   in rungs, or of weights that land, which move where their codes change. */
enum { NOTHING, ACTUAL, GIVEN, GIVEN_IN_RUNGS, LANDING };

INLINE void count(const Piece *p, int32_t n, Found *found, const int what) {
    const int32_t *rungs = p->rungs, *rungs_before = p->rungs_before, bits = p->bits;
    const float *now = p->now, *before = p->before, *gradient = p->gradient, *intended = p->intended;
    const float *unrounded = p->unrounded, *spacings = p->spacings;
    int32_t same = 0, updates = 0, updated_same = 0, moved = 0, stayed = 0; /* negative: a mask is -1 */
    float reached = 0; /* spacings that updated elements are meant to move, at most one each */
    _Pragma("omp simd reduction(+ : same, updates, updated_same, moved, stayed, reached)")
    EACH {
        const int32_t has_moved = what && now[i] != before[i] ? -1 : 0;
        const int32_t is_same = what == LANDING ? ~has_moved : ((rungs[i] ^ rungs_before[i]) & bits) == 0 ? -1 : 0;
        const int32_t is_updated = gradient[i] != 0 ? -1 : 0;
        same += is_same;
        updates += is_updated;
        updated_same += is_updated & is_same;
        if (what && what != LANDING) {
            moved += has_moved;
            stayed += has_moved & is_same;
        }
        if (what) {
            const float aim = what == ACTUAL ? now[i] - before[i] : what == LANDING ? unrounded[i] - before[i] : intended[i];
            const float size = what == GIVEN_IN_RUNGS ? fabsf(aim) : fabsf(aim) / spacings[i];
            const float part = 1.0f < size ? 1.0f : size; /* NaN stays NaN */
            reached += part * (gradient[i] != 0 ? 1.0f : 0.0f);
        }
    }
    found->counts.flips += n + same;
    found->counts.updates -= updates;
    found->counts.both += updated_same - updates;
    found->counts.moved += what == LANDING ? n + same : -moved;
    found->counts.stayed -= stayed;
    if (what) found->sums.lost += -updates - (double)reached;
}

static void count_piece(const Weight *t, const Piece *p, int32_t n, Found *found) {
    if (!(t->flags & STALL)) count(p, n, found, NOTHING);
    else if (p->unrounded) count(p, n, found, LANDING);
    else if (t->flags & IN_RUNGS) count(p, n, found, GIVEN_IN_RUNGS);
    else if (p->intended) count(p, n, found, GIVEN);
    else count(p, n, found, ACTUAL);
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
    float room[PIECE];
    if (!(t->flags & RECODE)) {
        read_codes(t, t->codes_before, at, rungs, n);
        return;
    }
    const float *scales = scales_of(t->scale_before, t->columns, t->down_before, t->across_before, at, n, room);
    rungs_of(t, t->before + at, scales, rungs, n);
    write_codes(t, rungs, t->codes_before, at, n);
}

/* The values before the step of a weight on a grid under one scale. */
static void values_before_step(const Weight *t, const int32_t *rungs, float *before, int32_t n) {
    const float scale = *t->scale, inverse = 1.0f / scale;
    const int32_t lowest = nan_code(t);
    int32_t least = 0;
    t->values(rungs, before, n, t->context);
    _Pragma("omp simd reduction(min : least)")
    EACH least = rungs[i] < least ? rungs[i] : least;
    if (is_power_of_two(scale)) SIMD EACH before[i] *= inverse;
    else SIMD EACH before[i] /= scale;
    if (least == lowest) SIMD EACH before[i] = rungs[i] == lowest ? NAN : before[i];
}

/* The spacings at x, in weight units. */
static void spacings_of(const Weight *t, const float *x, const float *scales, float *spacings, int32_t n) {
    float scaled[PIECE];
    if (!t->columns) {
        t->spacings(x, spacings, n, *t->scale, t->context);
        return;
    }
    multiply(x, scales, scaled, n, 0);
    t->spacings(scaled, spacings, n, 1.0f, t->context);
    SIMD EACH spacings[i] /= scales[i];
}

/* Counts and sums what the weight's flags say, and writes its codes. p: all but rungs, spacings and bits is filled in. */
static void piece_of(const Weight *t, int64_t at, int32_t n, Piece *p, Found *found) {
    const float *now = p->now, *before = p->before, *unrounded = p->unrounded;
    float spacings[PIECE], intended[PIECE];
    int32_t rungs[PIECE];
    rungs_of(t, p->now, p->scales, rungs, n);
    write_codes(t, rungs, t->codes, at, n);
    if ((t->flags & STALL) && !(t->flags & IN_RUNGS)) spacings_of(t, p->before, p->scales, spacings, n);
    if (before && !p->intended && t->flags & (DESCENT | IN_RUNGS)) {
        const float *to = unrounded ? unrounded : now;
        SIMD EACH intended[i] = to[i] - before[i];
        p->intended = intended;
    }
    p->rungs = rungs;
    p->spacings = spacings;
    p->bits = t->flags & WORDS ? UINT16_MAX : UINT8_MAX;
    count_piece(t, p, n, found);
    if ((t->flags & DESCENT) && (t->flags & IN_RUNGS)) products_in_rungs(t, p, n, &found->sums);
    else if (t->flags & DESCENT) products_in_units(p, n, &found->sums);
}

static void chunk_of(const Weight *t, int64_t begin, int64_t end, Found *found) {
    float room[PIECE];
    int32_t rungs_before[PIECE];
    *found = (Found){0};
    for (int64_t at = begin; at < end; at += PIECE) {
        const int32_t n = (int32_t)(end - at < PIECE ? end - at : PIECE);
        Piece p = {.now = t->now + at, .before = t->before ? t->before + at : 0, .gradient = t->gradient + at,
                   .intended = t->intended ? t->intended + at : 0, .rungs_before = rungs_before};
        p.scales = scales_of(t->scale, t->columns, t->down, t->across, at, n, room);
        rungs_before_step(t, at, rungs_before, n);
        piece_of(t, at, n, &p, found);
        if (t->kept) memcpy(t->kept + at, p.now, (size_t)n * sizeof(float));
    }
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

/* Adds up what has been found in the chunks of each weight. */
void gather(int64_t count, const Weight *weights, Counts *counts, Sums *sums) {
    for (int64_t each = 0; each < count; each++) {
        const int64_t chunks = (weights[each].n + CHUNK - 1) / CHUNK;
        Found whole = {0};
        for (int64_t chunk = 0; chunk < chunks; chunk++) add(&whole, &weights[each].founds[chunk]);
        counts[each] = whole.counts;
        sums[each] = whole.sums;
    }
}

/* Counts and sums of each weight what its flags say. chunks: of all weights together. */
void tally(int64_t count, const Weight *weights, int64_t chunks, Counts *counts, Sums *sums) {
    _Pragma("omp parallel for schedule(dynamic)")
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const Weight *t = weights;
        while (t + 1 < weights + count && t[1].first <= chunk) t++;
        const int64_t begin = (chunk - t->first) * CHUNK, end = begin + CHUNK;
        chunk_of(t, begin, end < t->n ? end : t->n, &t->founds[chunk - t->first]);
    }
    gather(count, weights, counts, sums);
}

/* The same of a block of a weight that lands on its grid, a Look; `gather` finds what was counted. weight: a Weight
   under one scale, whose codes before the step are those of its values then. */
void tally_landing(const float *unrounded, const float *rounded, int64_t at, int32_t n, void *weight) {
    const Weight *t = weight;
    Found *found = &t->founds[at / CHUNK];
    float before[PIECE];
    int32_t rungs_before[PIECE];
    if (at % CHUNK == 0) *found = (Found){0};
    for (int64_t end = at + n; at < end; at += PIECE, unrounded += PIECE, rounded += PIECE) {
        n = (int32_t)(end - at < PIECE ? end - at : PIECE);
        Piece p = {.now = rounded, .gradient = t->gradient + at, .scales = t->scale, .rungs_before = rungs_before};
        rungs_before_step(t, at, rungs_before, n);
        if (t->flags & (STALL | DESCENT)) {
            values_before_step(t, rungs_before, before, n);
            p.before = before;
            p.unrounded = unrounded;
        }
        piece_of(t, at, n, &p, found);
    }
}
