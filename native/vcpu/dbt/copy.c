/*
 * Instructions that are emitted as they are, but for R14 and R15, which are the
 * translator's, and for the memory operand, which is [T0 + disp].
 */
#include "translate.h"

/* How an instruction is written anew. */
struct rewrite {
  bool mem; /* the memory operand becomes [base + disp]             */
  uint8_t base;
  int32_t disp;
  uint8_t gpr[2]; /* what stands for guest R14, R15                       */
};

static unsigned map_gpr(const struct rewrite *w, const struct mv_gpr_ref *ref, unsigned raw) {
  if (ref->reg != MV_REG_NONE && guest_scratch(ref->reg) && !ref->high8)
    return w->gpr[ref->reg - MV_T0];
  return raw;
}

static void emit_modrm(struct mv_emit *e, const struct mv_insn *in, const struct rewrite *w,
                       unsigned reg, unsigned rm) {
  if (!in->modrm_off)
    return;
  if (w->mem && in->enc == MV_ENC_EVEX) { /* disp8 would be scaled: use disp32 */
    e_modrm(e, 2, reg, w->base);
    e32(e, (uint32_t)w->disp);
  } else if (w->mem) {
    e_mem(e, reg, w->base, MV_REG_NONE, 1, w->disp);
  } else {
    e_modrm(e, in->modrm >> 6, reg, rm);
  }
}

static void emit_vex(struct mv_emit *e, const struct mv_insn *in, const uint8_t *bytes,
                     const struct rewrite *w) {
  const uint8_t *v = bytes + in->opcode_off;
  unsigned r, b, x, mmm, last;
  if (in->opcode_off >= 3 && v[-3] == 0xc4) {
    r = ~v[-2] >> 7 & 1, x = ~v[-2] >> 6 & 1, b = ~v[-2] >> 5 & 1;
    mmm = v[-2] & 0x1f, last = v[-1];
  } else {
    r = ~v[-1] >> 7 & 1, x = 0, b = 0, mmm = 1, last = v[-1] & 0x7f;
  }
  unsigned reg = map_gpr(w, &in->reg, r << 3 | (in->modrm >> 3 & 7));
  unsigned rm = map_gpr(w, &in->rm, b << 3 | (in->modrm & 7));
  unsigned vvvv = map_gpr(w, &in->vvvv, ~last >> 3 & 15);
  if (w->mem)
    x = 0, b = w->base >> 3;
  else
    b = rm >> 3;
  e8(e, 0xc4);
  e8(e, (reg >> 3 ? 0 : 0x80) | (x ? 0 : 0x40) | (b ? 0 : 0x20) | mmm);
  e8(e, (last & 0x87) | (~vvvv & 15) << 3);
  e8(e, in->opcode);
  emit_modrm(e, in, w, reg, rm);
}

static void emit_evex(struct mv_emit *e, const struct mv_insn *in, const uint8_t *bytes,
                      const struct rewrite *w) {
  const uint8_t *v = bytes + in->opcode_off;
  unsigned p0 = v[-3], p1 = v[-2], p2 = v[-1];
  unsigned reg = map_gpr(w, &in->reg, (~p0 >> 7 & 1) << 3 | (in->modrm >> 3 & 7));
  unsigned rm = map_gpr(w, &in->rm, (~p0 >> 5 & 1) << 3 | (in->modrm & 7));
  unsigned x = ~p0 >> 6 & 1, b = w->mem ? w->base >> 3 : rm >> 3;
  if (w->mem)
    x = 0;
  e8(e, 0x62);
  e8(e, (p0 & 0x1f) | (reg >> 3 ? 0 : 0x80) | (x ? 0 : 0x40) | (b ? 0 : 0x20));
  e8(e, p1);
  e8(e, p2);
  e8(e, in->opcode);
  emit_modrm(e, in, w, reg, rm);
}

