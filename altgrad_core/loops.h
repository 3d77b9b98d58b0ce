/* What the loops in C share: the bits of float32, the random streams, and a format's arithmetic over blocks.

   Every source that `altgrad_core.native.library` compiles finds this file: #include "loops.h".

   Nothing here may be contracted or reassociated: compile with -ffp-contract=off and without -ffast-math. */

#ifndef ALTGRAD_LOOPS_H
#define ALTGRAD_LOOPS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#else
static inline int omp_get_thread_num(void) { return 0; }
static inline int omp_get_num_threads(void) { return 1; }
#endif

#define INLINE static inline __attribute__((always_inline))
#define SIMD _Pragma("omp simd")
#define EACH for (int32_t i = 0; i < n; i++)

#define LINE 16     /* elements of a line of the cache */
#define LANDED 384  /* elements that are told of at a time as they land, see Look */
#define CHUNK 15360 /* elements that a thread takes at a time: as many blocks of LANDED */

/* --- the bits of float32 ------------------------------------------------------------------------------------- */

INLINE int32_t bits_of(float x) { int32_t i; memcpy(&i, &x, sizeof(i)); return i; }
INLINE float float_of(int32_t i) { float x; memcpy(&x, &i, sizeof(x)); return x; }

/* Bits without the sign, which order magnitudes, NaN above all. */
INLINE uint32_t magnitude_of(float x) { return (uint32_t)bits_of(x) & 0x7FFFFFFFu; }

/* x between two numbers; NaN stays NaN. */
INLINE float limited(float x, float low, float high) {
    x = x < low ? low : x; /* one after the other: two instructions instead of nine */
    return x > high ? high : x;
}

/* A division by a power of two is a multiplication: the same bits, sooner. */
INLINE int is_power_of_two(float s) {
    const int32_t b = bits_of(s);
    return (b & 0x7FFFFF) == 0 && b >= (1 << 23) && b <= (253 << 23);
}

/* --- random streams: the bits of altgrad_core.random_bits ---------------------------------------------------- */

typedef struct {
    uint32_t first, second;
} Keys;

/* The keys of a stream, as `stream_keys` makes them of the state of seed and step, and the tensor's number. */
static inline Keys keys_of(uint64_t state, uint64_t number) {
    uint64_t word = (state ^ number) + 0x9E3779B97F4A7C15u;
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9u;
    word = (word ^ word >> 27) * 0x94D049BB133111EBu;
    word ^= word >> 31;
    return (Keys){(uint32_t)word, (uint32_t)(word >> 32)};
}

/* Element i's random bits, of which the upper 24 are good. In two halves, since the first is linear in i: a loop that
   adds FIRST_STEP to it from one element to the next saves a product. */
#define FIRST_STEP 0xED5AD4BBu

INLINE uint32_t first_half(uint32_t i, Keys keys) { return (i + keys.first) * FIRST_STEP; }

INLINE uint32_t second_half(uint32_t i, Keys keys) {
    i = (i ^ i >> 15) * 0xAC4C1B51u + keys.second;
    return (i ^ i >> 15) * 0x31848BABu;
}

INLINE uint32_t random_bits(uint32_t i, Keys keys) { return second_half(first_half(i, keys), keys); }

/* The number in [0, 1) of random bits: they over 2^24, exactly. */
INLINE float uniform_of(uint32_t bits) { return (float)(int32_t)(bits >> 8) * 0x1p-24f; }

INLINE float uniform(uint32_t i, Keys keys) { return uniform_of(random_bits(i, keys)); }

/* --- moves by whole rungs ------------------------------------------------------------------------------------ */

/* How weights move. */
typedef struct {
    float clip;        /* rungs, the most in one move */
    float scale;       /* of the weights */
    int32_t low, high; /* rungs at which they stop */
} Walk;

/* What moves tell of where they went, before any limit. */
typedef struct {
    int32_t least, most; /* two rungs: all are between them, the farther of them is no wider than that */
    int32_t undefined;   /* whether a weight or its move is NaN */
    int32_t lost;        /* whether the same move back, of -r, may not lead to where one was */
    int32_t flips;       /* weights that have changed */
} Moved;

static const Moved NOTHING_MOVED = {INT32_MAX, INT32_MIN, 0, 0, 0};

static inline Moved moved_both(Moved a, Moved b) {
    return (Moved){a.least < b.least ? a.least : b.least, a.most > b.most ? a.most : b.most, a.undefined | b.undefined,
                  a.lost | b.lost, a.flips + b.flips};
}

#define FEW 64 /* rungs: so many, times 2^24, are an int32 */

/* The number in [0, 1) that rounds a move, over 2^-24. */
INLINE int32_t draw_of(uint32_t bits) { return (int32_t)(bits >> 8); }

/* |r| rungs after the clip, rounded stochastically, negative: up in magnitude where the fraction is above the draw over
   2^24. A few rungs are rounded as integers, which is sooner: in units of 2^-24, of which FEW rungs are an int32, and the
   quotient is a shift. NaN: the clip. */
INLINE int32_t few_rungs(float r, float clip, int32_t draw) {
    float size = float_of(bits_of(r) | INT32_MIN);
    size = size > -clip ? size : -clip;
    return (int32_t)floorf(size * 0x1p24f) + draw;
}

INLINE int32_t whole_rungs(float r, float clip, int32_t draw, const int few) {
    if (few) return few_rungs(r, clip, draw) >> 24;
    const float magnitude = fabsf(r), size = magnitude < clip ? magnitude : clip, whole = floorf(size);
    return -(int32_t)whole - ((float)draw * 0x1p-24f < size - whole);
}

/* --- a format's arithmetic: functions over blocks; altgrad_core.native.BlockLoops says what each does --------- */

typedef void (*Rungs)(const float *x, int32_t *rungs, int32_t n, const void *context);
typedef void (*Values)(const int32_t *rungs, float *x, int32_t n, const void *context);
typedef void (*Moves)(const float *x, const float *down, const int32_t *draws, float *to, int32_t n, const Walk *walk,
                      Moved *moved, const void *context);
typedef void (*Spacings)(const float *x, float *spacings, int32_t n, float scale, const void *context);
typedef void (*Quantize)(const float *x, float *out, int32_t n, uint32_t first, float scale, float low, float high,
                         const Keys *keys, const void *context);
typedef void (*Steps)(const float *before, const float *now, int32_t *same, float *shares, int32_t n, float scale,
                      const void *context);

/* --- weights that land on their grids: altgrad_core/landing.c --------------------------------------------------- */

/* Told of n elements from `at`, a multiple of LANDED, before and after they were rounded. The blocks of a chunk come one
   after the other, in one thread. */
typedef void (*Look)(const float *unrounded, const float *rounded, int64_t at, int32_t n, void *context);

#endif
