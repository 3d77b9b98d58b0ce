/* What one step did to the quantized weights, on a CPU: each of weight, gradient, weight before and intended update is
   read once, and the weights, or their codes, are left where the next step finds them. `tally` goes through all weights
   after a step; `tally_landing` takes blocks of a weight that is just being rounded to its grid, where what it was meant
   to become is at hand.

   What is counted is said by the torch code beside it (tally.py); here are the same operations, so the same counts,
   and the same sums but for their order; `lost` is summed in float32 within a piece. A format's arithmetic comes as
   functions over blocks (altgrad_core.native.BlockLoops). Loops are over 32 bits throughout, a mask of all ones being -1:
   what a processor does at once is then the same number of elements in all of them. Sums are taken by chunks in a fixed
   order: the same with any number of threads, and whoever goes through the weights. */

#include "loops.h"

#define PIECE 384 /* elements of a block: what is known of them stays in a core's first cache */

_Static_assert(LANDED % PIECE == 0 && CHUNK % LANDED == 0, "pieces are the same whoever goes through the weights");

enum {
    WORDS = 1,    /* codes are int16, else int8 */
    RECODE = 2,   /* the codes before the step are those of `before` under the scale of then */
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

/* The same as numbers of one kind, which are exact: fewer than 2^53. */
typedef struct {
    double flips, updates, both, stayed, moved;
    Sums sums;
} Row;

typedef struct {
    const float *now, *gradient;
    const float *before;   /* NULL where none of RECODE, STALL and DESCENT is asked for */
    const float *intended; /* NULL: now - before; not read of what lands */
    float *kept;           /* NULL, or where `now` is left for the next step; may be the memory of `before` */
    void *codes_before;    /* NULL, under RECODE: not kept; there they are left */
    void *codes;           /* NULL, or where the codes after the step are left; may be the same memory */
    const float *scale_before; /* read under RECODE, and under DESCENT with IN_RUNGS; see `scale` */
    float *scale_kept;         /* NULL, or where a single scale is left for the next step; may be the same memory */
    Rungs rungs;
    Spacings spacings;
    Steps steps;
    const void *context;
    const float *scale;            /* element i has scale[i / columns * down + i % columns * across] */
    int64_t columns, down, across; /* columns 0: one scale for all */
    int64_t down_before, across_before; /* of the scale before, whose columns are the same */
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
    const float *now, *before, *gradient;
    const float *to;       /* where the update was meant to lead: `now`, or of what lands that before its rounding */
    const float *intended; /* NULL: to - before */
    const float *scales;
    const int32_t *same; /* -1 where the code has not changed */
    const float *shares; /* spacings that elements are meant to move, at most one each */
} Piece;

/* What is counted of updates beside flips: nothing; how many move, and how much is lost; the same of weights on the grid,
   which move where their codes change. */
enum { NOTHING, STEPS, STEPS_ON_GRID };

INLINE void count(const Piece *p, int32_t n, Found *found, const int what) {
    const float *now = p->now, *before = p->before, *gradient = p->gradient, *shares = p->shares;
    const int32_t *same_code = p->same;
    int32_t same = 0, updates = 0, updated_same = 0, still = 0, stayed = 0; /* negative: a mask is -1 */
    float reached = 0;
    _Pragma("omp simd reduction(+ : same, updates, updated_same, still, stayed, reached)")
    EACH {
        const int32_t stands = what && now[i] == before[i] ? -1 : 0;
        const int32_t is_same = what == STEPS_ON_GRID ? stands : same_code[i];
        const int32_t is_updated = gradient[i] != 0 ? -1 : 0;
        same += is_same;
        updates += is_updated;
        updated_same += is_updated & is_same;
        if (what == STEPS) {
            still += stands;
            stayed += ~stands & is_same;
        }
        if (what) reached += shares[i] * (gradient[i] != 0 ? 1.0f : 0.0f); /* NaN stays NaN */
    }
    found->counts.flips += n + same;
    found->counts.updates -= updates;
    found->counts.both += updated_same - updates;
    if (!what) return;
    found->counts.moved += n + (what == STEPS_ON_GRID ? same : still);
    found->counts.stayed -= stayed;
    found->sums.lost += -updates - (double)reached;
}

/* --- products ------------------------------------------------------------------------------------------------ */

/* Intended are rungs of the grid before the step, so what has arrived is counted there too. */
static void products_in_rungs(const Weight *t, const Piece *p, int64_t at, int32_t n, Sums *sums) {
    const float *intended = p->intended, *now = p->now, *before = p->before;
    int32_t rungs[PIECE], rungs_before[PIECE];
    float room[PIECE];
    double product = 0, square = 0;
    const float *scales = scales_of(t->scale_before, t->columns, t->down_before, t->across_before, at, n, room);
    rungs_of(t, now, scales, rungs, n);
    rungs_of(t, before, scales, rungs_before, n);
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

/* The rungs before the step: as they are kept, or of the values before it under the scale of then. */
static void rungs_before_step(const Weight *t, const float *before, int64_t at, int32_t *rungs, int32_t n) {
    float room[PIECE];
    if (!(t->flags & RECODE)) {
        read_codes(t, t->codes_before, at, rungs, n);
        return;
    }
    const float *scales = scales_of(t->scale_before, t->columns, t->down_before, t->across_before, at, n, room);
    rungs_of(t, before, scales, rungs, n);
    if (t->codes_before) write_codes(t, rungs, t->codes_before, at, n);
}

/* Whether codes have not changed, by comparing them; they are left where they are kept. */
static void compared(const Weight *t, const Piece *p, int64_t at, int32_t *same, int32_t n) {
    const int32_t bits = t->flags & WORDS ? UINT16_MAX : UINT8_MAX;
    int32_t rungs[PIECE], rungs_before[PIECE];
    rungs_before_step(t, p->before, at, rungs_before, n);
    rungs_of(t, p->now, p->scales, rungs, n);
    if (t->codes) write_codes(t, rungs, t->codes, at, n);
    SIMD EACH same[i] = ((rungs[i] ^ rungs_before[i]) & bits) == 0 ? -1 : 0;
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

/* Spacings that updates are long, at most one. */
static void shares_of(const Weight *t, const Piece *p, float *shares, int32_t n) {
    if (t->flags & IN_RUNGS) SIMD EACH shares[i] = 1.0f;
    else spacings_of(t, p->before, p->scales, shares, n);
    SIMD EACH {
        const float share = fabsf(p->intended ? p->intended[i] : p->to[i] - p->before[i]) / shares[i];
        shares[i] = 1.0f < share ? 1.0f : share; /* NaN stays NaN */
    }
}

/* Counts and sums what the weight's flags say. p: all but `same` and `shares` is filled in. lands: both sides of the step
   are on one grid. */
static void piece_of(const Weight *t, int64_t at, int32_t n, Piece *p, int lands, Found *found) {
    float shares[PIECE], intended[PIECE];
    int32_t same[PIECE];
    const int stall = t->flags & STALL, codes = t->codes_before || t->codes;
    const int regular = !t->columns && (!(t->flags & RECODE) || *t->scale == *t->scale_before);
    const int at_once = stall && regular && !p->intended && !(t->flags & IN_RUNGS);
    p->same = same;
    p->shares = shares;
    lands = lands && stall && regular;
    if (at_once) t->steps(p->before, p->to, codes || lands ? 0 : same, shares, n, *t->scale, t->context);
    else if (stall) shares_of(t, p, shares, n);
    if (codes || !at_once) compared(t, p, at, same, n);
    if (!stall) count(p, n, found, NOTHING);
    else if (lands) count(p, n, found, STEPS_ON_GRID);
    else count(p, n, found, STEPS);
    if (!(t->flags & DESCENT)) return;
    if (!p->intended) {
        SIMD EACH intended[i] = p->to[i] - p->before[i];
        p->intended = intended;
    }
    if (t->flags & IN_RUNGS) products_in_rungs(t, p, at, n, &found->sums);
    else products_in_units(p, n, &found->sums);
}

/* The same of a block of a weight; to: NULL, or where the update led before the weight landed. */
static void block_of(const Weight *t, const float *now, const float *to, int64_t at, int64_t n, Found *found) {
    float room[PIECE];
    for (const int64_t end = at + n; at < end; at += PIECE, now += PIECE, to += to ? PIECE : 0) {
        const int32_t size = (int32_t)(end - at < PIECE ? end - at : PIECE);
        Piece p = {.now = now, .before = t->before ? t->before + at : 0, .gradient = t->gradient + at, .to = to ? to : now,
                   .intended = t->intended && !to ? t->intended + at : 0};
        p.scales = scales_of(t->scale, t->columns, t->down, t->across, at, size, room);
        piece_of(t, at, size, &p, to != 0, found);
        if (t->kept) memcpy(t->kept + at, now, (size_t)size * sizeof(float));
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

static Row row_of(const Found *found) {
    const Counts *of = &found->counts;
    return (Row){(double)of->flips, (double)of->updates, (double)of->both, (double)of->stayed, (double)of->moved,
                 found->sums};
}

/* Adds up what has been found in the chunks of each weight, all of which has been gone through: a row for each. */
void gather(int64_t count, const Weight *weights, Row *rows) {
    for (int64_t each = 0; each < count; each++) {
        const int64_t chunks = (weights[each].n + CHUNK - 1) / CHUNK;
        Found whole = {0};
        for (int64_t chunk = 0; chunk < chunks; chunk++) add(&whole, &weights[each].founds[chunk]);
        rows[each] = row_of(&whole);
        if (weights[each].scale_kept) *weights[each].scale_kept = *weights[each].scale;
    }
}

/* Counts and sums of each weight what its flags say. chunks: of all weights together. */
void tally(int64_t count, const Weight *weights, int64_t chunks, Row *rows) {
    _Pragma("omp parallel for schedule(dynamic)")
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const Weight *t = weights;
        while (t + 1 < weights + count && t[1].first <= chunk) t++;
        const int64_t at = (chunk - t->first) * CHUNK, rest = t->n - at;
        Found *found = &t->founds[chunk - t->first];
        *found = (Found){0};
        block_of(t, t->now + at, 0, at, rest < CHUNK ? rest : CHUNK, found);
    }
    gather(count, weights, rows);
}

/* The same of a block of a weight that lands on its grid, a Look; `gather` finds what was counted. */
void tally_landing(const float *unrounded, const float *rounded, int64_t at, int32_t n, void *weight) {
    const Weight *t = weight;
    Found *found = &t->founds[at / CHUNK];
    if (at % CHUNK == 0) *found = (Found){0};
    block_of(t, rounded, unrounded, at, n, found);
}
