/*
 * What the files of the system level share: system.c dispatches one
 * instruction to control.c, segment.c, far.c, syscall.c, interrupt.c, msr.c or
 * port.c; state.c moves it all to and from KVM's structs.
 *
 * An instruction's function returns one of enum mv_system_result. It changes
 * nothing until it can no longer fail.
 */
#ifndef MV_SYSTEM_H
#define MV_SYSTEM_H

#include "dbt.h"
#include "mv/cpuid.h"

enum mv_system_result {
  MV_SYS_FAULT = -1, /* exception raised                                      */
  MV_SYS_NEXT = 0,   /* done: goes on at the next instruction                 */
  MV_SYS_EXIT = 1,   /* a port access that must leave mv_vcpu_run()           */
  MV_SYS_JUMPED = 2, /* done, has set d->rip                                  */
};

enum {
  MV_CR0_PE = 1u << 0,
  MV_CR0_MP = 1u << 1,
  MV_CR0_EM = 1u << 2,
  MV_CR0_TS = 1u << 3,
  MV_CR0_ET = 1u << 4,
  MV_CR0_NE = 1u << 5,
  MV_CR0_WP = 1u << 16,
  MV_CR0_AM = 1u << 18,
  MV_CR0_NW = 1u << 29,
  MV_CR0_CD = 1u << 30
};
#define MV_CR0_PG (1ULL << 31)
enum {
  MV_CR4_VME = 1u << 0,
  MV_CR4_PVI = 1u << 1,
  MV_CR4_TSD = 1u << 2,
  MV_CR4_DE = 1u << 3,
  MV_CR4_PSE = 1u << 4,
  MV_CR4_PAE = 1u << 5,
  MV_CR4_MCE = 1u << 6,
  MV_CR4_PGE = 1u << 7,
  MV_CR4_PCE = 1u << 8,
  MV_CR4_OSFXSR = 1u << 9,
  MV_CR4_OSXMMEXCPT = 1u << 10,
  MV_CR4_UMIP = 1u << 11,
  MV_CR4_FSGSBASE = 1u << 16,
  MV_CR4_PCIDE = 1u << 17,
  MV_CR4_OSXSAVE = 1u << 18,
  MV_CR4_SMEP = 1u << 20,
  MV_CR4_SMAP = 1u << 21
};
enum {
  MV_EFER_SCE = 1u << 0,
  MV_EFER_LME = 1u << 8,
  MV_EFER_LMA = 1u << 10,
  MV_EFER_NXE = 1u << 11,
  MV_EFER_AUTOIBRS = 1u << 21
};
/* struct mv_seg.attr */
enum {
  MV_SEG_TYPE = 0xf,
  MV_SEG_A = 1,
  MV_SEG_RW = 2,
  MV_SEG_CONFORM = 4,
  MV_SEG_CODE = 8,
  MV_SEG_S = 1 << 4,
  MV_SEG_DPL = 3 << 5,
  MV_SEG_P = 1 << 7,
  MV_SEG_L = 1 << 13,
  MV_SEG_DB = 1 << 14,
  MV_SEG_G = 1 << 15
};

#define MV_MTRR_VAR  8 /* pairs that MTRRCAP tells of                         */
#define MV_MTRR_FIX  11
#define MV_MSR_EXTRA 76 /* MSRs unknown here that a restored state brought     */

struct mv_system {
  struct kvm_cpuid_entry2 cpuid[MV_CPUID_ENTRIES_MAX];
  unsigned ncpuid;
  bool amd;      /* SYSCALL and SYSENTER differ in compatibility mode     */
  bool fsgsbase; /* offered, likewise below                               */
  bool smap, rdpid, rdtscp, invpcid;
  uint64_t cr4_allowed, efer_allowed, xcr0_allowed;
  uint64_t phys_mask; /* address bits that exist                               */

  /* Events that a restored state brought in flight, and NMIs. */
  struct kvm_vcpu_events injected;
  bool nmi_masked;
  uint8_t shadow_kind; /* KVM_X86_SHADOW_INT_* behind d->irq_shadow            */
  /* Waiting for SIPI: KVM_MP_STATE_UNINITIALIZED or _INIT_RECEIVED, else 0
   * (runnable; d->halted tells HLT). */
  uint32_t mp_wait;

