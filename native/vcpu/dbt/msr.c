/*
 * Model-specific registers: SDM 4; APM 2 appendix A; Linux's own list in
 * arch/x86/include/asm/msr-index.h.
 *
 * Offered is what CPUID promises, and what Linux touches at boot without
 * asking. Any other MSR raises #GP, as on KVM; Linux probes with that in mind.
 */
#include "apic.h"
#include "clock.h"
#include "system.h"

enum {
  MSR_TSC = 0x10,
  MSR_PLATFORM_ID = 0x17,
  MSR_APIC_BASE = 0x1b,
  MSR_FEAT_CTL = 0x3a,
  MSR_TSC_ADJUST = 0x3b,
  MSR_SPEC_CTRL = 0x48,
  MSR_PRED_CMD = 0x49,
  MSR_BIOS_UPDT_TRIG = 0x79,
  MSR_BIOS_SIGN_ID = 0x8b,
  MSR_PLATFORM_INFO = 0xce,
  MSR_MTRRCAP = 0xfe,
  MSR_ARCH_CAPABILITIES = 0x10a,
  MSR_SYSENTER_CS = 0x174,
  MSR_SYSENTER_ESP = 0x175,
  MSR_SYSENTER_EIP = 0x176,
  MSR_MCG_CAP = 0x179,
  MSR_MCG_STATUS = 0x17a,
  MSR_PERF_STATUS = 0x198,
  MSR_PERF_CTL = 0x199,
  MSR_MISC_ENABLE = 0x1a0,
  MSR_DEBUGCTL = 0x1d9,
  MSR_MTRR_PHYS = 0x200,
  MSR_MTRR_FIX64K = 0x250,
  MSR_MTRR_FIX16K = 0x258,
  MSR_MTRR_FIX4K = 0x268,
  MSR_PAT = 0x277,
  MSR_MTRR_DEF = 0x2ff,
  MSR_RAPL_UNIT = 0x606,
  MSR_TSC_DEADLINE = 0x6e0,
  MSR_X2APIC = 0x800,
  MSR_X2APIC_END = 0x8ff,
  MSR_KVM_WALL_CLOCK_NEW = 0x4b564d00,
  MSR_KVM_SYSTEM_TIME_NEW = 0x4b564d01,
};
#define MSR_EFER           0xc0000080u
#define MSR_STAR           0xc0000081u
#define MSR_LSTAR          0xc0000082u
#define MSR_CSTAR          0xc0000083u
#define MSR_SFMASK         0xc0000084u
#define MSR_FS_BASE        0xc0000100u
#define MSR_GS_BASE        0xc0000101u
#define MSR_KERNEL_GS_BASE 0xc0000102u
#define MSR_TSC_AUX        0xc0000103u
#define MSR_AMD_SYSCFG     0xc0010010u
#define MSR_AMD_HWCR       0xc0010015u
#define MSR_AMD_NB_CFG     0xc001001fu
#define MSR_AMD_INT_PEND   0xc0010055u
#define MSR_AMD_MMIO_CONF  0xc0010058u
#define MSR_AMD_LS_CFG     0xc0011020u
#define MSR_AMD_IC_CFG     0xc0011021u
#define MSR_AMD_DC_CFG     0xc0011022u
#define MSR_AMD_TW_CFG     0xc0011023u
#define MSR_AMD_DE_CFG     0xc0011029u
#define MSR_AMD_BU_CFG2    0xc001102au

#define MTRRCAP       (MV_MTRR_VAR | 1u << 8 | 1u << 10) /* fixed ranges, WC   */
#define HWCR_TSC_P0   (1u << 24) /* the TSC counts at the P0 frequency         */
#define HWCR_WRITABLE (HWCR_TSC_P0 | 0x40018u)
#define DE_CFG_LFENCE 2u      /* LFENCE serialises                                  */
#define MISC_ENABLE   0x1801u /* fast strings; no BTS, no PEBS                 */
#define FEAT_CTL_LOCK 1u
#define DEFAULT_PAT   0x0007040600070406ULL
#define MTRR_ENABLED  0xc00u
#define MTRR_WB       6u

