/* Shared by run.c and handover.c. */
#ifndef MV_RUN_H
#define MV_RUN_H

#include <pthread.h>
#include <stdatomic.h>

#include "mv/vm.h"

struct mv_handover_vm;

/* What run.c keeps for a vCPU. */
struct mv_run {
  /* Where the vCPU is at home: itself, or its double on the translator. */
  _Atomic(struct mv_vcpu *) active;
  atomic_bool kicked; /* a kick that no backend has reported yet             */
  struct mv_handover_vm *handover;
  unsigned steps; /* instructions handed over so far                         */

  pthread_t thread;
  bool started;
  atomic_bool stop;
  mv_vcpu_exit_fn on_exit;
  void *ctx;
};

/* Executes the instruction at which KVM gave up on the translator. 0 or -errno. */
int mv_handover_step(struct mv_vcpu *vcpu);
void mv_handover_destroy(struct mv_vcpu *vcpu);

#endif
