/* Shared by run.c and handover.c. */
#ifndef MV_RUN_H
#define MV_RUN_H

#include <pthread.h>
#include <stdatomic.h>

#include "mv/vm.h"

struct mv_twin;

/* What run.c keeps for a vCPU. */
struct mv_run {
  /* Where the vCPU is at home: itself, or its double on the translator. */
  _Atomic(struct mv_vcpu *) active;
  atomic_bool kicked;   /* a kick that no backend has reported yet             */
  struct mv_twin *twin; /* handover.c's                                    */
  unsigned steps;       /* instructions handed over so far                 */

  pthread_t thread;
  bool started;
  atomic_bool stop;
  mv_vcpu_exit_fn on_exit;
  void *ctx;
};

/* A VM of KVM: puts a switch before its interrupt lines. 0 or -errno. */
int mv_handover_init(struct mv_vm *vm);
void mv_handover_free(struct mv_vm *vm);
/* Executes the instruction at which KVM gave up on the translator. 0, -ESHUTDOWN (triple fault),
 * -errno. */
int mv_handover_step(struct mv_vcpu *vcpu);
/* Ends a vCPU's double. */
void mv_handover_destroy(struct mv_vcpu *vcpu);

#endif