/* ARCH_CAPABILITIES: RDCL_NO IBRS_ALL SKIP_L1DFL SSB_NO MDS_NO PSCHANGE_MC_NO
 * TAA_NO SBDR_SSDP_NO FBSDP_NO PSDP_NO BHI_NO PBRSB_NO GDS_NO RFDS_NO ITS_NO:
 * see "Mitigations" in cpuid.c. */
#define ARCH_CAPS                                                                                  \
  (1ULL << 0 | 1ULL << 1 | 1ULL << 3 | 1ULL << 4 | 1ULL << 5 | 1ULL << 6 | 1ULL << 8 |             \
   1ULL << 13 | 1ULL << 14 | 1ULL << 15 | 1ULL << 20 | 1ULL << 24 | 1ULL << 26 | 1ULL << 27 |      \
   1ULL << 62)

/* TSC before what depends on it. What lies in struct kvm_sregs (EFER, APIC
 * base, FS and GS base) is not repeated. */
const uint32_t mv_msr_saved[] = {
    MSR_TSC,
    MSR_TSC_ADJUST,
    MSR_FEAT_CTL,
    MSR_BIOS_SIGN_ID,
    MSR_SYSENTER_CS,
    MSR_SYSENTER_ESP,
    MSR_SYSENTER_EIP,
    MSR_STAR,
    MSR_LSTAR,
    MSR_CSTAR,
    MSR_SFMASK,
    MSR_KERNEL_GS_BASE,
    MSR_TSC_AUX,
    MSR_PAT,
    MSR_MISC_ENABLE,
    MSR_MCG_STATUS,
    MSR_SPEC_CTRL,
    MSR_MTRR_DEF,
    MSR_MTRR_PHYS + 0,
    MSR_MTRR_PHYS + 1,
    MSR_MTRR_PHYS + 2,
    MSR_MTRR_PHYS + 3,
    MSR_MTRR_PHYS + 4,
    MSR_MTRR_PHYS + 5,
    MSR_MTRR_PHYS + 6,
    MSR_MTRR_PHYS + 7,
    MSR_MTRR_PHYS + 8,
    MSR_MTRR_PHYS + 9,
    MSR_MTRR_PHYS + 10,
    MSR_MTRR_PHYS + 11,
    MSR_MTRR_PHYS + 12,
    MSR_MTRR_PHYS + 13,
    MSR_MTRR_PHYS + 14,
    MSR_MTRR_PHYS + 15,
    MSR_MTRR_FIX64K,
    MSR_MTRR_FIX16K,
    MSR_MTRR_FIX16K + 1,
    MSR_MTRR_FIX4K,
    MSR_MTRR_FIX4K + 1,
    MSR_MTRR_FIX4K + 2,
    MSR_MTRR_FIX4K + 3,
    MSR_MTRR_FIX4K + 4,
    MSR_MTRR_FIX4K + 5,
    MSR_MTRR_FIX4K + 6,
    MSR_MTRR_FIX4K + 7,
    MSR_AMD_HWCR,
    MSR_AMD_DE_CFG,
    MSR_KVM_WALL_CLOCK_NEW,
    MSR_KVM_SYSTEM_TIME_NEW,
    MSR_TSC_DEADLINE,
};
const unsigned mv_msr_saved_count = sizeof(mv_msr_saved) / sizeof(mv_msr_saved[0]);
_Static_assert(sizeof(mv_msr_saved) / sizeof(mv_msr_saved[0]) + MV_MSR_EXTRA <= MV_MSRS_MAX,
               "struct mv_vcpu_state holds them all");

