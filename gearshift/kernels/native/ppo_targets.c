/* ppo_targets on processors: every sequence is read once, while all of it is in the cache.
 *
 * Called through ctypes (gearshift/kernels/native/__init__.py), so that no header of Python is needed. All tensors are
 * contiguous; tensors [B, L] are rows of `length` numbers. The recurrences are summed in double: fp32 would lose a digit
 * over a thousand undiscounted tokens. Infinities and NaN follow the arithmetic of the plain definition.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "native.h"

enum estimator { K1, K2, K3 };

struct settings {
    double kl_coef, gamma, lam;
    int64_t estimator, whiten;
};

/* Tokens of a right-padded row of bytes 0 and 1, or -1 where a token follows a masked one. */
static inline int64_t tokens_of(const uint8_t *mask, int64_t length)
{
    const uint8_t *end = memchr(mask, 0, (size_t)length);
    if (end == NULL)
        return length;
    int64_t tokens = end - mask;
    return memchr(end, 1, (size_t)(length - tokens)) == NULL ? tokens : -1;
}

/* A token that is impossible under both models (-inf both) is equally likely under both. */
static inline float log_ratio(float new, float ref)
{
    return new == -INFINITY && ref == -INFINITY ? 0.0f : new - ref;
}

static inline void estimate(const float *new, const float *ref, int64_t tokens, int64_t estimator, float *kl)
{
    for (int64_t t = 0; t < tokens; t++)
        kl[t] = log_ratio(new[t], ref[t]);
    if (estimator == K2)
        for (int64_t t = 0; t < tokens; t++)
            kl[t] = 0.5f * kl[t] * kl[t];
    if (estimator == K3)
        for (int64_t t = 0; t < tokens; t++)
            kl[t] = expm1f(-kl[t]) + kl[t];
}

/* A[t] = delta[t] + decay * A[t + 1], four tokens a step: A[t + k] = own[k] + decay^(4 - k) * A[t + 4], where only the
 * last term waits for the step before. Both sums end in fp64. */
#define STEP 4

static inline void advantages_and_returns(
    const float *rewards, const float *values, int64_t tokens, const struct settings *set, float *advantages,
    float *returns)
{
    double decay = set->gamma * set->lam, next_value = 0.0, advantage = 0.0;
    double powers[STEP] = {decay * decay * decay * decay, decay * decay * decay, decay * decay, decay};
    int64_t whole = tokens - tokens % STEP;
    for (int64_t t = tokens - 1; t >= whole; t--) {
        advantage = rewards[t] + set->gamma * next_value - values[t] + decay * advantage;
        next_value = values[t];
        advantages[t] = (float)advantage;
        returns[t] = (float)(advantage + next_value);
    }
    for (int64_t t = whole - STEP; t >= 0; t -= STEP) {
        double own[STEP], later = 0.0, coming = t + STEP < tokens ? values[t + STEP] : 0.0;
        for (int k = STEP - 1; k >= 0; k--) {
            double value = values[t + k];
            later = rewards[t + k] + set->gamma * coming - value + decay * later;
            own[k] = later;
            coming = value;
        }
        for (int k = 0; k < STEP; k++) {
            double total = own[k] + powers[k] * advantage;
            advantages[t + k] = (float)total;
            returns[t + k] = (float)(total + values[t + k]);
            own[k] = total;
        }
        advantage = own[0];
    }
}

/* Eight sums side by side: independent, so that they overlap, and in a fixed order, so that bits repeat. */
#define LANES 8

