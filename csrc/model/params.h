/* Parameters, gradients and decode states as plans over flat buffers. */
#ifndef XL_PARAMS_H
#define XL_PARAMS_H

#include "model/config.h"
#include "ops/basic.h"

typedef struct {
    real *norm_attn;             /* [d] before attention, or behind it */
    xl_mat wq, wk, wv, wo;       /* [H*D, d] [G*D, d] [G*D, d] [d, H*D] */
    real *bq, *bk, *bv;          /* or NULL */
    real *norm_q, *norm_k;       /* [H*D] [G*D], or NULL */
    real *map_q, *map_k;         /* [H, D, D] */
    real *wi, *bi, *wf, *bf;     /* [H, d] [H] */
    real *w_og, *b_og;           /* [H, 3D] [H]; w_og NULL for a fixed gate */
    real *window_factor;         /* [H] LoLCATs: logit of the window's factor */
    real *norm_mlp;              /* [d] before the MLP, or behind it */
    xl_mat w_gate, w_up, w_down; /* [F, d] [F, d] [d, F] */
} xl_layer;

typedef struct {
    xl_mat embed; /* [V, d] */
    xl_layer layer[XL_MAX_LAYERS];
    real *norm;  /* [d] */
    xl_mat head; /* [V, d]; the embedding when tied */
} xl_params;

/* Names and places all parameters. wanted (NULL: all): one flag per entry in plan order; an entry
 * that is not wanted gets a NULL pointer: how frozen weights cost nothing in the backward. */
void xl_params_plan(xl_plan *plan, const xl_config *c, const uint8_t *wanted, xl_params *out);

/* What one layer remembers of the tokens before, for B rows. Absent parts are NULL. */
typedef struct {
    xl_kv kv; /* pos is set by the caller */
    xl_mlstm_state cell;
} xl_layer_state;

/* capacity: positions that full attention can remember */
void xl_state_plan(xl_plan *plan, const xl_config *c, ptrdiff_t B, ptrdiff_t capacity,
                   xl_layer_state *out);

/* Window and sinks of a layer as the attention op wants them, over at most `span` positions; with a
 * window that covers the span, sinks add nothing. */
void xl_attention_span(const xl_mixer *m, ptrdiff_t span, ptrdiff_t *window, ptrdiff_t *sinks);

#endif