/* Where a register lies that is plain storage, or NULL. */
static uint64_t *storage(struct mv_dbt *d, uint32_t index) {
  struct mv_system *s = d->sys;
  switch (index) {
  case MSR_SYSENTER_CS:
    return &d->sysenter_cs;
  case MSR_SYSENTER_ESP:
    return &d->sysenter_esp;
  case MSR_SYSENTER_EIP:
    return &d->sysenter_eip;
  case MSR_STAR:
    return &d->star;
  case MSR_LSTAR:
    return &d->lstar;
  case MSR_CSTAR:
    return &d->cstar;
  case MSR_SFMASK:
    return &d->sfmask;
  case MSR_FS_BASE:
    return &d->seg[MV_SEG_FS].base;
  case MSR_GS_BASE:
    return &d->seg[MV_SEG_GS].base;
  case MSR_KERNEL_GS_BASE:
    return &d->kernel_gs_base;
  case MSR_TSC_AUX:
    return &d->tsc_aux;
  case MSR_PAT:
    return &s->pat;
  case MSR_MISC_ENABLE:
    return &s->misc_enable;
  case MSR_MCG_STATUS:
    return &s->mcg_status;
  case MSR_SPEC_CTRL:
    return &s->spec_ctrl;
  case MSR_BIOS_SIGN_ID:
    return &s->bios_sign;
  case MSR_FEAT_CTL:
    return &s->feat_ctl;
  case MSR_AMD_HWCR:
    return &s->hwcr;
  case MSR_AMD_DE_CFG:
    return &s->de_cfg;
  case MSR_MTRR_DEF:
    return &s->mtrr_def;
  case MSR_MTRR_FIX64K:
    return &s->mtrr_fix[0];
  case MSR_MTRR_FIX16K:
    return &s->mtrr_fix[1];
  case MSR_MTRR_FIX16K + 1:
    return &s->mtrr_fix[2];
  case MSR_KVM_WALL_CLOCK_NEW:
    return &s->kvm_wall_clock;
  case MSR_KVM_SYSTEM_TIME_NEW:
    return &s->kvm_system_time;
  }
  if (index - MSR_MTRR_FIX4K < 8)
    return &s->mtrr_fix[3 + index - MSR_MTRR_FIX4K];
  if (index - MSR_MTRR_PHYS < 2 * MV_MTRR_VAR)
    return &s->mtrr_var[index - MSR_MTRR_PHYS];
  return NULL;
}

/* Read as zero and ignore writes: Linux touches them at boot, they do nothing
 * that we could do. */
static bool is_ignored(const struct mv_system *s, uint32_t index) {
  switch (index) {
  case MSR_PLATFORM_ID:
  case MSR_BIOS_UPDT_TRIG:
  case MSR_MCG_CAP:
  case MSR_DEBUGCTL:
  case MSR_PLATFORM_INFO:
  case MSR_PERF_STATUS:
  case MSR_PERF_CTL:
  case MSR_RAPL_UNIT:
    return true;
  case MSR_PRED_CMD:
    return true;
  case MSR_AMD_SYSCFG:
  case MSR_AMD_NB_CFG:
  case MSR_AMD_INT_PEND:
  case MSR_AMD_MMIO_CONF:
  case MSR_AMD_LS_CFG:
  case MSR_AMD_IC_CFG:
  case MSR_AMD_DC_CFG:
  case MSR_AMD_TW_CFG:
  case MSR_AMD_BU_CFG2:
    return s->amd;
  }
  return false;
}

/* ---- values that are refused ------------------------------------------------- */

/* Memory types: UC, WC, WT, WP, WB, and in the PAT UC-. */
static bool is_memory_type(uint8_t t, bool pat) {
  return t == 0 || t == 1 || t == 4 || t == 5 || t == 6 || (pat && t == 7);
}

static bool are_memory_types(uint64_t v, bool pat) {
  for (unsigned i = 0; i < 64; i += 8)
    if (!is_memory_type(v >> i & 0xff, pat))
      return false;
  return true;
}

