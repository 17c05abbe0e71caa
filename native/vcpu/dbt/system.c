/*
 * The system level's front door: which function does an instruction, those that
 * are a few lines, and the vCPU's reset.
 */
#include "system.h"

#include <errno.h>
#include <stdlib.h>

#include "apic.h"
#include "clock.h"

/* ---- flags ------------------------------------------------------------------- */

/* CLI and STI: IOPL decides (SDM 2A; CR4.VME and PVI are not offered). */
static int may_change_if(struct mv_dbt *d) {
  return mv_is_protected(d) && (mv_is_vm86(d) ? 3u : d->cpl) > mv_iopl(d) ? mv_gp0(d) : 0;
}

static int sys_cli(struct mv_dbt *d, const struct mv_insn *insn) {
  (void)insn;
  if (may_change_if(d) < 0)
    return -1;
  d->eflags &= ~(uint32_t)MV_FL_IF;
  return 0;
}

static int sys_sti(struct mv_dbt *d, const struct mv_insn *insn) {
  (void)insn;
  if (may_change_if(d) < 0)
    return -1;
  if (!(d->eflags & MV_FL_IF)) {
    d->eflags |= MV_FL_IF;
    d->irq_shadow = true;
    d->sys->shadow_kind = KVM_X86_SHADOW_INT_STI;
  }
  return 0;
}

static int sys_hlt(struct mv_dbt *d, const struct mv_insn *insn) {
  (void)insn;
  if (d->cpl)
    return mv_gp0(d);
  d->halted = true;
  return 0;
}

static int sys_pushf(struct mv_dbt *d, const struct mv_insn *insn) {
  uint64_t v = mv_dbt_rflags(d) & ~(uint64_t)(MV_FL_RF | MV_FL_VM);
  uint64_t sp = d->gpr[MV_RSP] - insn->op_size;
  if (mv_is_vm86(d) && mv_iopl(d) < 3)
    return mv_gp0(d);
  if (mv_mmu_write(d, mv_stack_linear(d, sp), &v, insn->op_size, MV_AS_CPL) < 0)
    return -1;
  mv_stack_set(d, sp);
  return 0;
}

/* IF changes if CPL <= IOPL, IOPL at CPL 0 alone; VM, VIF, VIP never; RF is
 * cleared. */
static int sys_popf(struct mv_dbt *d, const struct mv_insn *insn) {
  uint64_t v = 0, sp = d->gpr[MV_RSP], old = mv_dbt_rflags(d);
  uint64_t mask = MV_FL_HOST | MV_FL_TF | MV_FL_NT | MV_FL_AC | MV_FL_ID;
  if (mv_is_vm86(d) && mv_iopl(d) < 3)
    return mv_gp0(d);
  if (mv_mmu_read(d, mv_stack_linear(d, sp), &v, insn->op_size, MV_AS_CPL) < 0)
    return -1;
  if (!mv_is_protected(d) || d->cpl <= mv_iopl(d))
    mask |= MV_FL_IF;
  if (!mv_is_protected(d) || d->cpl == 0)
    mask |= MV_FL_IOPL;
  if (insn->op_size == 2)
    mask &= 0xffff;
  mv_dbt_set_rflags(d, ((old & ~mask) | (v & mask)) & ~(uint64_t)MV_FL_RF);
  mv_stack_set(d, sp + insn->op_size);
  return 0;
}

/* STAC, CLAC: SMAP's key. */
static int sys_stac(struct mv_dbt *d, const struct mv_insn *insn) {
  if (!d->sys->smap || d->cpl)
    return mv_ud(d);
  if (insn->op == MV_OP_STAC)
    d->eflags |= MV_FL_AC;
  else
    d->eflags &= ~(uint32_t)MV_FL_AC;
  return 0;
}

/* ---- time, identity ------------------------------------------------------------- */

uint64_t mv_system_tsc(struct mv_dbt *d) {
  if (d->sys->tsc_stopped)
    mv_system_resume(d);
  return mv_clock_tsc() + d->tsc_offset;
}

