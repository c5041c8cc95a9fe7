/* One step of decoding: each row's new key and value go to its place in the cache, and its query attends to what the
 * row has there. Rows are independent: the bits of one do not depend on the others.
 * Called through ctypes (gearshift/kernels/native/__init__.py).
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "native.h"

#define LANES 16
#define PANEL 4 /* vectors of a value that are summed side by side, so that no sum waits for the one before */

typedef float lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(4)));
typedef int32_t whole_lanes __attribute__((vector_size(LANES * sizeof(int32_t)), aligned(4)));

/* `softcap` 0: none; `window` 0: none; `key_size` is also the query's. */
struct shape {
    int64_t heads, kv_heads, capacity, key_size, value_size, window;
    double scaling, softcap;
};

/* exp of numbers of at most 0, to 2e-7 of the result: 2^n * e^r with |r| <= ln(2) / 2, e^r by its series. */
static inline __attribute__((always_inline)) lanes exp_of(lanes x)
{
    const float rounding = 12582912.0f; /* 1.5 * 2^23: what is added to it loses its fraction */
    whole_lanes low = x < -87.0f;
    x = (lanes)(((whole_lanes)x & ~low) | ((whole_lanes)((lanes){0} - 87.0f) & low));
    lanes n = (x * 1.44269504f + rounding) - rounding;
    lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    lanes series = 1.0f / 5040 + (lanes){0};
    series = series * r + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    whole_lanes power = (__builtin_convertvector(n, whole_lanes) + 127) << 23;
    return series * (lanes)power;
}

/* In place of sixteen vectors their sums over lanes: each turn adds the even to the odd lanes of pairs of vectors. */
static inline __attribute__((always_inline)) lanes sums_of(lanes *vectors)
{
    const whole_lanes even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    for (int left = LANES; left > 1; left /= 2)
        for (int i = 0; i < left / 2; i++)
            vectors[i] = __builtin_shuffle(vectors[2 * i], vectors[2 * i + 1], even) +
                         __builtin_shuffle(vectors[2 * i], vectors[2 * i + 1], even + 1);
    return vectors[0];
}

static inline __attribute__((always_inline)) lanes load(const float *from, int64_t count)
{
    lanes vector = {0};
    memcpy(&vector, from, (size_t)(count < LANES ? count : LANES) * sizeof(float));
    return vector;
}

/* q k for `count` (at most LANES) keys one after the other. */
static inline __attribute__((always_inline)) lanes products(
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
static inline __attribute__((always_inline)) void weighted_panel(
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
static inline __attribute__((always_inline)) float weighted_one(
    const float *weights, const float *values, int64_t count, int64_t stride, float scale)
{
    float sum = 0.0f;
    for (int64_t j = 0; j < count; j++)
        sum += weights[j] * values[j * stride];
    return sum * scale;
}

/* softmax(scaling * q K^T) V over `count` columns; a `sink` is a column without value. `weights` has room for whole
 * vectors. */
static inline __attribute__((always_inline)) void attend(
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

/* Rows from `first` up to `last`: query [n, heads, key_size], key and value [n, kv_heads, size], the cache
 * [rows, kv_heads, capacity, size], positions [n], sinks [heads] or NULL -> out [n, heads, value_size].
 * 1: no memory. */
EXPORT CLONES int gearshift_decode_attention(
    int64_t first, int64_t last, const struct shape *shape, const float *query, const float *key, const float *value,
    float *keys, float *values, const int64_t *positions, const float *sinks, float *out)
{
    int64_t group = shape->heads / shape->kv_heads, key_size = shape->key_size, value_size = shape->value_size;
    float *weights = malloc((size_t)(shape->capacity + LANES) * sizeof(float));
    if (weights == NULL)
        return 1;
    for (int64_t row = first; row < last; row++)
        for (int64_t kv = 0; kv < shape->kv_heads; kv++) {
            int64_t at = row * shape->kv_heads + kv, position = positions[row];
            float *own_keys = keys + at * shape->capacity * key_size;
            float *own_values = values + at * shape->capacity * value_size;
            memcpy(own_keys + position * key_size, key + at * key_size, (size_t)key_size * sizeof(float));
            memcpy(own_values + position * value_size, value + at * value_size, (size_t)value_size * sizeof(float));
            int64_t low = shape->window && position >= shape->window ? position - shape->window + 1 : 0;
            for (int64_t head = kv * group; head < (kv + 1) * group; head++)
                attend(query + (row * shape->heads + head) * key_size, own_keys + low * key_size,
                       own_values + low * value_size, position - low + 1, sinks ? sinks + head : NULL, shape, weights,
                       out + (row * shape->heads + head) * value_size);
        }
    free(weights);
    return 0;
}
