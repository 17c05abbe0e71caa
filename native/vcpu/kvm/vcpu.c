/*
 * A vCPU on KVM: the run loop.
 *
 * Port and MMIO accesses are served on the VM's buses here and KVM is entered again. Kicks: the
 * kicker sets kvm_run.immediate_exit, then signals the thread; whether the vCPU thread is before,
 * in or after KVM_RUN, that or the next KVM_RUN returns EINTR. KVM completes a pending access
 * before it looks at immediate_exit (api.rst, "immediate_exit"), so that state is whole whenever
 * run() has returned.
 */
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kvm.h"
#include "mv/cpuid.h"
#include "mv/vm.h"

/* A vCPU that may be handed over is offered what the translator offers too. */
static int set_cpuid(struct mv_vcpu *vcpu) {
  struct mv_vm *vm = vcpu->vm;
  const struct mv_kvm *kvm = vm->impl;
  const struct mv_kvm_vcpu *k = vcpu->impl;
  struct {
    struct kvm_cpuid2 head;
    struct kvm_cpuid_entry2 entry[MV_CPUID_ENTRIES_MAX];
  } cpuid = {0};
  /* A guest that the translator may take over must not use what that has not. */
  enum mv_cpuid_backend who = vm->handover == MV_HANDOVER_NEVER ? MV_CPUID_KVM : MV_CPUID_BOTH;
  cpuid.head.nent = mv_cpuid_build(cpuid.entry, MV_CPUID_ENTRIES_MAX, who,
                                   vm->ncpus ? vm->ncpus : 1, vcpu->id, kvm->supported);
  return MV_KVM_IOCTL(vm, k->fd, KVM_SET_CPUID2, &cpuid);
}

static void kvm_destroy(struct mv_vcpu *vcpu) {
  const struct mv_kvm *kvm = vcpu->vm->impl;
  struct mv_kvm_vcpu *k = vcpu->impl;
  if (k->run)
    munmap(k->run, kvm->run_size);
  if (k->fd >= 0)
    close(k->fd);
  free(k);
  vcpu->impl = NULL;
}

static int kvm_create(struct mv_vcpu *vcpu) {
  struct mv_vm *vm = vcpu->vm;
  struct mv_kvm *kvm = vm->impl;
  struct mv_kvm_vcpu *k = calloc(1, sizeof *k);
  if (!k)
    return -ENOMEM;
  vcpu->impl = k;
  unsigned long id = vcpu->id;
  int err = k->fd = mv_kvm_ioctl(vm, kvm->vm_fd, KVM_CREATE_VCPU, (void *)id, "KVM_CREATE_VCPU");
  if (err < 0)
    goto out;
  void *run = mmap(NULL, kvm->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, k->fd, 0);
  if (run == MAP_FAILED) {
    err = -errno;
    vm->failed = "mmap of kvm_run";
    goto out;
  }
  k->run = run;
  err = set_cpuid(vcpu);
  if (!err && !kvm->nmsrs)
    err = mv_kvm_list_msrs(vcpu);
out:
  if (err < 0) {
    kvm_destroy(vcpu);
    return err;
  }
  return 0;
}

/* One access on a bus. KVM may split an unaligned one into odd lengths; the bus takes 1, 2, 4, 8.
 */
static void access_bus(struct mv_bus *bus, uint64_t addr, uint8_t *data, unsigned len, bool write) {
  while (len) {
    unsigned part = len & (len - 1) ? 1 : len;
    uint64_t value = 0;
    if (write) {
      memcpy(&value, data, part);
      mv_bus_write(bus, addr, value, part);
    } else {
      value = mv_bus_read(bus, addr, part);
      memcpy(data, &value, part);
    }
    addr += part, data += part, len -= part;
  }
}

/* Without buses an access is an exit: reads give all ones. Runs KVM with immediate_exit to finish
 * the instruction, so that state is whole. */
static bool exit_with_access(struct mv_vcpu *vcpu, struct mv_exit_info *out, enum mv_exit reason,
                             uint64_t addr, uint8_t *data, unsigned len, bool write) {
  struct mv_kvm_vcpu *k = vcpu->impl;
  out->reason = reason;
  out->io.addr = addr;
  out->io.len = len;
  out->io.is_write = write;
  if (write)
    memcpy(&out->io.value, data, len);
  else
    memset(data, 0xff, len);
  k->run->immediate_exit = 1;
  ioctl(k->fd, KVM_RUN, 0);
  k->run->immediate_exit = 0;
  return true;
}

