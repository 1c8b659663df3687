/* The whole model: forward with and without state, training (stage II), alignment (stage I).
 * Every function has a *_scratch twin in bytes; parameters, gradients and states are flat buffers
 * laid out by their plans. */
#ifndef XL_MODEL_H
#define XL_MODEL_H

#include "model/block.h"

/* What the mixers of a forward computed, each NULL if not wanted, NaN in layers without it. */
typedef struct {
    real *o, *f; /* [layers, B, T, H] pre-activations of output and forget gates */
    real *q, *k; /* [layers, B, T, H or G, D] after RoPE */
} xl_taps;

/* hidden [B, T, d]: after the last norm. states (NULL or one per layer) are read and advanced, their
 * positions are the caller's. batch->rope is made here. */
xl_status xl_model_forward(xl_ctx *ctx, const xl_config *c, const xl_params *p, xl_batch *b,
                           xl_layer_state *states, real *hidden, const xl_taps *taps,
                           void *scratch);
ptrdiff_t xl_model_forward_scratch(const xl_ctx *ctx, const xl_config *c, const xl_batch *b);

/* Stage II (paper.md (13)): adds gradients into g, sums[3] as xl_head_loss. g NULL: loss only. With
 * batch->recompute the activations of one block are held at a time; the results are the same bits.
 * first, last (NULL or one per layer, both or none; not the same memory): the states that the rows go
 * on from, which get no gradient, and those behind them. */
xl_status xl_model_train(xl_ctx *ctx, const xl_config *c, const xl_params *p, const xl_params *g,
                         xl_batch *b, const xl_head *head, double *sums, const int32_t *labels,
                         const int32_t *target_ids, const real *target_logp,
                         const xl_layer_state *first, const xl_layer_state *last, void *scratch);
ptrdiff_t xl_model_train_scratch(const xl_ctx *ctx, const xl_config *c, const xl_batch *b,
                                 const xl_head *head);

/* Where the teacher's stream of stage I begins and ends, and in which layers it is looked at. */
typedef struct {
    const real *in;          /* [B, T, d] into the first layer; NULL: the embeddings of the batch */
    real *out;               /* [B, T, d] out of the last layer, or NULL */
    const uint8_t *compared; /* [layers] flags; NULL: all */
} xl_stream;

/* Stage I (paper.md (12)). The stream is the teacher's: its attention in every layer, whose input
 * each compared layer's mixer also gets. sums [layers, 2]: sum (h - h_teacher)^2 and sum h_teacher^2
 * of the compared layers are added; adds the gradient of scale * sum of the first into the mixers'
 * own parameters in g (NULL: loss only). Without stream->out nothing behind the last compared layer
 * is computed. One layer's activations are held at a time. */
xl_status xl_model_align(xl_ctx *ctx, const xl_config *c, const xl_params *p, const xl_params *g,
                         xl_batch *b, const xl_stream *stream, double scale, double *sums,
                         void *scratch);
ptrdiff_t xl_model_align_scratch(const xl_ctx *ctx, const xl_config *c, const xl_batch *b);

#endif
