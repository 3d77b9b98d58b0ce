/* ExMy formats on a CPU: one pass over memory for rounding, encoding and decoding.

   The same arithmetic as altgrad_formats.exmy, on the bits of float32, bit for bit (tests hold the two equal).
   A magnitude code counts the values from zero. In the normal range it is the float32 pattern shifted right by
   23 - M, less an offset; rounding is the addition of something below the cut, which carries by itself. Below
   the smallest normal it is a multiple of one spacing, which an addition of 2^23 spacings rounds to.

   Nothing here may be contracted or reassociated: compile with -ffp-contract=off and without -ffast-math. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define PIECE 16384 /* elements a thread takes at a time */
#define BLOCK 512   /* elements looked at together: whether all of them are normal */

typedef struct {
    int32_t shift;      /* 23 - M */
    int32_t half;       /* 2^(shift - 1) - 1: half a spacing, less the tie */
    int32_t offset;     /* of the codes against the shifted pattern */
    int32_t magic;      /* bits of 2^23 smallest spacings */
    int32_t normal;     /* bits of the smallest normal value */
    int32_t subtrahend; /* bits of the smallest normal value, or of -inf where patterns are codes already */
    int32_t largest;    /* magnitude code of the largest finite value */
    int32_t infinity;   /* magnitude code that inf is encoded as: its own, or the largest value's */
    int32_t nan;        /* code of NaN, or -1 */
    int32_t sign;       /* the code's sign bit: 2^(bits - 1) */
} Layout;

typedef struct {
    uint32_t first, second;
} Keys;

static inline int32_t bits_of(float x) { int32_t i; memcpy(&i, &x, 4); return i; }
static inline float float_of(int32_t i) { float x; memcpy(&x, &i, 4); return x; }

static inline float value_of(int32_t code, Layout k) {
    float normal = float_of((int32_t)((uint32_t)(code + k.offset) << k.shift));
    float subnormal = (normal + normal) - float_of(k.subtrahend);
    return subnormal < normal ? subnormal : normal;
}

static inline int32_t nearest_even(int32_t magnitude, Layout k) {
    int32_t odd = ((magnitude >> k.shift) - k.offset) & 1;
    int32_t normal = (int32_t)(((uint32_t)magnitude + (uint32_t)(k.half + odd)) >> k.shift) - k.offset;
    int32_t subnormal = bits_of(float_of(magnitude) + float_of(k.magic)) - k.magic;
    return magnitude < k.normal ? subnormal : normal;
}

/* Element i's random bits, of altgrad_core.random_bits; the upper 24 of them are its number in [0, 1). */
static inline uint32_t random_bits(uint32_t i, Keys keys) {
    i = (i + keys.first) * 0xED5AD4BBu;
    i = (i ^ i >> 15) * 0xAC4C1B51u + keys.second;
    return (i ^ i >> 15) * 0x31848BABu;
}

static inline float uniform(uint32_t i, Keys keys) {
    return (float)(int32_t)(random_bits(i, keys) >> 8) * 0x1p-24f;
}

static inline float limited(float x, float low, float high) {
    x = x < low ? low : x; /* one after the other: two instructions instead of nine */
    return x > high ? high : x;
}

static inline int is_power_of_two(float s) {
    int32_t b = bits_of(s);
    return (b & 0x7FFFFF) == 0 && b >= (1 << 23) && b <= (253 << 23);
}

/* What happens at the ends: values saturate; they do and are limited; they become something else, or are limited. */
enum { SATURATED, LIMITED, REPLACED };

/* What one rounding needs. */
typedef struct {
    Layout layout;
    Keys keys;
    float low, high; /* limits of the rounded value */
    float largest;   /* the largest finite value */
    float beyond;    /* what rounds past it becomes */
    int32_t cut;     /* bits of the magnitude at which stochastic rounding cuts its input */
    int ends;        /* what happens there */
    int stochastic;
} Rounding;

#define INLINE static inline __attribute__((always_inline))

INLINE float rounded_nearest(float v, const Rounding *r, const int ends) {
    int32_t b = bits_of(v), code = nearest_even(b & 0x7FFFFFFF, r->layout), end = r->layout.largest;
    float q = value_of(code > end ? end : code, r->layout);
    if (ends == REPLACED) q = code > end ? r->beyond : q;
    return float_of(bits_of(q) | (b & INT32_MIN));
}

