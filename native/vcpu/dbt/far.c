/*
 * Far JMP, CALL and RET, and IRET: SDM 2A/2B, 3A §5.8, §6.14.
 *
 * RETF and IRET share "return to a code segment, perhaps of an outer level":
 * read the whole frame, check all, then change all. Call gates, task gates and
 * hardware tasks are not offered: such a selector raises #GP.
 */
#include "system.h"

/* ---- the pieces of a return ------------------------------------------------ */

struct target {
  uint64_t rip, rsp;
  uint16_t cs_sel, ss_sel;
  uint64_t cs_raw, ss_raw;
  bool ss_null;
};

/* Reads `n` stack slots of `size` bytes from `sp`. */
static int read_frame(struct mv_dbt *d, uint64_t sp, unsigned size, unsigned n, uint64_t *slot) {
  uint8_t buf[5 * 8];
  if (mv_mmu_read(d, mv_stack_linear(d, sp), buf, size * n, MV_AS_CPL) < 0)
    return -1;
  if (size == 8) {
    __builtin_memcpy(slot, buf, n * 8);
    return 0;
  }
  for (unsigned i = 0; i < n; i++) {
    slot[i] = 0;
    __builtin_memcpy(&slot[i], buf + i * size, size);
  }
  return 0;
}

/* May control go to (cs_sel, rip)? */
static int check_target(struct mv_dbt *d, const struct target *t) {
  uint16_t attr = mv_desc_attr(t->cs_raw);
  if (mv_is_long(d) && (attr & MV_SEG_L)) {
    if (attr & MV_SEG_DB)
      return mv_dbt_raise_code(d, MV_EXC_GP, t->cs_sel & ~3u);
    return mv_is_canonical(t->rip) ? 0 : mv_gp0(d);
  }
  return t->rip <= mv_desc_seg(0, t->cs_raw).limit ? 0 : mv_gp0(d);
}

static int fetch_return_cs(struct mv_dbt *d, struct target *t) {
  unsigned rpl = t->cs_sel & 3;
  if (t->cs_sel < 4)
    return mv_gp0(d);
  if (mv_desc_read(d, t->cs_sel, MV_EXC_GP, 0, &t->cs_raw) < 0)
    return -1;
  uint16_t attr = mv_desc_attr(t->cs_raw);
  unsigned dpl = attr >> 5 & 3;
  bool code = (attr & (MV_SEG_S | MV_SEG_CODE)) == (MV_SEG_S | MV_SEG_CODE);
  if (!code || rpl < d->cpl || (attr & MV_SEG_CONFORM ? dpl > rpl : dpl != rpl))
    return mv_dbt_raise_code(d, MV_EXC_GP, t->cs_sel & ~3u);
  if (!(attr & MV_SEG_P))
    return mv_dbt_raise_code(d, MV_EXC_NP, t->cs_sel & ~3u);
  return 0;
}

static int fetch_return_ss(struct mv_dbt *d, struct target *t) {
  unsigned rpl = t->cs_sel & 3;
  bool to64 = mv_is_long(d) && (mv_desc_attr(t->cs_raw) & MV_SEG_L);
  t->ss_null = t->ss_sel < 4;
  if (t->ss_null)
    return to64 && rpl != 3 && (t->ss_sel & 3u) == rpl ? 0 : mv_gp0(d);
  if (mv_desc_read(d, t->ss_sel, MV_EXC_GP, 0, &t->ss_raw) < 0)
    return -1;
  uint16_t attr = mv_desc_attr(t->ss_raw);
  bool data = (attr & (MV_SEG_S | MV_SEG_CODE | MV_SEG_RW)) == (MV_SEG_S | MV_SEG_RW);
  if (!data || (t->ss_sel & 3u) != rpl || (attr >> 5 & 3u) != rpl)
    return mv_dbt_raise_code(d, MV_EXC_GP, t->ss_sel & ~3u);
  if (!(attr & MV_SEG_P))
    return mv_dbt_raise_code(d, MV_EXC_SS, t->ss_sel & ~3u);
  return 0;
}

/* Data segments that the outer level may not see become null. */
static inline void drop_inner_segments(struct mv_dbt *d) {
  static const uint8_t data[] = {MV_SEG_ES, MV_SEG_DS, MV_SEG_FS, MV_SEG_GS};
  for (unsigned i = 0; i < 4; i++) {
    struct mv_seg *s = &d->seg[data[i]];
    unsigned conforming_code = MV_SEG_S | MV_SEG_CODE | MV_SEG_CONFORM;
    if ((s->attr & MV_SEG_P) && (s->attr >> 5 & 3) < d->cpl &&
        (s->attr & conforming_code) != conforming_code)
      *s = mv_seg_null(0, 0);
  }
}

