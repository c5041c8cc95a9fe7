/* Rotary embedding, and what it does to gradients. Called through ctypes (gearshift/kernels/native/__init__.py).
 *
 * Products and their sum are rounded one by one, as operations on whole tensors round them: compilers may not join them
 * (APART), for none of the processors that it is compiled for. */
#include <stdint.h>

#include "native.h"

#include "apart.h"

/* x is turned by the angles into y, or y's gradient, as x, back into that of x. A head is the halves of `size` values,
 * which lie side by side; positions are counted over all rows of `length`. The rest are strides. */
struct rotation {
    int64_t back, length, heads, size;
    const float *x, *cos, *sin;
    float *y;
    int64_t x_row, x_position, x_head, cos_row, cos_position, sin_row, sin_position, y_row, y_position, y_head;
};

/* Positions first to last - 1. y1 = x1 c1 - x2 s1 and y2 = x2 c2 + x1 s2; back, x1 = y1 c1 + y2 s2 and
 * x2 = y2 c2 - y1 s1. */
EXPORT APART void gearshift_rotate_half(int64_t first, int64_t last, const struct rotation *given)
{
    struct rotation r = *given;
    int64_t half = r.size / 2;
    float sign = r.back ? -1.0f : 1.0f;
    for (int64_t at = first; at < last; at++) {
        int64_t row = at / r.length, position = at % r.length;
        const float *c = r.cos + row * r.cos_row + position * r.cos_position;
        const float *s = r.sin + row * r.sin_row + position * r.sin_position;
        /* What the other half is multiplied by. */
        const float *s1 = r.back ? s + half : s, *s2 = r.back ? s : s + half;
        for (int64_t head = 0; head < r.heads; head++) {
            const float *restrict in = r.x + row * r.x_row + position * r.x_position + head * r.x_head;
            float *restrict out = r.y + row * r.y_row + position * r.y_position + head * r.y_head;
            for (int64_t d = 0; d < half; d++) {
                float straight = in[d] * c[d], turned = sign * in[d + half] * s1[d];
                out[d] = straight - turned;
            }
            for (int64_t d = 0; d < half; d++) {
                float straight = in[d + half] * c[d + half], turned = sign * in[d] * s2[d];
                out[d + half] = straight + turned;
            }
        }
    }
}
