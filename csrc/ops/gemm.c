/* The plan of matrix products: a list of them is cut into tasks, which run on threads.

   A product of many rows has its B, unless it is little, packed first, by all threads, each panel
   once; then a task is a block of rows, which packs its own A, or reads it where it lies, and goes
   through all panels as they stream in from L3. A product whose rows are one block is cut by
   columns, and each task packs the panels it needs, in L2; of a little more rows, and many columns,
   A is packed first, so that B, the larger by far, need not go to memory and back. Few rows pack
   nothing. All products of a list share these two passes. The tasks are the same for every number
   of threads. */
#include "ops/gemm.h"

#include "core/pool.h"
#include "core/threads.h"
#include "ops/parts.h"

enum {
    ENOUGH_TASKS = 16, /* so that two to four threads end at about one time */
    EVEN = 2,          /* blocks of rows come in pairs: two threads end together */
    COLUMNS = 1536,    /* an element of A is packed once for so many columns, */
    NARROW = 64,       /* or so many where A is little */
    AGAIN_BYTES = 1
        << 20,           /* of B at most that tasks pack again, rather than once for all */
    PACK_COLUMNS = 64,   /* of a task that packs */
    FEW_BYTES = 1 << 19, /* of B to a task of few rows: its first come unasked for, */
    LITTLE_BYTES = 1 << 17, /* or so many where B has less than */
    LITTLE_TASKS = 4,       /* so many tasks */
    PACKED_BYTES = 64
        << 20 /* held at once: above, a list goes in waves, a product in pieces */
};

/* Columns n0 .. n1 - 1 of a product. */
typedef struct {
    const nf_gemm *p;
    size_t n0, n1;
    size_t first, first_pack; /* numbers of its first tasks */
    size_t row_parts, column_parts, pack_parts;
    nf_gemm_panels panels; /* of B, packed for all tasks; no data: each packs its own */
    char *strips;          /* of A, likewise */
    int few, shares_rows;
} piece;

typedef struct {
    const nf_gemm_kernels *kernels;
    const piece *pieces;
    size_t count;
} gemm_work;

static inline size_t
greatest(size_t a, size_t b)
{
    return a > b ? a : b;
}

/* Where part i of `count` begins, on a multiple of `unit`. */
static inline size_t
boundary(size_t n, size_t unit, size_t i, size_t count)
{
    return nf_least(n, nf_parts(n, unit) * i / count * unit);
}

/* ---- tasks ---- */

/* The piece of a task: the last that begins at or before it. */
static const piece *
piece_of(const gemm_work *w, size_t index, int packing)
{
    size_t low = 0, high = w->count;
    while (high - low > 1) {
        const size_t middle = (low + high) / 2;
        const piece *const c = &w->pieces[middle];
        *((packing ? c->first_pack : c->first) <= index ? &low : &high) = middle;
    }
    return &w->pieces[low];
}

static void
pack(size_t index, void *pointer, void *scratch)
{
    (void)scratch;
    const gemm_work *const w = pointer;
    const piece *const c = piece_of(w, index, 1);
    if (c->shares_rows) {
        w->kernels->pack_all_rows(c->p, c->strips, index - c->first_pack);
        return;
    }
    const size_t n0 = c->n0 + (index - c->first_pack) * PACK_COLUMNS;
    w->kernels->pack(c->p, &c->panels, n0, nf_least(n0 + PACK_COLUMNS, c->n1));
}

