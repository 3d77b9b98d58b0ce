/* Optimizer steps on a CPU, one call for all tensors of a group, each of weight, gradient and moments read once.

   What a step is, is said by the torch code beside it (manifold.py, grid.py); here are the same operations in the
   same order, so the same bits (but for sums over a tensor, which are taken in float64 in another order). A format's arithmetic comes
   as functions over blocks (altgrad_core.native.BlockLoops), which are small enough to stay in a core's first
   cache. Sums are taken by pieces in a fixed order: the same with any number of threads.

   Nothing here may be contracted or reassociated: compile with -ffp-contract=off and without -ffast-math. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
#endif

#define PIECE 1024      /* elements of a block */
#define GRID_PIECE 256  /* the same of GridOptim, which has more beside each weight in the first cache */
#define LINE 16         /* elements of a line of the cache */

typedef void (*Rungs)(const float *, int32_t *, int32_t, const void *);
typedef void (*Values)(const int32_t *, float *, int32_t, const void *);
typedef void (*Moves)(float *, const int32_t *, int32_t, float, const int32_t *, int32_t *, const void *);
typedef void (*Spacings)(const float *, float *, int32_t, float, const void *);

#define EACH for (int32_t i = 0; i < n; i++)
#define SIMD _Pragma("omp simd")

static inline float limited(float x, float low, float high) {
    x = x < low ? low : x; /* NaN stays NaN */
    return x > high ? high : x;
}

/* --- Adam's direction ---------------------------------------------------------------------------------------- */

typedef struct {
    double beta1, beta2;
    float first, second; /* 1 - beta1, and beta2 */
    float rest;          /* 1 - beta2 */
    float eps;
} Moments;

/* What the bias corrections multiply by: 1 / (1 - beta1^t), and 1 / sqrt(1 - beta2^t). */
typedef struct {
    float first, second;
} Correction;

/* Counts a weight's step, its t-th, and returns the corrections of it. */
static Correction counted(float *counter, const Moments *k) {
    const double t = *counter += 1.0f;
    return (Correction){(float)(1.0 / (1.0 - pow(k->beta1, t))), (float)(1.0 / sqrt(1.0 - pow(k->beta2, t)))};
}

/* Adam's direction from the moments; see adamw.py. */
static inline float direction_of(float m, float v, Moments k, Correction c) {
    return m / (sqrtf(v) * c.second + k.eps) * c.first;
}

/* Updates the moments by the gradient g and returns Adam's direction. */
static inline float direction(float g, float *m, float *v, Moments k, Correction c) {
    *m = *m + (g - *m) * k.first;
    *v = *v * k.second + (g * g) * k.rest;
    return direction_of(*m, *v, k, c);
}

/* --- ManifoldAdamW ------------------------------------------------------------------------------------------- */

enum { ONE, IDENTITY, ROOT, INVERSE_ROOT, INVERSE }; /* S^0, S^1, S^(1/2), S^(-1/2), S^(-1) */
enum { NONE, RMS, MEAN, MAX };

typedef struct {
    Moments moments;
    int32_t gradient_power, update_power, normalize;
    float max_stiffness, smallest; /* S is at most the first; a spacing at least the second */
    float lr, decay;               /* w is multiplied by the latter */
} Manifold;

typedef struct {
    float *w;
    const float *g;
    float *m, *v;
    float *counter; /* steps taken so far */
    const float *stiffness; /* S of each weight; NULL: the spacing of the format */
    Spacings spacings;
    const void *context;
    const float *scale;
    int64_t n;
} Weight;

/* S^power of n weights, of which the first is number `at`. */
static void powers_of(const Weight *t, int64_t at, int32_t n, const Manifold *o, int32_t power, float *s) {
    const float most = o->max_stiffness, least = o->smallest;
    if (t->stiffness)
        memcpy(s, t->stiffness + at, (size_t)n * sizeof(float));
    else
        t->spacings(t->w + at, s, n, *t->scale, t->context);
    SIMD EACH s[i] = limited(s[i], least, most);
    if (power == ROOT) SIMD EACH s[i] = sqrtf(s[i]);
    if (power == INVERSE_ROOT) SIMD EACH s[i] = 1.0f / sqrtf(s[i]);
    if (power == INVERSE) SIMD EACH s[i] = 1.0f / s[i];
}

