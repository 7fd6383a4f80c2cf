#include "core/pool.h"

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define NF_POOL_KEEPS 0
#else
#define NF_POOL_KEEPS 1
#endif

enum {
    ALIGNMENT = 64,
    HEADER = 64,
    LARGE = 1 << 16,     /* below, malloc's own lists are quick and no page faults */
    HUGE_PAGE = 1 << 21, /* from here on huge pages are asked for */
    CLASSES = 4 * 48,
};

/* Stands in the 64 bytes before a block. */
typedef struct header {
    size_t size; /* of the block, without the header */
    struct header *next;
    void *base; /* what free() takes */
} header;

_Static_assert(sizeof(header) <= HEADER, "a header fits before a block");

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static header *kept[CLASSES];
static nf_pool_stats stats = {.kept_limit = (size_t)2 << 30};

/* A child forked while another thread holds the lock would wait for ever. */
static void
take_lock(void)
{
    pthread_mutex_lock(&lock);
}

static void
leave_lock(void)
{
    pthread_mutex_unlock(&lock);
}

__attribute__((constructor)) static void
watch_forks(void)
{
    pthread_atfork(take_lock, leave_lock, leave_lock);
}

/* The class of a size, and the class's own size: 4 classes a power of two. */
static int
class_of(size_t bytes, size_t *size)
{
    const int log = 63 - __builtin_clzll((unsigned long long)bytes);
    const size_t step = (size_t)1 << (log - 2);
    const size_t quarters = (bytes - ((size_t)1 << log) + step - 1) / step;
    *size = ((size_t)1 << log) + quarters * step;
    return 4 * log + (int)quarters;
}

static void *
from_system(size_t size)
{
    const size_t alignment = size >= HUGE_PAGE ? HUGE_PAGE : ALIGNMENT;
    /* A huge block starts one header into its first huge page. */
    const size_t total = (size + HEADER + alignment - 1) / alignment * alignment;
    char *base = total < size ? NULL : aligned_alloc(alignment, total);
    if (base == NULL) {
        return NULL;
    }
#if defined(__linux__)
    if (size >= HUGE_PAGE) {
        madvise(base, total, MADV_HUGEPAGE);
    }
#endif
    header *h = (header *)(base + HEADER - sizeof(header));
    *h = (header){size, NULL, base};
    return base + HEADER;
}

static header *
header_of(void *block)
{
    return (header *)((char *)block - sizeof(header));
}

static void
count_in_use(size_t size)
{
    stats.in_use += size;
    if (stats.in_use > stats.in_use_peak) {
        stats.in_use_peak = stats.in_use;
    }
}

void *
nf_pool_allocate(size_t bytes)
{
    if (bytes > SIZE_MAX / 4) {
        return NULL;
    }
    size_t size = bytes;
    void *block = NULL;
    if (bytes >= LARGE && NF_POOL_KEEPS) {
        const int class = class_of(bytes, &size);
        pthread_mutex_lock(&lock);
        header *h = class < CLASSES ? kept[class] : NULL;
        if (h != NULL) {
            kept[class] = h->next;
            stats.kept -= h->size;
            stats.reused++;
            count_in_use(h->size);
            block = (char *)h + sizeof(header);
        }
        pthread_mutex_unlock(&lock);
        if (block != NULL) {
            return block;
        }
    }
    block = from_system(size);
    if (block == NULL && size >= LARGE) {
        nf_pool_empty();
        block = from_system(size);
    }
    if (block != NULL) {
        pthread_mutex_lock(&lock);
        stats.fresh++;
        count_in_use(size);
        pthread_mutex_unlock(&lock);
    }
    return block;
}

void *
nf_pool_allocate_zeroed(size_t bytes)
{
    void *block = nf_pool_allocate(bytes);
    if (block != NULL) {
        memset(block, 0, bytes);
    }
    return block;
}

void
nf_pool_free(void *block)
{
    if (block == NULL) {
        return;
    }
    header *h = header_of(block);
    pthread_mutex_lock(&lock);
    stats.in_use -= h->size;
    if (NF_POOL_KEEPS && h->size >= LARGE && stats.kept + h->size <= stats.kept_limit) {
        size_t size;
        const int class = class_of(h->size, &size);
        h->next = kept[class];
        kept[class] = h;
        stats.kept += h->size;
        h = NULL;
    }
    pthread_mutex_unlock(&lock);
    if (h != NULL) {
        free(h->base);
    }
}

void *
nf_pool_reallocate(void *block, size_t bytes)
{
    void *moved = nf_pool_allocate(bytes);
    if (moved != NULL && block != NULL) {
        const size_t size = header_of(block)->size;
        memcpy(moved, block, size < bytes ? size : bytes);
        nf_pool_free(block);
    }
    return moved;
}

nf_pool_stats
nf_pool_get_stats(void)
{
    pthread_mutex_lock(&lock);
    const nf_pool_stats copy = stats;
    pthread_mutex_unlock(&lock);
    return copy;
}

/* Lets go of kept blocks until at most `limit` bytes of them are left. */
static void
keep_at_most(size_t limit)
{
    header *dropped = NULL;
    pthread_mutex_lock(&lock);
    for (int class = CLASSES - 1; class >= 0; class--) {
        while (kept[class] != NULL && stats.kept > limit) {
            header *h = kept[class];
            kept[class] = h->next;
            stats.kept -= h->size;
            h->next = dropped;
            dropped = h;
        }
    }
    pthread_mutex_unlock(&lock);
    while (dropped != NULL) {
        header *next = dropped->next;
        free(dropped->base);
        dropped = next;
    }
}

void
nf_pool_empty(void)
{
    keep_at_most(0);
}

void
nf_pool_set_limit(size_t bytes)
{
    pthread_mutex_lock(&lock);
    stats.kept_limit = bytes;
    pthread_mutex_unlock(&lock);
    keep_at_most(bytes);
}