static void
multiply(size_t index, void *pointer, void *scratch)
{
    const gemm_work *const w = pointer;
    const nf_gemm_kernels *const kernels = w->kernels;
    const piece *const c = piece_of(w, index, 0);
    const size_t task = index - c->first, n = c->n1 - c->n0;
    /* The rows come in two halves: each of two threads keeps to one. */
    const size_t rows = c->row_parts > 1 ? c->row_parts / EVEN : 1;
    const size_t half = task / (rows * c->column_parts);
    const size_t row = half * rows + task % rows;
    const size_t column = task / rows % c->column_parts;
    const size_t n0 = c->n0 + boundary(n, kernels->columns, column, c->column_parts);
    const size_t n1 = c->n0 + boundary(n, kernels->columns, column + 1, c->column_parts);
    if (c->few) {
        kernels->few(c->p, n0, n1);
        return;
    }
    kernels->block(c->p, c->panels.data ? &c->panels : NULL, c->strips,
                   boundary(c->p->m, kernels->rows, row, c->row_parts),
                   boundary(c->p->m, kernels->rows, row + 1, c->row_parts), n0, n1,
                   scratch);
}

/* ---- the cut ---- */

/* Blocks of rows. */
static size_t
row_parts(const nf_gemm_kernels *kernels, const nf_gemm *p)
{
    return p->m > kernels->block_rows
               ? nf_parts(nf_parts(p->m, kernels->block_rows), EVEN) * EVEN
               : 1;
}

/* Whether something is packed first, for all tasks. Where each block of rows packs a little B for
   itself, threads need not meet a second time, nor wait for what another one's cache holds: between
   two dies that takes as long as a fifth of such a product. */
static int
is_packed(const nf_gemm_kernels *kernels, const nf_gemm *p)
{
    const size_t again = row_parts(kernels, p) - 1;
    return again * p->n * p->k * kernels->itemsize > AGAIN_BYTES && !kernels->few_fits(p);
}

/* Whether it is A that is packed first. */
static int
shares_rows(const nf_gemm_kernels *kernels, const nf_gemm *p)
{
    return is_packed(kernels, p) && p->m <= kernels->shared_rows && p->n >= 2 * p->m;
}

static size_t
packed_bytes(const nf_gemm_kernels *kernels, const nf_gemm *p, size_t n)
{
    if (shares_rows(kernels, p)) {
        return kernels->strips_bytes(p);
    }
    return is_packed(kernels, p)
               ? nf_parts(n, kernels->columns) * kernels->columns * p->k * kernels->itemsize
               : 0;
}

static piece
cut(const nf_gemm_kernels *kernels, const nf_gemm *p, size_t n0, size_t n1, size_t products)
{
    const size_t n = n1 - n0, wanted = nf_parts(ENOUGH_TASKS, products);
    piece c = {.p = p, .n0 = n0, .n1 = n1, .row_parts = 1, .few = kernels->few_fits(p)};
    if (c.few) {
        const size_t bytes = n * (p->k + 1) * kernels->itemsize;
        const size_t tasks =
            greatest(nf_parts(bytes, FEW_BYTES),
                     nf_least(nf_parts(bytes, LITTLE_BYTES), LITTLE_TASKS));
        c.column_parts = nf_least(tasks, nf_parts(n, kernels->columns));
    }
    else if (shares_rows(kernels, p)) {
        c.shares_rows = 1;
        c.column_parts = nf_least(wanted, nf_parts(n, NARROW));
        c.pack_parts = nf_parts(p->k, kernels->depth);
    }
    else if (is_packed(kernels, p)) {
        c.row_parts = row_parts(kernels, p);
        c.column_parts = nf_least(nf_parts(wanted, c.row_parts), nf_parts(n, COLUMNS));
        c.pack_parts = nf_parts(n, PACK_COLUMNS);
        c.panels =
            (nf_gemm_panels){NULL, n0, nf_parts(n, kernels->columns) * kernels->columns};
    }
    else {
        c.row_parts = row_parts(kernels, p);
        c.column_parts = nf_least(nf_parts(wanted, c.row_parts),
                                  nf_parts(n, c.row_parts > 1 ? COLUMNS : NARROW));
    }
    return c;
}

