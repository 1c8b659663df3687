#include "base/status.h"

#include <stdio.h>

xl_status xl_fail(xl_ctx *ctx, xl_status status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(ctx->message, sizeof ctx->message, format, args);
    va_end(args);
    return status;
}

xl_status xl_poll(xl_ctx *ctx) {
    if (ctx->poll && ctx->poll(ctx->poll_arg)) return XL_INTERRUPTED;
    return XL_OK;
}
