/*
 * A VM's life: create, run its vCPUs, hand a vCPU over, end.
 *
 *   struct mv_vm vm = {options};          zero but for the options of mv/vcpu.h
 *   mv_mem_add(&vm.mem, ...);             all RAM
 *   mv_vm_init(&vm, &mv_kvm_ops);         backend, irqchip
 *   mv_bus_add(&vm.mmio, ...);            devices; vm.has_bus = true
 *   mv_vm_add_vcpu(&vm, &vcpu);           one or more; id is the APIC id
 *   vcpu->ops->get_state(), mv_state_long_mode(), vcpu->ops->set_state()
 *   mv_vm_start(&vm, on_exit, ctx);       a thread a vCPU
 *   ...
 *   mv_vm_stop(&vm);                      kicks and joins the threads
 *   mv_vm_destroy(&vm);                   vCPUs, backend; memory is the caller's
 *
 * When a call fails, vm->failed names what did (a string constant: "KVM_CREATE_VM").
 *
 * Hand-over.  A KVM that must emulate guest code (no hardware under it) gives up on instructions
 * that it does not know: MV_EXIT_EMULATE.  mv_vcpu_run() then lets the translator execute that
 * instruction on the same memory and buses, and gives the state back.  If that happens again and
 * again, and the VM has one vCPU, it is handed over for good.
 */
#ifndef MV_VM_H
#define MV_VM_H

#include "mv/vcpu.h"

/* ---- create ------------------------------------------------------------- */
/* 0 or -errno. */
int mv_vm_init(struct mv_vm *vm, const struct mv_vcpu_ops *ops);
/* Adds a vCPU in its reset state. The first is the bootstrap processor, the
 * others wait for INIT and SIPI. 0, -ENOSPC, -errno of the backend. */
int mv_vm_add_vcpu(struct mv_vm *vm, struct mv_vcpu **out);
/* All threads have ended. */
void mv_vm_destroy(struct mv_vm *vm);

/* Lets KVM serve a virtio notification: a write of 4 bytes at `gpa` signals
 * eventfd `fd` and causes no exit. -ENOSYS: the backend cannot (translator). */
int mv_vm_ioeventfd(struct mv_vm *vm, uint64_t gpa, int fd);

/* ---- run ---------------------------------------------------------------- */
/* Runs a vCPU until there is something for the caller, with hand-over and
 * statistics. On the thread that owns the vCPU. */
void mv_vcpu_run(struct mv_vcpu *vcpu, struct mv_exit_info *out);
/* Makes mv_vcpu_run() return MV_EXIT_KICKED soon. Any thread. */
void mv_vcpu_kick(struct mv_vcpu *vcpu);
/* State in and out, wherever the vCPU is at home now. On the vCPU's thread, or
 * when it is stopped. 0 or -errno. */
int mv_vcpu_get_state(struct mv_vcpu *vcpu, struct mv_vcpu_state *out);
int mv_vcpu_set_state(struct mv_vcpu *vcpu, const struct mv_vcpu_state *in);

/* Called on the vCPU's thread for each exit but kicks. True: run on. */
typedef bool (*mv_vcpu_exit_fn)(void *ctx, struct mv_vcpu *vcpu, const struct mv_exit_info *exit);
/* Starts a thread for every vCPU. 0 or -errno (then none runs). */
int mv_vm_start(struct mv_vm *vm, mv_vcpu_exit_fn on_exit, void *ctx);
/* Ends all vCPU threads: kicks them and waits. Any thread but theirs. */
void mv_vm_stop(struct mv_vm *vm);

/* ---- hand-over ---------------------------------------------------------- */
enum mv_handover {
  MV_HANDOVER_AUTO = 0, /* single instructions, then for good               */
  MV_HANDOVER_STEP,     /* single instructions only                         */
  MV_HANDOVER_NEVER,    /* MV_EXIT_EMULATE goes to the caller                */
};
/* Hands a stopped vCPU of KVM over to the translator, for good, at once. */
int mv_vcpu_hand_over(struct mv_vcpu *vcpu);

/* ---- state -------------------------------------------------------------- */
/* Makes *s the state in which a kernel's 64-bit entry is called (Documentation/arch/x86/boot.rst,
 * "64-bit boot protocol"): long mode on the page tables at `cr3`, flat segments with the selectors
 * that the protocol fixes (CS 0x10, the others 0x18) on the GDT at `gdt`, interrupts off. The rest
 * of *s (MSRs, APIC, vector state) stays as it is. */
void mv_state_long_mode(struct mv_vcpu_state *s, uint64_t rip, uint64_t cr3, uint64_t gdt);
/* A GDT that fits: null, null, code 0x00af9b000000ffff, data 0x00cf93000000ffff. */
#define MV_BOOT_CS      0x10
#define MV_BOOT_DS      0x18
#define MV_BOOT_GDT_LEN 32

#endif