static bool on_io(struct mv_vcpu *vcpu, struct mv_exit_info *out) {
  struct mv_kvm_vcpu *k = vcpu->impl;
  bool write = k->run->io.direction == KVM_EXIT_IO_OUT;
  uint8_t *data = (uint8_t *)k->run + k->run->io.data_offset;
  unsigned size = k->run->io.size, port = k->run->io.port;
  if (!vcpu->vm->has_bus)
    return exit_with_access(vcpu, out, MV_EXIT_IO, port, data, size, write);
  for (uint32_t i = 0; i < k->run->io.count; i++)
    access_bus(&vcpu->vm->pio, port, data + i * size, size, write);
  vcpu->stats.exits[MV_EXIT_IO]++;
  return false;
}

static bool on_mmio(struct mv_vcpu *vcpu, struct mv_exit_info *out) {
  struct mv_kvm_vcpu *k = vcpu->impl;
  bool write = k->run->mmio.is_write;
  uint64_t addr = k->run->mmio.phys_addr;
  unsigned len = k->run->mmio.len;
  if (!vcpu->vm->has_bus)
    return exit_with_access(vcpu, out, MV_EXIT_MMIO, addr, k->run->mmio.data, len, write);
  access_bus(&vcpu->vm->mmio, addr, k->run->mmio.data, len, write);
  vcpu->stats.exits[MV_EXIT_MMIO]++;
  return false;
}

static bool on_failure(struct mv_vcpu *vcpu, struct mv_exit_info *out) {
  const struct mv_kvm_vcpu *k = vcpu->impl;
  bool internal = k->run->exit_reason == KVM_EXIT_INTERNAL_ERROR;
  if (internal && k->run->internal.suberror == KVM_INTERNAL_ERROR_EMULATION) {
    out->reason = MV_EXIT_EMULATE;
    return true;
  }
  out->reason = MV_EXIT_ERROR;
  out->error = -EIO;
  vcpu->vm->failed = internal ? "KVM_RUN: internal error"
                     : k->run->exit_reason == KVM_EXIT_FAIL_ENTRY
                         ? "KVM_RUN: the processor refused the vCPU's state"
                         : "KVM_RUN: unknown exit";
  return true;
}

/* True: there is something for the caller in *out. */
static bool handle_exit(struct mv_vcpu *vcpu, struct mv_exit_info *out) {
  const struct mv_kvm_vcpu *k = vcpu->impl;
  switch (k->run->exit_reason) {
  case KVM_EXIT_IO:
    return on_io(vcpu, out);
  case KVM_EXIT_MMIO:
    return on_mmio(vcpu, out);
  case KVM_EXIT_HLT:
    out->reason = MV_EXIT_HLT;
    return true;
  case KVM_EXIT_SHUTDOWN:
    out->reason = MV_EXIT_SHUTDOWN;
    return true;
  case KVM_EXIT_INTR:
    out->reason = MV_EXIT_KICKED;
    return true;
  default:
    return on_failure(vcpu, out);
  }
}

static void kvm_run(struct mv_vcpu *vcpu, struct mv_exit_info *out) {
  struct mv_kvm_vcpu *k = vcpu->impl;
  *out = (struct mv_exit_info){0};
  k->thread = pthread_self();
  atomic_store(&k->in_run, true);
  while (!out->reason) {
    if (!ioctl(k->fd, KVM_RUN, 0)) {
      handle_exit(vcpu, out);
    } else if (errno == EINTR || errno == EAGAIN) {
      k->run->immediate_exit = 0;
      out->reason = MV_EXIT_KICKED;
    } else {
      out->reason = MV_EXIT_ERROR;
      out->error = -errno;
      vcpu->vm->failed = "KVM_RUN";
    }
  }
  atomic_store(&k->in_run, false);
}

static void kvm_kick(struct mv_vcpu *vcpu) {
  struct mv_kvm_vcpu *k = vcpu->impl;
  __atomic_store_n(&k->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
  if (atomic_load(&k->in_run) && !pthread_equal(k->thread, pthread_self()))
    pthread_kill(k->thread, MV_KVM_KICK_SIGNAL);
}

const struct mv_vcpu_ops mv_kvm_ops = {
    .name = "kvm",
    .vm_init = mv_kvm_vm_init,
    .vm_destroy = mv_kvm_vm_destroy,
    .create = kvm_create,
    .destroy = kvm_destroy,
    .run = kvm_run,
    .kick = kvm_kick,
    .get_state = mv_kvm_get_state,
    .set_state = mv_kvm_set_state,
};
