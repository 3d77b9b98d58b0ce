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

#define PIECE 1024 /* elements of a block */

typedef void (*Rungs)(const float *, int32_t *, int32_t, const void *);
typedef void (*Values)(const int32_t *, float *, int32_t, const void *);
typedef void (*Spacings)(const float *, float *, int32_t, float, const void *);

#define EACH for (int32_t i = 0; i < n; i++)
#define SIMD _Pragma("omp simd")

static inline float limited(float x, float low, float high) {
    x = x < low ? low : x; /* NaN stays NaN */
    return x > high ? high : x;
}

/* --- Adam's direction ---------------------------------------------------------------------------------------- */

typedef struct {
    float first, second; /* 1 - beta1, and beta2 */
    float rest;          /* 1 - beta2 */
    float eps;
} Moments;

/* What the bias corrections make of a step: 1 / (1 - beta1^t), and 1 / sqrt(1 - beta2^t). */
typedef struct {
    float first, second;
} Correction;

/* Updates the moments by the gradient g and returns Adam's direction; see adamw.py. */
static inline float direction(float g, float *m, float *v, Moments k, Correction c) {
    *m = *m + (g - *m) * k.first;
    *v = *v * k.second + (g * g) * k.rest;
    return *m / (sqrtf(*v) * c.second + k.eps) * c.first;
}

/* --- ManifoldAdamW ------------------------------------------------------------------------------------------- */

enum { ONE, IDENTITY, ROOT, INVERSE_ROOT, INVERSE }; /* S^0, S^1, S^(1/2), S^(-1/2), S^(-1) */
enum { NONE, RMS, MEAN, MAX };

typedef struct {
    Moments moments;
    int32_t gradient_power, update_power, normalize;
    float max_stiffness, smallest; /* S is at most the first; a spacing at least the second */
} Manifold;

typedef struct {
    float *w;
    const float *g;
    float *m, *v;
    const float *stiffness; /* S of each weight; NULL: the spacing of the format */
    Spacings spacings;
    const void *context;
    const float *scale;
    int64_t n;
} Weight;

typedef struct {
    double first, second; /* the bias corrections */
    double lr;
    double decay; /* w is multiplied by it */
} Step;

static inline int is_power_of_two(float s) {
    int32_t b;
    memcpy(&b, &s, sizeof(b));
    return (b & 0x7FFFFF) == 0 && b >= (1 << 23) && b <= (253 << 23);
}

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

/* 1 over the rms, mean or largest of S^q, from the pieces' sums. */
static float over_norm(const double *parts, int64_t pieces, int64_t n, int32_t normalize) {
    double whole = parts[0];
    for (int64_t i = 1; i < pieces; i++) {
        if (normalize == MAX)
            whole = !(parts[i] <= whole) ? parts[i] : whole;
        else
            whole += parts[i];
    }
    if (normalize == RMS) return (float)(1.0 / sqrt(whole / (double)n));
    return (float)(1.0 / (normalize == MEAN ? whole / (double)n : whole));
}

/* One step of n weights; p, q: S^p and S^q, where there are such. */
static inline __attribute__((always_inline)) void
manifold_piece(const Weight *t, const Step *step, int64_t at, int32_t n, const Manifold *o, const float *p,
               const float *q, float norm, const int with_p, const int with_q) {
    const Moments k = o->moments;
    const Correction c = {(float)step->first, (float)step->second};
    const float lr = (float)step->lr, decay = (float)step->decay;
    float *w = t->w + at, *m = t->m + at, *v = t->v + at;
    const float *g = t->g + at;
    SIMD EACH {
        float move = direction(with_p ? g[i] * p[i] : g[i], &m[i], &v[i], k, c);
        if (with_q) move = move * (q[i] * norm);
        w[i] = w[i] * decay - move * lr;
    }
}

static void any_manifold_piece(const Weight *t, const Step *step, int64_t at, int32_t n, const Manifold *o,
                               const float *p, const float *q, float norm) {
    if (p && q) manifold_piece(t, step, at, n, o, p, q, norm, 1, 1);
    else if (p) manifold_piece(t, step, at, n, o, p, q, norm, 1, 0);
    else if (q) manifold_piece(t, step, at, n, o, p, q, norm, 0, 1);
    else manifold_piece(t, step, at, n, o, p, q, norm, 0, 0);
}

