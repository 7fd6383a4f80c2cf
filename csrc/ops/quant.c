/* Packing weights, and the blocking and threads of their products.

   A task is a run of rows by a strip of panels. A panel of 4-bit weights of K = 4096 is 32 KB
   and stays near while every tile of the run passes; the run, RUN x K bytes, stays in L2 for
   all panels of the strip. With few rows a task streams STREAM bytes of weights once. Tasks
   share nothing and an output belongs to one task.

   Bytes that int8_matmul must pack first are packed strip by strip where there are enough
   strips: a task packs one into memory that stays in L2 and multiplies all rows by it. Packed
   as a whole they would go to memory and come back. */
#include "ops/quant.h"

#include <string.h>

#include "core/pool.h"
#include "core/threads.h"
#include "ops/parts.h"

enum {
    RUN = 96,          /* rows */
    STRIP = 8,         /* panels */
    STREAM = 1 << 17,  /* bytes */
    FLOAT_DEPTH = 256, /* a panel of floats: 16 KB */
    ROWS_OF_TASK = 8,  /* to quantize */
    ROUND = 64,
    PACKED = 1 << 20,     /* bytes of a strip that a task packs for itself */
    STRIPS_OF_THREAD = 4, /* at least, if tasks pack */
};

static inline size_t
round_up(size_t n, size_t multiple)
{
    return nf_parts(n, multiple) * multiple;
}

/* Part i of n things cut into `parts` parts, as even as can be: first and count. */
static inline size_t
cut(size_t n, size_t parts, size_t i, size_t *count)
{
    const size_t base = n / parts, extra = n % parts;
    *count = base + (i < extra);
    return i * base + nf_least(i, extra);
}

/* ---- packing ---- */

static void
set_shape(nf_quant_weights *w, size_t n, size_t k, size_t group, int bits, int half)
{
    w->n = n;
    w->k = k;
    w->group = nf_least(group, k);
    w->groups = nf_parts(k, w->group);
    w->step = round_up(w->group, 8);
    w->depth = (w->groups - 1) * w->step + round_up(k - (w->groups - 1) * w->group, 8);
    w->panels = nf_parts(n, NF_QUANT_PANEL);
    w->bits = bits;
    w->half = half;
}

typedef struct {
    const nf_quant_weights *w;
    uint8_t *out; /* all panels, if they stay */
    const uint8_t *u;
    uint8_t flip; /* 0x80 where u is signed bytes */
} pack_work;

/* Element k of a row as it is in a file. */
static inline uint8_t
element(const uint8_t *row, size_t k, int bits)
{
    return bits == 8 ? row[k] : (uint8_t)(row[k / 2] >> (k % 2 * 4) & 15);
}

static inline size_t
panel_bytes(const nf_quant_weights *w)
{
    return w->depth * (size_t)w->bits / 8 * NF_QUANT_PANEL;
}

/* Panel p to `out`. */
static void
pack_panel(const pack_work *job, size_t p, uint8_t *out)
{
    const nf_quant_weights *const w = job->w;
    const int bits = w->bits;
    const size_t row_bytes = bits == 8 ? w->k : (w->k + 1) / 2;
    const size_t values = 32 / (size_t)bits; /* of a column in each step */
    const size_t columns = nf_least(NF_QUANT_PANEL, w->n - p * NF_QUANT_PANEL);
    const uint8_t *const rows = job->u + p * NF_QUANT_PANEL * row_bytes;
    size_t done = 0; /* depths; all but the last few where the layout has no gaps */
    if (columns == NF_QUANT_PANEL && (w->groups == 1 || w->step == w->group)) {
        done = w->k / values * values;
        nf_kernels.quant->pack(rows, row_bytes, done / values, bits, job->flip, out);
    }
    memset(out + done / values * NF_QUANT_PANEL * 4, 0,
           (w->depth - done) * (size_t)bits / 8 * NF_QUANT_PANEL);
    for (size_t g = 0; g < w->groups; g++) {
        const size_t first = g * w->group, length = nf_least(w->group, w->k - first);
        for (size_t c = 0; c < columns; c++) {
            const uint8_t *const row = rows + c * row_bytes;
            uint8_t *const to = out + g * w->step / values * NF_QUANT_PANEL * 4 + c * 4;
            for (size_t i = done > first ? done - first : 0; i < length; i++) {
                const uint8_t value = element(row, first + i, bits) ^ job->flip;
                const size_t j = i % values;
                to[i / values * NF_QUANT_PANEL * 4 + j % 4] |=
                    (uint8_t)(value << (j / 4 * 4));
            }
        }
    }
}

