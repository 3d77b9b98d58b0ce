/* Optimizer steps on a CPU, one call for all tensors of a group, each of weight, gradient and moments read once.

   What a step is, is said by the torch code beside it (manifold.py, grid.py); here are the same operations in the same
   order, so the same bits (but for sums over a tensor, which are taken in float64 in another order). A format's arithmetic
   comes as functions over blocks (altgrad_core.native.BlockLoops), which are small enough to stay in a core's first
   cache. Sums are taken by pieces in a fixed order: the same with any number of threads.

   Nothing here may be contracted or reassociated: compile with -ffp-contract=off and without -ffast-math. */

#include <stdlib.h>

#include "loops.h"

#define PIECE 1024      /* elements of a block */
#define GRID_PIECE 320  /* the same of GridOptim, which has more beside each weight in the first cache */

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

/* The moments after a gradient g; see adamw.py. */
INLINE float first_moment(float m, float g, Moments k) { return m + (g - m) * k.first; }

INLINE float second_moment(float v, float g, Moments k) { return v * k.second + (g * g) * k.rest; }

/* What the first moment is divided by, and the direction. */
INLINE float divisor_of(float v, Moments k, Correction c) { return sqrtf(v) * c.second + k.eps; }

INLINE float direction_of(float m, float divisor, Correction c) { return m / divisor * c.first; }

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
    Spacings spacings;      /* what S is, where it is not given */
    const void *context;
    const float *scale;
    float *position; /* how many spacings of its format it has moved; NULL: nobody counts */
    Spacings ulps;   /* of the format */
    const void *format;
    int64_t n;
} Weight;

/* S of n weights, of which the first is number `at`. */
static void stiffness_of(const Weight *t, int64_t at, int32_t n, float *s) {
    if (t->stiffness)
        memcpy(s, t->stiffness + at, (size_t)n * sizeof(float));
    else
        t->spacings(t->w + at, s, n, *t->scale, t->context);
}

INLINE float power_of(float s, const int32_t power) {
    const float root = power == ROOT || power == INVERSE_ROOT ? sqrtf(s) : s;
    return power == INVERSE || power == INVERSE_ROOT ? 1.0f / root : root;
}

/* Raises S, within its limits, to a power, and returns what that gives to the norm: in float64 the sum of squares, or the
   sum; or the largest, NaN if there is one. In one loop: the sum is free beside a root or a quotient. */
INLINE double raised(float *s, int32_t n, const Manifold *o, const int32_t power, const int32_t normalize) {
    const float most = o->max_stiffness, least = o->smallest;
    double sum = 0;
    int32_t largest = 0; /* as bits, which order positive numbers, NaN above all */
    _Pragma("omp simd reduction(+ : sum) reduction(max : largest)")
    EACH {
        s[i] = power_of(limited(s[i], least, most), power);
        if (normalize == RMS) sum += (double)s[i] * (double)s[i];
        if (normalize == MEAN) sum += (double)s[i];
        if (normalize == MAX) largest = bits_of(s[i]) > largest ? bits_of(s[i]) : largest;
    }
    return normalize == MAX ? float_of(largest) : sum;
}

static double any_raised(float *s, int32_t n, const Manifold *o, int32_t power, int32_t normalize) {
#define IN_CASE(power_, normalize_) \
    if (power == power_ && normalize == normalize_) return raised(s, n, o, power_, normalize_);
#define IN_CASES(power_) IN_CASE(power_, NONE) IN_CASE(power_, RMS) IN_CASE(power_, MEAN) IN_CASE(power_, MAX)
    IN_CASES(IDENTITY) IN_CASES(ROOT) IN_CASES(INVERSE_ROOT) IN_CASES(INVERSE)
#undef IN_CASES
#undef IN_CASE
    return 0;
}

static void powers_of(const Weight *t, int64_t at, int32_t n, const Manifold *o, int32_t power, float *s) {
    stiffness_of(t, at, n, s);
    any_raised(s, n, o, power, NONE);
}

/* S^q of a piece, and what it gives to the norm. Weights alone are read here, which one stream of reading brings in too
   slowly: they are asked for half a piece ahead. */
static double powers_and_sum(const Weight *t, int64_t at, int32_t n, const Manifold *o, float *s) {
    for (int32_t i = 0; i < n; i += PIECE / 4) {
        const int32_t m = n - i < PIECE / 4 ? n - i : PIECE / 4;
        for (int32_t j = 0; j < m; j += LINE) __builtin_prefetch(t->w + at + i + j + PIECE / 2);
        stiffness_of(t, at + i, m, s + i);
    }
    return any_raised(s, n, o, o->update_power, o->normalize);
}

