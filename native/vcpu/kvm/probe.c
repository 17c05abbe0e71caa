/*
 * Measures KVM before it is trusted with a guest.
 *
 * /dev/kvm may be there and open, and yet emulate every guest instruction (nested without hardware
 * support, software KVM). Nothing says so but a clock: a loop of some thousand instructions runs
 * for a microsecond on hardware, and for a millisecond on such a KVM.
 */
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "mv/probe.h"
#include "mv/vm.h"

/* The guest's memory: page tables that map 2 MiB one to one, and the code. */
enum { RAM = 0x10000, PML4 = 0x1000, PDPT = 0x2000, PD = 0x3000, CODE = 0x4000 };
enum { EXITS = 4, INSNS = 600 };

/* 0:  dec ecx
 * 2:  jnz 0
 * 4:  out 0xf4, al
 * 6:  jmp 4          */
static const uint8_t code[] = {0xff, 0xc9, 0x75, 0xfc, 0xe6, 0xf4, 0xeb, 0xfc};

static void fill_ram(struct mv_mem *mem) {
  enum { PRESENT_WRITE = 3, LARGE = 0x80 };
  uint64_t pml4 = PDPT | PRESENT_WRITE, pdpt = PD | PRESENT_WRITE, pd = LARGE | PRESENT_WRITE;
  mv_mem_write(mem, PML4, &pml4, sizeof pml4);
  mv_mem_write(mem, PDPT, &pdpt, sizeof pdpt);
  mv_mem_write(mem, PD, &pd, sizeof pd);
  mv_mem_write(mem, CODE, code, sizeof code);
}

static double now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

/* Time of one entry of the guest until its next OUT. < 0: -errno. */
static double run_once(struct mv_vcpu *vcpu) {
  struct mv_exit_info exit;
  double start = now_ns();
  vcpu->ops->run(vcpu, &exit);
  double taken = now_ns() - start;
  if (exit.reason == MV_EXIT_IO)
    return taken;
  return exit.reason == MV_EXIT_ERROR ? exit.error : -EIO;
}

static int measure(struct mv_vm *vm, struct mv_kvm_probe *out) {
  struct mv_vcpu *vcpu;
  struct mv_vcpu_state state;
  int err = mv_vm_add_vcpu(vm, &vcpu);
  if (!err)
    err = mv_vcpu_get_state(vcpu, &state);
  if (err)
    return err;
  mv_state_long_mode(&state, CODE, PML4, 0);
  state.regs.rcx = INSNS / 2;
  err = mv_vcpu_set_state(vcpu, &state);
  double loop = err ? err : run_once(vcpu), exits = 0;
  if (loop < 0)
    return loop;
  for (int i = 0; i < EXITS; i++) {
    double one = run_once(vcpu);
    if (one < 0)
      return one;
    exits += one / EXITS;
  }
  /* Twice: the first run also pays for the guest's page faults. */
  state.regs.rip = CODE;
  err = mv_vcpu_set_state(vcpu, &state);
  double again = err ? err : run_once(vcpu);
  if (again < 0)
    return again;
  double best = again < loop ? again : loop;
  out->ns_per_exit = exits;
  out->ns_per_insn = best > exits ? (best - exits) / INSNS : 0;
  return 0;
}

static enum mv_kvm_verdict judge(const struct mv_vm *vm, int err, double ns_per_insn) {
  bool opening = vm->failed && !strcmp(vm->failed, "/dev/kvm");
  switch (err) {
  case 0:
    return ns_per_insn <= MV_KVM_NS_PER_INSN_MAX ? MV_KVM_GOOD : MV_KVM_USELESS;
  case -ENOENT:
  case -ENODEV:
  case -ENXIO:
    return opening ? MV_KVM_ABSENT : MV_KVM_BROKEN;
  case -EACCES:
  case -EPERM:
    return opening ? MV_KVM_FORBIDDEN : MV_KVM_BROKEN;
  case -ENOTSUP:
    return MV_KVM_OLD;
  default:
    return MV_KVM_BROKEN;
  }
}

static void *end_vm(void *arg) {
  struct mv_vm *vm = arg;
  mv_vm_destroy(vm);
  mv_mem_destroy(&vm->mem);
  free(vm);
  return NULL;
}

/* The kernel takes some ms to end a VM (it waits for grace periods): nobody needs to wait too. */
static void end_vm_aside(struct mv_vm *vm) {
  pthread_t thread;
  if (pthread_create(&thread, NULL, end_vm, vm))
    end_vm(vm);
  else
    pthread_detach(thread);
}

void mv_kvm_probe(struct mv_kvm_probe *out) {
  memset(out, 0, sizeof *out);
  struct mv_vm *vm = calloc(1, sizeof *vm);
  if (!vm || mv_mem_add(&vm->mem, 0, RAM)) {
    free(vm);
    out->verdict = MV_KVM_BROKEN;
    out->error = -ENOMEM;
    return;
  }
  /* No irqchip and no buses: an OUT is an exit. */
  vm->hlt_exits = true;
  vm->handover = MV_HANDOVER_NEVER;
  fill_ram(&vm->mem);
  int created = mv_vm_init(vm, &mv_kvm_ops);
  out->error = created ? created : measure(vm, out);
  out->verdict = judge(vm, out->error, out->ns_per_insn);
  snprintf(out->failed, sizeof out->failed, "%s", out->error && vm->failed ? vm->failed : "");
  if (!created) {
    end_vm_aside(vm);
    return;
  }
  mv_mem_destroy(&vm->mem);
  free(vm);
}
