/* Formats known by their table of values, on a CPU: rounding by one look-up and one comparison.

   The upper 16 bits of a float32 name a slot: sign, exponent and 7 bits of mantissa. Where no slot holds more than
   one threshold at which rounding changes, the cell of x is that of the slot's lowest number, and the next one
   from the slot's threshold on. Exact for any thresholds, ties included. Cells as in altgrad_core.value_table:
   0 below the lowest value, 1 to n the values, n + 1 above the highest. */

#include "loops.h"

#define PIECE 16384 /* elements a thread takes at a time */

typedef struct {
    float threshold;
    int32_t cell;
} Slot;

static inline int32_t cell_of(float x, const Slot *slots) {
    const Slot slot = slots[(uint32_t)bits_of(x) >> 16];
    return slot.cell + (x >= slot.threshold);
}

void cells(const float *x, int32_t *out, int64_t n, const Slot *slots, int32_t last) {
    _Pragma("omp parallel for simd schedule(static) if (parallel : n > PIECE)")
    for (int64_t i = 0; i < n; i++) out[i] = x[i] != x[i] ? last : cell_of(x[i], slots);
}

/* The cell toward zero of x, or its outer neighbor where r * gap < |x| - |value|, r of the keys' stream.
   slots: of rounding toward zero. values: of the cells. gaps[c] lies below cell c; inf past the ends. */
void stochastic_cells(const float *x, int32_t *out, int64_t n, const Slot *slots, int32_t last,
                      const double *values, const double *gaps, const Keys *keys) {
    const Keys own = *keys;
    _Pragma("omp parallel for schedule(static) if (n > PIECE)")
    for (int64_t i = 0; i < n; i++) {
        const float v = x[i];
        const int32_t cell = v != v ? last : cell_of(v, slots), below = v < 0;
        const double above = fabs((double)v - values[cell]), gap = gaps[below ? cell : cell + 1];
        const int32_t outward = (double)uniform((uint32_t)i, own) * gap < above;
        out[i] = below ? cell - outward : cell + outward;
    }
}

static inline float rounded(float v, const Slot *slots, const float *outputs, float low, float high) {
    const float q = copysignf(outputs[cell_of(v, slots)], v), r = q < low ? low : q;
    return v != v ? v : r > high ? high : r;
}

/* rows x columns values, one scale a row: limited(output of the cell of x * scale) / scale. */
void quantize(const float *restrict x, float *restrict out, int64_t rows, int64_t columns, const float *scale,
              float low, float high, const Slot *restrict slots, const float *restrict outputs) {
    const int64_t across = (columns + PIECE - 1) / PIECE, pieces = rows * across;
    _Pragma("omp parallel for schedule(static) if (rows * columns > PIECE)")
    for (int64_t piece = 0; piece < pieces; piece++) {
        const int64_t row = piece / across, at = row * columns, begin = at + (piece % across) * PIECE;
        const int64_t end = begin + PIECE < at + columns ? begin + PIECE : at + columns;
        const float s = scale[row], inverse = 1.0f / s;
        if (is_power_of_two(s))
            _Pragma("omp simd") for (int64_t i = begin; i < end; i++) out[i] = rounded(x[i] * s, slots, outputs, low, high) * inverse;
        else
            _Pragma("omp simd") for (int64_t i = begin; i < end; i++) out[i] = rounded(x[i] * s, slots, outputs, low, high) / s;
    }
}

void decode(const uint8_t *codes, float *out, int64_t n, const float *values, int32_t count) {
    _Pragma("omp parallel for schedule(static) if (n > PIECE)")
    for (int64_t i = 0; i < n; i++) out[i] = codes[i] < count ? values[codes[i]] : NAN;
}

/* Blocks, for the loops of others (altgrad_core.native.BlockLoops): n values of one thread. */
typedef struct {
    const Slot *nearest, *inward; /* slots of rounding to nearest even, and toward zero */
    const float *outputs;         /* of the cells, saturated */
    const double *values, *gaps;  /* of the cells; gaps[c] lies below cell c */
    const int32_t *counts;        /* of the values, and of those below zero */
} Table;

