/* What a step of decoding does between its products, as tasks: norms, rotations, sums, gates.
 * Called through ctypes (gearshift/kernels/native/tasks.py).
 */
#include <stdint.h>

#include "native.h"
#include "team.h"
#include "vectors.h"

#include "apart.h"

/* Numbers of a unit of the tasks that go number by number. */
#define UNIT 256

struct rms_norm;
void gearshift_rms_norm(int64_t first, int64_t last, const struct rms_norm *given);

/* Units: rows. */
EXPORT int gearshift_step_norm(const void *arguments, struct heap *heap)
{
    int64_t first, last;
    while (gearshift_take(heap, &first, &last))
        gearshift_rms_norm(first, last, arguments);
    return 0;
}

/* Strides: of x (row, head), of cos and sin (row each), of y (row, head); values of a head lie side by side. */
struct rotation {
    int64_t heads, size, x_row, x_head, cos_row, sin_row, y_row, y_head;
    const float *x, *cos, *sin;
    float *y;
};

/* y[d] = x[d] cos[d] + (d < size / 2 ? -x[d + size / 2] : x[d - size / 2]) sin[d], of each head. Units: rows. */
EXPORT APART int gearshift_step_rotation(const void *arguments, struct heap *heap)
{
    const struct rotation *of = arguments;
    int64_t first, last, half = of->size / 2;
    while (gearshift_take(heap, &first, &last))
        for (int64_t row = first; row < last; row++)
            for (int64_t head = 0; head < of->heads; head++) {
                const float *x = of->x + row * of->x_row + head * of->x_head;
                const float *cos = of->cos + row * of->cos_row, *sin = of->sin + row * of->sin_row;
                float *restrict y = of->y + row * of->y_row + head * of->y_head;
                for (int64_t d = 0; d < half; d++) {
                    y[d] = x[d] * cos[d] + -x[d + half] * sin[d];
                    y[d + half] = x[d + half] * cos[d + half] + x[d] * sin[d + half];
                }
            }
    return 0;
}

struct pointwise {
    int64_t numbers;
    const float *a, *b;
    float *y;
};

/* Tasks whose units are UNIT numbers each. `y` may be `a` or `b`. */
#define POINTWISE(name, expression)                                                    \
    EXPORT int gearshift_step_##name(const void *arguments, struct heap *heap)         \
    {                                                                                  \
        const struct pointwise *of = arguments;                                        \
        const float *a = of->a, *b = of->b;                                            \
        int64_t first, last;                                                           \
        (void)b;                                                                       \
        while (gearshift_take(heap, &first, &last))                                    \
            for (int64_t i = first * UNIT; i < last * UNIT && i < of->numbers; i++)    \
                of->y[i] = (expression);                                               \
        return 0;                                                                      \
    }

POINTWISE(sum, a[i] + b[i])
POINTWISE(product, a[i] * b[i])

/* x / (1 + e^-x), and 0 or x far from 0, where e^x or e^-x is nothing beside 1; of -inf NaN, as torch gives it. */
INLINE lanes silu(lanes x)
{
    lanes small = choose(magnitude(x) > 87.0f, (lanes){0}, exp_of(-magnitude(x)));
    return x * choose(x < 0.0f, small, 1.0f + (lanes){0}) / (1.0f + small);
}

/* Units: UNIT numbers. */
EXPORT int gearshift_step_silu(const void *arguments, struct heap *heap)
{
    const struct pointwise *of = arguments;
    int64_t first, last;
    while (gearshift_take(heap, &first, &last)) {
        int64_t stop = last * UNIT < of->numbers ? last * UNIT : of->numbers, i = first * UNIT;
        for (; i + LANES <= stop; i += LANES)
            store(of->y + i, silu(load(of->a + i, LANES)), LANES);
        if (i < stop)
            store(of->y + i, silu(load(of->a + i, stop - i)), stop - i);
    }
    return 0;
}
