/* The memory pool: 64-byte-aligned, huge-page-advised blocks that are used again.

   A fresh result of 64 MB costs 2 to 5 times its GeLU in page faults, and above 32 MB malloc
   gives every block back. So freed blocks of LARGE bytes and more are kept, in classes four
   to a power of two, up to a bound; what is smaller goes to malloc, which keeps it itself.
   Safe with threads. Under AddressSanitizer nothing is kept, so that it sees every error. */
#ifndef NF_POOL_H
#define NF_POOL_H
#include <stddef.h>

/* Each block begins on a multiple of 64 bytes. Allocating 0 bytes gives a block too. */
void *nf_pool_allocate(size_t bytes);
void *nf_pool_allocate_zeroed(size_t bytes);
/* As realloc: on NULL the block is as it was. */
void *nf_pool_reallocate(void *block, size_t bytes);
void nf_pool_free(void *block); /* NULL is nothing */

typedef struct {
    size_t in_use, in_use_peak; /* bytes of the blocks handed out, now and at most */
    size_t kept;                /* bytes of the blocks that wait to be used again */
    size_t kept_limit;
    size_t reused,
        fresh; /* how often a block of the pool served, and how often the system */
} nf_pool_stats;

nf_pool_stats nf_pool_get_stats(void);

/* Gives all that is kept back to the system. */
void nf_pool_empty(void);

/* Keeps at most `bytes` from now on. */
void nf_pool_set_limit(size_t bytes);

#endif
