/* Work that several threads share: a list of tasks, done one after the other, each by whoever is there. */
#ifndef GEARSHIFT_TEAM_H
#define GEARSHIFT_TEAM_H

#include <stdint.h>

/* What of a task is left to be taken. */
struct heap;

/* The next units of the task, from `first` up to `last`, for the calling thread; 0 when none are left. */
int gearshift_take(struct heap *heap, int64_t *first, int64_t *last);

/* One thread's work on a task: takes units until none are left. Not 0: it failed. */
typedef int work(const void *arguments, struct heap *heap);

/* `units` that may be done in any order and by any thread, at least `grain` at a time. `waits` 0: it may begin before the
 * task in front of it has ended. */
struct task {
    work *work;
    const void *arguments;
    int64_t units, grain, waits;
};

#endif