/* Makes the checked target current. `sp` is the stack pointer if SS stays. */
static int go_to_target(struct mv_dbt *d, struct target *t, bool switch_stack, uint64_t sp) {
  unsigned old = d->cpl, rpl = t->cs_sel & 3;
  if (mv_desc_accessed(d, t->cs_sel, &t->cs_raw) < 0 ||
      (switch_stack && !t->ss_null && mv_desc_accessed(d, t->ss_sel, &t->ss_raw) < 0))
    return -1;
  if (!switch_stack)
    mv_stack_set(d, sp);
  d->seg[MV_SEG_CS] = mv_desc_seg(t->cs_sel, t->cs_raw);
  d->cpl = rpl;
  if (switch_stack) {
    d->seg[MV_SEG_SS] =
        t->ss_null ? mv_seg_null(t->ss_sel, rpl) : mv_desc_seg(t->ss_sel, t->ss_raw);
    mv_stack_set(d, t->rsp);
  }
  d->rip = t->rip;
  if (rpl > old)
    drop_inner_segments(d);
  mv_seg_changed(d);
  return 0;
}

/* ---- IRET ------------------------------------------------------------------ */

/* RFLAGS after IRET or POPF: `size` bytes of `image` by the rules of CPL, IOPL. */
static uint64_t flags_after_iret(const struct mv_dbt *d, uint64_t image, unsigned size,
                                 unsigned cpl) {
  uint64_t mask = MV_FL_HOST | MV_FL_TF | MV_FL_NT | MV_FL_RF | MV_FL_AC | MV_FL_ID;
  if (cpl <= mv_iopl(d))
    mask |= MV_FL_IF;
  if (cpl == 0)
    mask |= MV_FL_IOPL | MV_FL_VIF | MV_FL_VIP;
  if (size == 2)
    mask &= 0xffff;
  return (mv_dbt_rflags(d) & ~mask) | (image & mask);
}

static int iret_real(struct mv_dbt *d, unsigned size) {
  uint64_t slot[3], sp = d->gpr[MV_RSP];
  if (mv_is_vm86(d) && mv_iopl(d) < 3)
    return mv_gp0(d);
  if (read_frame(d, sp, size, 3, slot) < 0)
    return -1;
  if (slot[0] > 0xffff)
    return mv_gp0(d);
  mv_stack_set(d, sp + 3 * size);
  struct mv_seg *cs = &d->seg[MV_SEG_CS];
  *cs = mv_seg_real(slot[1], cs->attr);
  d->rip = slot[0];
  uint64_t keep = MV_FL_VM | MV_FL_VIF | MV_FL_VIP;
  if (mv_is_vm86(d))
    keep |= MV_FL_IOPL;
  if (size == 2)
    keep |= ~0xffffULL;
  mv_dbt_set_rflags(d, (mv_dbt_rflags(d) & keep) | (slot[2] & ~keep & 0x257fd5));
  return MV_SYS_JUMPED;
}

int mv_sys_iret(struct mv_dbt *d, const struct mv_insn *insn) {
  unsigned size = insn->op_size;
  uint64_t slot[5], sp = d->gpr[MV_RSP];
  if (!mv_is_protected(d) || mv_is_vm86(d))
    return iret_real(d, size);
  if (d->eflags & MV_FL_NT)
    return mv_gp0(d); /* #GP in long mode; elsewhere a return to a task        */
  bool code64 = mv_is_code64(d);
  unsigned n = code64 ? 5 : 3;
  if (read_frame(d, sp, size, n, slot) < 0)
    return -1;
  struct target t = {.rip = slot[0], .cs_sel = slot[1]};
  uint64_t image = slot[2];
  if (!mv_is_long(d) && (image & MV_FL_VM) && size == 4 && d->cpl == 0)
    return mv_gp0(d); /* virtual-8086 mode is not offered                      */
  if (fetch_return_cs(d, &t) < 0)
    return -1;
  bool outer = (t.cs_sel & 3u) != d->cpl;
  if (!code64 && outer && read_frame(d, sp, size, 5, slot) < 0)
    return -1;
  bool switch_stack = code64 || outer;
  if (switch_stack) {
    t.rsp = slot[3];
    t.ss_sel = slot[4];
    if (fetch_return_ss(d, &t) < 0)
      return -1;
  }
  if (check_target(d, &t) < 0)
    return -1;
  uint64_t flags = flags_after_iret(d, image, size, d->cpl);
  if (go_to_target(d, &t, switch_stack, sp + 3 * size) < 0)
    return -1;
  mv_dbt_set_rflags(d, flags);
  if (d->sys->nmi_masked) {
    d->sys->nmi_masked = false;
    mv_dbt_poke(d); /* another NMI may wait                                     */
  }
  return MV_SYS_JUMPED;
}

/* ---- RETF -------------------------------------------------------------------- */

static int retf_real(struct mv_dbt *d, unsigned size, unsigned release) {
  uint64_t slot[2], sp = d->gpr[MV_RSP];
  if (read_frame(d, sp, size, 2, slot) < 0)
    return -1;
  if (slot[0] > 0xffff)
    return mv_gp0(d);
  mv_stack_set(d, sp + 2 * size + release);
  struct mv_seg *cs = &d->seg[MV_SEG_CS];
  *cs = mv_seg_real(slot[1], cs->attr);
  d->rip = slot[0];
  return MV_SYS_JUMPED;
}

