/* Root-mean-square norm of rows (Zhang and Sennrich 2019), in one pass over each row for its sum and one for its result,
 * and its gradients. Called through ctypes (gearshift/kernels/native/__init__.py). */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "native.h"

#define LANES 16

struct rms_norm {
    int64_t features;
    const float *x, *weight;
    double eps, offset;
    float *y;
};

/* y = x / sqrt(mean(x^2) + eps) * (weight + offset) for rows first to last - 1 of `features` values each. */
EXPORT void gearshift_rms_norm(int64_t first, int64_t last, const struct rms_norm *given)
{
    int64_t features = given->features;
    const float *restrict weight = given->weight;
    for (int64_t row = first; row < last; row++) {
        const float *restrict in = given->x + row * features;
        float *restrict out = given->y + row * features;
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
        float scale = (float)(1.0 / sqrt(total / features + given->eps)), shift = (float)given->offset;
        for (k = 0; k < features; k++)
            out[k] = in[k] * scale * (weight[k] + shift);
    }
}

/* dx and dweight may be NULL. dweight: a row for each `part` of the rows, for their sum. */
struct rms_norm_backward {
    int64_t rows, part, features;
    const float *x, *weight, *dy;
    double eps, offset;
    float *dx, *dweight;
};

/* Parts first to last - 1: with g = dy (weight + offset) and r = 1 / sqrt(mean(x^2) + eps), dx = r g - x r^3 mean(g x),
 * and dweight the sum of dy x r. */
EXPORT void gearshift_rms_norm_backward(int64_t first, int64_t last, const struct rms_norm_backward *given)
{
    int64_t part = given->part, features = given->features;
    const float *restrict weight = given->weight;
    float shift = (float)given->offset;
    for (int64_t row = first * part; row < given->rows && row < last * part; row++) {
        const float *restrict in = given->x + row * features, *restrict slope = given->dy + row * features;
        float squares[LANES] = {0}, products[LANES] = {0};
        int64_t k = 0;
        for (; k + LANES <= features; k += LANES)
            for (int lane = 0; lane < LANES; lane++) {
                squares[lane] += in[k + lane] * in[k + lane];
                products[lane] += in[k + lane] * (slope[k + lane] * (weight[k + lane] + shift));
            }
        double square = 0, product = 0;
        for (int lane = 0; lane < LANES; lane++) {
            square += squares[lane];
            product += products[lane];
        }
        for (; k < features; k++) {
            square += (double)in[k] * in[k];
            product += (double)in[k] * (slope[k] * (weight[k] + shift));
        }
        double mean = square / features + given->eps, root = 1.0 / sqrt(mean);
        float scale = (float)root, along = (float)(product / features * root / mean);
        if (given->dx) {
            float *restrict out = given->dx + row * features;
            for (k = 0; k < features; k++)
                out[k] = slope[k] * (weight[k] + shift) * scale - in[k] * along;
        }
        if (given->dweight) {
            float *restrict sum = given->dweight + row / part * features;
            if (row % part == 0)
                memset(sum, 0, (size_t)features * sizeof *sum);
            for (k = 0; k < features; k++)
                sum[k] += slope[k] * (in[k] * scale);
        }
    }
}

/* The sum of `rows` rows, in their order, in the first of them. */
EXPORT void gearshift_sum_rows(int64_t rows, int64_t features, float *x)
{
    for (int64_t row = 1; row < rows; row++)
        for (int64_t k = 0; k < features; k++)
            x[k] += x[row * features + k];
}
