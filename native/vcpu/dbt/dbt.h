/*
 * The translator's vCPU: state, memory and the interface between its parts.
 *
 *   decode.c      bytes -> struct mv_insn (insn.h)
 *   translate.c   guest block -> host code
 *   cache.c       blocks: find, link, invalidate
 *   mmu.c         page walk, software TLB, guest memory by virtual address
 *   enter.S       the border between C and translated code
 *   exec.c        the run loop, slow paths of translated code
 *   system.c      exceptions, interrupts, IRET, segments, SYSCALL, CR, MSR
 *   cpuid.c       (shared with KVM, native/vcpu/cpuid.c) what is offered
 *   apic.c        local APIC, ioapic.c IOAPIC
 *
 * Guest registers live in host registers while translated code runs. All C
 * below runs with them stored in this struct; it is compiled with
 * general-regs-only because the guest's vector registers stay live (fpu_live),
 * so it must not call into libc code that uses SSE. mv_dbt_fpu_save() first
 * makes any C legal.
 */
#ifndef MV_DBT_H
#define MV_DBT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "insn.h"
#include "mv/vcpu.h"

enum {
  MV_RAX,
  MV_RCX,
  MV_RDX,
  MV_RBX,
  MV_RSP,
  MV_RBP,
  MV_RSI,
  MV_RDI,
  MV_R8,
  MV_R9,
  MV_R10,
  MV_R11,
  MV_R12,
  MV_R13,
  MV_R14,
  MV_R15
};

/* Exception vectors, SDM 3A table 6-1. */
enum {
  MV_EXC_DE = 0,
  MV_EXC_DB = 1,
  MV_EXC_NMI = 2,
  MV_EXC_BP = 3,
  MV_EXC_OF = 4,
  MV_EXC_BR = 5,
  MV_EXC_UD = 6,
  MV_EXC_NM = 7,
  MV_EXC_DF = 8,
  MV_EXC_TS = 10,
  MV_EXC_NP = 11,
  MV_EXC_SS = 12,
  MV_EXC_GP = 13,
  MV_EXC_PF = 14,
  MV_EXC_MF = 16,
  MV_EXC_AC = 17,
  MV_EXC_MC = 18,
  MV_EXC_XM = 19
};

/* RFLAGS bits beside the arithmetic ones. */
enum {
  MV_FL_TF = 1 << 8,
  MV_FL_IF = 1 << 9,
  MV_FL_DF = 1 << 10,
  MV_FL_IOPL = 3 << 12,
  MV_FL_NT = 1 << 14,
  MV_FL_RF = 1 << 16,
  MV_FL_VM = 1 << 17,
  MV_FL_AC = 1 << 18,
  MV_FL_VIF = 1 << 19,
  MV_FL_VIP = 1 << 20,
  MV_FL_ID = 1 << 21
};
/* Bits that live in the host's RFLAGS while guest code runs. */
#define MV_FL_HOST (MV_F_ARITH | MV_FL_DF)

struct mv_seg {
  uint64_t base;
  uint32_t limit; /* bytes, granularity applied                             */
  uint16_t sel;
  uint16_t attr; /* bits 8..23 of the descriptor's high word >> 8: type 0..3,
                    S 4, DPL 5..6, P 7, AVL 12, L 13, DB 14, G 15            */
};

struct mv_dtr {
  uint64_t base;
  uint16_t limit;
};

/* One entry of the software TLB. A tag is the guest page's address, or a value
 * that no address with this entry's index can match (mmu.c, tlb_no_tag). */
struct mv_tlb_entry {
  uint64_t tag_r, tag_w;
  uint64_t hva; /* host address of the page                                 */
  uint64_t global;
};
#define MV_TLB_BITS 12
#define MV_TLB_SIZE (1u << MV_TLB_BITS)

/* The page that a kind of access went to last (check.c, "last pages"), in front
 * of the TLB: one compare with memory at a fixed place, no index. */
struct mv_last_page {
  uint64_t tag; /* the page's address, or MV_NO_PAGE                          */
  uint64_t hva; /* of the page, or MV_NO_HVA                                  */
};
#define MV_LAST_PAGES 33u /* the stack's; 32 for tables                        */
/* Both not canonical: an address that matches the one faults by the other. */
#define MV_NO_PAGE (1ull << 63)
#define MV_NO_HVA  (1ull << 62)

/* Jump cache: code address by the low 16 bits of RIP. The code that is entered
 * checks that it is the right one (translate.c, "entries"). */
#define MV_JC_SIZE 65536u
/* Which mapping (struct mv_codepage id) is seen at a virtual page now; entries
 * of guarded blocks compare it. 0: not known. */
#define MV_ITLB_SIZE 1024u