int mv_sys_retf(struct mv_dbt *d, const struct mv_insn *insn) {
  unsigned size = insn->op_size, release = insn->imm_len ? (uint16_t)insn->imm : 0;
  uint64_t slot[2], outer_slot[2], sp = d->gpr[MV_RSP];
  if (!mv_is_protected(d) || mv_is_vm86(d))
    return retf_real(d, size, release);
  if (read_frame(d, sp, size, 2, slot) < 0)
    return -1;
  struct target t = {.rip = slot[0], .cs_sel = slot[1]};
  if (fetch_return_cs(d, &t) < 0)
    return -1;
  bool outer = (t.cs_sel & 3u) != d->cpl;
  if (outer) {
    if (read_frame(d, sp + 2 * size + release, size, 2, outer_slot) < 0)
      return -1;
    t.rsp = outer_slot[0] + release;
    t.ss_sel = outer_slot[1];
    if (fetch_return_ss(d, &t) < 0)
      return -1;
  }
  if (check_target(d, &t) < 0 || go_to_target(d, &t, outer, sp + 2 * size + release) < 0)
    return -1;
  return MV_SYS_JUMPED;
}

/* ---- far JMP and CALL ---------------------------------------------------------- */

/* The far pointer: immediate (EA, 9A), or in memory. */
static int read_pointer(struct mv_dbt *d, const struct mv_insn *insn, uint64_t *rip,
                        uint16_t *sel) {
  unsigned size = insn->op_size;
  uint8_t buf[10];
  uint64_t gva;
  if (!insn->has_mem) {
    *rip = size == 2 ? (uint16_t)insn->imm : (uint32_t)insn->imm;
    *sel = insn->imm2;
    return 0;
  }
  if (mv_operand_address(d, insn, size + 2, MV_ACC_R, &gva) < 0 ||
      mv_mmu_read(d, gva, buf, size + 2, MV_AS_CPL) < 0)
    return -1;
  *rip = 0;
  __builtin_memcpy(rip, buf, size);
  __builtin_memcpy(sel, buf + size, 2);
  return 0;
}

static int push_return(struct mv_dbt *d, const struct mv_insn *insn) {
  unsigned size = insn->op_size;
  uint64_t sp = d->gpr[MV_RSP] - 2 * size, next = mv_next_rip(d, insn);
  uint64_t cs = d->seg[MV_SEG_CS].sel;
  uint8_t buf[16];
  __builtin_memcpy(buf, &next, 8);
  __builtin_memcpy(buf + size, &cs, size);
  if (mv_mmu_write(d, mv_stack_linear(d, sp), buf, 2 * size, MV_AS_CPL) < 0)
    return -1;
  mv_stack_set(d, sp);
  return 0;
}

static int far_real(struct mv_dbt *d, const struct mv_insn *insn, bool call, uint64_t rip,
                    uint16_t sel) {
  if (rip > 0xffff)
    return mv_gp0(d);
  if (call && push_return(d, insn) < 0)
    return -1;
  struct mv_seg *cs = &d->seg[MV_SEG_CS];
  *cs = mv_seg_real(sel, cs->attr);
  d->rip = rip;
  return MV_SYS_JUMPED;
}

static int far_transfer(struct mv_dbt *d, const struct mv_insn *insn, bool call) {
  struct target t = {0};
  if (read_pointer(d, insn, &t.rip, &t.cs_sel) < 0)
    return -1;
  if (!mv_is_protected(d) || mv_is_vm86(d))
    return far_real(d, insn, call, t.rip, t.cs_sel);
  if (t.cs_sel < 4)
    return mv_gp0(d);
  if (mv_desc_read(d, t.cs_sel, MV_EXC_GP, 0, &t.cs_raw) < 0)
    return -1;
  uint16_t attr = mv_desc_attr(t.cs_raw);
  unsigned dpl = attr >> 5 & 3, rpl = t.cs_sel & 3;
  bool code = (attr & (MV_SEG_S | MV_SEG_CODE)) == (MV_SEG_S | MV_SEG_CODE);
  bool allowed = attr & MV_SEG_CONFORM ? dpl <= d->cpl : rpl <= d->cpl && dpl == d->cpl;
  if (!code || !allowed)
    return mv_dbt_raise_code(d, MV_EXC_GP, t.cs_sel & ~3u);
  if (!(attr & MV_SEG_P))
    return mv_dbt_raise_code(d, MV_EXC_NP, t.cs_sel & ~3u);
  if (check_target(d, &t) < 0 || mv_desc_accessed(d, t.cs_sel, &t.cs_raw) < 0 ||
      (call && push_return(d, insn) < 0))
    return -1;
  d->seg[MV_SEG_CS] = mv_desc_seg((t.cs_sel & ~3u) | d->cpl, t.cs_raw);
  d->rip = t.rip;
  mv_seg_changed(d);
  return MV_SYS_JUMPED;
}

int mv_sys_jmp_far(struct mv_dbt *d, const struct mv_insn *insn) {
  return far_transfer(d, insn, false);
}

int mv_sys_call_far(struct mv_dbt *d, const struct mv_insn *insn) {
  return far_transfer(d, insn, true);
}