static void manifold_step(const Weight *t, const Step *step, const Manifold *o, float *powers, double *parts, int split) {
    const int64_t pieces = (t->n + PIECE - 1) / PIECE;
    const int with_p = o->gradient_power != ONE, with_q = o->update_power != ONE, whole = with_q && o->normalize;
    float norm = 1.0f;
    if (whole) {
        _Pragma("omp parallel for schedule(static) if (split)")
        for (int64_t piece = 0; piece < pieces; piece++) {
            const int64_t at = piece * PIECE;
            const int32_t n = (int32_t)(t->n - at < PIECE ? t->n - at : PIECE);
            powers_of(t, at, n, o, o->update_power, powers + at);
            parts[piece] = summed(powers + at, n, o->normalize);
        }
        norm = over_norm(parts, pieces, t->n, o->normalize);
    }
    _Pragma("omp parallel for schedule(static) if (split)")
    for (int64_t piece = 0; piece < pieces; piece++) {
        const int64_t at = piece * PIECE;
        const int32_t n = (int32_t)(t->n - at < PIECE ? t->n - at : PIECE);
        float p[PIECE], q[PIECE];
        if (with_p) powers_of(t, at, n, o, o->gradient_power, p);
        if (with_q && !whole) powers_of(t, at, n, o, o->update_power, q);
        any_manifold_piece(t, step, at, n, o, with_p ? p : 0, whole ? powers + at : with_q ? q : 0, norm);
    }
}

/* One step of every weight: threads take a weight each, or with `split` share each one.
   powers, parts: for every thread room for S^q of the largest weight, `room` numbers, and for its pieces' sums. */
void manifold_steps(int64_t count, const Weight *weights, const Step *steps, const Manifold *o, float *powers,
                    double *parts, int64_t room, int32_t split) {
    _Pragma("omp parallel for schedule(dynamic) if (!split)")
    for (int64_t each = 0; each < count; each++) {
        const int64_t mine = split ? 0 : omp_get_thread_num() * room;
        manifold_step(&weights[each], &steps[each], o, powers + mine, parts + mine / PIECE, split);
    }
}

/* --- GridOptim ----------------------------------------------------------------------------------------------- */

typedef struct {
    Moments moments;
    float momentum, clip;
    int32_t adam; /* Adam's direction, else the velocity */
} Grid;

typedef struct {
    float *w;
    const float *g;
    float *m, *v; /* moments; without Adam m is the velocity */
    float *intended; /* -r is left here, unless it is NULL */
    Rungs rungs;
    Values values;
    Spacings spacings;
    const void *context;
    const float *scale;
    const uint32_t *keys;
    int64_t n;
} Member;

typedef struct {
    double first, second;          /* Adam's bias corrections */
    double lr, decay;              /* the decay is coupled without Adam */
    double low, high;              /* limits of the values, scaled units */
    double least_rung, most_rung;  /* of the format */
    double quiet_low, quiet_high;  /* the scale stays where low < amax <= high, weight units */
} Move;

typedef struct {
    int64_t flips, updates; /* weights that changed, and elements with a gradient */
    int64_t past;           /* whether one was pushed past the end */
    float *left;            /* the unrounded values of a weight that has not landed */
    int64_t failed;         /* whether there was no memory for them */
} Landing;

static inline float uniform(uint32_t i, uint32_t first, uint32_t second) { /* of altgrad_core.random_bits */
    i = (i + first) * 0xED5AD4BBu;
    i = (i ^ i >> 15) * 0xAC4C1B51u + second;
    i = (i ^ i >> 15) * 0x31848BABu;
    return (float)(int32_t)(i >> 8) * 0x1p-24f;
}

typedef struct {
    int32_t amax; /* bits of the largest magnitude, of a NaN if there is one */
    int32_t past;
    int64_t updates;
} Seen;