static void
pack_task(size_t p, void *pointer, void *scratch)
{
    (void)scratch;
    const pack_work *const job = pointer;
    pack_panel(job, p, job->out + p * panel_bytes(job->w));
}

static nf_status
pack(nf_quant_weights *w, const uint8_t *u, uint8_t flip, uint8_t *out)
{
    pack_work job = {.w = w, .out = out, .u = u, .flip = flip};
    w->u = out;
    return nf_parallel_apart(w->panels, (double)w->n * (double)w->k / 4, 0, pack_task,
                             &job);
}

/* (N, groups) of `size` bytes each to (panels, groups, PANEL) of `to_size`, zero-extended. */
static void
pack_groups(const nf_quant_weights *w, const char *from, size_t size, char *to,
            size_t to_size)
{
    memset(to, 0, w->panels * w->groups * NF_QUANT_PANEL * to_size);
    for (size_t n = 0; n < w->n; n++) {
        for (size_t g = 0; g < w->groups; g++) {
            const size_t at =
                (n / NF_QUANT_PANEL * w->groups + g) * NF_QUANT_PANEL + n % NF_QUANT_PANEL;
            memcpy(to + at * to_size, from + (n * w->groups + g) * size, size);
        }
    }
}

nf_quant_weights *
nf_quant_pack(const uint8_t *u, const void *scale, const uint8_t *zero, size_t n, size_t k,
              size_t group, int bits, int half)
{
    nf_quant_weights shape = {0};
    set_shape(&shape, n, k, group, bits, half);
    const size_t cells = shape.panels * shape.groups * NF_QUANT_PANEL;
    const size_t head = round_up(sizeof shape, ROUND), size = half ? 2 : 4;
    const size_t bytes =
        round_up(shape.panels * NF_QUANT_PANEL * shape.depth * (size_t)bits / 8, ROUND);
    const size_t scales = round_up(cells * size, ROUND);
    char *const block = nf_pool_allocate(head + bytes + scales + (zero ? 2 * cells : 0));
    if (block == NULL) {
        return NULL;
    }
    nf_quant_weights *const w = (nf_quant_weights *)block;
    *w = shape;
    pack_groups(w, scale, size, block + head + bytes, size);
    w->scale = block + head + bytes;
    if (zero != NULL) {
        pack_groups(w, (const char *)zero, 1, block + head + bytes + scales, 2);
        w->zero = (const uint16_t *)(block + head + bytes + scales);
    }
    if (pack(w, u, 0, (uint8_t *)block + head) != NF_OK) {
        nf_pool_free(block);
        return NULL;
    }
    return w;
}

void
nf_quant_free(nf_quant_weights *w)
{
    nf_pool_free(w);
}

/* ---- products ---- */

typedef struct {
    const nf_quant_weights *w;
    nf_quant_rows x;
    size_t rows;
    const void *in; /* (rows, K): floats, or bytes where `integers` is there */
    const float *bias;
    nf_elementwise_kernel *activation;
    float *y;
    int32_t *integers;
    size_t runs, strips;
    const pack_work *pack; /* NULL: weights are packed */
} product;

static void
quantize_rows(size_t index, void *pointer, void *scratch)
{
    (void)scratch;
    const product *const p = pointer;
    const size_t end = nf_least(p->rows, (index + 1) * ROWS_OF_TASK);
    for (size_t row = index * ROWS_OF_TASK; row < end; row++) {
        if (p->integers != NULL) {
            nf_kernels.quant->copy(p->w, (const int8_t *)p->in + row * p->w->k, &p->x, row);
        }
        else {
            nf_kernels.quant->quantize(p->w, (const float *)p->in + row * p->w->k, &p->x,
                                       row);
        }
    }
}

