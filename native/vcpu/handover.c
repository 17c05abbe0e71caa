/*
 * Hand-over of a vCPU from KVM to the translator.
 *
 * A vCPU of KVM gets a twin when it first needs one: a VM of one vCPU on the translator that
 * shares the memory, the buses and the interrupt lines' owners with the real one.
 *
 * One instruction.  Registers, vector state and MSRs go to the twin, it executes one instruction
 * (or delivers the exception that this raises), and what instructions can change comes back. The
 * APIC and pending events stay in KVM. The twin sees no writes of code by the guest in between;
 * therefore it forgets its translations of the bytes at RIP each time.
 *
 * For good.  The whole state moves, APIC and IOAPIC too; from then on the twin runs, mv_run.active
 * points at it, device interrupts go to its IOAPIC and device DMA is told to it. KVM's VM stays as
 * it is until the end, unused. Only where there is one vCPU: interrupts between a vCPU on KVM and
 * one on the translator are not carried.
 */
#include <errno.h>
#include <stdlib.h>

#include "dbt/apic.h"
#include "dbt/exec.h"
#include "kvm/kvm.h"
#include "run.h"

/* After so many single instructions the vCPU moves for good. */
#define STEPS_MAX 100

struct mv_twin {
  struct mv_vm vm;
  struct mv_vcpu vcpu;
};

/* Of a VM: a switch between devices and the irqchip that is in use. */
struct mv_handover_vm {
  pthread_mutex_t lock;
  struct mv_irqchip chip;       /* KVM's, then the twin's                          */
  uint32_t levels;              /* of the lines, bit per GSI                       */
  _Atomic(struct mv_vm *) home; /* the twin's VM, when it has moved          */
};

/* ---- what devices see ---------------------------------------------------- */

static void switch_set_level(void *ctx, unsigned gsi, int level) {
  struct mv_handover_vm *over = ctx;
  pthread_mutex_lock(&over->lock);
  if (gsi < 32)
    over->levels = level ? over->levels | 1u << gsi : over->levels & ~(1u << gsi);
  over->chip.set_level(over->chip.ctx, gsi, level);
  pthread_mutex_unlock(&over->lock);
}

static void switch_written(void *ctx, uint64_t gpa, uint64_t len) {
  struct mv_handover_vm *over = ctx;
  struct mv_vm *home = atomic_load(&over->home);
  if (home)
    mv_mem_written(&home->mem, gpa, len);
}

int mv_handover_init(struct mv_vm *vm) {
  struct mv_handover_vm *over = calloc(1, sizeof *over);
  if (!over)
    return -ENOMEM;
  pthread_mutex_init(&over->lock, NULL);
  over->chip = vm->irqchip;
  vm->over = over;
  vm->irqchip = (struct mv_irqchip){switch_set_level, over};
  vm->mem.written = switch_written;
  vm->mem.written_ctx = over;
  return 0;
}

void mv_handover_free(struct mv_vm *vm) {
  if (!vm->over)
    return;
  pthread_mutex_destroy(&vm->over->lock);
  free(vm->over);
  vm->over = NULL;
}

/* ---- the twin ------------------------------------------------------------- */

static int make_twin(struct mv_vcpu *vcpu) {
  const struct mv_vm *vm = vcpu->vm;
  struct mv_twin *twin = calloc(1, sizeof *twin);
  if (!twin)
    return -ENOMEM;
  twin->vm = (struct mv_vm){
      .mem = vm->mem,
      .pio = vm->pio,
      .mmio = vm->mmio,
      .has_bus = vm->has_bus,
      .hlt_exits = vm->hlt_exits,
      .count = vm->count,
      .dbt = vm->dbt,
      .ncpus = vm->ncpus,
      .nvcpus = 1,
      .ops = &mv_dbt_ops,
  };
  twin->vcpu = (struct mv_vcpu){.vm = &twin->vm, .ops = &mv_dbt_ops, .id = vcpu->id};
  twin->vm.vcpu[0] = &twin->vcpu;
  int err = mv_dbt_ops.vm_init(&twin->vm);
  if (!err) {
    err = mv_dbt_ops.create(&twin->vcpu);
    if (err)
      mv_dbt_ops.vm_destroy(&twin->vm);
  }
  if (err) {
    free(twin);
    return err;
  }
  vcpu->run->twin = twin;
  return 0;
}

void mv_handover_destroy(struct mv_vcpu *vcpu) {
  struct mv_twin *twin = vcpu->run->twin;
  if (!twin)
    return;
  mv_dbt_ops.destroy(&twin->vcpu);
  mv_dbt_ops.vm_destroy(&twin->vm);
  free(twin);
  vcpu->run->twin = NULL;
}

/* The guest may have changed the bytes at RIP since the twin last saw them. */
static void forget_code(struct mv_vcpu *vcpu, uint64_t rip) {
  struct mv_twin *twin = vcpu->run->twin;
  uint64_t last = rip + MV_INSN_MAX - 1;
  uint64_t gpa = mv_kvm_translate(vcpu, rip), end = mv_kvm_translate(vcpu, last);
  if (gpa != ~0ULL)
    mv_mem_written(&twin->vm.mem, gpa & ~0xfffULL, 0x1000);
  if ((rip ^ last) >> 12 && end != ~0ULL)
    mv_mem_written(&twin->vm.mem, end & ~0xfffULL, 0x1000);
}