static Seen grid_piece(const Member *t, const Move *move, int64_t at, int32_t n, const Grid *o, float *target) {
    const Moments k = o->moments;
    const Correction c = {(float)move->first, (float)move->second};
    const float lr = (float)move->lr, decay = (float)move->decay, scale = *t->scale, clip = o->clip;
    const int32_t least = (int32_t)move->least_rung, most = (int32_t)move->most_rung;
    const uint32_t first = t->keys[0], second = t->keys[1], begin = (uint32_t)at;
    float scaled[PIECE], spacing[PIECE], r[PIECE];
    int32_t rungs[PIECE];
    const float *w = t->w + at, *g = t->g + at;
    float *m = t->m + at, *v = t->v + at;
    SIMD EACH scaled[i] = w[i] * scale;
    t->rungs(scaled, rungs, n, t->context);
    if (o->adam) {
        SIMD EACH r[i] = direction(g[i], &m[i], &v[i], k, c) * lr;
        if (decay != 0) {
            t->spacings(scaled, spacing, n, 1.0f, t->context);
            SIMD EACH r[i] = r[i] + scaled[i] / spacing[i] * decay;
        }
    } else {
        const float momentum = o->momentum;
        if (decay != 0)
            SIMD EACH m[i] = m[i] * momentum + (g[i] + w[i] * decay);
        else
            SIMD EACH m[i] = m[i] * momentum + g[i];
        SIMD EACH r[i] = m[i] * lr;
    }
    SIMD EACH r[i] = scaled[i] != scaled[i] ? NAN : limited(r[i], -clip, clip);
    if (t->intended) SIMD EACH t->intended[at + i] = -r[i];
    int32_t past = 0, updates = 0;
    _Pragma("omp simd reduction(| : past) reduction(+ : updates)")
    EACH {
        const float magnitude = r[i] != r[i] ? 0.0f : fabsf(r[i]), whole = floorf(magnitude);
        const float up = uniform(begin + (uint32_t)i, first, second) < magnitude - whole ? 1.0f : 0.0f;
        const int32_t rung = rungs[i] - (int32_t)copysignf(whole + up, r[i]);
        const int32_t inside = rung < least ? least : rung > most ? most : rung;
        past |= rung ^ inside;
        updates += g[i] != 0;
        rungs[i] = inside;
    }
    t->values(rungs, target, n, t->context);
    int32_t amax = 0; /* as bits, which order magnitudes, NaN above all */
    _Pragma("omp simd reduction(max : amax)")
    EACH {
        const float value = r[i] != r[i] ? NAN : target[i], size = fabsf(value);
        int32_t bits;
        memcpy(&bits, &size, sizeof(bits));
        target[i] = value;
        amax = bits > amax ? bits : amax;
    }
    return (Seen){amax, past != 0, updates};
}

static float float_of(int32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

static Landing grid_move(const Member *t, const Move *move, const Grid *o, float *target, int split) {
    const int64_t pieces = (t->n + PIECE - 1) / PIECE;
    const float scale = *t->scale, inverse = 1.0f / scale, low = (float)move->low, high = (float)move->high;
    const int multiply = is_power_of_two(scale); /* instead of dividing: the same bits, sooner */
    int64_t updates = 0, flips = 0;
    int32_t amax = 0, past = 0;
    _Pragma("omp parallel for schedule(static) reduction(max : amax, past) reduction(+ : updates) if (split)")
    for (int64_t piece = 0; piece < pieces; piece++) {
        const int64_t at = piece * PIECE;
        const Seen seen = grid_piece(t, move, at, (int32_t)(t->n - at < PIECE ? t->n - at : PIECE), o, target + at);
        amax = seen.amax > amax ? seen.amax : amax;
        past = seen.past > past ? seen.past : past;
        updates += seen.updates;
    }
    const double size = float_of(amax) / scale;
    if (past || !(size > move->quiet_low && size <= move->quiet_high)) {
        float *left = malloc((size_t)t->n * sizeof(float));
        if (left) memcpy(left, target, (size_t)t->n * sizeof(float));
        return (Landing){0, updates, past, left, !left};
    }
    _Pragma("omp parallel for schedule(static) reduction(+ : flips) if (split)")
    for (int64_t piece = 0; piece < pieces; piece++) {
        const int64_t at = piece * PIECE;
        const int32_t n = (int32_t)(t->n - at < PIECE ? t->n - at : PIECE);
        const float *from = target + at;
        float *w = t->w + at;
        int32_t changed = 0;
        _Pragma("omp simd reduction(+ : changed)")
        EACH {
            const float landed = limited(from[i], low, high), value = multiply ? landed * inverse : landed / scale;
            changed += value != w[i];
            w[i] = value;
        }
        flips += changed;
    }
    return (Landing){flips, updates, past, 0, 0};
}

/* Moves weights by whole rungs and lands those whose scale surely stays; of another one the unrounded values, in scaled
   units, are left in `landings`, for `take` to fetch. Threads take a weight each, or with `split` share each one.
   targets: for every thread room for the largest weight, `room` numbers. Returns whether memory ran out. */
int32_t grid_steps(int64_t count, const Member *members, const Move *moves, const Grid *o, float *targets,
                   int64_t room, int32_t split, Landing *landings) {
    int32_t failed = 0;
    _Pragma("omp parallel for schedule(dynamic) reduction(max : failed) if (!split)")
    for (int64_t each = 0; each < count; each++) {
        float *target = targets + (split ? 0 : omp_get_thread_num() * room);
        landings[each] = grid_move(&members[each], &moves[each], o, target, split);
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
