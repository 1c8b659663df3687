#include "base/plan.h"

#include <stdio.h>

ptrdiff_t xl_dtype_size(xl_dtype dtype) {
    switch (dtype) {
    case XL_DT_REAL: return (ptrdiff_t)sizeof(real);
    case XL_DT_BF16:
    case XL_DT_PANELS: return (ptrdiff_t)sizeof(xl_bf16);
    case XL_DT_I32: return 4;
    case XL_DT_U8:
    case XL_DT_I8: return 1;
    }
    return 0;
}

void *xl_take(xl_plan *plan, const char *name, xl_role role, xl_dtype dtype, int ndim,
              const ptrdiff_t *shape) {
    if (plan->failed) return NULL;
    ptrdiff_t bytes = xl_dtype_size(dtype), padded, end;
    for (int i = 0; i < ndim; i++) {
        ptrdiff_t room = shape[i]; /* sizes of matrices are below 2^31: rounding up is safe */
        if (dtype == XL_DT_PANELS || dtype == XL_DT_I8) room = xl_round_up(room, XL_PANEL);
        if (dtype == XL_DT_I8 && i == 1) room = xl_int8_depth(room);
        if (shape[i] < 0 || __builtin_mul_overflow(bytes, room, &bytes)) plan->failed = 1;
    }
    if (__builtin_add_overflow(bytes, XL_PLAN_ALIGN - 1, &padded)) plan->failed = 1;
    padded = padded / XL_PLAN_ALIGN * XL_PLAN_ALIGN;
    if (dtype == XL_DT_I8 && !plan->failed) {
        /* no more than 9 times as much */
        bytes = padded + xl_round_up(shape[0], XL_PANEL) * (ptrdiff_t)sizeof(real);
        padded = xl_round_up(bytes, XL_PLAN_ALIGN);
    }
    if (__builtin_add_overflow(plan->used, padded, &end)) plan->failed = 1;
    if (plan->base && end > plan->size) plan->failed = 1;
    if (plan->entries && plan->count >= plan->capacity) plan->failed = 1;
    if (plan->failed) return NULL;
    if (plan->entries) {
        xl_entry *e = &plan->entries[plan->count];
        snprintf(e->name, sizeof e->name, "%s%s", plan->prefix ? plan->prefix : "", name);
        e->role = role, e->group = plan->group, e->dtype = dtype, e->ndim = ndim;
        for (int i = 0; i < ndim; i++) e->shape[i] = shape[i];
        e->offset = plan->used, e->bytes = bytes;
    }
    plan->count++;
    void *place = plan->base ? plan->base + plan->used : NULL;
    plan->used = end;
    return place;
}

real *xl_take_reals(xl_plan *plan, ptrdiff_t count) {
    return xl_take(plan, "", XL_ROLE_WORK, XL_DT_REAL, 1, XL_SHAPE(count));
}