void mv_system_resume(struct mv_dbt *d) {
  struct mv_system *s = d->sys;
  if (!s->tsc_stopped)
    return;
  s->tsc_stopped = false;
  d->tsc_offset = s->tsc_value - mv_clock_tsc();
  mv_lapic_resume(d->lapic);
}

static int sys_rdtsc(struct mv_dbt *d, const struct mv_insn *insn) {
  if (insn->op == MV_OP_RDTSCP && !d->sys->rdtscp)
    return mv_ud(d);
  if ((d->cr4 & MV_CR4_TSD) && d->cpl)
    return mv_gp0(d);
  uint64_t tsc = mv_system_tsc(d);
  d->gpr[MV_RAX] = (uint32_t)tsc;
  d->gpr[MV_RDX] = tsc >> 32;
  if (insn->op == MV_OP_RDTSCP)
    d->gpr[MV_RCX] = (uint32_t)d->tsc_aux;
  return 0;
}

static int sys_rdpid(struct mv_dbt *d, const struct mv_insn *insn) {
  if (!d->sys->rdpid)
    return mv_ud(d);
  d->gpr[mv_modrm_rm(insn)] = d->tsc_aux;
  return 0;
}

/* There are no performance counters. */
static int sys_rdpmc(struct mv_dbt *d, const struct mv_insn *insn) {
  (void)insn;
  return mv_gp0(d);
}

static int sys_cpuid(struct mv_dbt *d, const struct mv_insn *insn) {
  struct mv_cpuid_dynamic dyn = {
      .cr4 = d->cr4, .xcr0 = d->xcr0, .apic_base = mv_lapic_base(d->lapic)};
  uint32_t r[4], leaf = (uint32_t)d->gpr[MV_RAX];
  (void)insn;
  mv_cpuid_query(d->sys->cpuid, d->sys->ncpuid, leaf, (uint32_t)d->gpr[MV_RCX], &dyn, r);
  if (leaf == MV_CPUID_HV_TIMING)
    r[MV_CPUID_EAX] = (uint32_t)(mv_clock_hz() / 1000);
  d->gpr[MV_RAX] = r[MV_CPUID_EAX];
  d->gpr[MV_RBX] = r[MV_CPUID_EBX];
  d->gpr[MV_RCX] = r[MV_CPUID_ECX];
  d->gpr[MV_RDX] = r[MV_CPUID_EDX];
  return 0;
}

/* ---- FS and GS bases --------------------------------------------------------------- */

static int sys_swapgs(struct mv_dbt *d, const struct mv_insn *insn) {
  if (insn->mode != MV_MODE_64)
    return mv_ud(d);
  if (d->cpl)
    return mv_gp0(d);
  uint64_t base = d->seg[MV_SEG_GS].base;
  d->seg[MV_SEG_GS].base = d->kernel_gs_base;
  d->kernel_gs_base = base;
  return 0;
}

static int sys_rdbase(struct mv_dbt *d, const struct mv_insn *insn) {
  unsigned seg = insn->op == MV_OP_RDFSBASE ? MV_SEG_FS : MV_SEG_GS;
  if (insn->mode != MV_MODE_64 || !(d->cr4 & MV_CR4_FSGSBASE))
    return mv_ud(d);
  mv_gpr_put(d, mv_modrm_rm(insn), d->seg[seg].base, insn->op_size);
  return 0;
}

static int sys_wrbase(struct mv_dbt *d, const struct mv_insn *insn) {
  unsigned seg = insn->op == MV_OP_WRFSBASE ? MV_SEG_FS : MV_SEG_GS;
  uint64_t v = d->gpr[mv_modrm_rm(insn)];
  if (insn->mode != MV_MODE_64 || !(d->cr4 & MV_CR4_FSGSBASE))
    return mv_ud(d);
  if (insn->op_size < 8)
    v = (uint32_t)v;
  if (!mv_is_canonical(v))
    return mv_gp0(d);
  d->seg[seg].base = v;
  return 0;
}

/* ---- the rest ------------------------------------------------------------------------ */