/* C functions that translated code calls, by index into mv_dbt.tramp. */
enum mv_tramp {
  MV_TRAMP_MEM,      /* TLB miss: arg is the site                            */
  MV_TRAMP_LINK,     /* direct jump not linked yet: arg is the link          */
  MV_TRAMP_INDIRECT, /* indirect jump: t0 is the target                      */
  MV_TRAMP_GUARD,    /* a guard did not match: arg is the block              */
  MV_TRAMP_INSN,     /* let C execute the instruction: arg is the site       */
  MV_TRAMP_RAISE,    /* the instruction raises: arg is vector << 24 | site   */
  MV_TRAMP_BOUNCE_IN,
  MV_TRAMP_BOUNCE_OUT, /* see exec.c, "bounce"           */
  MV_TRAMP_COUNT
};

/* Privilege of translated code: it selects the TLB. */
enum mv_priv { MV_PRIV_KERNEL = 0, MV_PRIV_USER = 1, MV_PRIV_COUNT = 2 };

struct mv_dbt {
  /* ---- hot: addressed by translated code through GS -------------------- */
  uint64_t gpr[16]; /* all valid outside translated code                    */
  uint64_t rip;
  uint64_t flags;  /* MV_FL_HOST bits, as saved from the host's RFLAGS       */
  uint32_t eflags; /* all the other RFLAGS bits (IF, IOPL, AC, NT, ...)      */
  uint8_t cpl;
  bool irq_shadow; /* after STI / MOV SS: no interrupt before the next insn  */
  bool halted;

  struct mv_seg seg[MV_SEG_COUNT];
  struct mv_dtr gdt, idt;
  uint64_t cr0, cr2, cr3, cr4, cr8;
  uint64_t efer, xcr0;
  uint64_t dr[8];
  uint64_t kernel_gs_base, star, lstar, cstar, sfmask;
  uint64_t sysenter_cs, sysenter_esp, sysenter_eip;
  uint64_t tsc_aux, tsc_offset; /* guest TSC = host TSC + offset             */

  /* Exception that a helper wants to raise, see mv_dbt_raise().             */
  uint8_t exc_vector;
  bool exc_has_code;
  uint32_t exc_code;

  /* system.c's own: other MSRs, kvmclock, pending events                    */
  struct mv_system *sys;
  struct mv_lapic *lapic; /* apic.c's own                                   */

  /* mmu.c's */
  struct mv_dbt_mmu *mmu;
  /* exec.c's, cache.c's */
  struct mv_dbt_exec *exec;

  struct mv_vcpu *vcpu;
  struct mv_vm *vm;
  uint64_t icount; /* guest instructions begun, if vm->count                 */
  bool fpu_live;   /* guest's vector state is in the host's registers        */

  /* ---- of translated code and enter.S ------------------------------------ */
  struct mv_dbt *self;
  uint64_t host_rsp; /* C's stack while guest code runs               */
  uint64_t resume;   /* where enter.S jumps to after loading registers */
  uint64_t t0;       /* scratch register 0 at the last call of C      */
  uint64_t save_rax; /* RAX while flags are kept in it                */
  uint64_t stash[2]; /* values kept over a second memory check        */
  uint64_t borrow;   /* a guest register lent to an instruction       */
  uint64_t poll;     /* address that poll points load from            */
  uint64_t tramp[MV_TRAMP_COUNT];
  uint8_t bounce[128] __attribute__((aligned(64))); /* operand of a slow access */
  uint8_t vec[4][32] __attribute__((aligned(64)));  /* vector operands for C  */
  uint32_t itlb[MV_PRIV_COUNT][MV_ITLB_SIZE];
  struct mv_tlb_entry tlb[MV_PRIV_COUNT][MV_TLB_SIZE] __attribute__((aligned(64)));
  uint64_t jc[MV_PRIV_COUNT][MV_JC_SIZE];
  struct mv_last_page last[MV_PRIV_COUNT][2][MV_LAST_PAGES]; /* [reads, writes] */
};

/* ======================== raising exceptions =========================== */
/* A helper that finds a guest fault records it and returns negative; nothing
 * of the instruction may have happened yet. The run loop delivers it with
 * mv_system_deliver(). These return -1 so that callers can `return raise()`. */
int mv_dbt_raise(struct mv_dbt *d, unsigned vector); /* no code */
int mv_dbt_raise_code(struct mv_dbt *d, unsigned vector, uint32_t code);
int mv_dbt_raise_pf(struct mv_dbt *d, uint64_t gva, uint32_t code); /* sets cr2 */

/* ======================== mmu.c: guest memory ========================== */
/* As which privilege an access is made. SYSTEM accesses (descriptor tables,
 * TSS, interrupt frames) are supervisor accesses whatever the CPL. */
enum mv_mmu_as { MV_AS_CPL, MV_AS_SYSTEM };

