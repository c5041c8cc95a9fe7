/* Root-mean-square norm of rows (Zhang and Sennrich 2019), in one pass over each row for its sum and one for its result,
 * and its gradients. Called through ctypes (gearshift/kernels/native/__init__.py). */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "native.h"
#include "vectors.h"

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
    for (int64_t row = first; row < last; row++) {
        const float *in = given->x + row * features;
        float *out = given->y + row * features;
        lanes sums = {0};
        for (int64_t k = 0; k < features; k += LANES) {
            lanes x = load(in + k, features - k);
            sums += x * x;
        }
        float scale = (float)(1.0 / sqrt(total_of(sums) / features + given->eps)), shift = (float)given->offset;
        for (int64_t k = 0; k < features; k += LANES) {
            lanes weight = load(given->weight + k, features - k) + shift;
            store(out + k, load(in + k, features - k) * scale * weight, features - k);
        }
    }
}

/* dx and dweight may be NULL. dweight: a row for each `part` of the rows, for their sum. */
struct rms_norm_backward {
    int64_t rows, part, features;
    const float *x, *weight, *dy;
    double eps, offset;
    float *dx, *dweight;
};

/* Of one row: r, and r^3 mean(g x). */
INLINE float factors_of(const struct rms_norm_backward *given, const float *in, const float *slope, float *along)
{
    int64_t features = given->features;
    float shift = (float)given->offset;
    lanes squares = {0}, products = {0};
    for (int64_t k = 0; k < features; k += LANES) {
        lanes x = load(in + k, features - k), weight = load(given->weight + k, features - k) + shift;
        squares += x * x;
        products += x * (load(slope + k, features - k) * weight);
    }
    double mean = total_of(squares) / features + given->eps, root = 1.0 / sqrt(mean);
    *along = (float)(total_of(products) / features * root / mean);
    return (float)root;
}

/* Parts first to last - 1: with g = dy (weight + offset) and r = 1 / sqrt(mean(x^2) + eps), dx = r g - x r^3 mean(g x),
 * and dweight the sum of dy x r. */
EXPORT void gearshift_rms_norm_backward(int64_t first, int64_t last, const struct rms_norm_backward *given)
{
    int64_t part = given->part, features = given->features;
    float shift = (float)given->offset;
    for (int64_t row = first * part; row < given->rows && row < last * part; row++) {
        const float *in = given->x + row * features, *slope = given->dy + row * features;
        float along, scale = factors_of(given, in, slope, &along);
        float *sum = given->dweight ? given->dweight + row / part * features : NULL;
        if (sum && row % part == 0)
            memset(sum, 0, (size_t)features * sizeof *sum);
        for (int64_t k = 0; k < features; k += LANES) {
            int64_t left = features - k;
            lanes x = load(in + k, left), dy = load(slope + k, left);
            if (given->dx)
                store(given->dx + row * features + k,
                      dy * (load(given->weight + k, left) + shift) * scale - x * along, left);
            if (sum)
                store(sum + k, load(sum + k, left) + dy * (x * scale), left);
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