/* INVD, WBINVD: the caches are coherent with everything that we offer. */
static int sys_wbinvd(struct mv_dbt *d, const struct mv_insn *insn) {
  (void)insn;
  return d->cpl ? mv_gp0(d) : 0;
}

/* KVM hypercalls (Documentation/virt/kvm/x86/hypercalls.rst): none is offered. */
static int sys_vmcall(struct mv_dbt *d, const struct mv_insn *insn) {
  enum { KVM_EPERM = 1, KVM_ENOSYS = 1000 };
  (void)insn;
  d->gpr[MV_RAX] = (uint64_t)(int64_t)(d->cpl ? -KVM_EPERM : -KVM_ENOSYS);
  return 0;
}

static int sys_undefined(struct mv_dbt *d, const struct mv_insn *insn) {
  (void)insn;
  return mv_ud(d);
}

static mv_system_fn *const table[MV_OP_COUNT] = {
    [MV_OP_JMP_FAR] = mv_sys_jmp_far,
    [MV_OP_CALL_FAR] = mv_sys_call_far,
    [MV_OP_RETF] = mv_sys_retf,
    [MV_OP_PUSHF] = sys_pushf,
    [MV_OP_POPF] = sys_popf,
    [MV_OP_PUSH_SEG] = mv_sys_push_seg,
    [MV_OP_POP_SEG] = mv_sys_pop_seg,
    [MV_OP_HLT] = sys_hlt,
    [MV_OP_CLI] = sys_cli,
    [MV_OP_STI] = sys_sti,
    [MV_OP_IN] = mv_sys_in,
    [MV_OP_OUT] = mv_sys_out,
    [MV_OP_INT] = mv_sys_int,
    [MV_OP_INT3] = mv_sys_int3,
    [MV_OP_INT1] = mv_sys_int1,
    [MV_OP_INTO] = mv_sys_into,
    [MV_OP_IRET] = mv_sys_iret,
    [MV_OP_SYSCALL] = mv_sys_syscall,
    [MV_OP_SYSRET] = mv_sys_sysret,
    [MV_OP_SYSENTER] = mv_sys_sysenter,
    [MV_OP_SYSEXIT] = mv_sys_sysexit,
    [MV_OP_MOV_CR_READ] = mv_sys_mov_cr_read,
    [MV_OP_MOV_CR_WRITE] = mv_sys_mov_cr_write,
    [MV_OP_MOV_DR_READ] = mv_sys_mov_dr_read,
    [MV_OP_MOV_DR_WRITE] = mv_sys_mov_dr_write,
    [MV_OP_CLTS] = mv_sys_clts,
    [MV_OP_LMSW] = mv_sys_lmsw,
    [MV_OP_SMSW] = mv_sys_smsw,
    [MV_OP_LGDT] = mv_sys_lgdt,
    [MV_OP_SGDT] = mv_sys_sgdt,
    [MV_OP_LIDT] = mv_sys_lgdt,
    [MV_OP_SIDT] = mv_sys_sgdt,
    [MV_OP_LLDT] = mv_sys_lldt,
    [MV_OP_SLDT] = mv_sys_sldt,
    [MV_OP_LTR] = mv_sys_ltr,
    [MV_OP_STR] = mv_sys_str,
    [MV_OP_LAR] = mv_sys_lar,
    [MV_OP_LSL] = mv_sys_lsl,
    [MV_OP_VERR] = mv_sys_verr,
    [MV_OP_VERW] = mv_sys_verr,
    [MV_OP_MOV_SEG_READ] = mv_sys_mov_seg_read,
    [MV_OP_MOV_SEG_WRITE] = mv_sys_mov_seg_write,
    [MV_OP_LXS] = mv_sys_lxs,
    [MV_OP_RDMSR] = mv_sys_rdmsr,
    [MV_OP_WRMSR] = mv_sys_wrmsr,
    [MV_OP_RDTSC] = sys_rdtsc,
    [MV_OP_RDTSCP] = sys_rdtsc,
    [MV_OP_RDPMC] = sys_rdpmc,
    [MV_OP_RDPID] = sys_rdpid,
    [MV_OP_CPUID] = sys_cpuid,
    [MV_OP_INVLPG] = mv_sys_invlpg,
    [MV_OP_INVPCID] = mv_sys_invpcid,
    [MV_OP_INVD] = sys_wbinvd,
    [MV_OP_WBINVD] = sys_wbinvd,
    [MV_OP_SWAPGS] = sys_swapgs,
    [MV_OP_RDFSBASE] = sys_rdbase,
    [MV_OP_RDGSBASE] = sys_rdbase,
    [MV_OP_WRFSBASE] = sys_wrbase,
    [MV_OP_WRGSBASE] = sys_wrbase,
    [MV_OP_XGETBV] = mv_sys_xgetbv,
    [MV_OP_XSETBV] = mv_sys_xsetbv,
    [MV_OP_STAC] = sys_stac,
    [MV_OP_CLAC] = sys_stac,
    [MV_OP_MONITOR] = sys_undefined,
    [MV_OP_MWAIT] = sys_undefined,
    [MV_OP_VMCALL] = sys_vmcall,
    [MV_OP_VMMCALL] = sys_vmcall,
};

