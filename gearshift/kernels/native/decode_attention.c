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

/* `softcap` 0: none; `window` 0: none; `key_size` is also the query's. */
struct shape {
    int64_t heads, kv_heads, capacity, key_size, value_size, window;
    double scaling, softcap;
};

static inline __attribute__((always_inline)) float dot(const float *a, const float *b, int64_t size)
{
    float sums[LANES] = {0};
    int64_t whole = size - size % LANES;
    for (int64_t i = 0; i < whole; i += LANES)
        for (int k = 0; k < LANES; k++)
            sums[k] += a[i + k] * b[i + k];
    for (int64_t i = whole; i < size; i++)
        sums[i - whole] += a[i] * b[i];
    for (int width = LANES / 2; width; width /= 2)
        for (int k = 0; k < width; k++)
            sums[k] += sums[k + width];
    return sums[0];
}

/* out[d] = scale * sum over j of weights[j] * values[j * stride + d], for `width` (at most LANES) of the d. */
static inline __attribute__((always_inline)) void weighted(
    const float *weights, const float *values, int64_t count, int64_t stride, int64_t width, float scale, float *out)
{
    float sums[LANES] = {0};
    for (int64_t j = 0; j < count; j++)
        for (int64_t d = 0; d < width; d++)
            sums[d] += weights[j] * values[j * stride + d];
    for (int64_t d = 0; d < width; d++)
        out[d] = scale * sums[d];
}

/* softmax(scaling * q K^T) V over `count` columns; a `sink` is a column without value. */
static inline __attribute__((always_inline)) void attend(
    const float *query, const float *keys, const float *values, int64_t count, const float *sink,
    const struct shape *shape, float *weights, float *out)
{
    float scaling = (float)shape->scaling, cap = (float)shape->softcap;
    float highest = sink ? *sink : -INFINITY, total = 0.0f;
    for (int64_t j = 0; j < count; j++) {
        weights[j] = scaling * dot(query, keys + j * shape->key_size, shape->key_size);
        if (cap != 0.0f)
            weights[j] = cap * tanhf(weights[j] / cap);
        highest = weights[j] > highest ? weights[j] : highest;
    }
    for (int64_t j = 0; j < count; j++) {
        weights[j] = expf(weights[j] - highest);
        total += weights[j];
    }
    if (sink)
        total += expf(*sink - highest);
    int64_t whole = shape->value_size - shape->value_size % LANES;
    for (int64_t d = 0; d < whole; d += LANES)
        weighted(weights, values + d, count, shape->value_size, LANES, 1.0f / total, out + d);
    weighted(weights, values + whole, count, shape->value_size, shape->value_size - whole, 1.0f / total, out + whole);
}

/* Rows from `first` up to `last`: query [n, heads, key_size], key and value [n, kv_heads, size], the cache
 * [rows, kv_heads, capacity, size], positions [n], sinks [heads] or NULL -> out [n, heads, value_size].
 * 1: no memory. */
EXPORT CLONES int gearshift_decode_attention(
    int64_t first, int64_t last, const struct shape *shape, const float *query, const float *key, const float *value,
    float *keys, float *values, const int64_t *positions, const float *sinks, float *out)
{
    int64_t group = shape->heads / shape->kv_heads, key_size = shape->key_size, value_size = shape->value_size;
    float *weights = malloc((size_t)shape->capacity * sizeof(float));
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