/* Copies between a buffer and guest virtual memory, across pages, also from
 * and to MMIO. All or nothing for faults: every page is checked before a byte
 * is written. 0, or -1 with #PF (or #GP/#SS for a non-canonical address)
 * raised. Segment bases are added by the caller. */
int mv_mmu_read(struct mv_dbt *d, uint64_t gva, void *buf, unsigned len, enum mv_mmu_as as);
int mv_mmu_write(struct mv_dbt *d, uint64_t gva, const void *buf, unsigned len, enum mv_mmu_as as);
/* Physical memory by the page tables' rules (A/D bits set), no access:
 * 0 and *gpa, or -1 with the exception raised. access: MV_ACC_*, or
 * MV_ACC_X. */
#define MV_ACC_X 4
int mv_mmu_translate(struct mv_dbt *d, uint64_t gva, unsigned access, enum mv_mmu_as as,
                     uint64_t *gpa);
/* TLB maintenance, called by system.c when CRs, EFER or INVLPG demand it.   */
void mv_mmu_flush_all(struct mv_dbt *d);       /* with global pages           */
void mv_mmu_flush_nonglobal(struct mv_dbt *d); /* MOV CR3                     */
void mv_mmu_flush_page(struct mv_dbt *d, uint64_t gva);
/* CPL, CR0, CR4, EFER or CS.L changed: recompute what translated code is
 * keyed by. Does not flush. */
void mv_mmu_mode_changed(struct mv_dbt *d);

/* ======================== system.c ===================================== */
/* Executes one decoded instruction of class SYSTEM (also POPF/PUSHF, far
 * branches, INT, IRET, IN/OUT, INS/OUTS excepted). d->rip is the address of
 * the instruction on entry; on success it is set to the next one to run and
 * 0 is returned. -1: exception raised, nothing changed. */
int mv_system_exec(struct mv_dbt *d, const struct mv_insn *insn);
/* Delivers the exception recorded by mv_dbt_raise* at d->rip; double and
 * triple faults included. 0, or -1 on triple fault (the vCPU is shut down). */
int mv_system_deliver(struct mv_dbt *d);
/* INT n / INT3 / external interrupt through the IDT. 0 or -1 as above.      */
int mv_system_interrupt(struct mv_dbt *d, unsigned vector, bool software);
/* Is there an interrupt (or NMI) that IF and the APIC's priority let in now? */
bool mv_system_irq_ready(struct mv_dbt *d);
/* Takes and delivers it. 0 or -1 (triple fault).                            */
int mv_system_take_irq(struct mv_dbt *d);
int mv_system_init(struct mv_dbt *d); /* reset state (SDM 3A table 9-1)       */
void mv_system_destroy(struct mv_dbt *d);
int mv_system_get_state(struct mv_dbt *d, struct mv_vcpu_state *out);
int mv_system_set_state(struct mv_dbt *d, const struct mv_vcpu_state *in);
static inline uint64_t mv_dbt_rflags(const struct mv_dbt *d) {
  return (d->flags & MV_FL_HOST) | (d->eflags & ~(uint32_t)MV_FL_HOST) | 2;
}
static inline void mv_dbt_set_rflags(struct mv_dbt *d, uint64_t v) {
  d->flags = v & MV_FL_HOST;
  d->eflags = (uint32_t)v & ~(uint32_t)MV_FL_HOST;
}

/* ======================== apic.c, ioapic.c ============================= */
struct mv_ioapic;
/* Any thread may call these two; they kick the vCPU that is concerned.      */
void mv_lapic_deliver(struct mv_lapic *apic, unsigned vector, unsigned trigger_level);
void mv_ioapic_set_level(struct mv_ioapic *io, unsigned gsi, int level);
/* When the APIC timer next fires, host CLOCK_MONOTONIC ns; UINT64_MAX: never. */
uint64_t mv_lapic_deadline(struct mv_lapic *apic);

/* ======================== exec.c ======================================= */
/* Port and MMIO on the VM's buses; saves vector state around the device.
 * 0, or -1 if the access must be an exit (no bus): exec.c leaves with
 * MV_EXIT_IO/MMIO and finishes the instruction when the vCPU runs again. */
int mv_dbt_port_io(struct mv_dbt *d, uint16_t port, uint64_t *value, unsigned len, bool write);
/* Asks the vCPU to look at interrupts and kicks soon. Any thread.           */
void mv_dbt_poke(struct mv_dbt *d);
/* Puts the guest's vector state into memory, so that C may use SSE. */
void mv_dbt_fpu_save(struct mv_dbt *d);
/* XSAVE image of the guest (standard layout, 64-byte aligned, valid after
 * mv_dbt_fpu_save) and its size. */
uint8_t *mv_dbt_fpu_image(struct mv_dbt *d, unsigned *size);

#endif