/* Scratch of one of its tasks, in bytes. */
static size_t
scratch_bytes(const nf_gemm_kernels *kernels, const piece *c)
{
    if (c->few) {
        return 0;
    }
    const size_t rows =
        nf_parts(nf_parts(c->p->m, kernels->rows), c->row_parts) * kernels->rows;
    const size_t columns =
        nf_parts(nf_parts(c->n1 - c->n0, kernels->columns), c->column_parts)
        * kernels->columns;
    return kernels->scratch + kernels->aside(c->p, rows, columns);
}

/* About 16 multiply-adds a cycle, and reading or packing B. */
static double
cycles(const piece *c)
{
    return (double)(c->n1 - c->n0) * (double)c->p->k * ((double)c->p->m / 16 + 0.5);
}

/* Pieces whose packed B is held together. */
static nf_status
run_wave(const nf_gemm_kernels *kernels, piece *pieces, size_t count)
{
    gemm_work w = {kernels, pieces, count};
    size_t tasks = 0, packs = 0, bytes = 0, scratch = 0;
    double cost = 0;
    for (size_t i = 0; i < count; i++) {
        piece *const c = &pieces[i];
        c->first = tasks;
        c->first_pack = packs;
        tasks += c->row_parts * c->column_parts;
        packs += c->pack_parts;
        bytes += packed_bytes(kernels, c->p, c->n1 - c->n0);
        cost += cycles(c);
        scratch = greatest(scratch, scratch_bytes(kernels, c));
    }
    if (packs == 0) {
        return nf_parallel_apart(tasks, cost, scratch, multiply, &w);
    }
    char *const packed = nf_pool_allocate(bytes);
    if (packed == NULL) {
        return NF_NO_MEMORY;
    }
    size_t at = 0;
    for (size_t i = 0; i < count; i++) {
        if (pieces[i].shares_rows) {
            pieces[i].strips = packed + at;
        }
        else if (pieces[i].pack_parts > 0) {
            pieces[i].panels.data = packed + at;
        }
        at += packed_bytes(kernels, pieces[i].p, pieces[i].n1 - pieces[i].n0);
    }
    nf_status status = nf_parallel_apart(packs, (double)bytes / 4, 0, pack, &w);
    if (status == NF_OK) {
        status = nf_parallel_apart(tasks, cost, scratch, multiply, &w);
    }
    nf_pool_free(packed);
    return status;
}

static size_t
pieces_of(const nf_gemm_kernels *kernels, const nf_gemm *p)
{
    return p->m == 0 || p->n == 0
               ? 0
               : greatest(1, nf_parts(packed_bytes(kernels, p, p->n), PACKED_BYTES));
}

nf_status
nf_products(const nf_gemm_kernels *kernels, const nf_gemm *products, size_t count)
{
    enum { ON_STACK = 4 };
    piece few_pieces[ON_STACK], *pieces = few_pieces;
    size_t total = 0;
    for (size_t i = 0; i < count; i++) {
        total += pieces_of(kernels, &products[i]);
    }
    if (total > ON_STACK) {
        pieces = nf_pool_allocate(total * sizeof *pieces);
        if (pieces == NULL) {
            return NF_NO_MEMORY;
        }
    }
    for (size_t i = 0, at = 0; i < count; i++) {
        const nf_gemm *const p = &products[i];
        const size_t number = pieces_of(kernels, p);
        for (size_t j = 0; j < number; j++) {
            pieces[at++] = cut(kernels, p, boundary(p->n, kernels->columns, j, number),
                               boundary(p->n, kernels->columns, j + 1, number), count);
        }
    }
    nf_status status = NF_OK;
    for (size_t begin = 0, end; begin < total && status == NF_OK; begin = end) {
        size_t bytes = 0;
        for (end = begin; end < total; end++) {
            bytes += packed_bytes(kernels, pieces[end].p, pieces[end].n1 - pieces[end].n0);
            if (end > begin && bytes > PACKED_BYTES) {
                break;
            }
        }
        status = run_wave(kernels, pieces + begin, end - begin);
    }
    if (pieces != few_pieces) {
        nf_pool_free(pieces);
    }
    return status;
}