static inline double folded(const double *sums)
{
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

static inline double sum_of(const float *numbers, int64_t count)
{
    double sums[LANES] = {0};
    int64_t whole = count - count % LANES;
    for (int64_t i = 0; i < whole; i += LANES)
        for (int k = 0; k < LANES; k++)
            sums[k] += numbers[i + k];
    for (int64_t i = whole; i < count; i++)
        sums[i - whole] += numbers[i];
    return folded(sums);
}

static inline double squares_of(const float *numbers, int64_t count, double mean)
{
    double sums[LANES] = {0};
    int64_t whole = count - count % LANES;
    for (int64_t i = 0; i < whole; i += LANES)
        for (int k = 0; k < LANES; k++)
            sums[k] += (numbers[i + k] - mean) * (numbers[i + k] - mean);
    for (int64_t i = whole; i < count; i++)
        sums[i - whole] += (numbers[i] - mean) * (numbers[i] - mean);
    return folded(sums);
}

/* Count, mean and sum of squared deviations. */
static inline void moments_of(const float *advantages, int64_t tokens, double *moments)
{
    double mean = tokens ? sum_of(advantages, tokens) / (double)tokens : 0.0;
    moments[0] = (double)tokens;
    moments[1] = mean;
    moments[2] = squares_of(advantages, tokens, mean);
}

static inline void clear(float *row, int64_t tokens, int64_t length)
{
    memset(row + tokens, 0, (size_t)(length - tokens) * sizeof(float));
}

/* Rows from `first` up to `last`. `given_kl` may be NULL. Returns 0, or 1 for a mask that is not right-padded. */
EXPORT int gearshift_ppo_targets(
    int64_t first, int64_t last, int64_t length, const float *logprobs, const float *ref_logprobs, const float *values,
    const uint8_t *mask, const float *scores, const float *given_kl, const struct settings *set, float *rewards,
    float *kl, float *advantages, float *returns, double *moments)
{
    for (int64_t row = first; row < last; row++) {
        int64_t at = row * length, tokens = tokens_of(mask + at, length);
        float penalty = (float)-set->kl_coef;
        if (tokens < 0)
            return 1;
        if (given_kl)
            memcpy(kl + at, given_kl + at, (size_t)tokens * sizeof(float));
        else
            estimate(logprobs + at, ref_logprobs + at, tokens, set->estimator, kl + at);
        for (int64_t t = 0; t < tokens; t++) /* without a penalty an infinite KL costs nothing: 0 * inf would be NaN */
            rewards[at + t] = penalty == 0.0f ? 0.0f : penalty * kl[at + t];
        if (tokens)
            rewards[at + tokens - 1] += scores[row];
        advantages_and_returns(rewards + at, values + at, tokens, set, advantages + at, returns + at);
        if (set->whiten)
            moments_of(advantages + at, tokens, moments + 3 * row);
        clear(rewards + at, tokens, length);
        clear(kl + at, tokens, length);
        clear(advantages + at, tokens, length);
        clear(returns + at, tokens, length);
    }
    return 0;
}

/* moments[rows][3] of groups, together in `merged`, in their order (Chan et al. 1979). */
EXPORT void gearshift_merge_moments(int64_t rows, const double *moments, double *merged)
{
    double count = 0.0, total = 0.0, mean, squares = 0.0;
    for (int64_t row = 0; row < rows; row++) {
        count += moments[3 * row];
        total += moments[3 * row] * moments[3 * row + 1];
    }
    mean = count > 0.0 ? total / count : 0.0;
    for (int64_t row = 0; row < rows; row++) {
        double apart = moments[3 * row + 1] - mean;
        squares += moments[3 * row + 2] + moments[3 * row] * apart * apart;
    }
    merged[0] = count;
    merged[1] = mean;
    merged[2] = squares;
}

/* In place, the tokens of rows from `first` up to `last`; moments[3 * row] is a row's number of tokens. */
EXPORT void gearshift_whiten(
    int64_t first, int64_t last, int64_t length, const double *moments, double mean, double scale, float *advantages)
{
    for (int64_t row = first; row < last; row++)
        for (int64_t t = 0; t < (int64_t)moments[3 * row]; t++)
            advantages[row * length + t] = (float)((advantages[row * length + t] - mean) * scale);
}
