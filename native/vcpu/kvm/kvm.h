/*
 * The KVM backend's own (Documentation/virt/kvm/api.rst).
 *
 *   vm.c     VM: capabilities, memory slots, irqchip, notifications
 *   vcpu.c   vCPU: create, run loop, kick
 *   state.c  vCPU state in and out
 *   probe.c  is this KVM any good?
 */
#ifndef MV_KVM_H
#define MV_KVM_H

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>

#include "mv/vcpu.h"

/* Interrupts KVM_RUN. */
#define MV_KVM_KICK_SIGNAL SIGRTMIN

struct mv_kvm {
  int dev_fd, vm_fd;
  bool emulated;   /* there is no hardware behind it: guest code is emulated  */
  bool irqchip;    /* LAPICs and IOAPIC in the kernel; else HLT is an exit    */
  size_t run_size; /* bytes of struct kvm_run and what follows it             */
  struct kvm_cpuid2 *supported;
  unsigned nmsrs; /* MSRs that can be read and written back                  */
  uint32_t msr[MV_MSRS_MAX];
};

struct mv_kvm_vcpu {
  int fd;
  struct kvm_run *run;
  pthread_t thread; /* valid while in_run                                    */
  atomic_bool in_run;
};

/* ioctl on `fd`: its result, or -errno, and then `what` is noted in vm->failed. */
int mv_kvm_ioctl(struct mv_vm *vm, int fd, unsigned long request, void *arg, const char *what);
/* The same, with the request's own name. */
#define MV_KVM_IOCTL(vm, fd, request, arg) mv_kvm_ioctl(vm, fd, request, arg, #request)

int mv_kvm_vm_init(struct mv_vm *vm);
void mv_kvm_vm_destroy(struct mv_vm *vm);
int mv_kvm_ioeventfd(struct mv_vm *vm, uint64_t gpa, int fd);
int mv_kvm_get_ioapic(struct mv_vm *vm, struct kvm_ioapic_state *out);
/* Guest-physical address behind a virtual one as the vCPU sees it now, or ~0. */
uint64_t mv_kvm_translate(struct mv_vcpu *vcpu, uint64_t gva);

int mv_kvm_get_state(struct mv_vcpu *vcpu, struct mv_vcpu_state *out);
int mv_kvm_set_state(struct mv_vcpu *vcpu, const struct mv_vcpu_state *in);
/* Fills mv_kvm.msr; called for the first vCPU. 0 or -errno. */
int mv_kvm_list_msrs(struct mv_vcpu *vcpu);

#endif