static inline int32_t inside(int32_t cell, int32_t count) { return cell < 1 ? 1 : cell > count ? count : cell; }

static inline int32_t rung_of(float x, Table t) { return inside(cell_of(x, t.nearest), t.counts[0]) - 1 - t.counts[1]; }

static inline float value_at(int32_t rung, Table t) {
    const int64_t cell = (int64_t)rung + 1 + t.counts[1], count = t.counts[0];
    return t.outputs[cell < 1 ? 1 : cell > count ? count : cell];
}

void block_rungs(const float *x, int32_t *rungs, int32_t n, const void *context) {
    const Table t = *(const Table *)context;
    for (int32_t i = 0; i < n; i++) rungs[i] = rung_of(x[i], t);
}

void block_values(const int32_t *rungs, float *x, int32_t n, const void *context) {
    const Table t = *(const Table *)context;
    for (int32_t i = 0; i < n; i++) x[i] = value_at(rungs[i], t);
}

void block_moves(const float *x, const float *down, const int32_t *draws, float *to, int32_t n, const Walk *walk, Moved *seen,
                 const void *context) {
    const Table t = *(const Table *)context;
    const Walk own = *walk;
    for (int32_t i = 0; i < n; i++) {
        const int32_t whole = whole_rungs(down[i], own.clip, draws[i], 0);
        const int32_t rung = rung_of(x[i] * own.scale, t) + (down[i] < 0 ? -whole : whole);
        seen->least = rung < seen->least ? rung : seen->least;
        seen->most = rung > seen->most ? rung : seen->most;
        to[i] = value_at(rung < own.low ? own.low : rung > own.high ? own.high : rung, t) / own.scale;
        seen->flips += to[i] != x[i];
        seen->undefined |= __builtin_isunordered(x[i], down[i]);
    }
    seen->lost = 1;
}

void block_spacings(const float *x, float *spacings, int32_t n, float s, const void *context) {
    const Table t = *(const Table *)context;
    for (int32_t i = 0; i < n; i++) {
        const float v = x[i] * s;
        const int32_t cell = inside(cell_of(v, t.inward), t.counts[0]);
        const float gap = (float)t.gaps[v < 0 ? cell : cell + 1];
        spacings[i] = v != v ? v : gap / s;
    }
}

void block_steps(const float *before, const float *now, int32_t *same, float *shares, int32_t n, float s,
                 const void *context) {
    const Table t = *(const Table *)context;
    block_spacings(before, shares, n, s, context);
    for (int32_t i = 0; i < n; i++) {
        const float v = now[i] * s, w = before[i] * s, share = fabsf(now[i] - before[i]) / shares[i];
        shares[i] = 1.0f < share ? 1.0f : share; /* NaN stays NaN */
        if (same) same[i] = (v != v || w != w ? v != v && w != w : rung_of(v, t) == rung_of(w, t)) ? -1 : 0;
    }
}

void block_quantize(const float *x, float *out, int32_t n, uint32_t first, float s, float low, float high,
                    const Keys *keys, const void *context) {
    const Table t = *(const Table *)context;
    for (int32_t i = 0; i < n; i++) {
        const float v = x[i] * s;
        if (keys) {
            const int32_t cell = cell_of(v, t.inward), below = v < 0;
            const double above = fabs((double)v - t.values[cell]), gap = t.gaps[below ? cell : cell + 1];
            const int32_t outward = (double)uniform(first + (uint32_t)i, *keys) * gap < above;
            const float q = copysignf(t.outputs[below ? cell - outward : cell + outward], v), r = q < low ? low : q;
            out[i] = (v != v ? v : r > high ? high : r) / s;
        } else
            out[i] = rounded(v, t.nearest, t.outputs, low, high) / s;
    }
}