/* What a piece gives to the norm: in float64 the sum of squares, or the sum; or the largest, NaN if there is one. */
static double summed(const float *s, int32_t n, int32_t normalize) {
    double sum = 0;
    int32_t largest = 0; /* as bits, which order positive numbers, NaN above all */
    if (normalize == RMS) {
        _Pragma("omp simd reduction(+ : sum)")
        EACH sum += (double)s[i] * (double)s[i];
    } else if (normalize == MEAN) {
        _Pragma("omp simd reduction(+ : sum)")
        EACH sum += (double)s[i];
    } else {
        _Pragma("omp simd reduction(max : largest)")
        EACH {
            int32_t bits;
            memcpy(&bits, &s[i], sizeof(bits));
            largest = bits > largest ? bits : largest;
        }
        float size;
        memcpy(&size, &largest, sizeof(size));
        sum = size;
    }
    return sum;
}

/* S^q of a piece, and what it gives to the norm. Weights alone are read here, which one stream of reading brings in too
   slowly: they are asked for half a piece ahead. */
static double powers_and_sum(const Weight *t, int64_t at, int32_t n, const Manifold *o, float *s) {
    for (int32_t i = 0; i < n; i += PIECE / 4) {
        const int32_t m = n - i < PIECE / 4 ? n - i : PIECE / 4;
        for (int32_t j = 0; j < m; j += LINE) __builtin_prefetch(t->w + at + i + j + PIECE / 2);
        powers_of(t, at + i, m, o, o->update_power, s + i);
    }
    return summed(s, n, o->normalize);
}

/* 1 over the rms, mean or largest of S^q, from the pieces' sums. */
static float over_norm(const double *parts, int64_t pieces, int64_t n, int32_t normalize) {
    double whole = parts[0];
    for (int64_t i = 1; i < pieces; i++) {
        if (normalize == MAX)
            whole = whole != whole || parts[i] <= whole ? whole : parts[i]; /* NaN stays */
        else
            whole += parts[i];
    }
    if (normalize == RMS) return (float)(1.0 / sqrt(whole / (double)n));
    return (float)(1.0 / (normalize == MEAN ? whole / (double)n : whole));
}

/* One step of n weights; p, q: S^p and S^q, where there are such. */
static inline __attribute__((always_inline)) void
manifold_piece(const Weight *t, Correction c, int64_t at, int32_t n, const Manifold *o, const float *p,
               const float *q, float norm, const int with_p, const int with_q) {
    const Moments k = o->moments;
    const float lr = o->lr, decay = o->decay;
    float *w = t->w + at, *m = t->m + at, *v = t->v + at;
    const float *g = t->g + at;
    SIMD EACH {
        float move = direction(with_p ? g[i] * p[i] : g[i], &m[i], &v[i], k, c);
        if (with_q) move = move * (q[i] * norm);
        w[i] = w[i] * decay - move * lr;
    }
}

static void any_manifold_piece(const Weight *t, Correction c, int64_t at, int32_t n, const Manifold *o,
                               const float *p, const float *q, float norm) {
    if (p && q) manifold_piece(t, c, at, n, o, p, q, norm, 1, 1);
    else if (p) manifold_piece(t, c, at, n, o, p, q, norm, 1, 0);
    else if (q) manifold_piece(t, c, at, n, o, p, q, norm, 0, 1);
    else manifold_piece(t, c, at, n, o, p, q, norm, 0, 0);
}

static void manifold_step(const Weight *t, const Manifold *o, float *powers, double *parts, int split) {
    const int64_t pieces = (t->n + PIECE - 1) / PIECE;
    const int with_p = o->gradient_power != ONE, with_q = o->update_power != ONE, whole = with_q && o->normalize;
    const Correction c = counted(t->counter, &o->moments);
    float norm = 1.0f;
    if (whole) {
        _Pragma("omp parallel for schedule(static) if (split)")
        for (int64_t piece = 0; piece < pieces; piece++) {
            const int64_t at = piece * PIECE;
            const int32_t n = (int32_t)(t->n - at < PIECE ? t->n - at : PIECE);
            parts[piece] = powers_and_sum(t, at, n, o, powers + at);
        }
        norm = over_norm(parts, pieces, t->n, o->normalize);
    }
    _Pragma("omp parallel for schedule(static) if (split)")
    for (int64_t piece = 0; piece < pieces; piece++) {
        const int64_t at = piece * PIECE;
        const int32_t n = (int32_t)(t->n - at < PIECE ? t->n - at : PIECE);
        float first[PIECE], second[PIECE];
        const float *p = 0, *q = 0;
        if (with_q && whole) q = powers + at;
        if (with_q && !whole) powers_of(t, at, n, o, o->update_power, second), q = second;
        if (with_p && o->gradient_power == o->update_power) p = q;
        else if (with_p) powers_of(t, at, n, o, o->gradient_power, first), p = first;
        any_manifold_piece(t, c, at, n, o, p, q, norm);
    }
}