/* ---- one instruction ------------------------------------------------------ */

/* What the twin gets: the processor without what KVM keeps. */
static void lend(struct mv_vcpu_state *lent, const struct mv_vcpu_state *whole) {
  *lent = *whole;
  lent->events = (struct kvm_vcpu_events){
      .interrupt.shadow = whole->events.interrupt.shadow,
      .nmi.masked = whole->events.nmi.masked,
      .flags = whole->events.flags & KVM_VCPUEVENT_VALID_SHADOW,
  };
  lent->lapic = (struct kvm_lapic_state){0};
  for (unsigned i = 0; i < sizeof lent->sregs.interrupt_bitmap / 8; i++)
    lent->sregs.interrupt_bitmap[i] = 0;
  lent->mp_state = KVM_MP_STATE_RUNNABLE;
}

/* What an instruction can have changed. */
static void give_back(struct mv_vcpu_state *whole, const struct mv_vcpu_state *lent) {
  struct kvm_sregs sregs = lent->sregs;
  sregs.apic_base = whole->sregs.apic_base;
  sregs.cr8 = whole->sregs.cr8;
  __builtin_memcpy(sregs.interrupt_bitmap, whole->sregs.interrupt_bitmap,
                   sizeof sregs.interrupt_bitmap);
  whole->regs = lent->regs;
  whole->sregs = sregs;
  whole->xcr0 = lent->xcr0;
  whole->debugregs = lent->debugregs;
  __builtin_memcpy(whole->xsave, lent->xsave, sizeof whole->xsave);
  whole->events.interrupt.shadow = lent->events.interrupt.shadow;
  whole->mp_state = lent->mp_state;
}

int mv_handover_step(struct mv_vcpu *vcpu) {
  struct mv_run *run = vcpu->run;
  struct mv_vcpu_state whole, lent;
  if (vcpu->vm->handover == MV_HANDOVER_AUTO && vcpu->vm->nvcpus == 1 && run->steps >= STEPS_MAX)
    return mv_vcpu_hand_over(vcpu);
  run->steps++;
  int err = run->twin ? 0 : make_twin(vcpu);
  if (!err)
    err = mv_kvm_get_state(vcpu, &whole);
  if (err)
    return err;
  struct mv_vcpu *twin = &run->twin->vcpu;
  forget_code(vcpu, whole.sregs.cs.base + whole.regs.rip);
  lend(&lent, &whole);
  err = twin->ops->set_state(twin, &lent);
  if (err) {
    vcpu->vm->failed = "hand-over: the translator refuses KVM's state";
    return err;
  }
  struct mv_exit_info exit;
  mv_dbt_step(twin, &exit);
  if (exit.reason == MV_EXIT_ERROR) {
    vcpu->vm->failed = "hand-over: the translator cannot execute the instruction";
    return exit.error;
  }
  err = twin->ops->get_state(twin, &lent);
  if (err)
    return err;
  give_back(&whole, &lent);
  err = mv_kvm_set_state(vcpu, &whole);
  return err ? err : exit.reason == MV_EXIT_SHUTDOWN ? -ESHUTDOWN : 0;
}

/* ---- for good ------------------------------------------------------------- */

/* Devices' lines move to the twin's IOAPIC. */
static int move_lines(struct mv_vm *vm, struct mv_vm *to) {
  struct mv_handover_vm *over = vm->over;
  struct kvm_ioapic_state ioapic;
  pthread_mutex_lock(&over->lock);
  int err = mv_kvm_get_ioapic(vm, &ioapic);
  if (!err) {
    mv_ioapic_set_state(to->impl, &ioapic);
    over->chip = to->irqchip;
    atomic_store(&over->home, to);
    for (unsigned gsi = 0; gsi < KVM_IOAPIC_NUM_PINS; gsi++)
      to->irqchip.set_level(to->irqchip.ctx, gsi, over->levels >> gsi & 1);
  }
  pthread_mutex_unlock(&over->lock);
  return err;
}

int mv_vcpu_hand_over(struct mv_vcpu *vcpu) {
  struct mv_vm *vm = vcpu->vm;
  struct mv_run *run = vcpu->run;
  if (vcpu->ops != &mv_kvm_ops || vm->nvcpus != 1 || !vm->over)
    return -ENOTSUP;
  if (atomic_load(&run->active) != vcpu)
    return 0;
  int err = run->twin ? 0 : make_twin(vcpu);
  if (err)
    return err;
  struct mv_vcpu *twin = &run->twin->vcpu;
  struct mv_vcpu_state state;
  for (unsigned i = 0; i < vm->mem.nslots; i++)
    mv_mem_written(&run->twin->vm.mem, vm->mem.slot[i].gpa, vm->mem.slot[i].size);
  err = mv_kvm_get_state(vcpu, &state);
  if (!err && ((struct mv_kvm *)vm->impl)->irqchip)
    err = move_lines(vm, &run->twin->vm);
  if (!err)
    err = twin->ops->set_state(twin, &state);
  if (err) {
    vm->failed = "hand-over";
    return err;
  }
  atomic_store(&run->active, twin);
  return 0;
}
