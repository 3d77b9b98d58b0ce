/* What weights that move in whole rungs lose at the ends of their format, in one pass; rung_counts.py says what. */

#include "loops.h"

#define PIECE 1024 /* elements of a block: what is made of them stays in a core's first cache */

typedef struct {
    int64_t overflow, underflow, undefined;
    uint32_t largest, smallest; /* bits of magnitudes, finite and not 0; the smallest less 1 */
} Lost;

static Lost lost_in(const float *before, const float *intended, const float *after, int32_t n, float scale, float low,
                    float high, Rungs rungs, const void *context) {
    const uint32_t infinity = 0x7F800000u;
    float scaled[PIECE];
    int32_t rung[PIECE], overflow = 0, underflow = 0, undefined = 0;
    uint32_t largest = 0, smallest = UINT32_MAX;
    _Pragma("omp simd")
    for (int32_t i = 0; i < n; i++) scaled[i] = before[i] * scale;
    rungs(scaled, rung, n, context);
    _Pragma("omp simd reduction(+ : overflow, underflow, undefined) reduction(max : largest) reduction(min : smallest)")
    for (int32_t i = 0; i < n; i++) {
        const float wanted = (float)rung[i] + intended[i];
        const uint32_t size = magnitude_of(after[i]), used = size < infinity ? size : 0;
        const int known = (magnitude_of(before[i]) < infinity) & (magnitude_of(intended[i]) < infinity);
        overflow += known & ((wanted > high) | (wanted < low));
        underflow += known & (size == 0) & (wanted != 0);
        undefined += !known;
        largest = used > largest ? used : largest;
        smallest = used - 1 < smallest ? used - 1 : smallest; /* of a zero: the largest there is */
    }
    return (Lost){overflow, underflow, undefined, largest, smallest};
}

static Lost together(Lost a, Lost b) {
    return (Lost){a.overflow + b.overflow, a.underflow + b.underflow, a.undefined + b.undefined,
                  a.largest > b.largest ? a.largest : b.largest, a.smallest < b.smallest ? a.smallest : b.smallest};
}

_Pragma("omp declare reduction(together : Lost : omp_out = together(omp_out, omp_in)) initializer(omp_priv = omp_orig)")

/* ends: the lowest and the largest rung. counts, extremes: what is found is left there. */
void count_rungs(const float *before, const float *intended, const float *after, int64_t n, const float *scale,
                 const int32_t *ends, Rungs rungs, const void *context, int64_t *counts, float *extremes) {
    const float low = (float)ends[0], high = (float)ends[1];
    Lost lost = {0, 0, 0, 0, UINT32_MAX};
    _Pragma("omp parallel for schedule(static) reduction(together : lost) if (n > 16 * PIECE)")
    for (int64_t at = 0; at < n; at += PIECE) {
        const int32_t m = (int32_t)(n - at < PIECE ? n - at : PIECE);
        lost = together(lost, lost_in(before + at, intended + at, after + at, m, *scale, low, high, rungs, context));
    }
    counts[0] = lost.overflow;
    counts[1] = lost.underflow;
    counts[2] = lost.undefined;
    extremes[0] = extremes[1] = float_of(lost.largest);
    extremes[2] = lost.smallest == UINT32_MAX ? __builtin_inff() : float_of(lost.smallest + 1);
}
