/* One step of decoding: each row's new key and value go to its place in the cache, and its query attends to what the
 * row has there. Rows are independent: the bits of one do not depend on the others.
 * Called through ctypes (gearshift/kernels/native/tasks.py).
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "native.h"
#include "team.h"
#include "vectors.h"

#define PANEL 4 /* vectors of a value that are summed side by side, so that no sum waits for the one before */

/* `softcap` 0: none; `window` 0: none; `key_size` is also the query's. */
struct shape {
    int64_t heads, kv_heads, capacity, key_size, value_size, window;
    double scaling, softcap;
};

/* query [n, heads, key_size], key and value [n, kv_heads, size], the cache [>= n, kv_heads, capacity, size],
 * positions [n], sinks [heads] or NULL -> out [n, heads, value_size]. */
struct decode_attention {
    struct shape shape;
    const float *query, *key, *value;
    float *keys, *values;
    const int64_t *positions;
    const float *sinks;
    float *out;
};

/* In place of LANES vectors their sums over lanes: each turn adds the even to the odd lanes of pairs of vectors. */
INLINE lanes sums_of(lanes *vectors)
{
    const whole_lanes even = NUMBER * 2;
    for (int left = LANES; left > 1; left /= 2)
        for (int i = 0; i < left / 2; i++)
            vectors[i] = __builtin_shuffle(vectors[2 * i], vectors[2 * i + 1], even) +
                         __builtin_shuffle(vectors[2 * i], vectors[2 * i + 1], even + 1);
    return vectors[0];
}

/* q k for `count` (at most LANES) keys one after the other. */
INLINE lanes products(
    const float *query, const float *keys, int64_t count, int64_t size)
{
    lanes sums[LANES] = {0};
    int64_t whole = size - size % LANES;
    for (int64_t i = 0; i < whole; i += LANES) {
        lanes q = *(const lanes *)(query + i);
        for (int64_t j = 0; j < count; j++)
            sums[j] += q * *(const lanes *)(keys + j * size + i);
    }
    if (whole < size)
        for (int64_t j = 0; j < count; j++)
            sums[j] += load(query + whole, size - whole) * load(keys + j * size + whole, size - whole);
    return sums_of(sums);
}

/* out[d] = scale * sum over j of weights[j] * values[j * stride + d], for PANEL vectors of d. */
INLINE void weighted_panel(
    const float *weights, const float *values, int64_t count, int64_t stride, float scale, float *out)
{
    lanes sums[PANEL] = {0};
    for (int64_t j = 0; j < count; j++)
        for (int p = 0; p < PANEL; p++)
            sums[p] += weights[j] * *(const lanes *)(values + j * stride + p * LANES);
    for (int p = 0; p < PANEL; p++)
        *(lanes *)(out + p * LANES) = sums[p] * scale;
}

/* The same for one d. */
INLINE float weighted_one(
    const float *weights, const float *values, int64_t count, int64_t stride, float scale)
{
    float sum = 0.0f;
    for (int64_t j = 0; j < count; j++)
        sum += weights[j] * values[j * stride];
    return sum * scale;
}

/* softmax(scaling * q K^T) V over `count` columns; a `sink` is a column without value. `weights` has room for whole
 * vectors. */
INLINE void attend(
    const float *query, const float *keys, const float *values, int64_t count, const float *sink,
    const struct shape *shape, float *weights, float *out)
{
    float cap = (float)shape->softcap, highest = sink ? *sink : -INFINITY, total = 0.0f;
    for (int64_t j = 0; j < count; j += LANES) {
        int64_t here = count - j < LANES ? count - j : LANES;
        const float *block = keys + j * shape->key_size;
        lanes scores = here == LANES ? products(query, block, LANES, shape->key_size)
                                     : products(query, block, here, shape->key_size);
        *(lanes *)(weights + j) = scores * (float)shape->scaling;
        for (int64_t k = j; k < j + here; k++) {
            if (cap != 0.0f)
                weights[k] = cap * tanhf(weights[k] / cap);
            highest = weights[k] > highest ? weights[k] : highest;
        }
    }
    for (int64_t j = 0; j < count; j += LANES)
        *(lanes *)(weights + j) = exp_of(*(const lanes *)(weights + j) - highest);
    for (int64_t j = 0; j < count; j++)
        total += weights[j];
    if (sink)
        total += expf(*sink - highest);
    int64_t d = 0;
    for (; d + PANEL * LANES <= shape->value_size; d += PANEL * LANES)
        weighted_panel(weights, values + d, count, shape->value_size, 1.0f / total, out + d);
    for (; d < shape->value_size; d++)
        out[d] = weighted_one(weights, values + d, count, shape->value_size, 1.0f / total);
}

/* One row's part of one head of keys and values: `number` counts them, row by row. */
INLINE void step_of(const struct decode_attention *of, int64_t number, float *weights)
{
    const struct shape *shape = &of->shape;
    int64_t row = number / shape->kv_heads, kv = number % shape->kv_heads, position = of->positions[row];
    int64_t group = shape->heads / shape->kv_heads, key_size = shape->key_size, value_size = shape->value_size;
    float *keys = of->keys + number * shape->capacity * key_size;
    float *values = of->values + number * shape->capacity * value_size;
    memcpy(keys + position * key_size, of->key + number * key_size, (size_t)key_size * sizeof(float));
    memcpy(values + position * value_size, of->value + number * value_size, (size_t)value_size * sizeof(float));
    int64_t low = shape->window && position >= shape->window ? position - shape->window + 1 : 0;
    for (int64_t head = kv * group; head < (kv + 1) * group; head++)
        attend(of->query + (row * shape->heads + head) * key_size, keys + low * key_size, values + low * value_size,
               position - low + 1, of->sinks ? of->sinks + head : NULL, shape, weights,
               of->out + (row * shape->heads + head) * value_size);
}

/* A task whose units are the heads of keys and values of all rows. */
EXPORT int gearshift_decode_attention(const void *arguments, struct heap *heap)
{
    const struct decode_attention *of = arguments;
    float *weights = malloc((size_t)(of->shape.capacity + LANES) * sizeof(float));
    int64_t first, last;
    if (weights == NULL)
        return 1;
    while (gearshift_take(heap, &first, &last))
        for (int64_t number = first; number < last; number++)
            step_of(of, number, weights);
    free(weights);
    return 0;
}
