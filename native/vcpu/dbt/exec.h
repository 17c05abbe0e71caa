/* What exec.c, signal.c, dma.c and backend.c share. */
#ifndef MV_EXEC_H
#define MV_EXEC_H

#include "cache.h"

void mv_dbt_run(struct mv_vcpu *vcpu, struct mv_exit_info *out);
/* Like run(), for one instruction or one exception delivered. MV_EXIT_KICKED:
 * there is nothing for the caller. */
void mv_dbt_step(struct mv_vcpu *vcpu, struct mv_exit_info *out);
void mv_dbt_fpu_load(struct mv_dbt *d);
/* Delivers the recorded exception or makes it an exit; nonzero: leave. */
int mv_dbt_fault(struct mv_dbt *d);
/* After a write that may let an interrupt in (EOI, TPR): look at it soon. */
void mv_dbt_recheck(struct mv_dbt *d);

/* signal.c: GS, the alternate stack and the handlers, for this thread. */
int mv_signal_init(void);
/* The alternate stack of a vCPU; 0 or -ENOMEM. */
int mv_signal_stack_new(void **out);
void mv_signal_stack_free(void *stack);
int mv_signal_bind(struct mv_dbt *d);
void mv_signal_unbind(struct mv_dbt *d);
/* The page that polls fault on. */
const void *mv_signal_guard(void);

/* dma.c: devices wrote guest RAM that may hold translated code. */
void mv_dma_written(void *vm, uint64_t gpa, uint64_t len);
void mv_dma_apply(struct mv_dbt *d);

#endif