/* The activation of rows by columns of y. */
static void
activate(const product *p, size_t row, size_t rows, size_t panel, size_t panels)
{
    const size_t begin = panel * NF_QUANT_PANEL;
    const size_t end = nf_least(p->w->n, (panel + panels) * NF_QUANT_PANEL);
    for (size_t i = row; p->activation != NULL && i < row + rows; i++) {
        float *const y = p->y + i * p->w->n + begin;
        const void *const in[1] = {y};
        p->activation(in, y, end - begin);
    }
}

/* Tile i of `tiles` by the same panels asks for its share of those from `panel` on. */
static void
ask_for_panels(const nf_quant_weights *w, size_t panel, size_t i, size_t tiles,
               nf_quant_tile *tile)
{
    const size_t bytes = (size_t)w->bits * NF_QUANT_PANEL; /* of 8 depths of a panel */
    if (tiles > 1 && panel < w->panels) {
        tile->ask = tile->panels * bytes / tiles;
        tile->next = w->u + (panel * bytes + i * tile->ask) * (w->depth / 8);
    }
}

/* Run `run`, of whole tiles, by panels that lie at u. */
static void
multiply_run(const product *p, size_t run, size_t panel, size_t panels, const uint8_t *u)
{
    const nf_quant_kernels *const kernels = nf_kernels.quant;
    size_t tiles;
    const size_t row =
        cut(nf_parts(p->rows, kernels->rows), p->runs, run, &tiles) * kernels->rows;
    const size_t rows = nf_least(tiles * kernels->rows, p->rows - row);
    const size_t step = kernels->panels[nf_parts(rows, tiles) - 1];
    for (size_t j = 0; j < panels; j += step) {
        for (size_t i = 0; i < tiles; i++) {
            nf_quant_tile tile = {.w = p->w,
                                  .x = &p->x,
                                  .u = u + j * panel_bytes(p->w),
                                  .panel = panel + j,
                                  .panels = nf_least(step, panels - j),
                                  .bias = p->bias,
                                  .y = p->y,
                                  .integers = p->integers,
                                  .next = u};
            tile.row = row + cut(rows, tiles, i, &tile.rows);
            if (p->pack == NULL) {
                ask_for_panels(p->w, panel + j + step, i, tiles, &tile);
            }
            kernels->multiply(&tile);
        }
    }
    activate(p, row, rows, panel, panels);
}

static void
multiply_task(size_t index, void *pointer, void *scratch)
{
    (void)scratch;
    const product *const p = pointer;
    size_t panels;
    const size_t panel = cut(p->w->panels, p->strips, index % p->strips, &panels);
    multiply_run(p, index / p->strips, panel, panels, p->w->u + panel * panel_bytes(p->w));
}

/* Packs a strip and multiplies all rows by it. */
static void
pack_and_multiply_task(size_t index, void *pointer, void *scratch)
{
    const product *const p = pointer;
    size_t panels;
    const size_t panel = cut(p->w->panels, p->strips, index, &panels);
    for (size_t j = 0; j < panels; j++) {
        pack_panel(p->pack, panel + j, (uint8_t *)scratch + j * panel_bytes(p->w));
    }
    for (size_t run = 0; run < p->runs; run++) {
        multiply_run(p, run, panel, panels, scratch);
    }
}

/* The same with weights as floats: `scratch` holds FLOAT_DEPTH depths of a panel. */
static void
float_task(size_t index, void *pointer, void *scratch)
{
    const product *const p = pointer;
    const nf_quant_weights *const w = p->w;
    const nf_quant_kernels *const kernels = nf_kernels.quant;
    size_t rows, panels;
    const size_t row = cut(p->rows, p->runs, index / p->strips, &rows);
    const size_t panel = cut(w->panels, p->strips, index % p->strips, &panels);
    for (size_t j = panel; j < panel + panels; j++) {
        const size_t columns = nf_least(NF_QUANT_PANEL, w->n - j * NF_QUANT_PANEL);
        for (size_t k = 0, end; k < w->k; k = end) {
            const size_t group_end = nf_least(w->k, (k / w->group + 1) * w->group);
            end = nf_least(group_end, k + FLOAT_DEPTH);
            kernels->dequantize(w, j, k, end, scratch);
            for (size_t i = 0; i < rows; i += kernels->float_rows) {
                kernels->multiply_floats(
                    (const float *)p->in + (row + i) * w->k + k, w->k, scratch, end - k,
                    p->y + (row + i) * w->n + j * NF_QUANT_PANEL, w->n,
                    nf_least(kernels->float_rows, rows - i), columns, k == 0);
            }
        }
        for (size_t i = row; p->bias != NULL && i < row + rows; i++) {
            for (size_t c = j * NF_QUANT_PANEL; c < j * NF_QUANT_PANEL + columns; c++) {
                p->y[i * w->n + c] += p->bias[c];
            }
        }
    }
    activate(p, row, rows, panel, panels);
}

