/* Parts of a function's work, by the threads of OpenMP that torch has, which stand ready between its operations: threads
 * of one's own would wait until those let go of the processors. Called through ctypes
 * (gearshift/kernels/native/__init__.py). */
#include <stdint.h>

#include "native.h"

/* OpenMP's own of GCC and of LLVM: fn(data) on so many threads, which it waits for. Found when the program runs, so
 * that it is the one that torch has loaded. */
typedef void parallel(void (*fn)(void *), void *data, unsigned threads, unsigned flags);
typedef void work(int64_t first, int64_t last, const void *given);

struct job {
    work *work;
    const void *given;
    int64_t rows, parts, next;
};

static void take_parts(void *data)
{
    struct job *job = data;
    for (;;) {
        int64_t part = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (part >= job->parts)
            return;
        job->work(job->rows * part / job->parts, job->rows * (part + 1) / job->parts, job->given);
    }
}

EXPORT void gearshift_spread(
    parallel *parallel, int64_t threads, int64_t parts, work *work, int64_t rows, const void *given)
{
    struct job job = {work, given, rows, parts < rows ? parts : rows, 0};
    parallel(take_parts, &job, (unsigned)threads, 0);
}
