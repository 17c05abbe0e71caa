/* Control and debug registers, XCR0, TLB maintenance: SDM 3A §2.5, §17.2. */
#include "apic.h"
#include "system.h"

/* CR0 bits that exist; the others of the low half read as written zero. */
#define CR0_BITS                                                                                   \
  (MV_CR0_PE | MV_CR0_MP | MV_CR0_EM | MV_CR0_TS | MV_CR0_NE | MV_CR0_WP | MV_CR0_AM | MV_CR0_NW | \
   MV_CR0_CD | MV_CR0_PG)
#define CR0_FLUSHES (MV_CR0_PG | MV_CR0_WP | MV_CR0_PE)
#define CR4_FLUSHES                                                                                \
  (MV_CR4_PGE | MV_CR4_PAE | MV_CR4_PSE | MV_CR4_PCIDE | MV_CR4_SMEP | MV_CR4_SMAP)

static int write_cr0(struct mv_dbt *d, uint64_t v) {
  if (v >> 32 || ((v & MV_CR0_PG) && !(v & MV_CR0_PE)) || ((v & MV_CR0_NW) && !(v & MV_CR0_CD)))
    return mv_gp0(d);
  v = (v & CR0_BITS) | MV_CR0_ET;
  uint64_t changed = v ^ d->cr0;
  if (changed & MV_CR0_PG) {
    bool code_l = d->seg[MV_SEG_CS].attr & MV_SEG_L;
    if (v & MV_CR0_PG) {
      if ((d->efer & MV_EFER_LME) && (!(d->cr4 & MV_CR4_PAE) || code_l))
        return mv_gp0(d);
      if (d->efer & MV_EFER_LME)
        d->efer |= MV_EFER_LMA;
    } else {
      if (mv_is_code64(d))
        return mv_gp0(d);
      d->efer &= ~(uint64_t)MV_EFER_LMA;
    }
  }
  d->cr0 = v;
  if (changed & CR0_FLUSHES)
    mv_mmu_flush_all(d);
  if (changed)
    mv_mmu_mode_changed(d);
  return 0;
}

static int write_cr3(struct mv_dbt *d, uint64_t v) {
  if (mv_is_long(d) ? (v & ~d->sys->phys_mask) != 0 : v >> 32 != 0)
    return mv_gp0(d);
  d->cr3 = v;
  mv_mmu_flush_nonglobal(d);
  return 0;
}

static int write_cr4(struct mv_dbt *d, uint64_t v) {
  if ((v & ~d->sys->cr4_allowed) || (mv_is_long(d) && !(v & MV_CR4_PAE)))
    return mv_gp0(d);
  uint64_t changed = v ^ d->cr4;
  d->cr4 = v;
  if (changed & CR4_FLUSHES)
    mv_mmu_flush_all(d);
  if (changed)
    mv_mmu_mode_changed(d);
  return 0;
}

static int write_cr8(struct mv_dbt *d, uint64_t v) {
  if (v >> 4)
    return mv_gp0(d);
  mv_lapic_set_tpr(d->lapic, v << 4);
  return 0;
}

int mv_sys_mov_cr_write(struct mv_dbt *d, const struct mv_insn *insn) {
  uint64_t v = d->gpr[mv_modrm_rm(insn)];
  if (insn->mode != MV_MODE_64)
    v = (uint32_t)v;
  if (d->cpl)
    return mv_gp0(d);
  switch (mv_modrm_reg(insn)) {
  case 0:
    return write_cr0(d, v);
  case 2:
    d->cr2 = v;
    return 0;
  case 3:
    return write_cr3(d, v);
  case 4:
    return write_cr4(d, v);
  case 8:
    return write_cr8(d, v);
  default:
    return mv_ud(d);
  }
}

int mv_sys_mov_cr_read(struct mv_dbt *d, const struct mv_insn *insn) {
  uint64_t v;
  if (d->cpl)
    return mv_gp0(d);
  switch (mv_modrm_reg(insn)) {
  case 0:
    v = d->cr0;
    break;
  case 2:
    v = d->cr2;
    break;
  case 3:
    v = d->cr3;
    break;
  case 4:
    v = d->cr4;
    break;
  case 8:
    v = mv_lapic_tpr(d->lapic) >> 4;
    break;
  default:
    return mv_ud(d);
  }
  mv_gpr_put(d, mv_modrm_rm(insn), v, insn->mode == MV_MODE_64 ? 8 : 4);
  return 0;
}

int mv_sys_clts(struct mv_dbt *d, const struct mv_insn *insn) {
  (void)insn;
  if (d->cpl)
    return mv_gp0(d);
  if (d->cr0 & MV_CR0_TS) {
    d->cr0 &= ~(uint64_t)MV_CR0_TS;
    mv_mmu_mode_changed(d);
  }
  return 0;
}

/* LMSW loads PE, MP, EM, TS, and cannot clear PE. */
int mv_sys_lmsw(struct mv_dbt *d, const struct mv_insn *insn) {
  uint64_t v;
  if (d->cpl)
    return mv_gp0(d);
  if (mv_operand_read(d, insn, 2, &v) < 0)
    return -1;
  return write_cr0(d, (d->cr0 & ~0xeULL) | (v & 0xf));
}

