/* Processes of one host that wait for each other, by numbers in memory that they share. Called through ctypes
 * (gearshift/engine/neighbours.py). */
#include <stdint.h>
#include <time.h>

#include "native.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LOOKS 2000 /* before the processor is given up; about 100 microseconds */

/* In the shared memory, 0 in the beginning. */
struct meeting {
    int32_t arrived, round;
};

/* One of `size` is here; returns the round, to be waited for. Whoever comes last lets all others go on. What was written
 * before is seen by those who go on. */
EXPORT int64_t gearshift_arrive(struct meeting *meeting, int64_t size)
{
    int32_t round = __atomic_load_n(&meeting->round, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&meeting->arrived, 1, __ATOMIC_ACQ_REL) == size) {
        __atomic_store_n(&meeting->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&meeting->round, (int32_t)((uint32_t)round + 1), __ATOMIC_RELEASE);
        syscall(SYS_futex, &meeting->round, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
    }
    return round;
}

/* Whether all have come (1), or not within so many milliseconds (0). */
EXPORT int64_t gearshift_await(struct meeting *meeting, int64_t round, int64_t milliseconds)
{
    struct timespec most = {milliseconds / 1000, milliseconds % 1000 * 1000000};
    for (int look = 0; look < LOOKS; look++) {
        if (__atomic_load_n(&meeting->round, __ATOMIC_ACQUIRE) != (int32_t)round)
            return 1;
        if (look % 64 == 63)
            sched_yield(); /* there may be fewer processors than processes */
    }
    syscall(SYS_futex, &meeting->round, FUTEX_WAIT, (int32_t)round, &most, NULL, 0);
    return __atomic_load_n(&meeting->round, __ATOMIC_ACQUIRE) != (int32_t)round;
}
#endif
