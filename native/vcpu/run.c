/*
 * A VM's life and its vCPUs' threads.
 *
 * Kicks are sticky here and not only in the backends, because a vCPU may be on its way from one
 * backend to the other when the kick comes: the kicker sets run->kicked and then looks where the
 * vCPU is; the vCPU's thread says where it is and then looks at run->kicked.
 */
#include <errno.h>
#include <signal.h>
#include <stdlib.h>

#include "kvm/kvm.h"
#include "run.h"

int mv_vm_init(struct mv_vm *vm, const struct mv_vcpu_ops *ops) {
  vm->ops = ops;
  vm->failed = NULL;
  int err = ops->vm_init(vm);
  if (!err && ops == &mv_kvm_ops && vm->handover != MV_HANDOVER_NEVER) {
    err = mv_handover_init(vm);
    if (err)
      ops->vm_destroy(vm);
  }
  return err;
}

int mv_vm_add_vcpu(struct mv_vm *vm, struct mv_vcpu **out) {
  if (vm->nvcpus == sizeof vm->vcpu / sizeof *vm->vcpu)
    return -ENOSPC;
  struct mv_vcpu *vcpu = calloc(1, sizeof *vcpu);
  struct mv_run *run = calloc(1, sizeof *run);
  int err = -ENOMEM;
  if (!vcpu || !run)
    goto out;
  *vcpu = (struct mv_vcpu){.vm = vm, .ops = vm->ops, .id = vm->nvcpus, .run = run};
  atomic_store(&run->active, vcpu);
  err = vm->ops->create(vcpu);
  if (err)
    goto out;
  vm->vcpu[vm->nvcpus++] = vcpu;
  *out = vcpu;
  return 0;
out:
  free(run);
  free(vcpu);
  return err;
}

void mv_vm_destroy(struct mv_vm *vm) {
  for (unsigned i = 0; i < vm->nvcpus; i++) {
    struct mv_vcpu *vcpu = vm->vcpu[i];
    mv_handover_destroy(vcpu);
    vm->ops->destroy(vcpu);
    free(vcpu->run);
    free(vcpu);
  }
  vm->nvcpus = 0;
  mv_handover_free(vm);
  vm->ops->vm_destroy(vm);
}

int mv_vm_ioeventfd(struct mv_vm *vm, uint64_t gpa, int fd) {
  return vm->ops == &mv_kvm_ops ? mv_kvm_ioeventfd(vm, gpa, fd) : -ENOSYS;
}

/* ---- run ---------------------------------------------------------------- */

/* Runs where the vCPU is at home; the counters are kept in one place. */
static void run_active(struct mv_vcpu *vcpu, struct mv_exit_info *out) {
  struct mv_vcpu *active = atomic_load(&vcpu->run->active);
  if (active != vcpu)
    active->stats = vcpu->stats;
  active->ops->run(active, out);
  if (active != vcpu)
    vcpu->stats = active->stats;
  vcpu->stats.exits[out->reason]++;
}

void mv_vcpu_run(struct mv_vcpu *vcpu, struct mv_exit_info *out) {
  for (;;) {
    if (atomic_exchange(&vcpu->run->kicked, false)) {
      *out = (struct mv_exit_info){.reason = MV_EXIT_KICKED};
      return;
    }
    run_active(vcpu, out);
    if (out->reason == MV_EXIT_KICKED)
      atomic_store(&vcpu->run->kicked, false);
    if (out->reason != MV_EXIT_EMULATE || vcpu->vm->handover == MV_HANDOVER_NEVER)
      return;
    int err = mv_handover_step(vcpu);
    if (err == -ESHUTDOWN) {
      *out = (struct mv_exit_info){.reason = MV_EXIT_SHUTDOWN};
      return;
    }
    if (err) {
      *out = (struct mv_exit_info){.reason = MV_EXIT_ERROR, .error = err};
      return;
    }
  }
}

void mv_vcpu_kick(struct mv_vcpu *vcpu) {
  atomic_store(&vcpu->run->kicked, true);
  struct mv_vcpu *active = atomic_load(&vcpu->run->active);
  active->ops->kick(active);
}

int mv_vcpu_get_state(struct mv_vcpu *vcpu, struct mv_vcpu_state *out) {
  struct mv_vcpu *active = atomic_load(&vcpu->run->active);
  return active->ops->get_state(active, out);
}

int mv_vcpu_set_state(struct mv_vcpu *vcpu, const struct mv_vcpu_state *in) {
  struct mv_vcpu *active = atomic_load(&vcpu->run->active);
  return active->ops->set_state(active, in);
}

/* ---- threads ------------------------------------------------------------ */

static void *vcpu_thread(void *arg) {
  struct mv_vcpu *vcpu = arg;
  struct mv_run *run = vcpu->run;
  while (!atomic_load(&run->stop)) {
    struct mv_exit_info info;
    mv_vcpu_run(vcpu, &info);
    if (info.reason != MV_EXIT_KICKED && !run->on_exit(run->ctx, vcpu, &info))
      break;
  }
  return NULL;
}

int mv_vm_start(struct mv_vm *vm, mv_vcpu_exit_fn on_exit, void *ctx) {
  for (unsigned i = 0; i < vm->nvcpus; i++) {
    struct mv_run *run = vm->vcpu[i]->run;
    atomic_store(&run->stop, false);
    run->on_exit = on_exit;
    run->ctx = ctx;
    int err = -pthread_create(&run->thread, NULL, vcpu_thread, vm->vcpu[i]);
    if (err) {
      vm->failed = "pthread_create";
      mv_vm_stop(vm);
      return err;
    }
    run->started = true;
  }
  return 0;
}

void mv_vm_stop(struct mv_vm *vm) {
  for (unsigned i = 0; i < vm->nvcpus; i++)
    if (vm->vcpu[i]->run->started) {
      atomic_store(&vm->vcpu[i]->run->stop, true);
      mv_vcpu_kick(vm->vcpu[i]);
    }
  for (unsigned i = 0; i < vm->nvcpus; i++) {
    struct mv_run *run = vm->vcpu[i]->run;
    if (run->started)
      pthread_join(run->thread, NULL);
    run->started = false;
  }
}