static bool is_good(const struct mv_dbt *d, uint32_t index, uint64_t v) {
  switch (index) {
  case MSR_LSTAR:
  case MSR_CSTAR:
  case MSR_FS_BASE:
  case MSR_GS_BASE:
  case MSR_KERNEL_GS_BASE:
  case MSR_SYSENTER_ESP:
  case MSR_SYSENTER_EIP:
    return mv_is_canonical(v);
  case MSR_TSC_AUX:
  case MSR_SFMASK:
    return v >> 32 == 0;
  case MSR_PAT:
    return are_memory_types(v, true);
  case MSR_MTRR_DEF:
    return !(v & ~0xcffULL) && is_memory_type(v & 0xff, false);
  case MSR_FEAT_CTL:
    return false; /* locked                                                      */
  case MSR_AMD_HWCR:
    return !(v & ~(uint64_t)HWCR_WRITABLE);
  case MSR_AMD_DE_CFG:
    return !(v & ~(uint64_t)DE_CFG_LFENCE);
  case MSR_SPEC_CTRL:
    return !(v & ~7ULL);
  }
  if (index - MSR_MTRR_FIX64K <= MSR_MTRR_FIX4K + 7 - MSR_MTRR_FIX64K)
    return are_memory_types(v, false);
  if (index - MSR_MTRR_PHYS < 2 * MV_MTRR_VAR) {
    uint64_t low = index & 1 ? 0x800 : 0xff;
    return !(v & ~((d->sys->phys_mask & ~0xfffULL) | low)) &&
           ((index & 1) || is_memory_type(v & 0xff, false));
  }
  return true;
}

static bool is_offered(const struct mv_system *s, uint32_t index) {
  if (index == MSR_AMD_HWCR || index == MSR_AMD_DE_CFG)
    return s->amd;
  return true;
}

/* ---- those that do something ----------------------------------------------------- */

static int write_efer(struct mv_dbt *d, uint64_t v, bool host) {
  if (!host) {
    if (v & ~(d->sys->efer_allowed | MV_EFER_LMA))
      return -1;
    if ((d->cr0 & MV_CR0_PG) && ((v ^ d->efer) & MV_EFER_LME))
      return -1;
    v = (v & ~(uint64_t)MV_EFER_LMA) | (d->efer & MV_EFER_LMA);
  }
  uint64_t changed = v ^ d->efer;
  d->efer = v;
  if (changed & MV_EFER_NXE)
    mv_mmu_flush_all(d);
  if (changed)
    mv_mmu_mode_changed(d);
  return 0;
}

static void write_tsc(struct mv_dbt *d, uint64_t v, bool host) {
  struct mv_system *s = d->sys;
  if (host) {
    s->tsc_stopped = true;
    s->tsc_value = v;
    return;
  }
  uint64_t delta = v - mv_system_tsc(d);
  d->tsc_offset += delta;
  s->clock_tsc += delta;
  s->tsc_adjust += delta;
}

static void write_tsc_adjust(struct mv_dbt *d, uint64_t v, bool host) {
  uint64_t delta = v - d->sys->tsc_adjust;
  d->sys->tsc_adjust = v;
  if (!host) {
    d->tsc_offset += delta;
    d->sys->clock_tsc += delta;
  }
}

static void write_kvm_clock(struct mv_dbt *d, uint32_t index, uint64_t v, bool host) {
  uint64_t gpa = v & ~1ULL;
  *storage(d, index) = v;
  if (index == MSR_KVM_WALL_CLOCK_NEW) {
    if (!host)
      mv_pvclock_wall(d, v);
  } else if (v & 1) {
    if (host)
      mv_pvclock_adopt(d, gpa);
    else
      mv_pvclock_publish(d, gpa);
  }
}