INLINE float rounded_stochastic(float v, uint32_t i, const Rounding *r, const int ends) {
    const int32_t to_ulp = (23 - r->layout.shift) << 23;
    int32_t b = bits_of(v), magnitude = b & 0x7FFFFFFF;
    magnitude = magnitude > r->cut ? r->cut : magnitude;
    int32_t binade = magnitude & 0x7F800000;
    int32_t ulp = (binade > r->layout.normal ? binade : r->layout.normal) - to_ulp;
    float y = float_of(magnitude) * float_of(0x7F000000 - ulp); /* over ulp, exactly: a power of two */
    float whole = floorf(y);
    whole += uniform(i, r->keys) < y - whole ? 1.0f : 0.0f;
    float q = whole * float_of(ulp);
    if (ends == REPLACED) q = q > r->largest ? r->beyond : q;
    return float_of(bits_of(q) | (b & INT32_MIN));
}

/* rounded(x * s) / s of n elements, the first of which is the `first` of the stream of random numbers. A division
   by a power of two is a multiplication: the same bits, sooner. */
INLINE void piece(const float *x, float *out, int32_t n, uint32_t first, float s, const Rounding *rounding,
                  const int stochastic, const int ends, const int power_of_two) {
    const Rounding r = *rounding;
    const float inverse = 1.0f / s;
    _Pragma("omp simd")
    for (int32_t i = 0; i < n; i++) {
        float v = x[i] * s;
        float q = stochastic ? rounded_stochastic(v, first + (uint32_t)i, &r, ends) : rounded_nearest(v, &r, ends);
        if (ends != SATURATED) q = limited(q, r.low, r.high);
        q = power_of_two ? q * inverse : q / s;
        out[i] = v != v ? v : q;
    }
}

/* The same of values that are all zero, or normal and not to be rounded past an end: half the instructions and less.
   Nearest even adds just under half a spacing to the pattern, and stochastic rounding its random number's complement:
   what is cut off, as a share of the spacing, carries where it is above that number. */
INLINE void normal_piece(const float *x, float *out, int32_t n, uint32_t first, float s, const Rounding *rounding,
                         const int stochastic, const int power_of_two) {
    const Rounding r = *rounding;
    const int32_t shift = r.layout.shift;
    const uint32_t below = (1u << shift) - 1, offset = (uint32_t)r.layout.offset, half = (uint32_t)r.layout.half;
    const float inverse = 1.0f / s;
    _Pragma("omp simd")
    for (int32_t i = 0; i < n; i++) {
        const uint32_t b = (uint32_t)bits_of(x[i] * s);
        const uint32_t up = stochastic ? ~random_bits(first + (uint32_t)i, r.keys) >> (32 - shift)
                                       : half + (((b >> shift) ^ offset) & 1);
        const float q = float_of((int32_t)((b + up) & ~below));
        out[i] = power_of_two ? q * inverse : q / s;
    }
}

/* Whether `normal_piece` serves. */
static int is_normal(const float *restrict x, int32_t n, float s, const Rounding *r) {
    uint32_t least = UINT32_MAX, most = 0; /* of the magnitudes, as bits, which order them; `least` of all but 0, less 1 */
    _Pragma("omp simd reduction(min : least) reduction(max : most)")
    for (int32_t i = 0; i < n; i++) {
        const uint32_t magnitude = (uint32_t)bits_of(x[i]) & 0x7FFFFFFF;
        least = magnitude - 1 < least ? magnitude - 1 : least;
        most = magnitude > most ? magnitude : most;
    }
    const float end = fminf(r->largest, fminf(r->high, -r->low));
    const int32_t top = bits_of(float_of((int32_t)most) * s), below = (1 << r->layout.shift) - 1;
    const int starts = !most || float_of((int32_t)(least + 1)) * s >= float_of(r->layout.normal);
    return starts && most < 0x7F800000 && top <= bits_of(r->largest) && float_of((top + below) & ~below) <= end;
}

static void any_block(const float *x, float *out, int32_t n, uint32_t first, float s, const Rounding *r) {
    const int normal = is_normal(x, n, s, r);
#define IF_NORMAL(stochastic_, power_)                                                                  \
    if (normal && r->stochastic == stochastic_ && is_power_of_two(s) == power_)                         \
        normal_piece(x, out, n, first, s, r, stochastic_, power_);
    IF_NORMAL(0, 0) IF_NORMAL(0, 1) IF_NORMAL(1, 0) IF_NORMAL(1, 1)
    if (normal) return;
#define IN_CASE(stochastic_, ends_, power_)                                                             \
    if (r->stochastic == stochastic_ && r->ends == ends_ && is_power_of_two(s) == power_)               \
        piece(x, out, n, first, s, r, stochastic_, ends_, power_);
#define IN_CASES(stochastic_, power_)                                                                   \
    IN_CASE(stochastic_, SATURATED, power_) IN_CASE(stochastic_, LIMITED, power_) IN_CASE(stochastic_, REPLACED, power_)
    IN_CASES(0, 0) IN_CASES(0, 1) IN_CASES(1, 0) IN_CASES(1, 1)
}