static void emit_legacy(struct mv_emit *e, const struct mv_insn *in, const uint8_t *bytes,
                        const struct rewrite *w) {
  static const uint8_t escape[4] = {0, 1, 2, 2};
  unsigned i = in->opcode_off - escape[in->map & 3];
  /* Each prefix once, so that it stays within 15 bytes with a longer displacement. */
  if (in->opsize)
    e8(e, 0x66);
  if (in->lock)
    e8(e, 0xf0);
  if (in->rep || in->repne)
    e8(e, in->rep ? 0xf3 : 0xf2);
  if (w->mem && !in->modrm_off) { /* MOV AL/rAX, moffs: as MOV r, r/m and back */
    e8(e, 0x40 | (in->rex & 8) | w->base >> 3);
    e8(e, 0x88 | ((in->opcode & 3) ^ 2));
    e_mem(e, MV_RAX, w->base, MV_REG_NONE, 1, w->disp);
    return;
  }
  unsigned rex = in->rex;
  unsigned reg = map_gpr(w, &in->reg, (rex >> 2 & 1) << 3 | (in->modrm >> 3 & 7));
  unsigned rm = map_gpr(w, &in->rm, (rex & 1) << 3 | (in->modrm & 7));
  unsigned opreg = map_gpr(w, &in->opreg, (rex & 1) << 3 | (in->opcode & 7));
  unsigned out = rex & 8;
  if (in->modrm_off)
    out |= (reg >> 3) << 2 | (w->mem ? w->base >> 3 : rm >> 3);
  else if (in->opreg.reg != MV_REG_NONE)
    out |= opreg >> 3;
  if (out || rex)
    e8(e, 0x40 | out);
  for (; i < in->opcode_off; i++)
    e8(e, bytes[i]);
  e8(e, in->opreg.reg != MV_REG_NONE ? (in->opcode & ~7u) | (opreg & 7) : in->opcode);
  emit_modrm(e, in, w, reg, rm);
}

static void emit_rewritten(struct tr *t, unsigned i, const struct rewrite *w) {
  const struct mv_insn *in = &t->insn[i];
  const uint8_t *bytes = t->bytes[i];
  if (in->enc == MV_ENC_VEX)
    emit_vex(&t->e, in, bytes, w);
  else if (in->enc == MV_ENC_EVEX)
    emit_evex(&t->e, in, bytes, w);
  else
    emit_legacy(&t->e, in, bytes, w);
  if (in->imm_len)
    e_copy(&t->e, bytes + in->imm_off, in->imm_len);
}

/* Is guest register `reg` (R14, R15) needed before, changed by the instruction? */
static void scratch_use(const struct mv_insn *in, unsigned reg, bool *read, bool *written) {
  const struct mv_gpr_ref *ref[4] = {&in->reg, &in->rm, &in->vvvv, &in->opreg};
  *read = *written = false;
  for (int k = 0; k < 4; k++) {
    if (ref[k]->reg != reg)
      continue;
    if (ref[k]->access & MV_ACC_R || ref[k]->size < 4)
      *read = true;
    if (ref[k]->access & MV_ACC_W)
      *written = true;
  }
}

/* A register that the instruction does not use, to lend it. */
static unsigned pick_borrow(const struct mv_insn *in, bool low) {
  static const uint8_t any[] = {MV_RSI, MV_RDI, MV_RBX, MV_RBP, MV_R8, MV_R9, MV_R10};
  unsigned used = in->gpr_read | in->gpr_written;
  for (unsigned k = 0; k < (low ? 2 : sizeof any); k++)
    if (!(used & 1u << any[k]))
      return any[k];
  return MV_RBX;
}

/* A COPY instruction, with its operand in memory (`mem`, at T0 + at) or not. */
static void emit_copy(struct tr *t, unsigned i, bool mem, int32_t at) {
  const struct mv_insn *in = &t->insn[i];
  struct mv_emit *e = &t->e;
  struct rewrite w = {.mem = mem, .base = MV_T0, .disp = at, .gpr = {MV_T0, MV_T1}};
  unsigned use = mv_scratch_operands(in);
  unsigned borrow = MV_REG_NONE;

  if (!mem && !use) { /* nothing to change: the guest's bytes                  */
    e_copy(e, t->bytes[i], in->len);
    return;
  }
  if (mem && (in->reg.high8 || in->rm.high8)) { /* AH.. excludes REX: no R14   */
    w.base = (uint8_t)(borrow = pick_borrow(in, true));
    e_store(e, MV_DBT(borrow), borrow);
    e_mov_rr(e, borrow, MV_T0);
  }
  if (mem || t->t0_busy[i]) {
    w.gpr[0] = w.gpr[1] = MV_T1;
    if (use == 3) {
      borrow = pick_borrow(in, false);
      e_store(e, MV_DBT(borrow), borrow);
      w.gpr[1] = (uint8_t)borrow;
    }
  }
  for (unsigned k = 0; use && k < 2; k++) {
    bool read, written;
    scratch_use(in, MV_T0 + k, &read, &written);
    if (use & 1u << k && read)
      e_load(e, w.gpr[k], MV_DBT_GPR(MV_T0 + k));
  }
  emit_rewritten(t, i, &w);
  for (unsigned k = 0; use && k < 2; k++) {
    bool read, written;
    scratch_use(in, MV_T0 + k, &read, &written);
    if (use & 1u << k && written)
      e_store(e, MV_DBT_GPR(MV_T0 + k), w.gpr[k]);
  }
  if (borrow != MV_REG_NONE)
    e_load(e, borrow, MV_DBT(borrow));
}