int mv_msr_read(struct mv_dbt *d, uint32_t index, bool host, uint64_t *value) {
  struct mv_system *s = d->sys;
  if (index >= MSR_X2APIC && index <= MSR_X2APIC_END)
    return mv_lapic_msr_read(d->lapic, index, value);
  switch (index) {
  case MSR_TSC:
    *value = host && s->tsc_stopped ? s->tsc_value : mv_system_tsc(d);
    return 0;
  case MSR_TSC_ADJUST:
    *value = s->tsc_adjust;
    return 0;
  case MSR_APIC_BASE:
    *value = mv_lapic_base(d->lapic);
    return 0;
  case MSR_TSC_DEADLINE:
    *value = mv_lapic_tsc_deadline(d->lapic);
    return 0;
  case MSR_EFER:
    *value = d->efer;
    return 0;
  case MSR_MTRRCAP:
    *value = MTRRCAP;
    return 0;
  case MSR_ARCH_CAPABILITIES:
    *value = ARCH_CAPS;
    return s->amd ? -1 : 0;
  case MSR_PRED_CMD:
    return -1; /* write-only                                                      */
  }
  uint64_t *p = storage(d, index);
  *value = p ? *p : 0;
  if (!host && !is_offered(s, index))
    return -1;
  return p || is_ignored(s, index) ? 0 : -1;
}

int mv_msr_write(struct mv_dbt *d, uint32_t index, bool host, uint64_t value) {
  if (index >= MSR_X2APIC && index <= MSR_X2APIC_END)
    return mv_lapic_msr_write(d->lapic, index, value);
  switch (index) {
  case MSR_TSC:
    write_tsc(d, value, host);
    return 0;
  case MSR_TSC_ADJUST:
    write_tsc_adjust(d, value, host);
    return 0;
  case MSR_APIC_BASE:
    return mv_lapic_set_base(d->lapic, value, host);
  case MSR_TSC_DEADLINE:
    mv_lapic_set_tsc_deadline(d->lapic, value);
    return 0;
  case MSR_EFER:
    return write_efer(d, value, host);
  case MSR_KVM_WALL_CLOCK_NEW:
  case MSR_KVM_SYSTEM_TIME_NEW:
    write_kvm_clock(d, index, value, host);
    return 0;
  case MSR_BIOS_SIGN_ID: /* 0 is written before CPUID(1) fills it                  */
    if (host)
      d->sys->bios_sign = value;
    return 0;
  case MSR_MCG_CAP:
    return -1;
  }
  uint64_t *p = storage(d, index);
  if (!host && p && (!is_offered(d->sys, index) || !is_good(d, index, value)))
    return -1;
  if (p)
    *p = value;
  return p || is_ignored(d->sys, index) ? 0 : -1;
}

void mv_msr_reset(struct mv_dbt *d) {
  struct mv_system *s = d->sys;
  s->pat = DEFAULT_PAT;
  s->misc_enable = MISC_ENABLE;
  s->feat_ctl = FEAT_CTL_LOCK;
  /* Microcode revision, in the high half on Intel. */
  s->bios_sign = s->amd ? 0x01000065 : 0x100000000ULL;
  s->hwcr = HWCR_TSC_P0;
  s->de_cfg = DE_CFG_LFENCE;
  /* As firmware leaves it: all memory is write-back. */
  s->mtrr_def = MTRR_ENABLED | MTRR_WB;
  for (unsigned i = 0; i < MV_MTRR_FIX; i++)
    s->mtrr_fix[i] = 0x0606060606060606ULL;
}

int mv_sys_rdmsr(struct mv_dbt *d, const struct mv_insn *insn) {
  uint64_t v;
  (void)insn;
  if (d->cpl || mv_msr_read(d, (uint32_t)d->gpr[MV_RCX], false, &v) < 0)
    return mv_gp0(d);
  d->gpr[MV_RAX] = (uint32_t)v;
  d->gpr[MV_RDX] = v >> 32;
  return 0;
}

int mv_sys_wrmsr(struct mv_dbt *d, const struct mv_insn *insn) {
  uint64_t v = d->gpr[MV_RDX] << 32 | (uint32_t)d->gpr[MV_RAX];
  (void)insn;
  if (d->cpl || mv_msr_write(d, (uint32_t)d->gpr[MV_RCX], false, v) < 0)
    return mv_gp0(d);
  return 0;
}