static void any_piece(const float *x, float *out, int32_t n, uint32_t first, float s, const Rounding *r) {
    for (int32_t at = 0; at < n; at += BLOCK)
        any_block(x + at, out + at, n - at < BLOCK ? n - at : BLOCK, first + (uint32_t)at, s, r);
}

/* rows x columns values, one scale a row: limited(rounded(x * scale)) / scale.
   keys: NULL for rounding to nearest even, else those of the random numbers. */
void quantize(const float *x, float *out, int64_t rows, int64_t columns, const float *scale, float low,
              float high, float beyond, const uint32_t *keys, const Layout *layout) {
    const int64_t across = (columns + PIECE - 1) / PIECE, pieces = rows * across;
    Rounding r = {.layout = *layout, .low = low, .high = high, .beyond = beyond, .stochastic = keys != 0};
    r.largest = value_of(layout->largest, *layout);
    r.ends = beyond != r.largest ? REPLACED : low == -INFINITY && high == INFINITY ? SATURATED : LIMITED;
    r.cut = bits_of(beyond == r.largest ? r.largest : value_of(layout->largest + 1, *layout));
    if (keys) r.keys = (Keys){keys[0], keys[1]};
    _Pragma("omp parallel for schedule(static) if (rows * columns > PIECE)")
    for (int64_t piece = 0; piece < pieces; piece++) {
        const int64_t row = piece / across, begin = row * columns + (piece % across) * PIECE;
        const int64_t rest = (row + 1) * columns - begin;
        any_piece(x + begin, out + begin, (int32_t)(rest < PIECE ? rest : PIECE), (uint32_t)begin, scale[row], &r);
    }
}

/* Writes the codes of n values below the end of the format, or any others with `whole`: those past the end, inf
   and NaN, take as many instructions as all the rest. Returns the pattern of the largest |x|, a NaN's included. */
INLINE int32_t codes_of(const float *restrict x, int32_t *restrict codes, int64_t n, Layout k, const int whole) {
    int32_t largest = 0;
    _Pragma("omp simd reduction(max : largest)")
    for (int64_t i = 0; i < n; i++) {
        int32_t b = bits_of(x[i]), magnitude = b & 0x7FFFFFFF, code = nearest_even(magnitude, k);
        int32_t sign = (b >> 31) & k.sign;
        largest = magnitude > largest ? magnitude : largest;
        if (whole) {
            code = code > k.largest ? k.largest : code;
            code = magnitude == 0x7F800000 ? k.infinity : code;
            code = magnitude > 0x7F800000 ? k.nan : code | sign;
        } else
            code |= sign;
        codes[i] = code;
    }
    return largest;
}

static int32_t codes_of_any(const float *x, int32_t *codes, int64_t n, Layout k) {
    int32_t largest = codes_of(x, codes, n, k, 0);
    return largest > bits_of(value_of(k.largest, k)) ? codes_of(x, codes, n, k, 1) : largest;
}

static void values_of(const int32_t *restrict codes, float *restrict x, int64_t n, Layout k) {
    _Pragma("omp simd")
    for (int64_t i = 0; i < n; i++) {
        int32_t c = codes[i], magnitude = c & (k.sign - 1);
        float q = value_of(magnitude, k);
        q = magnitude > k.largest ? (magnitude == k.infinity ? INFINITY : NAN) : q;
        q = float_of(bits_of(q) | (c & k.sign ? INT32_MIN : 0));
        x[i] = c >= 2 * k.sign ? NAN : q;
    }
}

/* Codes are made, and read, in int32 pieces that stay in the first-level cache: a loop over two widths at once
   is beyond the compiler. encode_... returns whether an element is NaN. */
#define SMALL 2048

#define ENCODE(name, type)                                                                              \
    int32_t name(const float *x, type *out, int64_t n, const Layout *layout) {                          \
        const Layout k = *layout;                                                                       \
        int32_t largest = 0;                                                                            \
        _Pragma("omp parallel for schedule(static) reduction(max : largest) if (n > PIECE)")            \
        for (int64_t at = 0; at < n; at += SMALL) {                                                     \
            const int64_t m = n - at < SMALL ? n - at : SMALL;                                          \
            int32_t codes[SMALL], seen = codes_of_any(x + at, codes, m, k);                             \
            largest = seen > largest ? seen : largest;                                                  \
            _Pragma("omp simd") for (int64_t i = 0; i < m; i++) out[at + i] = (type)codes[i];           \
        }                                                                                               \
        return largest > 0x7F800000;                                                                    \
    }

