/* The threads that work on tasks: the one that calls and helpers that stay.
 *
 * A step of decoding is a hundred tasks of a few microseconds each, so nobody sleeps between them: a thread that has
 * nothing to take looks again and again whether the task is done. Between lists helpers look for a moment and then sleep.
 * Nobody waits for a helper to come: who is there takes part after part, and one that the system starts late finds the
 * rest. Which thread did what changes no bit: parts do not meet.
 * Called through ctypes (gearshift/kernels/native/tasks.py).
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#include "native.h"
#include "team.h"

#define PARTS 4        /* of a task for each thread, so that one that comes late or is held up takes fewer */
#define MOST_HELPERS 64
#define BETWEEN 1000   /* looks of a helper for the next list before it sleeps: about 50 microseconds */
#define WITHIN 1000    /* looks for the end of a task before the processor is offered to others */
#define LONG 4000      /* looks before a thread sleeps between them: the task waits for another process */
#define LINE 64

#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#else
#define PAUSE() ((void)0)
#endif

/* How far a task is: parts taken, parts done. A cache line of its own, which all threads write. */
struct progress {
    _Alignas(LINE) atomic_llong taken;
    atomic_llong done;
    long long parts;
};

struct heap {
    struct progress *progress;
    int64_t units;
    long long own; /* parts that this thread has taken */
};

struct list {
    const struct task *tasks;
    struct progress *progress;
    int64_t count;
    atomic_int places; /* for helpers */
    atomic_int failed;
};

static struct {
    pthread_mutex_t lock;
    pthread_cond_t called;
    atomic_flag busy; /* one list at a time has helpers */
    _Atomic(struct list *) list;
    atomic_uint lists; /* so far */
    atomic_int inside, sleeping; /* helpers that may hold `list`, that wait for `called` */
    int helpers;
} team = {.lock = PTHREAD_MUTEX_INITIALIZER, .called = PTHREAD_COND_INITIALIZER, .busy = ATOMIC_FLAG_INIT};

int gearshift_take(struct heap *heap, int64_t *first, int64_t *last)
{
    long long part = atomic_fetch_add(&heap->progress->taken, 1), parts = heap->progress->parts;
    if (part >= parts)
        return 0;
    *first = heap->units * part / parts;
    *last = heap->units * (part + 1) / parts;
    heap->own++;
    return 1;
}

static void work_on(struct list *list, int64_t number)
{
    struct heap heap = {&list->progress[number], list->tasks[number].units, 0};
    int64_t first, last;
    if (atomic_load(&heap.progress->taken) >= heap.progress->parts)
        return;
    int failed = atomic_load(&list->failed); /* then nothing more is done */
    if (failed == 0)
        failed = list->tasks[number].work(list->tasks[number].arguments, &heap);
    if (failed) {
        atomic_store(&list->failed, failed);
        while (gearshift_take(&heap, &first, &last)) /* nobody is to wait for what will not be done */
            ;
    }
    atomic_fetch_add(&heap.progress->done, heap.own);
}

static void await(struct progress *progress)
{
    for (long looks = 0; atomic_load(&progress->done) < progress->parts; looks++) {
        if (looks < WITHIN)
            PAUSE();
        else if (looks < LONG)
            sched_yield();
        else
            nanosleep(&(struct timespec){0, 50000}, NULL);
    }
}

static void go_through(struct list *list)
{
    int64_t open = 0; /* tasks from here on may not have ended */
    for (int64_t number = 0; number < list->count; number++) {
        if (list->tasks[number].waits)
            for (; open < number; open++)
                await(&list->progress[open]);
        work_on(list, number);
    }
    for (; open < list->count; open++)
        await(&list->progress[open]);
}

static void sleep_until_called(unsigned lists)
{
    for (int looks = 0; looks < BETWEEN; looks++) {
        if (atomic_load(&team.lists) != lists)
            return;
        PAUSE();
    }
    pthread_mutex_lock(&team.lock);
    atomic_fetch_add(&team.sleeping, 1);
    while (atomic_load(&team.lists) == lists)
        pthread_cond_wait(&team.called, &team.lock);
    atomic_fetch_sub(&team.sleeping, 1);
    pthread_mutex_unlock(&team.lock);
}

static void *help(void *nothing)
{
    for (;;) {
        unsigned lists = atomic_load(&team.lists);
        atomic_fetch_add(&team.inside, 1); /* before the list is read: it stays while somebody is inside */
        struct list *list = atomic_load(&team.list);
        if (list != NULL && atomic_fetch_sub(&list->places, 1) > 0)
            go_through(list);
        atomic_fetch_sub(&team.inside, 1);
        sleep_until_called(lists);
    }
    return nothing;
}

/* A fork has the calling thread alone, and maybe the middle of a list. */
static void start_again(void)
{
    pthread_mutex_init(&team.lock, NULL);
    pthread_cond_init(&team.called, NULL);
    atomic_flag_clear(&team.busy);
    atomic_store(&team.list, NULL);
    atomic_store(&team.inside, 0);
    atomic_store(&team.sleeping, 0);
    team.helpers = 0;
}

static void watch_forks(void)
{
    pthread_atfork(NULL, NULL, start_again);
}

static void have_helpers(int64_t wanted)
{
    static pthread_once_t watched = PTHREAD_ONCE_INIT;
    pthread_t thread;
    pthread_once(&watched, watch_forks);
    while (team.helpers < wanted && team.helpers < MOST_HELPERS && pthread_create(&thread, NULL, help, NULL) == 0) {
        pthread_detach(thread);
        team.helpers++;
    }
}

static void share(struct list *list, int64_t helpers)
{
    have_helpers(helpers);
    atomic_store(&list->places, (int)helpers);
    atomic_store(&team.list, list);
    atomic_fetch_add(&team.lists, 1);
    if (atomic_load(&team.sleeping) > 0) {
        pthread_mutex_lock(&team.lock);
        pthread_cond_broadcast(&team.called);
        pthread_mutex_unlock(&team.lock);
    }
    go_through(list);
    atomic_store(&team.list, NULL);
    while (atomic_load(&team.inside) > 0)
        sched_yield();
}

/* Parts of tasks for so many threads; returns how many threads find a part of some task. */
static int64_t cut(struct list *list, int64_t threads)
{
    int64_t useful = 1;
    for (int64_t number = 0; number < list->count; number++) {
        const struct task *task = &list->tasks[number];
        int64_t most = threads == 1 ? 1 : threads * PARTS, parts = (task->units + task->grain - 1) / task->grain;
        atomic_init(&list->progress[number].taken, 0);
        atomic_init(&list->progress[number].done, 0);
        list->progress[number].parts = parts < most ? parts : most;
        useful = parts > useful ? parts : useful;
    }
    return useful < threads ? useful : threads;
}

/* Does the tasks in their order by at most so many threads. Not 0: what one of them failed by, after which none is done. */
EXPORT int gearshift_do_tasks(const struct task *tasks, int64_t count, int64_t threads)
{
    struct list list = {.tasks = tasks, .count = count};
    if (count == 0)
        return 0;
    list.progress = aligned_alloc(LINE, (size_t)count * sizeof *list.progress);
    if (list.progress == NULL)
        return NO_MEMORY;
    threads = cut(&list, threads);
    if (threads > 1 && !atomic_flag_test_and_set(&team.busy)) {
        share(&list, threads - 1);
        atomic_flag_clear(&team.busy);
    } else {
        go_through(&list);
    }
    free(list.progress);
    return atomic_load(&list.failed);
}
