/* Context and statuses. A context lives on the caller's stack for one call of the core; it carries
 * what every op needs (kernels, threads, interruption) and the message of the first failure. */
#ifndef XL_STATUS_H
#define XL_STATUS_H

#include <stdarg.h>
#include <stddef.h>

typedef enum {
    XL_OK = 0,
    XL_TYPE,        /* TypeError */
    XL_VALUE,       /* ValueError */
    XL_MEMORY,      /* MemoryError */
    XL_FLOATING,    /* FloatingPointError */
    XL_INTERRUPTED, /* KeyboardInterrupt (the Python error is already set) */
} xl_status;

struct xl_kernels;

typedef struct xl_ctx {
    const struct xl_kernels *k; /* kernels of the chosen instruction set */
    int threads;                /* >= 1 */
    int (*poll)(void *arg);     /* nonzero: stop; called between blocks by the calling thread */
    void *poll_arg;
    char message[256];
} xl_ctx;

/* Records the message (names the argument, what was found, what was expected); returns `status`. */
__attribute__((format(printf, 3, 4))) xl_status xl_fail(xl_ctx *ctx, xl_status status,
                                                        const char *format, ...);

/* XL_INTERRUPTED when the user asked to stop. */
xl_status xl_poll(xl_ctx *ctx);

#define XL_TRY(call)                                                                               \
    do {                                                                                           \
        xl_status xl_try_status = (call);                                                          \
        if (xl_try_status != XL_OK) return xl_try_status;                                          \
    } while (0)

#endif