#define DECODE(name, type)                                                                              \
    int32_t name(const type *in, float *out, int64_t n, const Layout *layout) {                         \
        const Layout k = *layout;                                                                       \
        _Pragma("omp parallel for schedule(static) if (n > PIECE)")                                     \
        for (int64_t at = 0; at < n; at += SMALL) {                                                     \
            const int64_t m = n - at < SMALL ? n - at : SMALL;                                          \
            int32_t codes[SMALL];                                                                       \
            _Pragma("omp simd") for (int64_t i = 0; i < m; i++) codes[i] = in[at + i];                  \
            values_of(codes, out + at, m, k);                                                           \
        }                                                                                               \
        return 0;                                                                                       \
    }

ENCODE(encode_bytes, uint8_t)
ENCODE(encode_words, int16_t)
DECODE(decode_bytes, uint8_t)
DECODE(decode_words, uint16_t)

/* Blocks, for the loops of others (altgrad_core.native.BlockLoops): n values of one thread, format given by
   `layout`. Rungs of NaN may be anything. */
static inline int32_t rung_of(float x, Layout k) {
    int32_t b = bits_of(x), code = nearest_even(b & 0x7FFFFFFF, k), sign = b >> 31;
    code = code > k.largest ? k.largest : code;
    return (code ^ sign) - sign;
}

static inline float value_at(int32_t rung, Layout k) {
    int32_t sign = rung >> 31, magnitude = (rung ^ sign) - sign;
    float value = value_of(magnitude > k.largest ? k.largest : magnitude, k);
    return float_of(bits_of(value) | (sign & INT32_MIN));
}

void block_rungs(const float *restrict x, int32_t *restrict rungs, int32_t n, const void *layout) {
    const Layout k = *(const Layout *)layout;
    _Pragma("omp simd")
    for (int32_t i = 0; i < n; i++) rungs[i] = rung_of(x[i], k);
}

void block_values(const int32_t *restrict rungs, float *restrict x, int32_t n, const void *layout) {
    const Layout k = *(const Layout *)layout;
    _Pragma("omp simd")
    for (int32_t i = 0; i < n; i++) x[i] = value_at(rungs[i], k);
}

INLINE void moved(float *restrict x, const int32_t *restrict down, int32_t n, float s, const int32_t *ends, int32_t *seen,
                  Layout k, const int power_of_two) {
    const int32_t low = ends[0], high = ends[1];
    const float inverse = 1.0f / s;
    int32_t least = seen[0], most = seen[1], changed = 0;
    _Pragma("omp simd reduction(min : least) reduction(max : most) reduction(+ : changed)")
    for (int32_t i = 0; i < n; i++) {
        int32_t rung = rung_of(x[i] * s, k) - down[i];
        least = rung < least ? rung : least;
        most = rung > most ? rung : most;
        rung = rung < low ? low : rung;
        rung = rung > high ? high : rung;
        const float value = value_at(rung, k), to = power_of_two ? value * inverse : value / s;
        changed += to != x[i];
        x[i] = to;
    }
    seen[0] = least;
    seen[1] = most;
    seen[2] += changed;
}

/* The same where all x are normal, and stay so, and the ends are alike: a rung is one unit of the pattern, so that fewer
   instructions do. Returns whether it was so; otherwise nothing has been done. */
