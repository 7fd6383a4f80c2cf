/* How plans cut work. */
#ifndef NF_PARTS_H
#define NF_PARTS_H
#include <stddef.h>

static inline size_t
nf_least(size_t a, size_t b)
{
    return a < b ? a : b;
}

/* How many parts of `most` at most n things make. */
static inline size_t
nf_parts(size_t n, size_t most)
{
    return (n + most - 1) / most;
}

#endif
