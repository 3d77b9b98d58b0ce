/* What a rounding did to the ends of a format, counted in one pass over what went in and what came out.

   Integer comparisons on the bits of float32, which order magnitudes; NaN lies above all. */

#include "loops.h"

#define PIECE 8192 /* elements a thread takes at a time; their counts fit in 32 bits */

enum { ELEMENTS, OVERFLOW, UNDERFLOW, NON_FINITE };
enum { AMAX, LARGEST, SMALLEST };

typedef struct {
    int64_t overflow, underflow, non_finite;
    uint32_t amax, largest; /* bits of the largest finite magnitudes of x and of q */
    uint32_t smallest;      /* bits of the smallest non-zero magnitude of q, less 1 */
} Seen;

INLINE Seen seen_in(const float *x, const float *q, int32_t n, const float *scale, float low, float high,
                    const int each) {
    const uint32_t infinity = 0x7F800000u;
    const float one = *scale;
    int32_t overflow = 0, underflow = 0, non_finite = 0;
    uint32_t amax = 0, largest = 0, smallest = UINT32_MAX;
    _Pragma("omp simd reduction(+ : overflow, underflow, non_finite) reduction(max : amax, largest) reduction(min : smallest)")
    for (int32_t i = 0; i < n; i++) {
        const float v = x[i] * (each ? scale[i] : one);
        const uint32_t in = magnitude_of(x[i]), out = magnitude_of(q[i]);
        const uint32_t finite_in = in < infinity ? in : 0, finite_out = out < infinity ? out : 0;
        overflow += (v > high) | (v < low);
        underflow += (out == 0) & (in != 0);
        non_finite += in >= infinity;
        amax = finite_in > amax ? finite_in : amax;
        largest = finite_out > largest ? finite_out : largest;
        smallest = finite_out - 1 < smallest ? finite_out - 1 : smallest; /* of a zero: the largest there is */
    }
    return (Seen){overflow, underflow, non_finite, amax, largest, smallest};
}

static Seen together(Seen a, Seen b) {
    return (Seen){a.overflow + b.overflow,
                  a.underflow + b.underflow,
                  a.non_finite + b.non_finite,
                  a.amax > b.amax ? a.amax : b.amax,
                  a.largest > b.largest ? a.largest : b.largest,
                  a.smallest < b.smallest ? a.smallest : b.smallest};
}

_Pragma("omp declare reduction(together : Seen : omp_out = together(omp_out, omp_in)) initializer(omp_priv = omp_orig)")

/* Adds what rounding x to q did, rows x columns values: what of x*scale lies outside of kept[0] to kept[1], what
   became zero, what is not finite; and the extremes. scale: one a row, or with `each` one an element. */
void count_ranges(const float *x, const float *q, int64_t rows, int64_t columns, const float *scale, int32_t each,
                  const float *kept, int64_t *totals, float *ends) {
    const int64_t across = (columns + PIECE - 1) / PIECE, pieces = rows * across;
    const float low = kept[0], high = kept[1];
    Seen seen = {0, 0, 0, 0, 0, UINT32_MAX};
    _Pragma("omp parallel for schedule(static) reduction(together : seen) if (rows * columns > PIECE)")
    for (int64_t piece = 0; piece < pieces; piece++) {
        const int64_t row = piece / across, at = row * columns + (piece % across) * PIECE;
        const int64_t rest = (row + 1) * columns - at;
        const int32_t n = (int32_t)(rest < PIECE ? rest : PIECE);
        seen = together(seen, each ? seen_in(x + at, q + at, n, scale + at, low, high, 1)
                                   : seen_in(x + at, q + at, n, scale + row, low, high, 0));
    }
    totals[ELEMENTS] += rows * columns;
    totals[OVERFLOW] += seen.overflow;
    totals[UNDERFLOW] += seen.underflow;
    totals[NON_FINITE] += seen.non_finite;
    const float amax = float_of(seen.amax), largest = float_of(seen.largest);
    if (amax > ends[AMAX]) ends[AMAX] = amax;
    if (largest > ends[LARGEST]) ends[LARGEST] = largest;
    if (seen.smallest != UINT32_MAX && float_of(seen.smallest + 1) < ends[SMALLEST]) ends[SMALLEST] = float_of(seen.smallest + 1);
}
