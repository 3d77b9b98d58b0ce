/* ExMy formats on a CPU: one pass over memory for rounding, encoding and decoding.

   The same arithmetic as altgrad_formats.exmy, on the bits of float32, bit for bit (tests hold the two equal).
   A magnitude code counts the values from zero. In the normal range it is the float32 pattern shifted right by
   23 - M, less an offset; rounding is the addition of something below the cut, which carries by itself. Below
   the smallest normal it is a multiple of one spacing, which an addition of 2^23 spacings rounds to.

   Nothing here may be contracted or reassociated: compile with -ffp-contract=off and without -ffast-math. */

#include "loops.h"

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

INLINE float rounded_nearest(float v, const Rounding *r, const int ends) {
    int32_t b = bits_of(v), code = nearest_even(b & 0x7FFFFFFF, r->layout), end = r->layout.largest;
    float q = value_of(code > end ? end : code, r->layout);
    if (ends == REPLACED) q = code > end ? r->beyond : q;
    return float_of(bits_of(q) | (b & INT32_MIN));
}

INLINE float rounded_stochastic(float v, float uniform, const Rounding *r, const int ends) {
    const int32_t to_ulp = (23 - r->layout.shift) << 23;
    int32_t b = bits_of(v), magnitude = b & 0x7FFFFFFF;
    magnitude = magnitude > r->cut ? r->cut : magnitude;
    int32_t binade = magnitude & 0x7F800000;
    int32_t ulp = (binade > r->layout.normal ? binade : r->layout.normal) - to_ulp;
    float y = float_of(magnitude) * float_of(0x7F000000 - ulp); /* over ulp, exactly: a power of two */
    float whole = floorf(y);
    whole += uniform < y - whole ? 1.0f : 0.0f;
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
    uint32_t word = first_half(first, r.keys);
    _Pragma("omp simd linear(word : FIRST_STEP)")
    EACH {
        float v = x[i] * s;
        float q = stochastic ? rounded_stochastic(v, uniform_of(second_half(word, r.keys)), &r, ends)
                             : rounded_nearest(v, &r, ends);
        word += FIRST_STEP;
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
    uint32_t word = first_half(first, r.keys);
    _Pragma("omp simd linear(word : FIRST_STEP)")
    EACH {
        const uint32_t b = (uint32_t)bits_of(x[i] * s);
        const uint32_t up = stochastic ? ~second_half(word, r.keys) >> (32 - shift) : half + (((b >> shift) ^ offset) & 1);
        word += FIRST_STEP;
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
              float high, float beyond, const Keys *keys, const Layout *layout) {
    const int64_t across = (columns + PIECE - 1) / PIECE, pieces = rows * across;
    Rounding r = {.layout = *layout, .low = low, .high = high, .beyond = beyond, .stochastic = keys != 0};
    r.largest = value_of(layout->largest, *layout);
    r.ends = beyond != r.largest ? REPLACED : low == -INFINITY && high == INFINITY ? SATURATED : LIMITED;
    r.cut = bits_of(beyond == r.largest ? r.largest : value_of(layout->largest + 1, *layout));
    if (keys) r.keys = *keys;
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

INLINE void moved(const float *restrict x, const float *restrict down, const int32_t *restrict draws, float *restrict to,
                  int32_t n, const Walk *walk, Moved *seen, Layout k, const int few, const int power_of_two) {
    const Walk own = *walk;
    const float inverse = 1.0f / own.scale;
    int32_t least = INT32_MAX, most = INT32_MIN, flips = 0, undefined = 0;
    _Pragma("omp simd reduction(min : least) reduction(max : most) reduction(+ : flips) reduction(| : undefined)")
    EACH {
        const int32_t whole = whole_rungs(down[i], own.clip, draws[i], few);
        int32_t rung = rung_of(x[i] * own.scale, k) - (down[i] < 0 ? whole : -whole);
        least = rung < least ? rung : least;
        most = rung > most ? rung : most;
        rung = rung < own.low ? own.low : rung;
        rung = rung > own.high ? own.high : rung;
        const float value = value_at(rung, k);
        to[i] = power_of_two ? value * inverse : value / own.scale;
        flips += to[i] != x[i];
        undefined |= __builtin_isunordered(x[i], down[i]);
    }
    *seen = moved_both(*seen, (Moved){least, most, undefined, 1, flips});
}

/* The patterns of weights between which a rung is one unit of the pattern, `shift` places up. */
typedef struct {
    int32_t least;     /* of the smallest normal value, or more: no move from there leads below 0 */
    int32_t width;     /* from there to where moves end; negative: there is no such span */
    uint32_t farthest; /* that a move leads */
} Span;

static inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

static Span span_of(const Walk *walk, Layout k) {
    const int64_t scaled = bits_of(walk->scale) - bits_of(1.0f), farthest = (int64_t)ceilf(walk->clip) << k.shift;
    const int64_t last = lesser(k.largest, lesser(walk->high, -(int64_t)walk->low));
    const int64_t normal = -lesser(-(k.normal - scaled), lesser(-0x00800000, -farthest));
    const int64_t top = lesser(((last + k.offset) << k.shift) - scaled, lesser(0x7F7FFFFF, INT32_MAX - farthest));
    if (!is_power_of_two(walk->scale) || walk->clip > FEW || last < 0 || top < normal) return (Span){.width = -1};
    return (Span){(int32_t)normal, (int32_t)(top - normal), (uint32_t)farthest};
}

/* The same of weights on the grid, in such a span before and after they have moved, or past its end: less than half the
   instructions. Returns whether it was so; otherwise what is in `to` is nonsense. */
static int spanned(const float *restrict x, const float *restrict down, const int32_t *restrict draws, float *restrict to,
                   int32_t n, const Walk *walk, Span span, Moved *seen, Layout k) {
    const Walk own = *walk;
    const int32_t right = 24 - k.shift, below = (1 << k.shift) - 1;
    const uint32_t width = (uint32_t)span.width;
    uint32_t begin = 0, end = 0; /* the farthest from the least pattern */
    int32_t steepest = INT32_MIN, patterns = 0, same = 0;
    _Pragma("omp simd reduction(max : begin, end, steepest) reduction(+ : same) reduction(| : patterns)")
    EACH {
        const int32_t b = bits_of(x[i]), r = bits_of(down[i]), outward = (b ^ r) >> 31, size = r | INT32_MIN;
        const int32_t whole = (few_rungs(down[i], own.clip, draws[i]) >> right) & ~below;
        const uint32_t before = (uint32_t)((b & INT32_MAX) - span.least);
        const uint32_t after = before + (uint32_t)((whole ^ outward) - outward);
        const int32_t moved = (b - (int32_t)before) + (int32_t)(after > width ? width : after);
        begin = before > begin ? before : begin;
        end = after > end ? after : end;
        steepest = size > steepest ? size : steepest;
        patterns |= b;
        same += moved == b;
        to[i] = float_of(moved);
    }
    const int past = end > width, defined = steepest <= bits_of(-INFINITY);
    if (!defined || patterns & below || begin > width) return 0;
    if (past && (end - width > span.farthest || own.high != -own.low)) return 0;
    const int64_t farthest = (int64_t)span.least + end + bits_of(own.scale) - bits_of(1.0f); /* scaled units */
    const int32_t rung = (int32_t)(farthest >> k.shift) - k.offset;
    *seen = moved_both(*seen, (Moved){-rung, rung, 0, past, n - same});
    return 1;
}

void block_moves(const float *x, const float *down, const int32_t *draws, float *to, int32_t n, const Walk *walk, Moved *seen,
                 const void *layout) {
    const Layout k = *(const Layout *)layout;
    const Span span = span_of(walk, k);
    const int few = walk->clip <= FEW, power = is_power_of_two(walk->scale);
    for (int32_t at = 0; at < n; at += BLOCK) {
        const int32_t m = n - at < BLOCK ? n - at : BLOCK;
        if (span.width >= 0 && spanned(x + at, down + at, draws + at, to + at, m, walk, span, seen, k)) continue;
#define IF_MOVED(few_, power_)                                                                          \
    if (few == few_ && power == power_)                                                                 \
        moved(x + at, down + at, draws + at, to + at, m, walk, seen, k, few_, power_);
        IF_MOVED(0, 0) IF_MOVED(0, 1) IF_MOVED(1, 0) IF_MOVED(1, 1)
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

#define EXPONENT 0x7F800000

/* Patterns that steps of finite values within the format are taken with: 1.5 * 2^23 spacings and the inverse spacing of a
   binade, as distances to it. */
typedef struct {
    int32_t middle, inverse;
    int32_t largest; /* of a magnitude; negative: no float32 holds the middle, or the inverse */
} Ruler;

static Ruler ruler_of(Layout k) {
    const int32_t to_ulp = (23 - k.shift) << 23, largest = bits_of(value_of(k.largest, k)), top = largest & EXPONENT;
    const int fits = (top > k.normal ? top : k.normal) <= EXPONENT - ((k.shift + 1) << 23) && k.normal > to_ulp;
    return (Ruler){k.shift << 23 | 0x400000, (254 << 23) + to_ulp, fits ? largest : -1};
}

/* The nearest value: adding the middle rounds to a multiple of the spacing, and to an even one where two are as near. Without
   fraction bits it is the even code that counts, so the middle is odd where the lower code is even. */
INLINE float nearest_by_adding(float v, int32_t binade, Ruler ruler, Layout k, const int fraction) {
    const int32_t odd = fraction ? 0 : ~((binade >> 23) + k.offset) & 1;
    const float middle = float_of((binade + ruler.middle) | odd);
    return (v + middle) - middle;
}

/* Returns the largest pattern of a magnitude, of those on which it depends whether what is written is right. */
INLINE int32_t steps_by_adding(const float *restrict before, const float *restrict now, int32_t *restrict same,
                               float *restrict shares, int32_t n, float s, Layout k, const int compares, const int fraction) {
    const Ruler ruler = ruler_of(k);
    const int32_t top = ruler.largest & EXPONENT;
    int32_t most = 0, one = bits_of(1.0f);
    __asm__("" : "+r"(one)); /* as a constant it would be a float, whose minimum takes three instructions */
    _Pragma("omp simd reduction(max : most)")
    EACH {
        const float w = before[i] * s;
        int32_t binade = bits_of(w) & EXPONENT;
        if (!compares) binade = binade > top ? top : binade;
        binade = binade > k.normal ? binade : k.normal;
        const int32_t share = bits_of((now[i] - before[i]) * s * float_of(ruler.inverse - binade)) & INT32_MAX;
        shares[i] = float_of(share < one ? share : one);
        if (compares) {
            const float v = now[i] * s;
            const int32_t other = (bits_of(v) & EXPONENT) > k.normal ? bits_of(v) & EXPONENT : k.normal;
            same[i] = nearest_by_adding(v, other, ruler, k, fraction) == nearest_by_adding(w, binade, ruler, k, fraction) ? -1 : 0;
            const int32_t one = bits_of(v) & INT32_MAX, two = bits_of(w) & INT32_MAX, both = one > two ? one : two;
            most = both > most ? both : most;
        } else
            most = share > most ? share : most;
    }
    return most;
}

/* The same of any values. */
INLINE void any_steps(const float *restrict before, const float *restrict now, int32_t *restrict same, float *restrict shares,
                      int32_t n, float s, Layout k, const int compares) {
    spacings_of(before, shares, n, s, k, 0);
    EACH {
        const float v = now[i] * s, w = before[i] * s, share = fabsf(now[i] - before[i]) / shares[i];
        shares[i] = 1.0f < share ? 1.0f : share; /* NaN stays NaN */
        if (compares) same[i] = (v != v || w != w ? v != v && w != w : rung_of(v, k) == rung_of(w, k)) ? -1 : 0;
    }
}

void block_steps(const float *before, const float *now, int32_t *same, float *shares, int32_t n, float s, const void *layout) {
    const Layout k = *(const Layout *)layout;
    const int32_t end = same ? ruler_of(k).largest : ruler_of(k).largest < 0 ? -1 : EXPONENT;
#define IF_STEPS(compares_, fraction_)                                                                  \
    if (end >= 0 && (same != 0) == compares_ && (k.shift < 23) == fraction_ &&                           \
        steps_by_adding(before, now, same, shares, n, s, k, compares_, fraction_) <= end) return;
    IF_STEPS(1, 1) IF_STEPS(1, 0) IF_STEPS(0, 1) IF_STEPS(0, 0)
    if (same) any_steps(before, now, same, shares, n, s, k, 1);
    else any_steps(before, now, same, shares, n, s, k, 0);
}

void block_quantize(const float *x, float *out, int32_t n, uint32_t first, float s, float low, float high,
                    const Keys *keys, const void *layout) {
    Rounding r = {.layout = *(const Layout *)layout, .low = low, .high = high, .stochastic = keys != 0};
    r.beyond = r.largest = value_of(r.layout.largest, r.layout);
    r.cut = bits_of(r.largest);
    r.ends = low == -INFINITY && high == INFINITY ? SATURATED : LIMITED;
    if (keys) r.keys = *keys;
    any_piece(x, out, n, first, s, &r);
}
