/* IN and OUT, and who may use which port: SDM 1 §18.5. */
#include "system.h"

/* The I/O bitmap's offset lies at byte 102 of the TSS. Two bytes of it are read,
 * as the CPU does, because an access may straddle them. */
int mv_system_port_check(struct mv_dbt *d, uint16_t port, unsigned len) {
  const struct mv_seg *tr = &d->seg[MV_SEG_TR];
  uint16_t base, bits;
  if (!mv_is_protected(d) || (d->cpl <= mv_iopl(d) && !mv_is_vm86(d)))
    return 0;
  bool tss = (tr->attr & MV_SEG_P) && (tr->attr & 8); /* 16-bit ones have none     */
  if (!tss || tr->limit < 103)
    return mv_gp0(d);
  if (mv_mmu_read(d, tr->base + 102, &base, 2, MV_AS_SYSTEM) < 0)
    return -1;
  uint32_t off = base + port / 8u;
  if (off + 1 > tr->limit)
    return mv_gp0(d);
  if (mv_mmu_read(d, tr->base + off, &bits, 2, MV_AS_SYSTEM) < 0)
    return -1;
  unsigned mask = ((1u << len) - 1) << (port & 7);
  return bits & mask ? mv_gp0(d) : 0;
}

/* E4..E7 name the port in a byte, EC..EF in DX. */
static uint16_t port_of(const struct mv_dbt *d, const struct mv_insn *insn) {
  return insn->imm_len ? insn->imm & 0xff : (uint16_t)d->gpr[MV_RDX];
}

static unsigned width_of(const struct mv_insn *insn) {
  return insn->op_size > 4 ? 4 : insn->op_size;
}

int mv_sys_in(struct mv_dbt *d, const struct mv_insn *insn) {
  unsigned len = width_of(insn);
  uint16_t port = port_of(d, insn);
  uint64_t value = 0;
  if (mv_system_port_check(d, port, len) < 0)
    return -1;
  if (mv_dbt_port_io(d, port, &value, len, false) < 0)
    return MV_SYS_EXIT;
  mv_gpr_put(d, MV_RAX, value, len);
  return 0;
}

int mv_sys_out(struct mv_dbt *d, const struct mv_insn *insn) {
  unsigned len = width_of(insn);
  uint16_t port = port_of(d, insn);
  uint64_t value = d->gpr[MV_RAX] & (0xffffffffu >> (32 - len * 8));
  if (mv_system_port_check(d, port, len) < 0)
    return -1;
  return mv_dbt_port_io(d, port, &value, len, true) < 0 ? MV_SYS_EXIT : 0;
}