/* One step of every weight: threads take a weight each, or with `split` share each one.
   powers, parts: for every thread room for S^q of the largest weight, `room` numbers, and for its pieces' sums. */
void manifold_steps(int64_t count, const Weight *weights, const Manifold *o, float *powers, double *parts,
                    int64_t room, int32_t split) {
    _Pragma("omp parallel for schedule(dynamic) if (!split)")
    for (int64_t each = 0; each < count; each++) {
        const int64_t mine = split ? 0 : omp_get_thread_num() * room;
        manifold_step(&weights[each], o, powers + mine, parts + mine / PIECE, split);
    }
}

/* --- GridOptim ----------------------------------------------------------------------------------------------- */

typedef struct {
    Moments moments;
    float momentum, clip;
    float lr, decay; /* the decay is coupled without Adam */
    int32_t adam;    /* Adam's direction, else the velocity */
    uint64_t state;  /* of the random streams of this step */
} Grid;

typedef struct {
    float *w;
    const float *g;
    float *m, *v; /* moments; without Adam m is the velocity */
    float *counter; /* steps taken so far */
    float *intended; /* -r is left here, unless it is NULL */
    Rungs rungs;
    Values values;
    Moves moves;
    Spacings spacings;
    const void *context;
    const float *scale;
    uint64_t number; /* of its random stream */
    int64_t n;
} Member;

typedef struct {
    double low, high;             /* limits of the values, scaled units; infinite without a bound */
    double least_rung, most_rung; /* of the format */
    double quiet_low, quiet_high; /* the scale stays where low < amax <= high, weight units */
} Move;

typedef struct {
    int64_t flips, updates; /* weights that changed, and elements with a gradient; 0 for what has not landed */
    int64_t past;           /* whether one was pushed past the end */
    float *left;            /* the unrounded values of a weight that has not landed */
    int64_t failed;         /* whether there was no memory for them */
} Landing;

/* What a piece tells of the rungs its weights went to, before any limit. */
typedef struct {
    int32_t least, most;
    int32_t undefined; /* whether a weight or its step is NaN */
    int64_t updates, flips;
} Seen;

static const Seen NOTHING_SEEN = {INT32_MAX, INT32_MIN, 0, 0, 0};

/* The keys of a stream, as altgrad_core.random_bits.stream_keys makes them of the state of seed and step. */
static void keys_of(uint64_t state, uint64_t number, uint32_t keys[2]) {
    uint64_t word = (state ^ number) + 0x9E3779B97F4A7C15u;
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9u;
    word = (word ^ word >> 27) * 0x94D049BB133111EBu;
    word ^= word >> 31;
    keys[0] = (uint32_t)word;
    keys[1] = (uint32_t)(word >> 32);
}

static inline uint32_t random_bits(uint32_t i, uint32_t first, uint32_t second) { /* of altgrad_core.random_bits */
    i = (i + first) * 0xED5AD4BBu;
    i = (i ^ i >> 15) * 0xAC4C1B51u + second;
    return (i ^ i >> 15) * 0x31848BABu;
}

#define INLINE static inline __attribute__((always_inline))

/* How far down n weights are to go, in rungs, before the clip; with `again` the moments have been updated before.
   Returns how many have a gradient. A loop of its own: what waits for a root and a quotient would hold up the
   arithmetic of the rounding. */
INLINE int32_t rates(const Member *t, Correction c, int64_t at, int32_t n, const Grid *o, const float *scaled,
                     const float *spacing, float *r, const int adam, const int decays, const int again) {
    const Moments k = o->moments;
    const float lr = o->lr, decay = o->decay, momentum = o->momentum;
    const float *w = t->w + at, *g = t->g + at;
    float *m = t->m + at, *v = t->v + at;
    int32_t updates = 0;
    _Pragma("omp simd reduction(+ : updates)")
    EACH {
        updates += g[i] != 0;
        if (adam) {
            r[i] = (again ? direction_of(m[i], v[i], k, c) : direction(g[i], &m[i], &v[i], k, c)) * lr;
            if (decays) r[i] = r[i] + scaled[i] / spacing[i] * decay;
        } else {
            if (!again) m[i] = m[i] * momentum + (decays ? g[i] + w[i] * decay : g[i]);
            r[i] = m[i] * lr;
        }
    }
    return updates;
}