  /* A state that was restored and has not run yet shows the TSC that it came
   * with. */
  bool tsc_stopped;
  uint64_t tsc_value;

  uint64_t tsc_adjust, misc_enable, pat, mcg_status, spec_ctrl, bios_sign, feat_ctl;
  uint64_t mtrr_def, mtrr_fix[MV_MTRR_FIX], mtrr_var[2 * MV_MTRR_VAR];
  uint64_t kvm_wall_clock, kvm_system_time;
  uint64_t clock_tsc, clock_ns; /* guest TSC and kvmclock's time at one moment   */
  uint64_t hwcr, de_cfg;
  unsigned nextra;
  struct kvm_msr_entry extra[MV_MSR_EXTRA];
};

/* ---- modes --------------------------------------------------------------- */

static inline bool mv_is_long(const struct mv_dbt *d) {
  return d->efer & MV_EFER_LMA;
}
static inline bool mv_is_code64(const struct mv_dbt *d) {
  return mv_is_long(d) && (d->seg[MV_SEG_CS].attr & MV_SEG_L);
}
static inline bool mv_is_protected(const struct mv_dbt *d) {
  return d->cr0 & MV_CR0_PE;
}
static inline bool mv_is_vm86(const struct mv_dbt *d) {
  return d->eflags & MV_FL_VM;
}
static inline unsigned mv_iopl(const struct mv_dbt *d) {
  return d->eflags >> 12 & 3;
}
static inline bool mv_is_canonical(uint64_t v) {
  return (uint64_t)((int64_t)(v << 16) >> 16) == v;
}
static inline uint64_t mv_next_rip(const struct mv_dbt *d, const struct mv_insn *insn) {
  uint64_t next = d->rip + insn->len;
  return insn->mode == MV_MODE_64 ? next : (uint32_t)next;
}
static inline int mv_gp0(struct mv_dbt *d) {
  return mv_dbt_raise_code(d, MV_EXC_GP, 0);
}
static inline int mv_ud(struct mv_dbt *d) {
  return mv_dbt_raise(d, MV_EXC_UD);
}

/* ---- operand.c: places of an instruction --------------------------------- */

uint64_t mv_gpr_get(const struct mv_dbt *d, const struct mv_gpr_ref *ref);
/* Writes `size` bytes as the CPU does: 4 zero-extends, 1 and 2 keep the rest. */
void mv_gpr_put(struct mv_dbt *d, unsigned reg, uint64_t value, unsigned size);
/* Linear address of the ModRM memory operand, `len` bytes of it accessed
 * (MV_ACC_*; 0: none, no checks). 0, or -1 with #GP or #SS raised. */
int mv_operand_address(struct mv_dbt *d, const struct mv_insn *insn, unsigned len, unsigned access,
                       uint64_t *gva);
/* Reads or writes the r/m operand: `len` bytes of memory, or the register.
 * A register is written with `reg_size` bytes. */
int mv_operand_read(struct mv_dbt *d, const struct mv_insn *insn, unsigned len, uint64_t *value);
int mv_operand_write(struct mv_dbt *d, const struct mv_insn *insn, uint64_t value, unsigned len,
                     unsigned reg_size);
/* The ModRM reg field as a number 0..15 (control, debug, segment registers). */
static inline unsigned mv_modrm_reg(const struct mv_insn *insn) {
  return (insn->modrm >> 3 & 7) | (insn->rex & 4) << 1;
}
static inline unsigned mv_modrm_rm(const struct mv_insn *insn) {
  return (insn->modrm & 7) | (insn->rex & 1) << 3;
}
/* The stack as PUSH and POP see it: where `sp` points, and how SP is written. */
uint64_t mv_stack_linear(const struct mv_dbt *d, uint64_t sp);
void mv_stack_set(struct mv_dbt *d, uint64_t sp);

/* ---- segment.c ------------------------------------------------------------ */

