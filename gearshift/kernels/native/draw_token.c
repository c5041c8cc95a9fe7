/* A token from the softmax over a vocabulary that is split over ranks, in two tasks: between them the ranks tell each
 * other a maximum and a sum a row. The distribution is kept as sums over blocks of it; only the block that the drawn
 * token is in is worked out again, token by token.
 * Called through ctypes (gearshift/kernels/native/tasks.py).
 */
#include <float.h>
#include <math.h>
#include <stdint.h>

#include "native.h"
#include "team.h"
#include "vectors.h"

#define BLOCK 512

struct distribution {
    int64_t rows, tokens;
    const float *logits; /* [rows, tokens] */
    float *stats;        /* [2, rows]: the largest logit, the sum of e^(logit - largest) */
    double *sums;        /* [rows, blocks]: parts of that sum */
    int64_t *best;       /* [rows]: the first token that has the largest logit */
};

struct draw {
    int64_t rows, tokens, ranks, rank, first_token, greedy;
    const float *logits, *stats; /* stats [ranks, 2, rows] */
    const double *sums;
    const int64_t *best;
    const float *uniforms; /* [rows] */
    float *told;           /* [2, rows]: token and log-prob, or 0 where another rank owns the token */
};

/* e^(logit - largest), 0 where that is less than 2e-38; `largest` may be that of no possible token, -inf. */
INLINE lanes weights_of(const float *logits, int64_t count, float largest)
{
    lanes below = load(logits, count) - (largest > -FLT_MAX ? largest : -FLT_MAX);
    lanes weights = choose(below < -87.0f, (lanes){0}, exp_of(below));
    if (count < LANES)
        weights = choose(NUMBER < (int32_t)count, weights, (lanes){0});
    return weights;
}

INLINE double sum_of(const float *logits, int64_t tokens, float largest)
{
    lanes sums = {0};
    int64_t k = 0;
    for (; k + LANES <= tokens; k += LANES)
        sums += weights_of(logits + k, LANES, largest);
    if (k < tokens)
        sums += weights_of(logits + k, tokens - k, largest);
    return total_of(sums);
}

INLINE int64_t blocks_of(int64_t tokens)
{
    return (tokens + BLOCK - 1) / BLOCK;
}

INLINE int64_t block_size(int64_t tokens, int64_t block)
{
    return tokens - block * BLOCK < BLOCK ? tokens - block * BLOCK : BLOCK;
}

/* Units: rows. */
EXPORT int gearshift_distribution(const void *arguments, struct heap *heap)
{
    const struct distribution *of = arguments;
    int64_t first, last, blocks = blocks_of(of->tokens);
    while (gearshift_take(heap, &first, &last))
        for (int64_t row = first; row < last; row++) {
            const float *logits = of->logits + row * of->tokens;
            float largest = largest_of(logits, of->tokens);
            double sum = 0.0;
            int64_t best = 0;
            for (int64_t block = 0; block < blocks; block++) {
                double part = sum_of(logits + block * BLOCK, block_size(of->tokens, block), largest);
                of->sums[row * blocks + block] = part;
                sum += part;
            }
            while (best < of->tokens - 1 && logits[best] != largest)
                best++;
            of->stats[row] = largest;
            of->stats[of->rows + row] = (float)sum;
            of->best[row] = best;
        }
    return 0;
}

/* The first token of the block whose weights, with those before it, are more than `within`; where rounding leaves none,
 * the last that has any. */
INLINE int64_t token_in(const float *logits, int64_t tokens, float largest, double within)
{
    double sum = 0.0;
    int64_t found = 0;
    for (int64_t k = 0; k < tokens; k += LANES) {
        lanes weights = weights_of(logits + k, tokens - k, largest);
        for (int lane = 0; lane < LANES; lane++) {
            sum += weights[lane];
            found = weights[lane] > 0.0f ? k + lane : found;
            if (sum > within)
                return found;
        }
    }
    return found;
}

/* The same of all blocks. */
INLINE int64_t token_at(const struct draw *of, int64_t row, float largest, double within)
{
    int64_t blocks = blocks_of(of->tokens), block = 0;
    const double *sums = of->sums + row * blocks;
    double before = 0.0, total = 0.0;
    for (int64_t b = 0; b < blocks; b++)
        total += sums[b];
    /* Below the last edge, so that rounding never points past the last token that has any probability. */
    within = fmin(fmax(within, 0.0), total * (1.0 - 0x1p-23));
    for (; block < blocks - 1 && !(before + sums[block] > within); block++)
        before += sums[block];
    return block * BLOCK + token_in(of->logits + row * of->tokens + block * BLOCK, block_size(of->tokens, block),
                                    largest, within - before);
}

/* The token of one row, if this rank owns it, and the logarithm of the whole softmax's probability of it. */
INLINE void draw_row(const struct draw *of, int64_t row)
{
    const float *tops = of->stats + row, *sums = tops + of->rows;
    int64_t step = 2 * of->rows, owner = 0, rank = of->rank, greedy = 0;
    float highest = -INFINITY;
    for (int64_t r = 0; r < of->ranks; r++)
        if (tops[r * step] > highest) {
            highest = tops[r * step];
            greedy = r;
        }
    double total = 0.0, before = 0.0, edge = 0.0;
    for (int64_t r = 0; r < of->ranks; r++)
        total += sums[r * step] * exp((double)tops[r * step] - highest);
    double threshold = of->uniforms[row] * total;
    for (int64_t r = 0; r < of->ranks - 1; r++) {
        edge += sums[r * step] * exp((double)tops[r * step] - highest);
        owner += threshold >= edge;
        before = r == rank - 1 ? edge : before;
    }
    int mine = (of->greedy ? greedy : owner) == rank;
    float own = tops[rank * step];
    int64_t token = of->best[row];
    if (mine && !of->greedy)
        token = token_at(of, row, own, (threshold - before) / exp((double)own - highest));
    double logprob = (double)of->logits[row * of->tokens + token] - highest - log(total);
    of->told[row] = mine ? (float)(token + of->first_token) : 0.0f;
    of->told[of->rows + row] = mine ? (float)logprob : 0.0f;
}

/* Units: rows. */
EXPORT int gearshift_draw_token(const void *arguments, struct heap *heap)
{
    const struct draw *of = arguments;
    int64_t first, last;
    while (gearshift_take(heap, &first, &last))
        for (int64_t row = first; row < last; row++)
            draw_row(of, row);
    return 0;
}
