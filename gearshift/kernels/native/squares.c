/* Sums of squares. Called through ctypes (gearshift/kernels/native/__init__.py). */
#include <stdint.h>

#include "native.h"
#include "vectors.h"

#define PART 4096 /* numbers that are added up in fp32, in lanes of their own, before they join the rest */

struct squares {
    int64_t n, block;
    const float *x;
    double *sums;
};

/* Of blocks first to last - 1 of `block` numbers each, of n numbers: one sum each. */
EXPORT void gearshift_squares(int64_t first, int64_t last, const struct squares *given)
{
    for (int64_t block = first; block < last; block++) {
        int64_t start = block * given->block, end = start + given->block < given->n ? start + given->block : given->n;
        double total = 0;
        for (int64_t part = start; part < end; part += PART) {
            int64_t stop = part + PART < end ? part + PART : end;
            lanes sums = {0}, others = {0};
            for (int64_t at = part; at < stop; at += 2 * LANES) {
                lanes a = load(given->x + at, stop - at), b = {0};
                if (at + LANES < stop)
                    b = load(given->x + at + LANES, stop - at - LANES);
                sums += a * a;
                others += b * b;
            }
            total += total_of(sums + others);
        }
        given->sums[block] = total;
    }
}
