/* What a model is, in numbers: switches per layer, never a family's name. */
#ifndef XL_CONFIG_H
#define XL_CONFIG_H

#include "base/plan.h"
#include "ops/cells.h"

#define XL_MAX_LAYERS 256
#define XL_MAX_HEAD_WIDTH 512
#define XL_MAX_ROPES 2 /* kinds of RoPE in a model: with its scaling and without */

typedef enum {
    XL_MIX_ATTENTION, /* the teacher's softmax attention */
    XL_MIX_WINDOW,    /* window + sinks alone (the control) */
    XL_MIX_LINEAR,    /* mLSTM without gates: i = f = 1 */
    XL_MIX_MLSTM,     /* mLSTM alone */
    XL_MIX_HYBRID,    /* o mLSTM + (1 - o) window attention, paper.md (11) */
    XL_MIX_LOLCATS,   /* linear attention before the window, softmax inside, one normaliser */
} xl_mixer_kind;

typedef struct {
    xl_mixer_kind kind;
    ptrdiff_t window; /* 0: unlimited */
    ptrdiff_t sinks;
    int gate_fixed; /* the output gate is its bias alone */
    xl_normalizer normalizer;
    xl_map_form map;
    ptrdiff_t teacher_window; /* of the teacher's attention in this layer; 0: unlimited */
    int rope;                 /* which of the model's kinds of RoPE turns q and k */
} xl_mixer;

typedef struct {
    ptrdiff_t layers, d, H, G, D, F, V;
    double eps;
    int tied, attention_bias;
    int post_norm; /* norms stand behind attention and MLP, before the addition; else before them */
    int qk_norm;   /* q and k are normalised over all their heads, before RoPE */
    xl_dtype weights; /* of matrices: XL_DT_REAL, or for inference XL_DT_PANELS or XL_DT_I8 */
    int mixed;        /* products of matrices: see xl_mat */
    ptrdiff_t ropes;  /* kinds of RoPE */
    double inv_freq[XL_MAX_ROPES][XL_MAX_HEAD_WIDTH / 2];
    double attention_factor[XL_MAX_ROPES]; /* YaRN's: what it turns is multiplied by it; else 1 */
    xl_mixer mixer[XL_MAX_LAYERS];
} xl_config;

static inline int xl_has_attention(const xl_mixer *m) {
    return m->kind == XL_MIX_ATTENTION || m->kind == XL_MIX_WINDOW || m->kind == XL_MIX_HYBRID;
}
static inline int xl_has_mlstm(const xl_mixer *m) {
    return m->kind == XL_MIX_LINEAR || m->kind == XL_MIX_MLSTM || m->kind == XL_MIX_HYBRID;
}
/* Keys and values are cached; feature maps and the state of a cell. */
static inline int xl_has_cache(const xl_mixer *m) {
    return xl_has_attention(m) || m->kind == XL_MIX_LOLCATS;
}
static inline int xl_has_maps(const xl_mixer *m) {
    return xl_has_mlstm(m) || m->kind == XL_MIX_LOLCATS;
}
static inline int xl_has_gates(const xl_mixer *m) {
    return m->kind == XL_MIX_MLSTM || m->kind == XL_MIX_HYBRID;
}
/* The teacher's attention in the layer of a student's mixer. */
static inline xl_mixer xl_teacher_attention(const xl_mixer *m) {
    return (xl_mixer){.kind = XL_MIX_ATTENTION,
                      .window = m->teacher_window,
                      .teacher_window = m->teacher_window,
                      .rope = m->rope};
}

/* Refuses sizes that contradict each other; names the value. */
xl_status xl_config_check(xl_ctx *ctx, const xl_config *c);

#endif