/* Whether S^q is divided by its norm, so that a constant S gives 1 to the bit. Without a root a power of two does so
   times the reciprocal too, which is sooner. */
static int divided(const Manifold *o) {
    return o->normalize && (o->update_power == ROOT || o->update_power == INVERSE_ROOT);
}

/* The rms, mean or largest of S^q, from the pieces' sums. */
static double norm_of(const double *parts, int64_t pieces, int64_t n, int32_t normalize) {
    double whole = parts[0];
    for (int64_t i = 1; i < pieces; i++) {
        if (normalize == MAX)
            whole = whole != whole || parts[i] <= whole ? whole : parts[i]; /* NaN stays */
        else
            whole += parts[i];
    }
    if (normalize == RMS) return sqrt(whole / (double)n);
    return normalize == MEAN ? whole / (double)n : whole;
}

enum { WITHOUT, TIMES, OVER }; /* what is done with S^q: nothing, or it is multiplied or divided by a number */

/* One step of n weights; p, q: S^p and S^q, where there are such. */
INLINE void manifold_piece(const Weight *t, Correction c, int64_t at, int32_t n, const Manifold *o, const float *p,
               const float *q, float norm, const int with_p, const int how_q) {
    const Moments k = o->moments;
    const float lr = o->lr, decay = o->decay;
    float *w = t->w + at, *m = t->m + at, *v = t->v + at;
    const float *g = t->g + at;
    SIMD EACH {
        const float gradient = with_p ? g[i] * p[i] : g[i];
        m[i] = first_moment(m[i], gradient, k);
        v[i] = second_moment(v[i], gradient, k);
        float move = direction_of(m[i], divisor_of(v[i], k, c), c);
        if (how_q) move = move * (how_q == OVER ? q[i] / norm : q[i] * norm);
        w[i] = w[i] * decay - move * lr;
    }
}

static void any_manifold_piece(const Weight *t, Correction c, int64_t at, int32_t n, const Manifold *o,
                               const float *p, const float *q, float norm) {
    const int how_q = !q ? WITHOUT : divided(o) ? OVER : TIMES, with_p = p != 0;
#define IN_CASE(with_p_, how_q_) \
    if (with_p == with_p_ && how_q == how_q_) manifold_piece(t, c, at, n, o, p, q, norm, with_p_, how_q_);
    IN_CASE(0, WITHOUT) IN_CASE(0, TIMES) IN_CASE(0, OVER)
    IN_CASE(1, WITHOUT) IN_CASE(1, TIMES) IN_CASE(1, OVER)
#undef IN_CASE
}

/* Adds to positions by how many spacings, of the grid at what weights were before, they have moved. */
static void count_movement(const Weight *t, int64_t at, int32_t n, const float *before) {
    const float *w = t->w + at, scale = *t->scale;
    float scaled[PIECE], spacing[PIECE], *position = t->position + at;
    SIMD EACH scaled[i] = before[i] * scale;
    t->ulps(scaled, spacing, n, 1.0f, t->format);
    SIMD EACH position[i] = position[i] + (w[i] - before[i]) * scale / spacing[i];
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
        const double whole_norm = norm_of(parts, pieces, t->n, o->normalize);
        norm = (float)(divided(o) ? whole_norm : 1.0 / whole_norm);
    }
    _Pragma("omp parallel for schedule(static) if (split)")
    for (int64_t piece = 0; piece < pieces; piece++) {
        const int64_t at = piece * PIECE;
        const int32_t n = (int32_t)(t->n - at < PIECE ? t->n - at : PIECE);
        float first[PIECE], second[PIECE], before[PIECE];
        const float *p = 0, *q = 0;
        if (with_q && whole) q = powers + at;
        if (with_q && !whole) powers_of(t, at, n, o, o->update_power, second), q = second;
        if (with_p && o->gradient_power == o->update_power) p = q;
        else if (with_p) powers_of(t, at, n, o, o->gradient_power, first), p = first;
        if (t->position) memcpy(before, t->w + at, (size_t)n * sizeof(float));
        any_manifold_piece(t, c, at, n, o, p, q, norm);
        if (t->position) count_movement(t, at, n, before);
    }
}

/* One step of every weight: threads take a weight each, or with `split` share each one.
   powers, parts: for every thread room for S^q of the largest weight, `room` numbers, and for its pieces' sums. */