int mv_system_exec(struct mv_dbt *d, const struct mv_insn *insn) {
  mv_system_fn *fn = insn->op < MV_OP_COUNT ? table[insn->op] : NULL;
  bool shadow = d->irq_shadow;
  if (!fn)
    return mv_ud(d);
  d->irq_shadow = false;
  int r = fn(d, insn);
  if (r == MV_SYS_NEXT) {
    d->rip = mv_next_rip(d, insn);
    d->eflags &= ~(uint32_t)MV_FL_RF;
    return 0;
  }
  if (r == MV_SYS_JUMPED)
    return 0;
  d->irq_shadow = shadow;
  return r;
}

/* ---- life ------------------------------------------------------------------------------- */

enum {
  REAL_CODE = MV_SEG_P | MV_SEG_S | MV_SEG_CODE | MV_SEG_RW | MV_SEG_A,
  REAL_DATA = MV_SEG_P | MV_SEG_S | MV_SEG_RW | MV_SEG_A
};

static void reset_segments(struct mv_dbt *d) {
  for (unsigned i = MV_SEG_ES; i <= MV_SEG_GS; i++)
    d->seg[i] = mv_seg_real(0, REAL_DATA);
  d->seg[MV_SEG_CS] = mv_seg_real(0xf000, REAL_CODE);
  d->seg[MV_SEG_CS].base = 0xffff0000;
  d->seg[MV_SEG_LDTR] = (struct mv_seg){.limit = 0xffff, .attr = MV_SEG_P | 2};
  d->seg[MV_SEG_TR] = (struct mv_seg){.limit = 0xffff, .attr = MV_SEG_P | 11};
  d->gdt = d->idt = (struct mv_dtr){.base = 0, .limit = 0xffff};
}

/* SDM 3A table 9-1. Vector state is exec.c's; the caller tells the mmu. */
void mv_system_reset(struct mv_dbt *d, bool init) {
  struct mv_system *s = d->sys;
  __builtin_memset(d->gpr, 0, sizeof(d->gpr));
  d->gpr[MV_RDX] = s->cpuid[1].eax; /* family, model, stepping                   */
  d->rip = 0xfff0;
  mv_dbt_set_rflags(d, 2);
  d->cpl = 0;
  d->irq_shadow = false;
  d->cr0 = (init ? d->cr0 & (MV_CR0_CD | MV_CR0_NW) : MV_CR0_CD | MV_CR0_NW) | MV_CR0_ET;
  d->cr2 = d->cr3 = d->cr4 = d->cr8 = d->efer = 0;
  __builtin_memset(d->dr, 0, sizeof(d->dr));
  d->dr[6] = 0xffff0ff0;
  d->dr[7] = 0x400;
  reset_segments(d);
  s->nmi_masked = false;
  s->injected = (struct kvm_vcpu_events){0};
  if (!init) {
    d->xcr0 = 1;
    d->tsc_offset = 0;
    s->clock_tsc = mv_clock_origin();
    s->clock_ns = 0;
    mv_msr_reset(d);
  }
  /* All but the bootstrap CPU wait for a SIPI. */
  bool bootstrap = d->vcpu->id == 0;
  s->mp_wait = bootstrap ? 0 : init ? KVM_MP_STATE_INIT_RECEIVED : KVM_MP_STATE_UNINITIALIZED;
  d->halted = !bootstrap;
  mv_lapic_reset(d->lapic, init);
}