/* Cuts the product: see the head of this file. */
static void
cut_product(product *p)
{
    const nf_quant_weights *const w = p->w;
    const size_t most =
        p->rows <= nf_kernels.quant->rows ? STREAM / panel_bytes(w) + 1 : STRIP;
    p->runs = nf_parts(p->rows, RUN);
    p->strips = nf_parts(w->panels, round_up(most, 4));
}

/* About 16 products a cycle. */
static double
cycles(const product *p)
{
    return (double)p->rows * (double)p->w->n * (double)p->w->depth / 16;
}

static nf_status
multiply_integers(product *p)
{
    const nf_quant_weights *const w = p->w;
    /* A vector may be stored behind the last group. */
    p->x.pitch =
        round_up(w->depth * nf_kernels.quant->width[w->bits == 8] + ROUND, 2 * ROUND)
        + ROUND;
    const size_t rows = p->rows;
    const size_t bytes = p->x.pitch + sizeof(float) + w->groups * sizeof(int32_t);
    char *const block = nf_pool_allocate(rows * bytes);
    if (block == NULL) {
        return NF_NO_MEMORY;
    }
    p->x.q = block;
    p->x.rows = rows;
    p->x.scale = (float *)(block + rows * p->x.pitch);
    p->x.minus = (int32_t *)(p->x.scale + rows);
    nf_status status = nf_parallel_apart(
        nf_parts(rows, ROWS_OF_TASK), (double)rows * (double)w->k / 2, 0, quantize_rows, p);
    if (status == NF_OK) {
        cut_product(p);
        status =
            p->pack == NULL
                ? nf_parallel_apart(p->runs * p->strips, cycles(p), 0, multiply_task, p)
                : nf_parallel_apart(p->strips, cycles(p),
                                    nf_parts(w->panels, p->strips) * panel_bytes(w),
                                    pack_and_multiply_task, p);
    }
    nf_pool_free(block);
    return status;
}

nf_status
nf_quant_linear(const nf_quant_weights *w, const float *x, size_t rows, const float *bias,
                nf_elementwise_kernel *activation, float *y)
{
    product p = {
        .w = w, .rows = rows, .in = x, .bias = bias, .activation = activation, .y = y};
    return rows == 0 ? NF_OK : multiply_integers(&p);
}

nf_status
nf_quant_linear_floats(const nf_quant_weights *w, const float *x, size_t rows,
                       const float *bias, nf_elementwise_kernel *activation, float *y)
{
    product p = {
        .w = w, .rows = rows, .in = x, .bias = bias, .activation = activation, .y = y};
    if (rows == 0) {
        return NF_OK;
    }
    cut_product(&p);
    return nf_parallel_apart(p.runs * p.strips, cycles(&p),
                             FLOAT_DEPTH * NF_QUANT_PANEL * sizeof(float), float_task, &p);
}

nf_status
nf_int8_matmul(const int8_t *a, const int8_t *b, size_t m, size_t n, size_t k, int32_t *y)
{
    nf_quant_weights w = {0};
    set_shape(&w, n, k, k, 8, 0);
    product p = {.w = &w, .rows = m, .in = a, .integers = y};
    const pack_work job = {.w = &w, .u = (const uint8_t *)b, .flip = 0x80};
    if (STRIP * panel_bytes(&w) <= PACKED
        && w.panels >= STRIPS_OF_THREAD * STRIP * (size_t)nf_get_num_threads()) {
        p.pack = &job;
        return multiply_integers(&p);
    }
    uint8_t *const block = nf_pool_allocate(w.panels * panel_bytes(&w));
    if (block == NULL) {
        return NF_NO_MEMORY;
    }
    nf_status status = pack(&w, job.u, job.flip, block);
    if (status == NF_OK) {
        status = multiply_integers(&p);
    }
    nf_pool_free(block);
    return status;
}
