#include "ops/optimizer.h"

#include <math.h>

#include "core/pool.h"
#include "core/threads.h"
#include "ops/parts.h"

/* 64 KB of each array: long against handing out a task, and of a few pages. */
enum { CHUNK = 16384 };

typedef struct {
    const nf_parameter *parameters;
    const size_t *first; /* task of each parameter, and after the last the count of all */
    size_t count;
    nf_adamw step;
    double lr;
    double *squares; /* of each task */
} step_work;

/* Fills first[0 .. count]; returns the count of tasks. */
static size_t
number_tasks(const nf_parameter *parameters, size_t count, size_t *first)
{
    size_t tasks = 0;
    for (size_t i = 0; i < count; i++) {
        first[i] = tasks;
        tasks += nf_parts(parameters[i].n, CHUNK);
    }
    first[count] = tasks;
    return tasks;
}

/* The parameter of a task, and where in it the task begins. */
static const nf_parameter *
find(const step_work *w, size_t index, size_t *begin)
{
    size_t low = 0, high = w->count;
    while (high - low > 1) {
        const size_t middle = low + (high - low) / 2;
        *(w->first[middle] <= index ? &low : &high) = middle;
    }
    *begin = (index - w->first[low]) * CHUNK;
    return &w->parameters[low];
}

static size_t
length(const nf_parameter *p, size_t begin)
{
    return nf_least(CHUNK, p->n - begin);
}

static double
elements(const nf_parameter *parameters, size_t count)
{
    double n = 0;
    for (size_t i = 0; i < count; i++) {
        n += (double)parameters[i].n;
    }
    return n;
}

static void
step_chunk(size_t index, void *pointer, void *scratch)
{
    (void)scratch;
    const step_work *w = pointer;
    size_t begin;
    const nf_parameter *const a = find(w, index, &begin);
    const size_t offset = begin * (a->is_double ? 8 : 4);
    nf_adamw step = w->step;
    step.keep = 1 - w->lr * a->decay;
    (a->is_double ? nf_kernels.adamw_f64 : nf_kernels.adamw_f32)(
        (char *)a->p + offset, (const char *)a->g + offset, (char *)a->m + offset,
        (char *)a->v + offset, length(a, begin), &step);
}

nf_status
nf_adamw_step(const nf_parameter *parameters, size_t count, const nf_adamw_options *o)
{
    size_t *const first = nf_pool_allocate((count + 1) * sizeof *first);
    if (first == NULL) {
        return NF_NO_MEMORY;
    }
    const double bias1 = 1 - pow(o->beta1, o->count), bias2 = 1 - pow(o->beta2, o->count);
    step_work w = {
        .parameters = parameters,
        .first = first,
        .count = count,
        .step = {.gain1 = 1 - o->beta1,
                 .gain2 = 1 - o->beta2,
                 .rate = o->lr / bias1,
                 .root = 1 / sqrt(bias2),
                 .eps = o->eps,
                 .scale = o->scale},
        .lr = o->lr,
    };
    const size_t tasks = number_tasks(parameters, count, first);
    const nf_status status =
        nf_parallel_apart(tasks, 4 * elements(parameters, count), 0, step_chunk, &w);
    nf_pool_free(first);
    return status;
}

static void
square_chunk(size_t index, void *pointer, void *scratch)
{
    (void)scratch;
    const step_work *w = pointer;
    size_t begin;
    const nf_parameter *const a = find(w, index, &begin);
    const char *const g = (const char *)a->g + begin * (a->is_double ? 8 : 4);
    w->squares[index] = (a->is_double ? nf_kernels.squares_f64
                                      : nf_kernels.squares_f32)(g, length(a, begin));
}

nf_status
nf_global_norm(const nf_parameter *parameters, size_t count, double *norm)
{
    size_t *const first = nf_pool_allocate((count + 1) * sizeof *first);
    if (first == NULL) {
        return NF_NO_MEMORY;
    }
    const size_t tasks = number_tasks(parameters, count, first);
    step_work w = {.parameters = parameters, .first = first, .count = count};
    w.squares = nf_pool_allocate(tasks * sizeof *w.squares);
    nf_status status = NF_NO_MEMORY;
    if (w.squares != NULL) {
        status = nf_parallel_apart(tasks, elements(parameters, count), 0, square_chunk, &w);
        double sum = 0;
        for (size_t i = 0; i < tasks; i++) {
            sum += w.squares[i];
        }
        *norm = sqrt(sum);
    }
    nf_pool_free(w.squares);
    nf_pool_free(first);
    return status;
}
