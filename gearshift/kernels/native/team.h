/* Work that several threads share: a list of tasks, done one after the other, each by whoever is there. */
#ifndef GEARSHIFT_TEAM_H
#define GEARSHIFT_TEAM_H

#include <stdint.h>

/* What of a task is left to be taken. */
struct heap;

/* The next units of the task, from `first` up to `last`, for the calling thread; 0 when none are left. */
int gearshift_take(struct heap *heap, int64_t *first, int64_t *last);

/* What a task may fail by (gearshift/kernels/native/tasks.py has the same numbers). */
#define NOT_YET (-2) /* no failure: to be looked at again */
#define TOO_LATE (-1) /* another process did not come */
#define NO_MEMORY 1
#define LEFT_ALONE 2 /* a process has ended, and its rank: this plus the rank */

/* One thread's work on a task: takes units until none are left. Not 0: it failed, by one of the above. */
typedef int work(const void *arguments, struct heap *heap);

/* `units` that may be done in any order and by any thread, at least `grain` at a time. `waits` 0: it may begin before the
 * task in front of it has ended. */
struct task {
    work *work;
    const void *arguments;
    int64_t units, grain, waits;
};

#endif