static inline uint16_t mv_desc_attr(uint64_t raw) {
  return raw >> 40 & 0xf0ff;
}
struct mv_seg mv_desc_seg(uint16_t sel, uint64_t raw);
struct mv_seg mv_seg_real(uint16_t sel, uint16_t attr);
/* A flat segment as SYSCALL and friends load without looking. */
static inline struct mv_seg mv_seg_flat(uint16_t sel, uint16_t attr) {
  return (struct mv_seg){.base = 0, .limit = 0xffffffffu, .sel = sel, .attr = attr};
}
static inline struct mv_seg mv_seg_null(uint16_t sel, unsigned dpl) {
  return (struct mv_seg){.base = 0, .limit = 0, .sel = sel, .attr = dpl << 5};
}
/* Reads the descriptor of `sel` (not null). Outside its table: raises `vector`
 * with code (sel & ~3) | ext. */
int mv_desc_read(struct mv_dbt *d, uint16_t sel, unsigned vector, unsigned ext, uint64_t *raw);
/* Sets the accessed bit in memory if it is clear. */
int mv_desc_accessed(struct mv_dbt *d, uint16_t sel, uint64_t *raw);
/* Loads ES, SS, DS, FS or GS. */
int mv_seg_load(struct mv_dbt *d, unsigned seg, uint16_t sel);
/* After CS, SS or CPL changed. */
void mv_seg_changed(struct mv_dbt *d);

/* ---- one function an instruction ------------------------------------------ */

typedef int mv_system_fn(struct mv_dbt *d, const struct mv_insn *insn);

mv_system_fn mv_sys_mov_cr_read, mv_sys_mov_cr_write, mv_sys_mov_dr_read, mv_sys_mov_dr_write,
    mv_sys_clts, mv_sys_lmsw, mv_sys_smsw, mv_sys_invlpg, mv_sys_invpcid, mv_sys_xgetbv,
    mv_sys_xsetbv; /* control.c */
mv_system_fn mv_sys_lgdt, mv_sys_sgdt, mv_sys_lldt, mv_sys_sldt, mv_sys_ltr, mv_sys_str, mv_sys_lar,
    mv_sys_lsl, mv_sys_verr, mv_sys_mov_seg_read, mv_sys_mov_seg_write, mv_sys_push_seg,
    mv_sys_pop_seg, mv_sys_lxs;                                              /* segment.c */
mv_system_fn mv_sys_jmp_far, mv_sys_call_far, mv_sys_retf, mv_sys_iret;      /* far.c */
mv_system_fn mv_sys_syscall, mv_sys_sysret, mv_sys_sysenter, mv_sys_sysexit; /* syscall.c */
mv_system_fn mv_sys_int, mv_sys_int3, mv_sys_int1, mv_sys_into;              /* interrupt.c */
mv_system_fn mv_sys_rdmsr, mv_sys_wrmsr;                                     /* msr.c */
mv_system_fn mv_sys_in, mv_sys_out;                                          /* port.c */

/* ---- control.c, msr.c, pvclock.c, events.c --------------------------------- */

/* May port accesses [port, port+len) be made at this privilege? 0, or -1 with
 * #GP raised. (INS and OUTS ask, too.) */
int mv_system_port_check(struct mv_dbt *d, uint16_t port, unsigned len);

/* 0, or -1 if there is no such MSR or it refuses the value (no exception is
 * raised). `host`: a state is saved or restored, no side effects. */
int mv_msr_read(struct mv_dbt *d, uint32_t index, bool host, uint64_t *value);
int mv_msr_write(struct mv_dbt *d, uint32_t index, bool host, uint64_t value);
void mv_msr_reset(struct mv_dbt *d);
/* The MSRs of a saved state. */
extern const uint32_t mv_msr_saved[];
extern const unsigned mv_msr_saved_count;

/* Guest TSC now. */
uint64_t mv_system_tsc(struct mv_dbt *d);
/* Lets the time of a restored state run on. The run loop's first question
 * about interrupts calls it. */
void mv_system_resume(struct mv_dbt *d);

/* pvclock.c: writes the wall clock, the vCPU's time page. */
void mv_pvclock_wall(struct mv_dbt *d, uint64_t gpa);
void mv_pvclock_publish(struct mv_dbt *d, uint64_t gpa);
/* Goes on with the time that a page in restored memory tells. */
void mv_pvclock_adopt(struct mv_dbt *d, uint64_t gpa);

/* Reset state; keeps what INIT keeps (SDM 3A table 9-1) if `init`. */
void mv_system_reset(struct mv_dbt *d, bool init);

#endif
