/* Vectors in the compilers' own notation, as long as a register of what the file is compiled for. */
#ifndef GEARSHIFT_VECTORS_H
#define GEARSHIFT_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* A longer vector than the processor has would live in memory. */
#if defined(__AVX512F__)
#define LANES 16
#define PLACES 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
#define REGISTERS 32
#elif defined(__AVX2__)
#define LANES 8
#define PLACES 0, 1, 2, 3, 4, 5, 6, 7
#define REGISTERS 16
#else
#define LANES 4
#define PLACES 0, 1, 2, 3
#define REGISTERS 16
#endif

#define INLINE static inline __attribute__((always_inline, unused))

typedef float lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(4)));
typedef int32_t whole_lanes __attribute__((vector_size(LANES * sizeof(int32_t)), aligned(4)));

static const whole_lanes NUMBER __attribute__((unused)) = {PLACES};

/* `low` where `where` is true (all bits set), else `high`. */
INLINE lanes choose(whole_lanes where, lanes low, lanes high)
{
    return (lanes)(((whole_lanes)high & ~where) | ((whole_lanes)low & where));
}

INLINE lanes magnitude(lanes x)
{
    return (lanes)((whole_lanes)x & 0x7fffffff);
}

INLINE lanes larger(lanes a, lanes b)
{
    return choose(a > b, a, b);
}

/* Every lane has what another one had, `step` away. */
INLINE lanes turned(lanes x, const int step)
{
    return __builtin_shuffle(x, NUMBER ^ step);
}

INLINE float sum_of_lanes(lanes x)
{
#if LANES > 8
    x += turned(x, 8);
#endif
#if LANES > 4
    x += turned(x, 4);
#endif
    x += turned(x, 2);
    x += turned(x, 1);
    return x[0];
}

/* In fp64, in one order always. */
INLINE double total_of(lanes x)
{
    double total = 0;
    for (int lane = 0; lane < LANES; lane++)
        total += x[lane];
    return total;
}

INLINE float largest_lane(lanes x)
{
#if LANES > 8
    x = larger(x, turned(x, 8));
#endif
#if LANES > 4
    x = larger(x, turned(x, 4));
#endif
    x = larger(x, turned(x, 2));
    x = larger(x, turned(x, 1));
    return x[0];
}

/* exp of numbers of at most 0, to 2e-7 of the result: 2^n * e^r with |r| <= ln(2) / 2, e^r by its series. Below -87 the
 * result is that of -87, 2e-38. */
INLINE lanes exp_of(lanes x)
{
    const float rounding = 12582912.0f; /* 1.5 * 2^23: what is added to it loses its fraction */
    x = choose(x < -87.0f, (lanes){0} - 87.0f, x);
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

/* As many numbers as there are, 0 after them. */
INLINE lanes load(const float *from, int64_t count)
{
    if (count >= LANES)
        return *(const lanes *)from;
    lanes vector = {0};
    memcpy(&vector, from, (size_t)count * sizeof(float));
    return vector;
}

INLINE void store(float *to, lanes vector, int64_t count)
{
    if (count >= LANES)
        *(lanes *)to = vector;
    else
        memcpy(to, &vector, (size_t)count * sizeof(float));
}

/* The numbers from `at`, of which there are `count` in all: past the last one they are `rest`. */
INLINE lanes numbers_at(const float *row, int64_t at, int64_t count, float rest)
{
    if (at + LANES <= count)
        return load(row + at, LANES);
    return choose(NUMBER < (int32_t)(count - at), load(row + at, count - at), (lanes){0} + rest);
}

INLINE float largest_of(const float *row, int64_t count)
{
    lanes found = (lanes){0} - INFINITY;
    for (int64_t at = 0; at < count; at += LANES)
        found = larger(numbers_at(row, at, count, -INFINITY), found);
    return largest_lane(found);
}

#endif
