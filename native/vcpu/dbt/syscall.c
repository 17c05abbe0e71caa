/*
 * SYSCALL, SYSRET, SYSENTER, SYSEXIT: SDM 2B. They load flat segments without
 * looking at descriptors, so that they are straight-line code.
 */
#include "system.h"

enum {
  CODE64 = MV_SEG_P | MV_SEG_S | MV_SEG_CODE | MV_SEG_RW | MV_SEG_A | MV_SEG_L | MV_SEG_G,
  CODE32 = MV_SEG_P | MV_SEG_S | MV_SEG_CODE | MV_SEG_RW | MV_SEG_A | MV_SEG_DB | MV_SEG_G,
  DATA = MV_SEG_P | MV_SEG_S | MV_SEG_RW | MV_SEG_A | MV_SEG_DB | MV_SEG_G,
  USER = MV_SEG_DPL,
};
#define SYSRET_FLAGS 0x3c7fd7u /* what R11 may set                             */

static inline void load_flat(struct mv_dbt *d, uint16_t cs, unsigned code, uint16_t ss,
                             unsigned user) {
  d->seg[MV_SEG_CS] = mv_seg_flat(cs, code | user);
  d->seg[MV_SEG_SS] = mv_seg_flat(ss, DATA | user);
  d->cpl = user ? 3 : 0;
  mv_seg_changed(d);
}

/* In compatibility mode AMD enters at CSTAR, Intel raises #UD; outside long
 * mode AMD enters at the low half of STAR. */
int mv_sys_syscall(struct mv_dbt *d, const struct mv_insn *insn) {
  bool code64 = mv_is_code64(d);
  uint64_t next = mv_next_rip(d, insn);
  uint16_t cs = d->star >> 32 & 0xfffc;
  if (!(d->efer & MV_EFER_SCE) || !mv_is_protected(d) || (!code64 && !d->sys->amd))
    return mv_ud(d);
  d->gpr[MV_RCX] = next;
  if (mv_is_long(d)) {
    uint64_t flags = mv_dbt_rflags(d);
    d->gpr[MV_R11] = flags & ~(uint64_t)MV_FL_RF;
    mv_dbt_set_rflags(d, flags & ~(d->sfmask | MV_FL_RF));
    d->rip = code64 ? d->lstar : d->cstar;
    load_flat(d, cs, CODE64, cs + 8, 0);
  } else {
    d->eflags &= ~(uint32_t)(MV_FL_VM | MV_FL_IF | MV_FL_RF);
    d->rip = (uint32_t)d->star;
    load_flat(d, cs, CODE32, cs + 8, 0);
  }
  return MV_SYS_JUMPED;
}

int mv_sys_sysret(struct mv_dbt *d, const struct mv_insn *insn) {
  uint16_t cs = d->star >> 48;
  bool to64 = insn->op_size == 8;
  if (!(d->efer & MV_EFER_SCE) || !mv_is_protected(d) || (!mv_is_code64(d) && !d->sys->amd))
    return mv_ud(d);
  if (d->cpl || (to64 && !mv_is_canonical(d->gpr[MV_RCX])))
    return mv_gp0(d);
  if (mv_is_long(d))
    mv_dbt_set_rflags(d, d->gpr[MV_R11] & SYSRET_FLAGS);
  else
    d->eflags |= MV_FL_IF;
  d->rip = to64 ? d->gpr[MV_RCX] : (uint32_t)d->gpr[MV_RCX];
  load_flat(d, (to64 ? cs + 16 : cs) | 3, to64 ? CODE64 : CODE32, (cs + 8) | 3, USER);
  return MV_SYS_JUMPED;
}

/* AMD has no SYSENTER in long mode. */
int mv_sys_sysenter(struct mv_dbt *d, const struct mv_insn *insn) {
  uint16_t cs = d->sysenter_cs & 0xfffc;
  bool to64 = mv_is_long(d);
  (void)insn;
  if (d->sys->amd && to64)
    return mv_ud(d);
  if (!mv_is_protected(d) || cs == 0)
    return mv_gp0(d);
  d->eflags &= ~(uint32_t)(MV_FL_VM | MV_FL_IF | MV_FL_RF);
  d->gpr[MV_RSP] = to64 ? d->sysenter_esp : (uint32_t)d->sysenter_esp;
  d->rip = to64 ? d->sysenter_eip : (uint32_t)d->sysenter_eip;
  load_flat(d, cs, to64 ? CODE64 : CODE32, cs + 8, 0);
  return MV_SYS_JUMPED;
}

int mv_sys_sysexit(struct mv_dbt *d, const struct mv_insn *insn) {
  uint16_t cs = d->sysenter_cs & 0xfffc;
  uint64_t rip = d->gpr[MV_RDX], rsp = d->gpr[MV_RCX];
  bool to64 = insn->op_size == 8;
  if (d->sys->amd && mv_is_long(d))
    return mv_ud(d);
  if (!mv_is_protected(d) || cs == 0 || d->cpl)
    return mv_gp0(d);
  if (to64 && (!mv_is_canonical(rip) || !mv_is_canonical(rsp)))
    return mv_gp0(d);
  d->rip = to64 ? rip : (uint32_t)rip;
  d->gpr[MV_RSP] = to64 ? rsp : (uint32_t)rsp;
  cs += to64 ? 32 : 16;
  load_flat(d, cs | 3, to64 ? CODE64 : CODE32, (cs + 8) | 3, USER);
  return MV_SYS_JUMPED;
}
