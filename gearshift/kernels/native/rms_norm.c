/* Root-mean-square norm of rows (Zhang and Sennrich 2019), in one pass over each row for its sum and one for its result.
 * Called through ctypes (gearshift/kernels/native/__init__.py). */
#include <math.h>
#include <stdint.h>

#include "native.h"

#define LANES 16

/* y = x / sqrt(mean(x^2) + eps) * (weight + offset) for rows first to last - 1 of `features` values each. */
EXPORT CLONES void gearshift_rms_norm(
    int64_t first, int64_t last, int64_t features, const float *x, const float *weight, double eps, double offset, float *y)
{
    for (int64_t row = first; row < last; row++) {
        const float *in = x + row * features;
        float *out = y + row * features;
        /* Lanes of their own, so that the compiler may add them side by side, in one order always. */
        float sums[LANES] = {0};
        int64_t k = 0;
        for (; k + LANES <= features; k += LANES)
            for (int lane = 0; lane < LANES; lane++)
                sums[lane] += in[k + lane] * in[k + lane];
        double total = 0;
        for (int lane = 0; lane < LANES; lane++)
            total += sums[lane];
        for (; k < features; k++)
            total += (double)in[k] * in[k];
        float scale = (float)(1.0 / sqrt(total / features + eps)), shift = (float)offset;
        for (k = 0; k < features; k++)
            out[k] = in[k] * scale * (weight[k] + shift);
    }
}
