/* What a sweep over a vocabulary keeps of the logits of each token (gearshift/kernels/states.py), and their gradients, in
 * one pass each after the one for the largest. Called through ctypes (gearshift/kernels/native/__init__.py). */
#include <math.h>
#include <stdint.h>

#include "native.h"
#include "vectors.h"

#define FEW 16 /* vectors that are added up before they join the rest: sums of as many numbers lose next to nothing */

/* e^x of differences of at most 0; 0 where fp32 has no more than 2e-38 of it. In `x` those, so that 0 of them is 0. */
INLINE lanes share_of(lanes *x)
{
    whole_lanes none = *x < -87.0f;
    lanes found = exp_of(*x);
    *x = choose(none, (lanes){0}, *x);
    return choose(none, (lanes){0}, found);
}

/* z [T, columns]; column [T]: the target's, past either end where this part does not hold it. */
struct logit_states {
    int64_t columns, entropy;
    const float *z;
    const int64_t *column;
    float *states; /* [T, 4] */
};

INLINE void states_of(const struct logit_states *given, int64_t token, const int entropy)
{
    int64_t count = given->columns, column = given->column[token];
    const float *row = given->z + token * count;
    float top = largest_of(row, count), base = top == -INFINITY ? 0.0f : top, *state = given->states + 4 * token;
    double total = 0, numerator = 0;
    for (int64_t start = 0; start < count; start += FEW * LANES) {
        lanes shares = {0}, weighted = {0};
        for (int64_t at = start; at < start + FEW * LANES && at < count; at += LANES) {
            lanes gap = numbers_at(row, at, count, -INFINITY) - base, share = share_of(&gap);
            shares += share;
            if (entropy)
                weighted += share * gap;
        }
        total += total_of(shares);
        numerator += total_of(weighted);
    }
    state[0] = top;
    state[1] = (float)total;
    state[2] = (float)numerator;
    state[3] = column >= 0 && column < count ? row[column] : NAN;
}

/* Tokens first to last - 1. */
EXPORT void gearshift_logit_states(int64_t first, int64_t last, const struct logit_states *given)
{
    for (int64_t token = first; token < last; token++)
        if (given->entropy)
            states_of(given, token, 1);
        else
            states_of(given, token, 0);
}

/* Numbers of each token: see `Slopes` of gearshift/kernels/linear_logprob_cpu.py. of_plogp may be NULL. */
struct logit_gradients {
    int64_t columns;
    float *z; /* the gradient in its place */
    const int64_t *column;
    const float *top, *at_target, *of_p, *of_plogp, *centre;
};

INLINE void gradients_of(const struct logit_gradients *given, int64_t token, const int entropy)
{
    int64_t count = given->columns, column = given->column[token];
    float *row = given->z + token * count, top = given->top[token], of_p = given->of_p[token];
    float of_plogp = entropy ? given->of_plogp[token] : 0.0f, centre = given->centre[token];
    for (int64_t at = 0; at < count; at += LANES) {
        lanes gap = numbers_at(row, at, count, -INFINITY) - top, share = share_of(&gap);
        lanes slope = entropy ? of_p + of_plogp * (gap - centre) : of_p + (lanes){0};
        store(row + at, share * slope, count - at);
    }
    if (column >= 0 && column < count)
        row[column] += given->at_target[token];
}

/* Tokens first to last - 1. */
EXPORT void gearshift_logit_gradients(int64_t first, int64_t last, const struct logit_gradients *given)
{
    for (int64_t token = first; token < last; token++)
        if (given->of_plogp)
            gradients_of(given, token, 1);
        else
            gradients_of(given, token, 0);
}