void manifold_steps(int64_t count, const Weight *weights, const Manifold *o, float *powers, double *parts,
                    int64_t room, int32_t split) {
    if (split) { /* not within a region of one thread: threads would be made anew for each weight */
        for (int64_t each = 0; each < count; each++) manifold_step(&weights[each], o, powers, parts, split);
        return;
    }
    _Pragma("omp parallel for schedule(dynamic)")
    for (int64_t each = 0; each < count; each++) {
        const int64_t mine = omp_get_thread_num() * room;
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
    Quantize quantize;
    const void *context;
    const float *scale;
    uint64_t number; /* of its random stream */
    int64_t least_rung, most_rung; /* of the format */
    int64_t n;
} Member;

typedef struct {
    double low, high;             /* limits of the values, scaled units; infinite without a bound */
    double quiet_low, quiet_high; /* the scale stays where low < amax <= high, weight units */
} Range;

typedef struct {
    int64_t flips, updates; /* weights that changed, and elements with a gradient */
    float *left;            /* of a weight that has not landed: where it would go without a bound, scaled units */
    double amax;            /* the largest magnitude of those */
    int64_t past;           /* whether one would go past the end of the format */
    int64_t failed;         /* whether there was no memory for them */
} Landed;

/* How a weight lands whose scale has been looked at. */
typedef struct {
    double place;     /* of its member */
    double ratio;     /* of its scale to the one before */
    double low, high; /* limits of the values, scaled units */
} Rescaled;

/* What Adam's directions of n weights are divided by, and the draws by which their moves are rounded: they are made in the
   time that roots take. With `again` the second moments have been updated before. */
INLINE void divisors(const Member *t, Correction c, Keys keys, int64_t at, int32_t n, Moments k, float *divisor,
                     int32_t *draws, const int again) {
    const float *g = t->g + at;
    float *v = t->v + at;
    uint32_t word = first_half((uint32_t)at, keys);
    _Pragma("omp simd linear(word : FIRST_STEP)")
    EACH {
        draws[i] = draw_of(second_half(word, keys));
        word += FIRST_STEP;
        if (!again) v[i] = second_moment(v[i], g[i], k);
        divisor[i] = divisor_of(v[i], k, c);
    }
}

/* How far down n weights are to go by Adam's directions, in rungs, before the clip, in place of the divisors; with `again`
   the first moments have been updated before. Returns how many have a gradient. A loop of its own: a core that waits for
   quotients of roots has no room left to work ahead in. */
INLINE int32_t quotients(const Member *t, Correction c, int64_t at, int32_t n, const Grid *o, const float *scaled,
                         const float *spacing, float *r, const int decays, const int again) {
    const Moments k = o->moments;
    const float lr = o->lr, decay = o->decay, *g = t->g + at;
    float *m = t->m + at;
    int32_t updates = 0;
    _Pragma("omp simd reduction(+ : updates)")
    EACH {
        updates += g[i] != 0;
        if (!again) m[i] = first_moment(m[i], g[i], k);
        r[i] = direction_of(m[i], r[i], c) * lr;
        if (decays) r[i] = r[i] + scaled[i] / spacing[i] * decay;
    }
    return updates;
}

/* The same by velocities, and the draws. */
INLINE int32_t velocities(const Member *t, Keys keys, int64_t at, int32_t n, const Grid *o, float *r, int32_t *draws,
                          const int decays, const int again) {
    const float lr = o->lr, decay = o->decay, momentum = o->momentum;
    const float *w = t->w + at, *g = t->g + at;
    float *m = t->m + at;
    uint32_t word = first_half((uint32_t)at, keys);
    int32_t updates = 0;
    _Pragma("omp simd linear(word : FIRST_STEP) reduction(+ : updates)")
    EACH {
        updates += g[i] != 0;
        draws[i] = draw_of(second_half(word, keys));
        word += FIRST_STEP;
        if (!again) m[i] = m[i] * momentum + (decays ? g[i] + w[i] * decay : g[i]);
        r[i] = m[i] * lr;
    }
    return updates;
}

/* How far down n weights are to go, in rungs, before the clip, and the draws; with `again` the moments have been updated
   before. Returns how many have a gradient. */
INLINE int32_t rates(const Member *t, Correction c, Keys keys, int64_t at, int32_t n, const Grid *o, const float *scaled,
                     const float *spacing, float *r, int32_t *draws, const int adam, const int decays, const int again) {
    if (!adam) return velocities(t, keys, at, n, o, r, draws, decays, again);
    divisors(t, c, keys, at, n, o->moments, r, draws, again);
    return quotients(t, c, at, n, o, scaled, spacing, r, decays, again);
}

static int32_t any_rates(const Member *t, Correction c, Keys keys, int64_t at, int32_t n, const Grid *o, const float *w,
                         float *r, int32_t *draws, const int again) {
    float scaled[GRID_PIECE], spacing[GRID_PIECE];
    const int decays = o->decay != 0, adam = o->adam != 0;
    if (adam && decays) {
        SIMD EACH scaled[i] = w[i] * *t->scale;
        t->spacings(scaled, spacing, n, 1.0f, t->context);
    }
#define IN_CASE(adam_, decays_, again_)                                                                 \
    if (adam == adam_ && decays == decays_ && again == again_)                                          \
        return rates(t, c, keys, at, n, o, scaled, spacing, r, draws, adam_, decays_, again_);
    IN_CASE(0, 0, 0) IN_CASE(0, 1, 0) IN_CASE(1, 0, 0) IN_CASE(1, 1, 0)
    IN_CASE(0, 0, 1) IN_CASE(0, 1, 1) IN_CASE(1, 0, 1) IN_CASE(1, 1, 1)
    return 0;
}

_Pragma("omp declare reduction(moved_both : Moved : omp_out = moved_both(omp_out, omp_in)) initializer(omp_priv = omp_orig)")

/* Weights as they were before a move that may not lead back, by halves: formats of few bits need the upper ones only. */
typedef struct {
    uint16_t *upper, *lower; /* of all weights */
    int8_t *kept;            /* of each piece */
} Before;

enum { NOT_KEPT, UPPER_KEPT, KEPT };

static void keep(const float *w, Before b, int64_t at, int32_t n) {
    uint16_t *restrict upper = b.upper + at, *restrict lower = b.lower + at;
    int32_t bits = 0;
    _Pragma("omp simd reduction(| : bits)") EACH bits |= bits_of(w[i]);
    SIMD EACH upper[i] = (uint16_t)((uint32_t)bits_of(w[i]) >> 16);
    if (bits & UINT16_MAX) SIMD EACH lower[i] = (uint16_t)bits_of(w[i]);
    b.kept[at / GRID_PIECE] = bits & UINT16_MAX ? KEPT : UPPER_KEPT;
}

static void put_back(float *restrict w, Before b, int64_t at, int32_t n) {
    const uint16_t *upper = b.upper + at, *lower = b.lower + at;
    const int whole = b.kept[at / GRID_PIECE] == KEPT;
    SIMD EACH w[i] = float_of((int32_t)((uint32_t)upper[i] << 16 | (whole ? lower[i] : 0)));
}

/* Moves and lands n weights; with `kept` what they were is kept, since they are going to be put back. */
static Moved grid_piece(const Member *t, Correction c, Keys keys, int64_t at, int32_t n, const Grid *o, const Walk *walk,
                        Before before, int kept, int64_t *updates) {
    float r[GRID_PIECE], to[GRID_PIECE], *w = t->w + at;
    int32_t draws[GRID_PIECE];
    Moved seen = NOTHING_MOVED;
    *updates += any_rates(t, c, keys, at, n, o, w, r, draws, 0);
    if (t->intended) SIMD EACH t->intended[at + i] = -limited(r[i], -o->clip, o->clip); /* NaN stays */
    t->moves(w, r, draws, to, n, walk, &seen, t->context);
    before.kept[at / GRID_PIECE] = NOT_KEPT;
    if (kept || seen.lost || (o->adam && o->decay != 0)) /* Adam's decay is of the weight before */
        keep(w, before, at, n);
    memcpy(w, to, (size_t)n * sizeof(float));
    return seen;
}

/* Moves n weights without a bound, to values in scaled units: they end with the format. NaN where a weight or its move
   is. */
static Moved freely(const Member *t, int64_t at, int32_t n, const Walk *walk, float *r, const int32_t *draws,
                    float *target) {
    const Walk free = {walk->clip, 1.0f, -INT32_MAX, INT32_MAX};
    const float *w = t->w + at;
    float scaled[GRID_PIECE];
    int32_t undefined = 0;
    Moved seen = NOTHING_MOVED;
    SIMD EACH scaled[i] = __builtin_isunordered(r[i], w[i]) ? NAN : w[i] * walk->scale;
    SIMD EACH r[i] = scaled[i] != scaled[i] ? 0.0f : r[i];
    t->moves(scaled, r, draws, target, n, &free, &seen, t->context);
    _Pragma("omp simd reduction(| : undefined)")
    EACH {
        undefined |= scaled[i] != scaled[i];
        target[i] = scaled[i] != scaled[i] ? NAN : target[i];
    }
    seen.undefined = undefined;
    return seen;
}

/* Puts n weights back to what they were, and returns the values in scaled units to which they would go if there were no
   bound; with `there` that is where they are. */
static Moved unbounded(const Member *t, Correction c, Keys keys, int64_t at, int32_t n, const Grid *o, const Walk *walk,
                       Before before, int there, float *target) {
    const int kept = before.kept[at / GRID_PIECE] != NOT_KEPT;
    int32_t draws[GRID_PIECE];
    float r[GRID_PIECE], back[GRID_PIECE], to[GRID_PIECE], *w = t->w + at;
    Moved seen = NOTHING_MOVED;
    if (there) SIMD EACH target[i] = w[i] * walk->scale;
    if (kept) put_back(w, before, at, n);
    if (kept && there) return seen;
    any_rates(t, c, keys, at, n, o, w, r, draws, 1);
    if (!kept) {
        SIMD EACH back[i] = -r[i];
        t->moves(w, back, draws, to, n, walk, &seen, t->context);
        memcpy(w, to, (size_t)n * sizeof(float));
    }
    return there ? seen : freely(t, at, n, walk, r, draws, target);
}

static inline int32_t within(int32_t rung, int32_t least, int32_t most) {
    rung = rung < least ? least : rung;
    return rung > most ? most : rung;
}

static int32_t size_of_piece(const Member *t, int64_t at) {
    return (int32_t)(t->n - at < GRID_PIECE ? t->n - at : GRID_PIECE);
}

/* The largest magnitude among values at such rungs, which end with the format. */
static double amax_of(const Member *t, Moved seen) {
    const int32_t rungs[2] = {seen.least, seen.most};
    float values[2];
    t->values(rungs, values, 2, t->context);
    return fmax(fabs(values[0]), fabs(values[1]));
}

static int past_end(const Member *t, Moved seen) { return seen.least < t->least_rung || seen.most > t->most_rung; }

/* Whether the scale surely has to change: it may change at all, and a weight went past the end of the format. */
static int beyond(const Member *t, const Range *range, Moved seen) {
    return past_end(t, seen) && !isinf(range->quiet_high);
}

/* Whether the scale stays for weights that went to such rungs. */
static int quiet(const Member *t, const Range *range, Moved seen) {
    const double amax = amax_of(t, seen) / *t->scale;
    return !seen.undefined && !beyond(t, range, seen) && amax > range->quiet_low && amax <= range->quiet_high;
}

/* Whether weights that went to such rungs are where they would be without a bound. */
static int not_bound(const Member *t, const Walk *walk, Moved seen) {
    const int low = seen.least >= walk->low || walk->low <= t->least_rung;
    const int high = seen.most <= walk->high || walk->high >= t->most_rung;
    return !seen.undefined && low && high;
}

/* Puts a weight back to what it was, and leaves where it would go without a bound: its scale may have to change.
   seen: the rungs to which it went. */
static Landed left(const Member *t, Moved seen, Correction c, Keys keys, const Grid *o, const Walk *walk, Before before,
                   int split) {
    float *target = malloc((size_t)t->n * sizeof(float));
    if (!target) return (Landed){.failed = 1};
    const int there = not_bound(t, walk, seen);
    Moved went = NOTHING_MOVED;
    _Pragma("omp parallel for schedule(static) reduction(moved_both : went) if (split)")
    for (int64_t at = 0; at < t->n; at += GRID_PIECE)
        went = moved_both(went, unbounded(t, c, keys, at, size_of_piece(t, at), o, walk, before, there, target + at));
    if (there) went = seen;
    return (Landed){.left = target, .amax = went.undefined ? NAN : amax_of(t, went), .past = past_end(t, went)};
}

/* The rungs at which a weight stops: its bound's, or the format's last. */
static void ends_of(const Member *t, const Range *range, Walk *walk) {
    const float limits[2] = {(float)range->low, (float)range->high};
    int32_t bound[2];
    walk->low = (int32_t)t->least_rung;
    walk->high = (int32_t)t->most_rung;
    t->rungs(limits, bound, 2, t->context);
    if (!isinf(limits[0])) walk->low = within(walk->low, bound[0], walk->high);
    if (!isinf(limits[1])) walk->high = within(walk->high, walk->low, bound[1]);
}

static Landed grid_move(const Member *t, const Range *range, const Grid *o, Before before, int split) {
    const Keys keys = keys_of(o->state, t->number);
    Walk walk = {.clip = o->clip, .scale = *t->scale};
    ends_of(t, range, &walk);
    const Correction c = counted(t->counter, &o->moments);
    Moved seen = NOTHING_MOVED;
    int64_t updates = 0;
    _Pragma("omp parallel for schedule(static) reduction(moved_both : seen) reduction(+ : updates) if (split)")
    for (int64_t at = 0; at < t->n; at += GRID_PIECE) {
        const int leaves = beyond(t, range, seen);
        const Moved piece = grid_piece(t, c, keys, at, size_of_piece(t, at), o, &walk, before, leaves, &updates);
        seen = moved_both(seen, piece);
    }
    Landed landed = {.flips = seen.flips};
    if (!quiet(t, range, seen)) landed = left(t, seen, c, keys, o, &walk, before, split);
    landed.updates = updates;
    return landed;
}

/* Moves weights by whole rungs and lands those whose scale surely stays; of another one the unrounded values, in scaled
   units, are left in `landings`, for `grid_land`. Threads take a weight each, or with `split` share each one.
   upper, lower, kept: for every thread room for what there is in `Before` of the largest weight, `room` numbers.
   Returns how many weights are left; -1 where memory ran out. */
int64_t grid_steps(int64_t count, const Member *members, const Range *ranges, const Grid *o, uint16_t *upper, uint16_t *lower,
                   int8_t *kept, int64_t room, int32_t split, Landed *landings) {
    int64_t waiting = 0, failed = 0;
    if (split) /* not within a region of one thread: threads would be made anew for each weight */
        for (int64_t each = 0; each < count; each++)
            landings[each] = grid_move(&members[each], &ranges[each], o, (Before){upper, lower, kept}, split);
    else
        _Pragma("omp parallel for schedule(dynamic)")
        for (int64_t each = 0; each < count; each++) {
            const int64_t mine = omp_get_thread_num() * room;
            const Before before = {upper + mine, lower + mine, kept + mine};
            landings[each] = grid_move(&members[each], &ranges[each], o, before, split);
        }
    for (int64_t each = 0; each < count; each++) {
        waiting += landings[each].left != 0;
        failed += landings[each].failed;
    }
    return failed ? -1 : waiting;
}

/* Lands the weights that were left. keys: of the random numbers; NULL: to nearest even. */
static int64_t landed(const Member *t, float *left, const Rescaled *how, const Keys *keys, int split) {
    const float ratio = (float)how->ratio, low = (float)how->low, high = (float)how->high, scale = *t->scale;
    int64_t flips = 0;
    _Pragma("omp parallel for schedule(static) reduction(+ : flips) if (split)")
    for (int64_t at = 0; at < t->n; at += GRID_PIECE) {
        const int32_t n = size_of_piece(t, at);
        float to[GRID_PIECE], *x = left + at, *w = t->w + at;
        int32_t changed = 0;
        SIMD EACH x[i] = x[i] * ratio;
        t->quantize(x, to, n, (uint32_t)at, 1.0f, low, high, keys, t->context);
        _Pragma("omp simd reduction(+ : changed)")
        EACH {
            const float value = to[i] / scale;
            changed += value != w[i];
            w[i] = value;
        }
        flips += changed;
    }
    return flips;
}

/* Lands one of them, and frees what was left of it. */
static void land(const Member *members, Landed *landings, const Rescaled *how, const uint64_t *state, uint64_t first,
                 int split) {
    const int64_t place = (int64_t)how->place;
    const Keys keys = state ? keys_of(*state, first + members[place].number) : (Keys){0, 0};
    landings[place].flips = landed(&members[place], landings[place].left, how, state ? &keys : 0, split);
    free(landings[place].left);
    landings[place].left = 0;
}

/* Lands the weights that `grid_steps` has left, by their scales as they are now, and frees what it left of them.
   state: of the random streams, which begin at number `first`; NULL: to nearest even. */
void grid_land(int64_t count, const Rescaled *rescaled, const Member *members, Landed *landings, const uint64_t *state,
               uint64_t first, int32_t split) {
    if (split)
        for (int64_t each = 0; each < count; each++) land(members, landings, &rescaled[each], state, first, split);
    else
        _Pragma("omp parallel for schedule(dynamic)")
        for (int64_t each = 0; each < count; each++) land(members, landings, &rescaled[each], state, first, split);
}