/* BT family with a register bit offset: T0 points at the operand that holds the
 * bit; the offset within it is masked into T1, which stands for the register. */
static void emit_bit_op(struct tr *t, unsigned i, int32_t at) {
  const struct mv_insn *in = &t->insn[i];
  struct mv_emit *e = &t->e;
  unsigned bits = in->op_size * 8;
  bool live = (t->live[i] & MV_F_ARITH) != 0;
  if (live)
    mv_emit_flags_save(e);
  mv_emit_bit_index(t, i);
  e8(e, 0x41), e8(e, 0x83); /* and t1d, bits - 1                              */
  e_modrm(e, 3, 4, MV_T1);
  e8(e, bits - 1);
  if (live)
    mv_emit_flags_restore(e);
  struct mv_insn copy = *in;
  struct mv_insn *slot = &t->insn[i];
  slot->reg.reg = MV_T1;
  struct rewrite w = {.mem = true, .base = MV_T0, .disp = at, .gpr = {MV_T1, MV_T1}};
  emit_rewritten(t, i, &w);
  *slot = copy;
}

void mv_emit_lea(struct tr *t, unsigned i) {
  const struct mv_insn *in = &t->insn[i];
  struct mv_emit *e = &t->e;
  unsigned dst = in->reg.reg;
  if (in->base == MV_REG_RIP) {
    uint64_t v = next_rip(t, i) + (uint64_t)in->disp;
    if (in->addr_size == 4)
      v = (uint32_t)v;
    unsigned to = guest_scratch(dst) ? MV_T1 : dst;
    if (in->op_size == 2) { /* mov r16, imm16                                 */
      if (guest_scratch(dst))
        e_load(e, MV_T1, MV_DBT_GPR(dst));
      e8(e, 0x66);
      if (to >= 8)
        e8(e, 0x41);
      e8(e, 0xb8 | (to & 7));
      e16(e, (unsigned)v);
    } else {
      e_mov_imm(e, to, in->op_size == 4 ? (uint32_t)v : v);
    }
    if (guest_scratch(dst))
      e_store(e, MV_DBT_GPR(dst), MV_T1);
    return;
  }
  mv_emit_address_regs(t, in);
  if (guest_scratch(dst) && in->op_size == 2 && dst != in->base && dst != in->index)
    e_load(e, dst, MV_DBT_GPR(dst));
  e_copy(e, t->bytes[i], in->len);
  if (guest_scratch(dst))
    e_store(e, MV_DBT_GPR(dst), dst);
}

/* FNSTENV and FNSAVE write where the last x87 instruction was: that is our
 * code's address. The guest reads zeros there (SDM 1 §8.1.10, figure 8-9). */
static void emit_hide_fip(struct tr *t, unsigned i, int32_t at) {
  bool short_form = t->insn[i].op_size == 2; /* 14 bytes, figure 8-12         */
  int32_t step = short_form ? 2 : 4;
  for (int32_t off = 3 * step; off < 7 * step; off += step) {
    if (short_form)
      e8(&t->e, 0x66);
    e8(&t->e, 0x41), e8(&t->e, 0xc7);
    e_mem(&t->e, 0, MV_T0, MV_REG_NONE, 1, at + off);
    if (short_form)
      e8(&t->e, 0), e8(&t->e, 0);
    else
      e32(&t->e, off == 24 ? 0xffff0000u : 0); /* reserved bits read as ones  */
  }
}

void mv_emit_copied(struct tr *t, unsigned i) {
  const struct mv_insn *in = &t->insn[i];
  if (t->nacc[i]) {
    int32_t at = mv_emit_access(t, i, 0);
    if (in->op == MV_OP_BT_MEM_REG)
      emit_bit_op(t, i, at);
    else
      emit_copy(t, i, true, at);
    if (in->op == MV_OP_FNSTENV || in->op == MV_OP_FNSAVE)
      emit_hide_fip(t, i, at);
    mv_emit_access_done(t, i, 0);
  } else {
    emit_copy(t, i, false, 0);
  }
}
