/* y = x W^T + b for few rows of x, as in a step of decoding: W is read once, as it lies, and never packed.
 *
 * A vector holds one input feature of LANES rows. A tile of outputs keeps its sums in registers while the features go
 * by: each sum adds its products in one fixed order, so a row's result has the same bits whatever rows stand beside it.
 * That a product and its sum are one operation is written out: compilers choose otherwise from one tile to the next.
 * Called through ctypes (gearshift/kernels/native/tasks.py).
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "native.h"
#include "team.h"
#include "vectors.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

#if LANES == 16
#define TILE 8    /* outputs of a tile: for two vectors of rows 16 sums, of the 32 registers that AVX-512 has */
#else
#define TILE 6    /* 12 of 16: beside them two vectors of rows and the weight that multiplies both */
#endif
#define LINE 16   /* features of a cache line */
#define AHEAD 12   /* lines between the one that is asked for and the one that is multiplied */
#define CHUNK 256 /* features summed at a time: sums of sums lose fewer digits than one long sum */
#define ALIGNED 64

/* x [rows, features], weight [outputs, features], bias [outputs] or NULL -> y [rows, outputs]. */
struct few_rows_linear {
    int64_t rows, features, outputs;
    const float *x, *weight, *bias;
    float *y;
};

/* factor * vector + sum, in one operation. */
INLINE lanes joined(float factor, lanes vector, lanes sum)
{
#if LANES == 16
    return (lanes)_mm512_fmadd_ps(_mm512_set1_ps(factor), (__m512)vector, (__m512)sum);
#else
    return (lanes)_mm256_fmadd_ps(_mm256_set1_ps(factor), (__m256)vector, (__m256)sum);
#endif
}

/* LANES vectors turned in place. Each turn puts the numbers of a vector of the first half and of one of the second next
 * to each other, which moves the first bit of a number's place (those of its vector, then those of its lane) to the end:
 * after as many as a lane has bits, rows are columns. */
INLINE void turn(lanes *vectors)
{
    const whole_lanes low = NUMBER / 2 + (NUMBER & 1) * LANES;
    for (int bit = 1; bit < LANES; bit *= 2) {
        lanes before[LANES];
        memcpy(before, vectors, sizeof before);
        for (int i = 0; i < LANES / 2; i++) {
            vectors[2 * i] = __builtin_shuffle(before[i], before[i + LANES / 2], low);
            vectors[2 * i + 1] = __builtin_shuffle(before[i], before[i + LANES / 2], low + LANES / 2);
        }
    }
}

/* [rows, features] -> [blocks][features] vectors, 0 where there is no row. */
static void transpose(const float *x, int64_t rows, int64_t features, lanes *columns)
{
    for (int64_t first = 0; first < rows; first += LANES, columns += features)
        for (int64_t k = 0; k < features; k += LANES) {
            int64_t count = features - k < LANES ? features - k : LANES;
            lanes vectors[LANES] = {0};
            for (int64_t lane = 0; lane < LANES && first + lane < rows; lane++)
                if (count == LANES)
                    memcpy(&vectors[lane], x + (first + lane) * features + k, sizeof *vectors);
                else
                    memcpy(&vectors[lane], x + (first + lane) * features + k, (size_t)count * sizeof *x);
            turn(vectors);
            memcpy(columns + k, vectors, (size_t)count * sizeof *vectors);
        }
}

/* Sums over all features, for `outputs` (at most TILE, `apart` rows of W from each other) and `blocks` (1 or 2) vectors of
 * rows: known where inlined. */
INLINE void tile(
    const float *weight, const float *bias, int outputs, int64_t apart, int64_t features, const lanes *columns,
    int blocks, float *y, int64_t stride, int64_t rows)
{
    lanes total[2][TILE] = {0};
    for (int64_t begin = 0; begin < features; begin += CHUNK) {
        int64_t end = begin + CHUNK < features ? begin + CHUNK : features;
        lanes sums[2][TILE] = {0};
        for (int64_t line = begin; line < end; line += LINE) {
            int64_t stop = line + LINE < end ? line + LINE : end;
            for (int o = 0; o < outputs; o++)
                __builtin_prefetch(weight + o * apart * features + line + AHEAD * LINE);
            for (int64_t k = line; k < stop; k++)
                for (int o = 0; o < outputs; o++)
                    for (int b = 0; b < blocks; b++)
                        sums[b][o] = joined(
                            weight[o * apart * features + k], columns[b * features + k], sums[b][o]);
        }
        for (int b = 0; b < blocks; b++)
            for (int o = 0; o < outputs; o++)
                total[b][o] += sums[b][o];
    }
    for (int64_t row = 0; row < rows; row++)
        for (int o = 0; o < outputs; o++)
            y[row * stride + o * apart] = total[row / LANES][o][row % LANES] + (bias ? bias[o * apart] : 0.0f);
}

/* All outputs of one or two vectors of rows; `stride`: of y's rows. The outputs of a tile are as far apart as there are
 * tiles: from one tile to the next memory is read on in TILE places, which processors foresee. */
INLINE void outputs_of(
    const float *weight, const float *bias, int64_t outputs, int64_t features, const lanes *columns, int blocks,
    float *y, int64_t stride, int64_t rows)
{
    int64_t tiles = outputs / TILE;
    for (int64_t o = 0; o < tiles; o++)
        tile(weight + o * features, bias ? bias + o : NULL, TILE, tiles, features, columns, blocks, y + o, stride, rows);
    for (int64_t o = tiles * TILE; o < outputs; o++)
        tile(weight + o * features, bias ? bias + o : NULL, 1, 1, features, columns, blocks, y + o, stride, rows);
}

/* Some outputs of one task: all rows of x, whose vectors are `columns`. */
static void some_outputs(const struct few_rows_linear *of, const lanes *columns, int64_t first, int64_t last)
{
    const float *weight = of->weight + first * of->features, *bias = of->bias ? of->bias + first : NULL;
    for (int64_t row = 0; row < of->rows; row += 2 * LANES) {
        const lanes *here = columns + row / LANES * of->features;
        float *out = of->y + row * of->outputs + first;
        int64_t left = of->rows - row;
        if (left > LANES)
            outputs_of(weight, bias, last - first, of->features, here, 2, out, of->outputs,
                       left < 2 * LANES ? left : 2 * LANES);
        else
            outputs_of(weight, bias, last - first, of->features, here, 1, out, of->outputs, left);
    }
}

/* A task whose units are tiles of outputs. */
EXPORT int gearshift_few_rows_linear(const void *arguments, struct heap *heap)
{
    const struct few_rows_linear *of = arguments;
    int64_t blocks = (of->rows + LANES - 1) / LANES, first, last;
    size_t size = (size_t)(blocks * of->features) * sizeof(lanes);
    lanes *columns = aligned_alloc(ALIGNED, (size + ALIGNED - 1) / ALIGNED * ALIGNED);
    if (columns == NULL)
        return 1;
    transpose(of->x, of->rows, of->features, columns);
    while (gearshift_take(heap, &first, &last))
        some_outputs(of, columns, first * TILE, last * TILE < of->outputs ? last * TILE : of->outputs);
    free(columns);
    return 0;
}
#else
#define TILE 0
#endif

/* Outputs of a tile of `gearshift_few_rows_linear`; 0 where there is none for lack of registers. */
EXPORT int gearshift_few_rows_tile(void)
{
    return TILE;
}
