/* One step of the reversals of all weights on a CPU, each read once: the arithmetic of `advance` in oscillation.py, in
   the same order, so with the same bits. Threads take a weight each.

   Nothing here may be contracted: compile with -ffp-contract=off. */

#include <stdint.h>

#define PIECE 4096 /* elements whose count fits an int32 that vectorizes */

typedef struct {
    const void *before, *now; /* codes */
    float *frequency;
    int8_t *direction;
    int64_t words; /* whether the codes are int16, else int8 */
    int64_t n;
} Weight;

/* Advances a piece, and returns how many of its weights oscillate. */
#define ADVANCE(NAME, CODE)                                                                                          \
    static int32_t NAME(const CODE *restrict before, const CODE *restrict now, float *restrict frequency,           \
                        int8_t *restrict direction, int32_t n, float kept, float added, float threshold) {          \
        int32_t count = 0;                                                                                           \
        for (int32_t i = 0; i < n; i++) {                                                                            \
            const int8_t last = direction[i];                                                                        \
            const int8_t went = (int8_t)((now[i] > before[i]) - (now[i] < before[i]));                               \
            const int8_t against = (int8_t)(went * last);                                                            \
            const float f = frequency[i] * kept + (against < 0 ? added : 0.0f);                                      \
            frequency[i] = f;                                                                                        \
            direction[i] = went ? went : last;                                                                       \
            count += f > threshold;                                                                                  \
        }                                                                                                            \
        return count;                                                                                                \
    }

ADVANCE(advance_bytes, int8_t)
ADVANCE(advance_words, int16_t)

static int64_t advance(const Weight *w, float kept, float added, float threshold) {
    int64_t count = 0;
    for (int64_t at = 0; at < w->n; at += PIECE) {
        const int32_t n = (int32_t)(w->n - at < PIECE ? w->n - at : PIECE);
        float *frequency = w->frequency + at;
        int8_t *direction = w->direction + at;
        if (w->words)
            count += advance_words((const int16_t *)w->before + at, (const int16_t *)w->now + at, frequency, direction,
                                   n, kept, added, threshold);
        else
            count += advance_bytes((const int8_t *)w->before + at, (const int8_t *)w->now + at, frequency, direction, n,
                                   kept, added, threshold);
    }
    return count;
}

/* oscillating: how many weights of each do, afterwards. */
void oscillations(int64_t count, const Weight *weights, float kept, float added, float threshold, int64_t *oscillating) {
    _Pragma("omp parallel for schedule(dynamic)")
    for (int64_t each = 0; each < count; each++) oscillating[each] = advance(&weights[each], kept, added, threshold);
}
