/* Processes of one host that wait for each other, by numbers in memory that they share, and what they sum there. Called
 * through ctypes (gearshift/engine/neighbours.py). */
#include <stdint.h>
#include <time.h>

#include "native.h"
#include "team.h"

#if defined(__linux__)
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LOOKS 2000 /* before the processor is given up; about 100 microseconds */

/* In the shared memory, 0 in the beginning. `failed`: by what (team.h); then nobody meets here any more, since who was
 * counted and who was not would never be known. */
struct meeting {
    int32_t arrived, round, failed;
};

/* One of `size` is here; returns the round, to be waited for. Whoever comes last lets all others go on. What was written
 * before is seen by those who go on. */
EXPORT int64_t gearshift_arrive(struct meeting *meeting, int64_t size)
{
    int32_t round = __atomic_load_n(&meeting->round, __ATOMIC_ACQUIRE);
    if (__atomic_load_n(&meeting->failed, __ATOMIC_ACQUIRE) != 0)
        return round;
    if (__atomic_add_fetch(&meeting->arrived, 1, __ATOMIC_ACQ_REL) == size) {
        __atomic_store_n(&meeting->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&meeting->round, (int32_t)((uint32_t)round + 1), __ATOMIC_RELEASE);
        syscall(SYS_futex, &meeting->round, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
    }
    return round;
}

/* Also where its parent has yet to take note of it. */
static int has_ended(int64_t process)
{
    char text[512];
    snprintf(text, sizeof text, "/proc/%lld/stat", (long long)process);
    int file = open(text, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return errno == ENOENT;
    ssize_t length = read(file, text, sizeof text - 1);
    int gone = length < 0 && errno == ESRCH;
    close(file);
    if (length <= 0)
        return gone;
    text[length] = 0;
    const char *state = strrchr(text, ')'); /* the name in front of it may hold anything */
    return state != NULL && strlen(state) > 2 && (state[2] == 'Z' || state[2] == 'X');
}

/* The first of the processes that has ended; -1: none has. */
EXPORT int64_t gearshift_ended(const int64_t *processes, int64_t count)
{
    for (int64_t number = 0; number < count; number++)
        if (has_ended(processes[number]))
            return number;
    return -1;
}

/* The meeting fails by `code`, for all; returns what it has failed by, which may have been somebody else's. */
EXPORT int64_t gearshift_fail(struct meeting *meeting, int64_t code)
{
    int32_t first = 0;
    if (__atomic_compare_exchange_n(&meeting->failed, &first, (int32_t)code, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
        first = (int32_t)code;
    syscall(SYS_futex, &meeting->round, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
    return first;
}

static int64_t state_of(const struct meeting *meeting, int64_t round)
{
    if (__atomic_load_n(&meeting->round, __ATOMIC_ACQUIRE) != (int32_t)round)
        return 0;
    int32_t failed = __atomic_load_n(&meeting->failed, __ATOMIC_ACQUIRE);
    return failed ? failed : NOT_YET;
}

/* 0: all have come; NOT_YET: not within so many milliseconds; else what the meeting has failed by. `processes` [2, size]:
 * their numbers in the system, and which ranks of the world they are. */
EXPORT int64_t gearshift_await(struct meeting *meeting, int64_t size, const int64_t *processes, int64_t round,
                               int64_t milliseconds)
{
    struct timespec most = {milliseconds / 1000, milliseconds % 1000 * 1000000};
    int64_t state, ended;
    for (int look = 0; look < LOOKS; look++) {
        if ((state = state_of(meeting, round)) != NOT_YET)
            return state;
        if (look % 64 == 63)
            sched_yield(); /* there may be fewer processors than processes */
    }
    syscall(SYS_futex, &meeting->round, FUTEX_WAIT, (int32_t)round, &most, NULL, 0);
    if ((state = state_of(meeting, round)) == NOT_YET && (ended = gearshift_ended(processes, size)) >= 0)
        state = gearshift_fail(meeting, LEFT_ALONE + processes[size + ended]);
    return state;
}

/* --- sums over ranks, as tasks ------------------------------------------------------------------------------------- */

#define PATIENCE 1000 /* milliseconds */
#define UNIT 4096     /* numbers; what one thread sums at a time stays in its nearest cache */

/* `numbers` of every rank, at most `room`. `parts` [2, ranks, room] is shared: rounds take turns, so that nobody writes
 * over what is still read. `whole` 0: y [numbers] becomes the sum, which may be x; else y [ranks, numbers] becomes what
 * each rank has, each rank's `whole` numbers after those of the one before it. */
struct together {
    int64_t ranks, rank, numbers, room, whole, milliseconds;
    struct meeting *meeting;
    const int64_t *processes;
    float *parts;
    const float *x;
    float *y;
};

static float *part_of(const struct together *of, int32_t round, int64_t rank)
{
    return of->parts + ((round & 1) * of->ranks + rank) * of->room;
}

static int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static void put(const struct together *of, int64_t start, int64_t count)
{
    float *part = part_of(of, __atomic_load_n(&of->meeting->round, __ATOMIC_ACQUIRE), of->rank);
    memcpy(part + start, of->x + start, (size_t)count * sizeof *part);
}

static int64_t milliseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static int meet(const struct together *of)
{
    int64_t round = gearshift_arrive(of->meeting, of->ranks), end = milliseconds() + of->milliseconds, state;
    while ((state = gearshift_await(of->meeting, of->ranks, of->processes, round, PATIENCE)) == NOT_YET)
        if (milliseconds() > end)
            return (int)gearshift_fail(of->meeting, TOO_LATE);
    return (int)state;
}

/* After the meeting, when no other can begin without this rank. Sums are in the order of ranks: the same bits on all. */
static void take(const struct together *of, int64_t start, int64_t count)
{
    int32_t round = (int32_t)((uint32_t)__atomic_load_n(&of->meeting->round, __ATOMIC_ACQUIRE) - 1);
    float *restrict y = of->y + start;
    if (of->whole == 0)
        memcpy(y, part_of(of, round, 0) + start, (size_t)count * sizeof *y);
    for (int64_t rank = of->whole == 0; rank < of->ranks; rank++) {
        const float *restrict part = part_of(of, round, rank) + start;
        if (of->whole == 0)
            for (int64_t i = 0; i < count; i++)
                y[i] += part[i];
        else
            memcpy(y + rank * of->whole, part, (size_t)count * sizeof *y);
    }
}

/* All of few numbers. One unit. */
EXPORT int gearshift_together(const void *arguments, struct heap *heap)
{
    const struct together *of = arguments;
    int64_t first, last;
    if (!gearshift_take(heap, &first, &last))
        return 0;
    put(of, 0, of->numbers);
    int failed = meet(of);
    if (failed == 0)
        take(of, 0, of->numbers);
    return failed;
}

/* The same of many in three tasks. Units of the first and the last: UNIT numbers each; of the second: one. */
EXPORT int gearshift_put_part(const void *arguments, struct heap *heap)
{
    const struct together *of = arguments;
    int64_t first, last;
    while (gearshift_take(heap, &first, &last))
        put(of, first * UNIT, least(last * UNIT, of->numbers) - first * UNIT);
    return 0;
}

EXPORT int gearshift_meet(const void *arguments, struct heap *heap)
{
    int64_t first, last;
    return gearshift_take(heap, &first, &last) ? meet(arguments) : 0;
}

EXPORT int gearshift_take_parts(const void *arguments, struct heap *heap)
{
    const struct together *of = arguments;
    int64_t first, last;
    while (gearshift_take(heap, &first, &last))
        for (int64_t start = first * UNIT; start < least(last * UNIT, of->numbers); start += UNIT)
            take(of, start, least(UNIT, of->numbers - start));
    return 0;
}
#endif