static int32_t any_rates(const Member *t, Correction c, int64_t at, int32_t n, const Grid *o, const float *w, float *r,
                         const int again) {
    float scaled[GRID_PIECE], spacing[GRID_PIECE];
    const int decays = o->decay != 0, adam = o->adam != 0;
    if (adam && decays) {
        SIMD EACH scaled[i] = w[i] * *t->scale;
        t->spacings(scaled, spacing, n, 1.0f, t->context);
    }
#define IN_CASE(adam_, decays_, again_)                                                                 \
    if (adam == adam_ && decays == decays_ && again == again_)                                          \
        return rates(t, c, at, n, o, scaled, spacing, r, adam_, decays_, again_);
    IN_CASE(0, 0, 0) IN_CASE(0, 1, 0) IN_CASE(1, 0, 0) IN_CASE(1, 1, 0)
    IN_CASE(0, 0, 1) IN_CASE(0, 1, 1) IN_CASE(1, 0, 1) IN_CASE(1, 1, 1)
    return 0;
}

#define FEW 64 /* rungs: so many, times 2^24, are an int32 */

/* r rungs after the clip, rounded stochastically: |r| rounds up where its fraction is above the number of its random
   bits, the upper 24 of them over 2^24. A few rungs are rounded as integers, which is sooner. */
INLINE int32_t whole_rungs(float r, float clip, uint32_t bits, const int few) {
    float rate = r < clip ? r : clip; /* a NaN too */
    rate = rate > -clip ? rate : -clip;
    const float magnitude = fabsf(rate);
    if (few) {
        const int32_t parts = (int32_t)ceilf(magnitude * 0x1p24f);
        const int32_t whole = (int32_t)(((uint32_t)parts + (~bits >> 8)) >> 24);
        return rate < 0 ? -whole : whole;
    }
    const float whole = floorf(magnitude);
    const float up = (float)(int32_t)(bits >> 8) * 0x1p-24f < magnitude - whole ? 1.0f : 0.0f;
    return (int32_t)copysignf(whole + up, rate);
}

/* Takes n weights, w, down by r rungs. Returns whether one of those or of these is NaN; what is `down` then is of no
   importance. before: gets the weights, unless it is NULL. */
INLINE int32_t rounded(const uint32_t *keys, int64_t at, int32_t n, float clip, const float *restrict r,
                       const float *restrict w, float *restrict before, int32_t *restrict down, const int few) {
    const uint32_t first = keys[0], second = keys[1], begin = (uint32_t)at;
    int32_t undefined = 0;
    _Pragma("omp simd reduction(| : undefined)")
    EACH {
        undefined |= __builtin_isunordered(r[i], w[i]);
        if (before) before[i] = w[i];
        down[i] = whole_rungs(r[i], clip, random_bits(begin + (uint32_t)i, first, second), few);
    }
    return undefined;
}

static int32_t any_rounded(const Member *t, int64_t at, int32_t n, const Grid *o, const float *r, const float *w,
                           float *before, int32_t *down) {
    uint32_t keys[2];
    keys_of(o->state, t->number, keys);
    if (o->clip <= FEW) return rounded(keys, at, n, o->clip, r, w, before, down, 1);
    return rounded(keys, at, n, o->clip, r, w, before, down, 0);
}

/* Moves and lands n weights; `before` gets them as they were. */
static Seen grid_piece(const Member *t, Correction c, int64_t at, int32_t n, const Grid *o, float *before,
                       const int32_t *ends) {
    float r[GRID_PIECE], *w = t->w + at;
    int32_t down[GRID_PIECE], seen[3] = {INT32_MAX, INT32_MIN, 0};
    const int32_t updates = any_rates(t, c, at, n, o, w, r, 0);
    if (t->intended) SIMD EACH t->intended[at + i] = w[i] != w[i] ? NAN : -limited(r[i], -o->clip, o->clip);
    const int32_t undefined = any_rounded(t, at, n, o, r, w, before, down);
    t->moves(w, down, n, *t->scale, ends, seen, t->context);
    return (Seen){seen[0], seen[1], undefined, updates, seen[2]};
}

/* The values in scaled units to which n weights would go from `before` if there were no bound, after the moments have
   been updated; NaN where the weight or its step is. */
static Seen unbounded(const Member *t, Correction c, int64_t at, int32_t n, const Grid *o,
                      const float *before, float *target) {
    const int32_t ends[2] = {INT32_MIN, INT32_MAX}; /* values end with the format */
    float r[GRID_PIECE];
    int32_t down[GRID_PIECE], seen[3] = {INT32_MAX, INT32_MIN, 0};
    any_rates(t, c, at, n, o, before, r, 1);
    SIMD EACH target[i] = before[i] * *t->scale;
    SIMD EACH r[i] = __builtin_isunordered(r[i], before[i]) ? NAN : r[i];
    any_rounded(t, at, n, o, r, before, 0, down);
    SIMD EACH down[i] = r[i] != r[i] ? 0 : down[i];
    t->moves(target, down, n, 1.0f, ends, seen, t->context);
    SIMD EACH target[i] = r[i] != r[i] ? NAN : target[i];
    return (Seen){seen[0], seen[1], 0, 0, 0};
}