int mv_sys_smsw(struct mv_dbt *d, const struct mv_insn *insn) {
  if (d->cpl && (d->cr4 & MV_CR4_UMIP))
    return mv_gp0(d);
  return mv_operand_write(d, insn, d->cr0, 2, insn->op_size);
}

int mv_sys_invlpg(struct mv_dbt *d, const struct mv_insn *insn) {
  uint64_t gva;
  if (d->cpl)
    return mv_gp0(d);
  if (mv_operand_address(d, insn, 1, 0, &gva) < 0)
    return -1;
  if (mv_is_canonical(gva))
    mv_mmu_flush_page(d, gva);
  return 0;
}

/* SDM 2A INVPCID: the descriptor is PCID and address; PCIDs are not offered, so
 * that only PCID 0 is good. */
int mv_sys_invpcid(struct mv_dbt *d, const struct mv_insn *insn) {
  uint64_t desc[2], gva, type = d->gpr[mv_modrm_reg(insn)];
  if (!d->sys->invpcid)
    return mv_ud(d);
  if (d->cpl)
    return mv_gp0(d);
  if (mv_operand_address(d, insn, 16, MV_ACC_R, &gva) < 0 ||
      mv_mmu_read(d, gva, desc, 16, MV_AS_CPL) < 0)
    return -1;
  if (type > 3 || desc[0] >> 12 || (type < 2 && desc[0]) ||
      (type == 0 && !mv_is_canonical(desc[1])))
    return mv_gp0(d);
  if (type == 0)
    mv_mmu_flush_page(d, desc[1]);
  else if (type == 2)
    mv_mmu_flush_all(d);
  else
    mv_mmu_flush_nonglobal(d);
  return 0;
}

/* ---- XCR0 ----------------------------------------------------------------- */

int mv_sys_xgetbv(struct mv_dbt *d, const struct mv_insn *insn) {
  (void)insn;
  if (!(d->cr4 & MV_CR4_OSXSAVE))
    return mv_ud(d);
  if ((uint32_t)d->gpr[MV_RCX] != 0)
    return mv_gp0(d);
  d->gpr[MV_RAX] = (uint32_t)d->xcr0;
  d->gpr[MV_RDX] = d->xcr0 >> 32;
  return 0;
}

/* SDM 1 §13.3: x87 always; AVX needs SSE; AVX-512's three go together with AVX. */
static bool xcr0_good(const struct mv_dbt *d, uint64_t v) {
  uint64_t avx512 = v & 0xe0;
  if (!(v & 1) || (v & ~d->sys->xcr0_allowed) || (v & 6) == 4)
    return false;
  return !avx512 || (avx512 == 0xe0 && (v & 4));
}

int mv_sys_xsetbv(struct mv_dbt *d, const struct mv_insn *insn) {
  uint64_t v = d->gpr[MV_RDX] << 32 | (uint32_t)d->gpr[MV_RAX];
  (void)insn;
  if (!(d->cr4 & MV_CR4_OSXSAVE))
    return mv_ud(d);
  if (d->cpl || (uint32_t)d->gpr[MV_RCX] != 0 || !xcr0_good(d, v))
    return mv_gp0(d);
  d->xcr0 = v;
  mv_mmu_mode_changed(d);
  return 0;
}

/* ---- debug registers -------------------------------------------------------- */

#define DR6_FIXED 0xffff0ff0ULL
#define DR6_BITS  0xe00fULL /* B0..B3, BD, BS, BT                               */
#define DR6_BD    (1u << 13)
#define DR7_FIXED 0x400ULL
#define DR7_GD    (1u << 13)

/* The register that is meant: DR4 and DR5 are DR6 and DR7, or #UD. -1: raised. */
static int which_dr(struct mv_dbt *d, const struct mv_insn *insn) {
  unsigned n = mv_modrm_reg(insn);
  if (n > 7 || ((n == 4 || n == 5) && (d->cr4 & MV_CR4_DE)))
    return mv_ud(d);
  if (d->cpl)
    return mv_gp0(d);
  if (d->dr[7] & DR7_GD) {
    d->dr[6] |= DR6_BD;
    d->dr[7] &= ~(uint64_t)DR7_GD;
    return mv_dbt_raise(d, MV_EXC_DB);
  }
  return n == 4 || n == 5 ? (int)n + 2 : (int)n;
}

int mv_sys_mov_dr_read(struct mv_dbt *d, const struct mv_insn *insn) {
  int n = which_dr(d, insn);
  if (n < 0)
    return -1;
  mv_gpr_put(d, mv_modrm_rm(insn), d->dr[n], insn->mode == MV_MODE_64 ? 8 : 4);
  return 0;
}

int mv_sys_mov_dr_write(struct mv_dbt *d, const struct mv_insn *insn) {
  uint64_t v = d->gpr[mv_modrm_rm(insn)];
  int n = which_dr(d, insn);
  if (n < 0)
    return -1;
  if (insn->mode != MV_MODE_64)
    v = (uint32_t)v;
  if (n >= 6 && v >> 32)
    return mv_gp0(d);
  if (n == 6)
    v = (v & DR6_BITS) | DR6_FIXED;
  else if (n == 7)
    v = (v & 0xffff2bffULL) | DR7_FIXED;
  d->dr[n] = v;
  return 0;
}
