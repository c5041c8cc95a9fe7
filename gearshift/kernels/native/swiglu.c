/* SwiGLU, silu(gate) * up (Shazeer 2020), and its gradients, in one pass over each. Called through ctypes
 * (gearshift/kernels/native/__init__.py). The numbers are cut into blocks, always the same ones. */
#include <stdint.h>

#include "native.h"
#include "vectors.h"

#define BLOCK 4096

/* 2^n for -127 < n < 128. */
INLINE lanes power_of_two(whole_lanes n)
{
    return (lanes)((n + 127) << 23);
}

/* e^-x within 1e-7 of it, infinite where fp32 ends, which `exp_of` does not reach. The polynomial is that of expf in
 * Moshier's Cephes; ln 2 is 0.693359375 - 2.12194440e-4. NaN gives some number: who calls this multiplies by x. */
INLINE lanes exp_minus(lanes x)
{
    const lanes far = (lanes){0} + 105.0f;
    lanes y = choose(x > far, -far, choose(x > -far, -x, far));
    lanes n = (y * 1.44269504f + 12582912.0f) - 12582912.0f; /* to the nearest integer */
    lanes r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    lanes p = 1.9875691500e-4f + (lanes){0};
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    whole_lanes whole = __builtin_convertvector(n, whole_lanes), part = whole >> 1; /* in two steps, as fp32 holds each */
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
    int64_t end = last * BLOCK < given->n ? last * BLOCK : given->n;
    for (int64_t k = first * BLOCK; k < end; k += LANES) {
        lanes gate = load(given->gate + k, end - k), up = load(given->up + k, end - k);
        store(given->y + k, gate / (1.0f + exp_minus(gate)) * up, end - k);
    }
}

struct swiglu_backward {
    int64_t n;
    const float *gate, *up, *dy;
    float *dgate, *dup;
};

/* dgate = dy up s (1 + gate (1 - s)) and dup = dy gate s, where s = 1 / (1 + e^-gate). */
EXPORT void gearshift_swiglu_backward(int64_t first, int64_t last, const struct swiglu_backward *given)
{
    int64_t end = last * BLOCK < given->n ? last * BLOCK : given->n;
    for (int64_t k = first * BLOCK; k < end; k += LANES) {
        lanes gate = load(given->gate + k, end - k), up = load(given->up + k, end - k);
        lanes dy = load(given->dy + k, end - k), s = 1.0f / (1.0f + exp_minus(gate));
        store(given->dgate + k, dy * up * (s * (1.0f + gate * (1.0f - s))), end - k);
        store(given->dup + k, dy * (gate * s), end - k);
    }
}
