/* The places that a system instruction names: registers, memory, the stack. */
#include "system.h"

uint64_t mv_gpr_get(const struct mv_dbt *d, const struct mv_gpr_ref *ref) {
  uint64_t v = d->gpr[ref->reg & 15];
  if (ref->high8)
    return v >> 8 & 0xff;
  return ref->size >= 8 ? v : v & ((1ULL << ref->size * 8) - 1);
}

void mv_gpr_put(struct mv_dbt *d, unsigned reg, uint64_t value, unsigned size) {
  uint64_t *r = &d->gpr[reg & 15];
  switch (size) {
  case 1:
    *r = (*r & ~0xffULL) | (value & 0xff);
    break;
  case 2:
    *r = (*r & ~0xffffULL) | (value & 0xffff);
    break;
  case 4:
    *r = (uint32_t)value;
    break;
  default:
    *r = value;
  }
}

static uint64_t effective_offset(const struct mv_dbt *d, const struct mv_insn *insn) {
  uint64_t off = (uint64_t)insn->disp;
  if (insn->base == MV_REG_RIP)
    off += d->rip + insn->len;
  else if (insn->base != MV_REG_NONE)
    off += d->gpr[insn->base & 15];
  if (insn->index != MV_REG_NONE)
    off += d->gpr[insn->index & 15] * insn->scale;
  if (insn->addr_size == 8)
    return off;
  return insn->addr_size == 4 ? (uint32_t)off : (uint16_t)off;
}

/* Limit and type of a segment outside 64-bit mode, SDM 3A §5.3. */
static bool segment_permits(const struct mv_dbt *d, const struct mv_seg *s, uint64_t off,
                            unsigned len, unsigned access) {
  uint64_t last = off + len - 1;
  if (!mv_is_protected(d) || mv_is_vm86(d))
    return last <= s->limit;
  if (!(s->attr & MV_SEG_P))
    return false;
  bool code = s->attr & MV_SEG_CODE;
  if ((access & MV_ACC_W) && (code || !(s->attr & MV_SEG_RW)))
    return false;
  if ((access & MV_ACC_R) && code && !(s->attr & MV_SEG_RW))
    return false;
  if (!code && (s->attr & MV_SEG_CONFORM)) /* expands down                     */
    return off > s->limit && last <= (s->attr & MV_SEG_DB ? 0xffffffffu : 0xffffu);
  return last <= s->limit;
}

int mv_operand_address(struct mv_dbt *d, const struct mv_insn *insn, unsigned len, unsigned access,
                       uint64_t *gva) {
  uint64_t off = effective_offset(d, insn);
  bool stack = insn->base == MV_RSP || insn->base == MV_RBP;
  unsigned seg = insn->segment != MV_REG_NONE ? insn->segment : stack ? MV_SEG_SS : MV_SEG_DS;
  if (insn->mode == MV_MODE_64) {
    *gva = seg == MV_SEG_FS || seg == MV_SEG_GS ? off + d->seg[seg].base : off;
    if (access && !mv_is_canonical(*gva))
      return mv_dbt_raise_code(d, seg == MV_SEG_SS ? MV_EXC_SS : MV_EXC_GP, 0);
    return 0;
  }
  if (access && !segment_permits(d, &d->seg[seg], off, len, access))
    return mv_dbt_raise_code(d, seg == MV_SEG_SS ? MV_EXC_SS : MV_EXC_GP, 0);
  *gva = (uint32_t)(d->seg[seg].base + off);
  return 0;
}

int mv_operand_read(struct mv_dbt *d, const struct mv_insn *insn, unsigned len, uint64_t *value) {
  uint64_t gva;
  *value = 0;
  if (!insn->has_mem) {
    *value = d->gpr[mv_modrm_rm(insn)];
    if (len < 8)
      *value &= (1ULL << len * 8) - 1;
    return 0;
  }
  if (mv_operand_address(d, insn, len, MV_ACC_R, &gva) < 0)
    return -1;
  return mv_mmu_read(d, gva, value, len, MV_AS_CPL);
}

int mv_operand_write(struct mv_dbt *d, const struct mv_insn *insn, uint64_t value, unsigned len,
                     unsigned reg_size) {
  uint64_t gva;
  if (!insn->has_mem) {
    mv_gpr_put(d, mv_modrm_rm(insn), value, reg_size);
    return 0;
  }
  if (mv_operand_address(d, insn, len, MV_ACC_W, &gva) < 0)
    return -1;
  return mv_mmu_write(d, gva, &value, len, MV_AS_CPL);
}

uint64_t mv_stack_linear(const struct mv_dbt *d, uint64_t sp) {
  const struct mv_seg *ss = &d->seg[MV_SEG_SS];
  if (mv_is_code64(d))
    return sp;
  sp = ss->attr & MV_SEG_DB ? (uint32_t)sp : (uint16_t)sp;
  return (uint32_t)(ss->base + sp);
}

void mv_stack_set(struct mv_dbt *d, uint64_t sp) {
  if (mv_is_code64(d))
    d->gpr[MV_RSP] = sp;
  else
    mv_gpr_put(d, MV_RSP, sp, d->seg[MV_SEG_SS].attr & MV_SEG_DB ? 4 : 2);
}
