/* SwiGLU, silu(gate) * up (Shazeer 2020), and its gradients, in one pass over each. Called through ctypes
 * (gearshift/kernels/native/__init__.py). The numbers are cut into blocks, always the same ones. */
#include <stdint.h>
#include <string.h>

#include "native.h"

#define BLOCK 4096

/* 2^n for -127 < n < 128. */
static inline __attribute__((always_inline)) float power_of_two(int32_t n)
{
    int32_t bits = (n + 127) << 23;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* e^-x within 1e-7 of it, infinite where fp32 ends. Without branches, so that compilers compute several at once, which
 * the C library's expf is not. The polynomial is that of expf in Moshier's Cephes; ln 2 is 0.693359375 - 2.12194440e-4.
 * NaN gives some number: who calls this multiplies by x. */
static inline __attribute__((always_inline)) float exp_minus(float x)
{
    float y = x > 105.0f ? -105.0f : x > -105.0f ? -x : 105.0f;
    float n = (y * 1.44269504f + 12582912.0f) - 12582912.0f; /* to the nearest integer */
    float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    int32_t whole = (int32_t)n, part = whole >> 1; /* in two steps, each of which fp32 holds */
    return p * power_of_two(part) * power_of_two(whole - part);
}

struct swiglu {
    int64_t n;
    const float *gate, *up;
    float *y;
};

/* Numbers in blocks first to last - 1 of n numbers. */
EXPORT void gearshift_swiglu(int64_t first, int64_t last, const struct swiglu *given)
{
    const float *restrict gate = given->gate, *restrict up = given->up;
    float *restrict y = given->y;
    int64_t end = last * BLOCK < given->n ? last * BLOCK : given->n;
    for (int64_t k = first * BLOCK; k < end; k++)
        y[k] = gate[k] / (1.0f + exp_minus(gate[k])) * up[k];
}

struct swiglu_backward {
    int64_t n;
    const float *gate, *up, *dy;
    float *dgate, *dup;
};

/* dgate = dy up s (1 + gate (1 - s)) and dup = dy gate s, where s = 1 / (1 + e^-gate). */
EXPORT void gearshift_swiglu_backward(int64_t first, int64_t last, const struct swiglu_backward *given)
{
    const float *restrict gate = given->gate, *restrict up = given->up, *restrict dy = given->dy;
    float *restrict dgate = given->dgate, *restrict dup = given->dup;
    int64_t end = last * BLOCK < given->n ? last * BLOCK : given->n;
    for (int64_t k = first * BLOCK; k < end; k++) {
        float s = 1.0f / (1.0f + exp_minus(gate[k]));
        dgate[k] = dy[k] * up[k] * (s * (1.0f + gate[k] * (1.0f - s)));
        dup[k] = dy[k] * (gate[k] * s);
    }
}