static bool offers(const struct mv_system *s, enum mv_feature feature) {
  return mv_cpuid_has(s->cpuid, s->ncpuid, feature);
}

static void note_offered(struct mv_system *s) {
  uint32_t r[4], r7[4];
  mv_cpuid_query(s->cpuid, s->ncpuid, 0x0, 0, NULL, r);
  s->amd = r[MV_CPUID_EBX] == 0x68747541 || r[MV_CPUID_EBX] == 0x6f677948; /* "Auth", "Hygo" */
  mv_cpuid_query(s->cpuid, s->ncpuid, 0x80000008, 0, NULL, r);
  s->phys_mask = (1ULL << (r[MV_CPUID_EAX] & 0xff)) - 1;
  mv_cpuid_query(s->cpuid, s->ncpuid, 0x7, 0, NULL, r7);
  s->fsgsbase = offers(s, MV_FEAT_FSGSBASE);
  s->smap = offers(s, MV_FEAT_SMAP);
  s->rdpid = offers(s, MV_FEAT_RDPID);
  s->rdtscp = offers(s, MV_FEAT_RDTSCP);
  s->invpcid = offers(s, MV_FEAT_INVPCID);
  s->xcr0_allowed = mv_cpuid_xcr0(s->cpuid, s->ncpuid);
  s->cr4_allowed = MV_CR4_TSD | MV_CR4_DE | MV_CR4_PSE | MV_CR4_PAE | MV_CR4_MCE | MV_CR4_PGE |
                   MV_CR4_PCE | MV_CR4_OSFXSR | MV_CR4_OSXMMEXCPT;
  s->cr4_allowed |= s->fsgsbase ? MV_CR4_FSGSBASE : 0;
  s->cr4_allowed |= offers(s, MV_FEAT_XSAVE) ? MV_CR4_OSXSAVE : 0;
  s->cr4_allowed |= r7[MV_CPUID_EBX] >> 7 & 1 ? MV_CR4_SMEP : 0;
  s->cr4_allowed |= s->smap ? MV_CR4_SMAP : 0;
  s->efer_allowed = MV_EFER_SCE | MV_EFER_LME | MV_EFER_NXE;
  mv_cpuid_query(s->cpuid, s->ncpuid, 0x80000021, 0, NULL, r);
  s->efer_allowed |= r[MV_CPUID_EAX] >> 8 & 1 ? MV_EFER_AUTOIBRS : 0;
}

static void build_cpuid(struct mv_dbt *d) {
  struct mv_system *s = d->sys;
  unsigned ncpus = d->vm->ncpus ? d->vm->ncpus : 1;
  s->ncpuid =
      mv_cpuid_build(s->cpuid, MV_CPUID_ENTRIES_MAX, MV_CPUID_DBT, ncpus, d->vcpu->id, NULL);
  note_offered(s);
}

int mv_system_init(struct mv_dbt *d) {
  mv_clock_start();
  d->sys = calloc(1, sizeof(*d->sys));
  if (!d->sys)
    return -ENOMEM;
  build_cpuid(d);
  d->lapic = mv_lapic_new(d);
  if (!d->lapic) {
    free(d->sys);
    d->sys = NULL;
    return -ENOMEM;
  }
  mv_system_reset(d, false);
  return 0;
}

void mv_system_destroy(struct mv_dbt *d) {
  mv_lapic_free(d->lapic);
  free(d->sys);
  d->lapic = NULL;
  d->sys = NULL;
}
