/* Rotary embedding of one position a row. Called through ctypes (gearshift/kernels/native/__init__.py).
 *
 * Products and their sum are rounded one by one, as operations on whole tensors round them: no CLONES, whose processors
 * would join them, and none of the compilers' own joining. */
#include <stdint.h>

#include "native.h"

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#define APART
#elif defined(__GNUC__)
#define APART __attribute__((optimize("fp-contract=off")))
#else
#define APART
#endif

/* y[d] = x[d] cos[d] + (d < size / 2 ? -x[d + size / 2] : x[d - size / 2]) sin[d], of each head of each row.
 * strides: of x (row, head), of cos and sin (row each), of y (row, head); values of a head lie side by side. */
EXPORT APART void gearshift_rotate_half(
    int64_t rows, int64_t heads, int64_t size, const float *x, const float *cos, const float *sin, float *y,
    const int64_t *strides)
{
    int64_t half = size / 2;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t head = 0; head < heads; head++) {
            const float *in = x + row * strides[0] + head * strides[1];
            const float *c = cos + row * strides[2], *s = sin + row * strides[3];
            float *out = y + row * strides[4] + head * strides[5];
            for (int64_t d = 0; d < half; d++) {
                float straight = in[d] * c[d], turned = -in[d + half] * s[d];
                out[d] = straight + turned;
            }
            for (int64_t d = half; d < size; d++) {
                float straight = in[d] * c[d], turned = in[d - half] * s[d];
                out[d] = straight + turned;
            }
        }
}
