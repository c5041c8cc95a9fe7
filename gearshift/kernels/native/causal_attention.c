/* Causal attention of sequences that stand one after another, each by itself, and its gradients. A head of a sequence
 * is a few products of small matrices, all of which are sums of rows of one: see `product`.
 * Called through ctypes (gearshift/kernels/native/__init__.py).
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "native.h"
#include "vectors.h"

#define ROWS 6   /* of a tile, and its columns in vectors: sums that stay in registers */
#define PANEL (REGISTERS / 8)
#define BLOCK 48 /* queries whose weights are held at once */

static const lanes LANE = {PLACES};

INLINE int64_t whole(int64_t count)
{
    return (count + LANES - 1) / LANES * LANES;
}

INLINE int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* c[r][v] (+)= sum over k of a[r a_row + k a_step] b[k][v] for `rows` rows and `vectors` vectors of columns, which are
 * known when this is compiled. */
INLINE void tile(
    const int rows, const int vectors, int64_t depth, const float *a, int64_t a_row, int64_t a_step, const float *b,
    int64_t b_row, float *c, int64_t c_row, int add)
{
    lanes sums[ROWS][PANEL];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            sums[r][v] = add ? *(const lanes *)(c + r * c_row + v * LANES) : (lanes){0};
    for (int64_t k = 0; k < depth; k++) {
        lanes row[PANEL];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            row[v] = *(const lanes *)(b + k * b_row + v * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            float factor = a[r * a_row + k * a_step];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                sums[r][v] += factor * row[v];
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            *(lanes *)(c + r * c_row + v * LANES) = sums[r][v];
}

/* C [rows, columns] (+)= A B: A's numbers lie a_row and a_step apart, so that it may be a transpose; rows of B and C are
 * whole vectors. */
INLINE void strip(
    const int rows, int64_t columns, int64_t depth, const float *a, int64_t a_row, int64_t a_step, const float *b,
    int64_t b_row, float *c, int64_t c_row, int add)
{
    int64_t n = 0;
    for (; n + PANEL * LANES <= columns; n += PANEL * LANES)
        tile(rows, PANEL, depth, a, a_row, a_step, b + n, b_row, c + n, c_row, add);
    switch ((columns - n) / LANES) {
#if PANEL > 3
    case 3:
        tile(rows, 3, depth, a, a_row, a_step, b + n, b_row, c + n, c_row, add);
        break;
    case 2:
        tile(rows, 2, depth, a, a_row, a_step, b + n, b_row, c + n, c_row, add);
        break;
#endif
    case 1:
        tile(rows, 1, depth, a, a_row, a_step, b + n, b_row, c + n, c_row, add);
    }
}

INLINE void product(
    int64_t rows, int64_t columns, int64_t depth, const float *a, int64_t a_row, int64_t a_step, const float *b,
    int64_t b_row, float *c, int64_t c_row, int add)
{
    if (rows == ROWS)
        strip(ROWS, columns, depth, a, a_row, a_step, b, b_row, c, c_row, add);
    else
        for (int64_t r = 0; r < rows; r++)
            strip(1, columns, depth, a + r * a_row, a_row, a_step, b, b_row, c + r * c_row, c_row, add);
}

/* Of LANES vectors, blocks of `step` lanes change places: those above the diagonal with those below. */
INLINE void swap(lanes *vectors, const int step)
{
    const whole_lanes upper = (NUMBER & step) != 0; /* all bits set */
    const whole_lanes first = NUMBER + (upper & (LANES - step)), second = first + step;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        if (!(i & step)) {
            lanes a = vectors[i], b = vectors[i + step];
            vectors[i] = __builtin_shuffle(a, b, first);
            vectors[i + step] = __builtin_shuffle(a, b, second);
        }
}

/* The columns of `from` [length, size] as rows of `to`, of whole vectors with 0 after the last. */
INLINE void transpose(const float *from, int64_t stride, int64_t length, int64_t size, float *to)
{
    int64_t width = whole(length);
    for (int64_t j = 0; j < length; j += LANES)
        for (int64_t d = 0; d < size; d += LANES) {
            lanes vectors[LANES];
            for (int i = 0; i < LANES; i++)
                vectors[i] = j + i < length ? *(const lanes *)(from + (j + i) * stride + d) : (lanes){0};
#if LANES > 8
            swap(vectors, 8);
#endif
#if LANES > 4
            swap(vectors, 4);
#endif
            swap(vectors, 2);
            swap(vectors, 1);
            for (int i = 0; i < LANES; i++)
                *(lanes *)(to + (d + i) * width + j) = vectors[i];
        }
}

/* Of so many numbers. There is nobody to tell that there is none. */
static float *memory_for(int64_t count)
{
    float *found = malloc((size_t)count * sizeof *found);
    if (found == NULL) {
        fputs("gearshift: no memory left for attention\n", stderr);
        abort();
    }
    return found;
}

/* All of a head's sequences lie in N rows one after the other: sequence s has rows starts[s] to starts[s + 1] - 1.
 * query [N, heads, key_size], key [N, kv_heads, key_size], value [N, kv_heads, value_size]: rows and heads lie as far
 * apart as told. Sizes are multiples of LANES. */
struct attention {
    int64_t heads, kv_heads, key_size, value_size, longest;
    double scaling;
    const int64_t *starts;
    const float *query, *key, *value;
    int64_t query_row, query_head, key_row, key_head, value_row, value_head;
};

/* One sequence's part of one head of keys and values. */
struct part {
    int64_t start, length, kv, width; /* width: its length in whole vectors */
    const float *key, *value;
};

INLINE struct part part_of(const struct attention *of, int64_t number)
{
    int64_t sequence = number / of->kv_heads, kv = number % of->kv_heads, start = of->starts[sequence];
    int64_t length = of->starts[sequence + 1] - start;
    return (struct part){
        start, length, kv, whole(length),
        of->key + start * of->key_row + kv * of->key_head,
        of->value + start * of->value_row + kv * of->value_head,
    };
}

/* Scores of `rows` queries from the `first`, against the keys that the last of them sees. */
INLINE void scores_of(
    const struct attention *of, const struct part *part, const float *query, int64_t first, int64_t rows,
    const float *keys, float *scores)
{
    product(rows, whole(first + rows), of->key_size, query + first * of->query_row, of->query_row, 1, keys, part->width,
            scores, part->width, 0);
}

struct attention_forward {
    struct attention of;
    float *out, *log_sums;
};

/* Of the scores from `j` those that the query does not see, at `seen` and after it, are `low`. */
INLINE void hide(float *scores, int64_t j, int64_t seen, float low)
{
    lanes place = LANE + (float)j;
    *(lanes *)(scores + j) = choose(place < (float)seen, *(const lanes *)(scores + j), low + (lanes){0});
}

/* scores [seen] of a query into their exponentials, less the largest, with 0 up to `end`; returns the largest, scaled,
 * and the sum. */
INLINE float exponentials(float *scores, int64_t seen, int64_t end, float scaling, float *total)
{
    lanes largest = {0}, sums = {0};
    largest -= INFINITY;
    for (int64_t j = seen / LANES * LANES; j < end; j += LANES)
        hide(scores, j, seen, -INFINITY);
    for (int64_t j = 0; j < end; j += LANES)
        largest = larger(*(const lanes *)(scores + j), largest);
    float highest = largest_lane(largest);
    for (int64_t j = 0; j < end; j += LANES)
        *(lanes *)(scores + j) = exp_of((*(const lanes *)(scores + j) - highest) * scaling);
    for (int64_t j = seen / LANES * LANES; j < end; j += LANES)
        hide(scores, j, seen, 0.0f);
    for (int64_t j = 0; j < end; j += LANES)
        sums += *(const lanes *)(scores + j);
    *total = sum_of_lanes(sums);
    return highest * scaling;
}

/* The queries from `first`: their outputs, and the logarithms of the sums of their weights. */
INLINE void forward_of(
    const struct attention_forward *given, const struct part *part, int64_t head, int64_t first, int64_t rows,
    const float *keys, float *weights)
{
    const struct attention *of = &given->of;
    int64_t row = of->heads * of->value_size, start = part->start;
    const float *query = of->query + start * of->query_row + head * of->query_head;
    float *out = given->out + (start + first) * row + head * of->value_size, totals[ROWS];
    scores_of(of, part, query, first, rows, keys, weights);
    for (int64_t r = 0; r < rows; r++) {
        float *own = weights + r * part->width;
        float highest = exponentials(own, first + r + 1, whole(first + rows), (float)of->scaling, totals + r);
        given->log_sums[(start + first + r) * of->heads + head] = highest + logf(totals[r]);
    }
    product(rows, of->value_size, first + rows, weights, part->width, 1, part->value, of->value_row, out, row, 0);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t d = 0; d < of->value_size; d += LANES)
            *(lanes *)(out + r * row + d) *= 1.0f / totals[r];
}

/* out [N, heads, value_size] and log_sums [N, heads], of heads first to last - 1 of keys and values of all sequences. */
EXPORT void gearshift_causal_attention(int64_t first, int64_t last, const struct attention_forward *given)
{
    const struct attention *of = &given->of;
    int64_t group = of->heads / of->kv_heads, room = whole(of->longest);
    float *keys = memory_for((of->key_size + ROWS) * room), *weights = keys + of->key_size * room;
    for (int64_t number = first; number < last; number++) {
        struct part part = part_of(of, number);
        transpose(part.key, of->key_row, part.length, of->key_size, keys);
        for (int64_t head = part.kv * group; head < (part.kv + 1) * group; head++)
            for (int64_t i = 0; i < part.length; i += ROWS)
                forward_of(given, &part, head, i, least(ROWS, part.length - i), keys, weights);
    }
    free(keys);
}

/* The gradients are those of the inputs, one row after the other: dquery [N, heads, key_size] and so on. */
struct attention_backward {
    struct attention of;
    const float *out, *log_sums, *dout; /* as the forward pass had them; dout like out */
    float *dquery, *dkey, *dvalue;
};

/* Room for one block of queries, and the transposes of what it is held against. */
struct room {
    float *keys, *values, *weights, *slopes;
};

/* scores [rows, width] of the queries from `first` into their weights, and dout V^T, which is in slopes, into the
 * gradient of the scores. */
INLINE void slopes_of(
    const struct attention_backward *given, const struct part *part, int64_t head, int64_t first, int64_t rows,
    float *weights, float *slopes)
{
    const struct attention *of = &given->of;
    float scaling = (float)of->scaling;
    for (int64_t r = 0; r < rows; r++) {
        int64_t at = (part->start + first + r) * of->heads + head, seen = first + r + 1, end = whole(first + rows);
        const float *out = given->out + at * of->value_size, *dout = given->dout + at * of->value_size;
        float *weight = weights + r * part->width, *slope = slopes + r * part->width;
        lanes sums = {0};
        for (int64_t d = 0; d < of->value_size; d += LANES)
            sums += *(const lanes *)(out + d) * *(const lanes *)(dout + d);
        float along = sum_of_lanes(sums);
        for (int64_t j = 0; j < end; j += LANES)
            *(lanes *)(weight + j) = exp_of(*(const lanes *)(weight + j) * scaling - given->log_sums[at]);
        for (int64_t j = seen / LANES * LANES; j < end; j += LANES)
            hide(weight, j, seen, 0.0f);
        for (int64_t j = 0; j < end; j += LANES)
            *(lanes *)(slope + j) = (*(const lanes *)(slope + j) - along) * *(const lanes *)(weight + j) * scaling;
    }
}

/* Adds the queries `first` to `end` - 1 of one head. */
INLINE void backward_of(
    const struct attention_backward *given, const struct part *part, int64_t head, int64_t first, int64_t end,
    const struct room *room)
{
    const struct attention *of = &given->of;
    int64_t width = part->width, row = of->heads * of->key_size, dout_row = of->heads * of->value_size;
    int64_t key_row = of->kv_heads * of->key_size, value_row = of->kv_heads * of->value_size;
    const float *query = of->query + part->start * of->query_row + head * of->query_head;
    const float *dout = given->dout + part->start * dout_row + head * of->value_size;
    float *dquery = given->dquery + part->start * row + head * of->key_size;
    float *dkey = given->dkey + part->start * key_row + part->kv * of->key_size;
    float *dvalue = given->dvalue + part->start * value_row + part->kv * of->value_size;
    for (int64_t i = first; i < end; i += ROWS) {
        int64_t rows = least(ROWS, end - i);
        float *weights = room->weights + (i - first) * width, *slopes = room->slopes + (i - first) * width;
        scores_of(of, part, query, i, rows, room->keys, weights);
        product(rows, whole(i + rows), of->value_size, dout + i * dout_row, dout_row, 1, room->values, width, slopes,
                width, 0);
        slopes_of(given, part, head, i, rows, weights, slopes);
        product(rows, of->key_size, i + rows, slopes, width, 1, part->key, of->key_row, dquery + i * row, row, 0);
    }
    for (int64_t j = 0; j < end; j += ROWS) {
        int64_t rows = least(ROWS, end - j), i = j > first ? j : first; /* no query before j sees it */
        int64_t at = (i - first) * width + j;
        int add = j < first || head > part->kv * (of->heads / of->kv_heads); /* else nobody was here before */
        product(rows, of->value_size, end - i, room->weights + at, 1, width, dout + i * dout_row, dout_row,
                dvalue + j * value_row, value_row, add);
        product(rows, of->key_size, end - i, room->slopes + at, 1, width, query + i * of->query_row, of->query_row,
                dkey + j * key_row, key_row, add);
    }
}

/* Heads first to last - 1 of keys and values of all sequences. */
EXPORT void gearshift_causal_attention_backward(
    int64_t first, int64_t last, const struct attention_backward *given)
{
    const struct attention *of = &given->of;
    int64_t group = of->heads / of->kv_heads, width = whole(of->longest);
    float *keys = memory_for((of->key_size + of->value_size + 2 * BLOCK) * width);
    float *values = keys + of->key_size * width, *weights = values + of->value_size * width;
    struct room room = {keys, values, weights, weights + BLOCK * width};
    for (int64_t number = first; number < last; number++) {
        struct part part = part_of(of, number);
        transpose(part.key, of->key_row, part.length, of->key_size, keys);
        transpose(part.value, of->value_row, part.length, of->value_size, values);
        for (int64_t head = part.kv * group; head < (part.kv + 1) * group; head++)
            for (int64_t i = 0; i < part.length; i += BLOCK)
                backward_of(given, &part, head, i, least(i + BLOCK, part.length), &room);
    }
    free(keys);
}
