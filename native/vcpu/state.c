/* vCPU state made from scratch: the 64-bit boot protocol's. */
#include "mv/vm.h"

/* Bits by the SDM's names: 3A §2.5 (CR0, CR4), §2.2.1 (EFER). */
#define CR0_PE   (1u << 0)
#define CR0_MP   (1u << 1)
#define CR0_ET   (1u << 4)
#define CR0_NE   (1u << 5)
#define CR0_WP   (1u << 16)
#define CR0_PG   (1u << 31)
#define CR4_PAE  (1u << 5)
#define EFER_LME (1u << 8)
#define EFER_LMA (1u << 10)

static struct kvm_segment flat(uint16_t selector, uint8_t type, bool code) {
  return (struct kvm_segment){
      .limit = 0xffffffff,
      .selector = selector,
      .type = type,
      .present = 1,
      .db = !code,
      .s = 1,
      .l = code,
      .g = 1,
  };
}

void mv_state_long_mode(struct mv_vcpu_state *s, uint64_t rip, uint64_t cr3, uint64_t gdt) {
  struct kvm_segment data = flat(MV_BOOT_DS, 3, false); /* read/write, accessed */
  s->regs = (struct kvm_regs){.rip = rip, .rflags = 2};
  s->sregs.cs = flat(MV_BOOT_CS, 11, true); /* execute/read, accessed */
  s->sregs.ds = s->sregs.es = s->sregs.fs = s->sregs.gs = s->sregs.ss = data;
  /* A task register and LDT that a processor accepts; no memory stands behind them. */
  s->sregs.tr = (struct kvm_segment){.limit = 0xffff, .type = 11, .present = 1};
  s->sregs.ldt = (struct kvm_segment){.limit = 0xffff, .type = 2, .present = 1};
  s->sregs.gdt = (struct kvm_dtable){.base = gdt, .limit = MV_BOOT_GDT_LEN - 1};
  s->sregs.idt = (struct kvm_dtable){0};
  s->sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
  s->sregs.cr2 = 0;
  s->sregs.cr3 = cr3;
  s->sregs.cr4 = CR4_PAE;
  s->sregs.efer = EFER_LME | EFER_LMA;
  s->mp_state = KVM_MP_STATE_RUNNABLE;
}
