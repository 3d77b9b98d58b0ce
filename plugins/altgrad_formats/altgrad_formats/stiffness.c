/* The founding and the smooth stiffness of blocks of weights, for the loops of others
   (altgrad_core.native.SpacingLoop): the bits of stiffness.py. */

#include "loops.h"

typedef struct {
    float ulp;      /* 2^-M */
    float slope;    /* ln 2 * 2^-M */
    float smallest; /* spacing of the subnormals, scaled units */
} Facts;

/* In the range of float32, so positive and finite; NaN stays NaN. */
static inline float representable(float s) {
    s = s < 0x1p-149f ? 0x1p-149f : s;
    return s > 0x1.fffffep127f ? 0x1.fffffep127f : s;
}

void ideal(const float *x, float *s, int32_t n, float scale, const void *context) {
    const Facts k = *(const Facts *)context;
    (void)scale;
    _Pragma("omp simd")
    for (int32_t i = 0; i < n; i++) {
        const int32_t size = magnitude_of(x[i]);
        const float normal = float_of((size < 0x7F800000 ? size : 0x7F7FFFFF) & 0x7F800000);
        const float subnormal = float_of(magnitude_of(float_of(size) * 0x1p24f) & 0x7F800000) * 0x1p-24f;
        const float ulp = representable((size < 0x00800000 ? subnormal : normal) * k.ulp);
        s[i] = x[i] != x[i] ? x[i] : size ? ulp : 1.0f;
    }
}

void smooth(const float *x, float *s, int32_t n, float scale, const void *context) {
    const Facts k = *(const Facts *)context;
    const float least = k.smallest / scale;
    _Pragma("omp simd")
    for (int32_t i = 0; i < n; i++) {
        const float slope = fabsf(x[i]) * k.slope;
        s[i] = x[i] != x[i] ? x[i] : representable(slope > least ? slope : least);
    }
}
