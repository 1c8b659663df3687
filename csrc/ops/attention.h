/* Shared by the attention files: which keys a block of queries sees. */
#ifndef XL_ATTENTION_H
#define XL_ATTENTION_H

#include "kernels/kernels.h"
#include "ops/cells.h"

/* A block of queries q0 <= t < q1 of one document that starts at step `start` (negative: in the
 * cache). It sees the cached slots, the sinks s0 <= s < s1 and the keys k0 <= s < q1, in this order
 * of columns; sinks inside the key range are counted there. */
typedef struct {
    ptrdiff_t start, q0, q1, slots, s0, s1, k0, columns;
} xl_block_keys;

/* Queries of a block: wide windows amortise packing over more rows. */
static inline ptrdiff_t xl_query_block(const xl_attn *a) { return a->window >= 512 ? 128 : 64; }

static inline ptrdiff_t xl_attn_length(const xl_attn *a, ptrdiff_t b) {
    return a->lengths ? a->lengths[b] : a->T;
}

/* The block that begins at step t of row b: blocks restart at document starts. */
static inline xl_block_keys xl_block_at(const xl_attn *a, ptrdiff_t b, ptrdiff_t t,
                                        ptrdiff_t cached) {
    const int32_t *pos = a->pos + b * a->T;
    xl_block_keys k = {.start = t - pos[t], .q0 = t, .q1 = t + 1};
    ptrdiff_t last = xl_min(xl_attn_length(a, b), t + xl_query_block(a));
    while (k.q1 < last && pos[k.q1] == pos[k.q1 - 1] + 1) k.q1++;
    k.slots = k.start < 0 ? cached : 0;
    k.s0 = xl_max(k.start, 0);
    k.k0 = xl_max(k.s0, k.q0 - a->window + 1);
    k.s1 = xl_min(xl_max(k.start + a->sinks, k.s0), k.k0);
    k.columns = k.slots + (k.s1 - k.s0) + (k.q1 - k.k0);
    return k;
}

/* Position in its document of what lies in a slot of a cache that has seen `seen` tokens of it. */
static inline ptrdiff_t xl_slot_position(ptrdiff_t slot, ptrdiff_t slots, ptrdiff_t sinks,
                                         ptrdiff_t seen) {
    ptrdiff_t ring = slots - sinks, newest = seen - 1 - sinks;
    if (slot < sinks || newest < 0) return slot;
    return seen - 1 - (newest - (slot - sinks)) % ring - ((newest < slot - sinks) ? ring : 0);
}

#endif