static inline int32_t within(int32_t rung, int32_t least, int32_t most) {
    rung = rung < least ? least : rung;
    return rung > most ? most : rung;
}

static Seen together(Seen a, Seen b) {
    return (Seen){a.least < b.least ? a.least : b.least, a.most > b.most ? a.most : b.most,
                  a.undefined | b.undefined, a.updates + b.updates, a.flips + b.flips};
}

_Pragma("omp declare reduction(together : Seen : omp_out = together(omp_out, omp_in)) initializer(omp_priv = omp_orig)")

static int32_t size_of_piece(const Member *t, int64_t at) {
    return (int32_t)(t->n - at < GRID_PIECE ? t->n - at : GRID_PIECE);
}

/* Puts a weight back to what it was, and leaves where it would go without a bound: its scale may have to change. */
static Landing left(const Member *t, const Move *move, Correction c, const Grid *o, const float *before, int split) {
    float *target = malloc((size_t)t->n * sizeof(float));
    if (!target) return (Landing){.failed = 1};
    Seen seen = NOTHING_SEEN;
    _Pragma("omp parallel for schedule(static) reduction(together : seen) if (split)")
    for (int64_t at = 0; at < t->n; at += GRID_PIECE)
        seen = together(seen, unbounded(t, c, at, size_of_piece(t, at), o, before + at, target + at));
    memcpy(t->w, before, (size_t)t->n * sizeof(float));
    const int past = seen.least < (int32_t)move->least_rung || seen.most > (int32_t)move->most_rung;
    return (Landing){.past = past, .left = target};
}

/* Whether the scale stays for weights that went to such rungs. */
static int quiet(const Member *t, const Move *move, Seen seen) {
    const int32_t least = (int32_t)move->least_rung, most = (int32_t)move->most_rung;
    const int32_t ends[2] = {within(seen.least, least, most), within(seen.most, least, most)};
    float values[2];
    t->values(ends, values, 2, t->context);
    const float down = fabsf(values[0]), up = fabsf(values[1]);
    const double amax = (down > up ? down : up) / *t->scale;
    return !seen.undefined && seen.least >= least && seen.most <= most && amax > move->quiet_low &&
           amax <= move->quiet_high;
}

static Landing grid_move(const Member *t, const Move *move, const Grid *o, float *before, int split) {
    const float limits[2] = {(float)move->low, (float)move->high};
    int32_t bound[2], ends[2] = {(int32_t)move->least_rung, (int32_t)move->most_rung};
    t->rungs(limits, bound, 2, t->context);
    if (!isinf(limits[0])) ends[0] = within(ends[0], bound[0], ends[1]);
    if (!isinf(limits[1])) ends[1] = within(ends[1], ends[0], bound[1]);
    const Correction c = counted(t->counter, &o->moments);
    Seen seen = NOTHING_SEEN;
    _Pragma("omp parallel for schedule(static) reduction(together : seen) if (split)")
    for (int64_t at = 0; at < t->n; at += GRID_PIECE)
        seen = together(seen, grid_piece(t, c, at, size_of_piece(t, at), o, before + at, ends));
    if (!quiet(t, move, seen)) return left(t, move, c, o, before, split);
    return (Landing){.flips = seen.flips, .updates = seen.updates};
}

/* Moves weights by whole rungs and lands those whose scale surely stays; of another one the unrounded values, in scaled
   units, are left in `landings`, for `take` to fetch. Threads take a weight each, or with `split` share each one.
   room_before: for every thread room for the largest weight, `room` numbers. Returns whether memory ran out. */
int32_t grid_steps(int64_t count, const Member *members, const Move *moves, const Grid *o, float *room_before,
                   int64_t room, int32_t split, Landing *landings) {
    int32_t failed = 0;
    _Pragma("omp parallel for schedule(dynamic) reduction(max : failed) if (!split)")
    for (int64_t each = 0; each < count; each++) {
        float *before = room_before + (split ? 0 : omp_get_thread_num() * room);
        landings[each] = grid_move(&members[each], &moves[each], o, before, split);
        failed = landings[each].failed ? 1 : failed;
    }
    return failed;
}

/* Copies the values that a weight has left, n of them, and frees their memory. */
void take(Landing *landing, float *values, int64_t n) {
    memcpy(values, landing->left, (size_t)n * sizeof(float));
    free(landing->left);
    landing->left = 0;
}