INLINE int normal_moved(float *restrict x, const int32_t *restrict down, int32_t n, float s, const int32_t *ends,
                        int32_t *seen, Layout k, const int power_of_two) {
    const int32_t below = (1 << k.shift) - 1, end = ends[1] < -ends[0] ? ends[1] : -ends[0];
    const int32_t top = (int32_t)((uint32_t)(end + k.offset) << k.shift); /* pattern of the value at that end */
    const float inverse = 1.0f / s;
    float to[BLOCK];
    int32_t least = INT32_MAX, most = 0, changed = 0;
    _Pragma("omp simd reduction(min : least) reduction(max : most) reduction(+ : changed)")
    for (int32_t i = 0; i < n; i++) {
        const int32_t b = bits_of(x[i] * s), sign = b >> 31, magnitude = b & 0x7FFFFFFF;
        const int32_t odd = ((magnitude >> k.shift) ^ k.offset) & 1, outward = sign - (down[i] ^ sign);
        const uint32_t rounded = (uint32_t)(magnitude + k.half + odd) & ~(uint32_t)below;
        const int32_t moved = (int32_t)(rounded + ((uint32_t)outward << k.shift));
        least = moved < least ? moved : least;
        most = moved > most ? moved : most;
        const float value = float_of((moved > top ? top : moved) | (b & INT32_MIN));
        to[i] = power_of_two ? value * inverse : value / s;
        changed += to[i] != x[i];
    }
    const int32_t rung = (most >> k.shift) - k.offset;
    if (least < k.normal || top < k.normal || (rung > end && ends[0] != -ends[1])) return 0;
    memcpy(x, to, (size_t)n * sizeof(float));
    seen[0] = -rung < seen[0] ? -rung : seen[0];
    seen[1] = rung > seen[1] ? rung : seen[1];
    seen[2] += changed;
    return 1;
}

/* Whether `normal_moved` may be tried: n values are normal, and no move passes over all patterns and around. */
static int may_be_normal(const float *restrict x, const int32_t *restrict down, int32_t n, float s, Layout k) {
    int32_t least = INT32_MAX, most = 0, farthest = 0;
    _Pragma("omp simd reduction(min : least) reduction(max : most, farthest)")
    for (int32_t i = 0; i < n; i++) {
        const int32_t magnitude = bits_of(x[i]) & 0x7FFFFFFF, far = down[i] < 0 ? -down[i] : down[i];
        least = magnitude < least ? magnitude : least;
        most = magnitude > most ? magnitude : most;
        farthest = far > farthest ? far : farthest;
    }
    return float_of(least) * s >= float_of(k.normal) && float_of(most) * s <= value_of(k.largest, k) &&
           farthest <= (1 << 30) >> k.shift;
}

static int any_normal_moved(float *x, const int32_t *down, int32_t n, float s, const int32_t *ends, int32_t *seen,
                            Layout k) {
    if (!may_be_normal(x, down, n, s, k)) return 0;
    return is_power_of_two(s) ? normal_moved(x, down, n, s, ends, seen, k, 1)
                              : normal_moved(x, down, n, s, ends, seen, k, 0);
}

void block_moves(float *x, const int32_t *down, int32_t n, float s, const int32_t *ends, int32_t *seen, const void *layout) {
    const Layout k = *(const Layout *)layout;
    for (int32_t at = 0; at < n; at += BLOCK) {
        const int32_t m = n - at < BLOCK ? n - at : BLOCK;
        if (any_normal_moved(x + at, down + at, m, s, ends, seen, k)) continue;
        if (is_power_of_two(s)) moved(x + at, down + at, m, s, ends, seen, k, 1);
        else moved(x + at, down + at, m, s, ends, seen, k, 0);
    }
}

INLINE void spacings_of(const float *restrict x, float *restrict spacings, int32_t n, float s, Layout k,
                        const int power_of_two) {
    const int32_t to_ulp = (23 - k.shift) << 23, top = bits_of(value_of(k.largest, k)) & 0x7F800000;
    const float inverse = 1.0f / s;
    _Pragma("omp simd")
    for (int32_t i = 0; i < n; i++) {
        float v = x[i] * s;
        int32_t binade = bits_of(v) & 0x7F800000;
        binade = binade > top ? top : binade;
        float ulp = float_of((binade > k.normal ? binade : k.normal) - to_ulp);
        ulp = power_of_two ? ulp * inverse : ulp / s;
        spacings[i] = v != v ? v : ulp;
    }
}

void block_spacings(const float *x, float *spacings, int32_t n, float s, const void *layout) {
    const Layout k = *(const Layout *)layout;
    if (is_power_of_two(s)) spacings_of(x, spacings, n, s, k, 1);
    else spacings_of(x, spacings, n, s, k, 0);
}

void block_quantize(const float *x, float *out, int32_t n, uint32_t first, float s, float low, float high,
                    const uint32_t *keys, const void *layout) {
    Rounding r = {.layout = *(const Layout *)layout, .low = low, .high = high, .stochastic = keys != 0};
    r.beyond = r.largest = value_of(r.layout.largest, r.layout);
    r.cut = bits_of(r.largest);
    r.ends = low == -INFINITY && high == INFINITY ? SATURATED : LIMITED;
    if (keys) r.keys = (Keys){keys[0], keys[1]};
    any_piece(x, out, n, first, s, &r);
}
