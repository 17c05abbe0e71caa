/*
 * Guest block -> host code.
 *
 * Most instructions are the guest's own bytes. What is changed:
 *
 *  - R14 and R15 belong to the translator (T0, T1); the guest's live in
 *    mv_dbt.gpr and are loaded into a scratch register around an instruction
 *    that names them.
 *  - A memory operand becomes [T0 + disp]: the effective address goes to T0,
 *    the software TLB turns it into a host address or jumps to a cold stub
 *    that calls mv_slow_mem() and begins again:
 *        lea  t0, [ea]
 *        mov  t1, t0;  shr t1, 7;  and t1, index mask
 *        xor  t0, gs:[t1 + tag]      ; offset in the page, if the tag matches
 *        cmp  t0, 4096 - size;  ja cold
 *        add  t0, gs:[t1 + hva]
 *    If arithmetic flags are live there they are kept in RAX meanwhile (LAHF,
 *    SETO), RAX in mv_dbt.save_rax.
 *  - Accesses off the same base register, one after the other, share a check
 *    ("run"): T0 then holds the host address for all of them. If the run
 *    crosses a page, or its check fails otherwise, mv_slow_mem() goes on with
 *    blocks of a single instruction (MV_VAR_SINGLE), which are exact.
 *  - Branches end a block: direct ones are linked to the target's code on
 *    first use (mv_slow_link), indirect ones go through the jump cache.
 *  - A poll, `mov t1, gs:[poll]; mov t1, [t1]`, stands before backward and
 *    indirect jumps. It faults when someone wants the vCPU. It touches no flag.
 *  - System instructions call mv_slow_insn().
 *
 * Entries of a block: `code` for jumps from the same page; the guarded entry
 * checks the page's mapping; the indirect entry also checks that T0, the
 * target, is the block's RIP. They are made when first needed.
 */

#include "translate.h"

/* ======================= stack instructions ============================= */

/* mov of `size` bytes (8 or 2) between reg and [T0 + at]. */
static void emit_mov_t0(struct tr *t, bool store, unsigned reg, int32_t at, unsigned size) {
  struct mv_emit *e = &t->e;
  if (size == 2) {
    e8(e, 0x66);
    e8(e, 0x40 | (reg >> 3) << 2 | 1);
  } else {
    e_rexw(e, reg, 0, MV_T0);
  }
  e8(e, store ? 0x89 : 0x8b);
  e_mem(e, reg, MV_T0, MV_REG_NONE, 1, at);
}
static void emit_store_imm(struct tr *t, int32_t at, int64_t v, unsigned size) {
  struct mv_emit *e = &t->e;
  if (size == 2)
    e8(e, 0x66), e8(e, 0x41);
  else
    e_rexw(e, 0, 0, MV_T0);
  e8(e, 0xc7);
  e_mem(e, 0, MV_T0, MV_REG_NONE, 1, at);
  if (size == 2)
    e16(e, (unsigned)v);
  else
    e32(e, (uint32_t)v);
}
static void emit_add_rsp(struct tr *t, int32_t by) {
  e_lea(&t->e, MV_RSP, MV_RSP, MV_REG_NONE, 1, by, false);
}

/* Keeps T1 over a second check of the same instruction. */
static void emit_stash(struct tr *t, unsigned i, unsigned k) {
  if (t->acc[i][k].starts)
    e_store(&t->e, MV_DBT(stash[0]), MV_T1);
}
static void emit_unstash(struct tr *t, unsigned i, unsigned k) {
  if (t->acc[i][k].starts)
    e_load(&t->e, MV_T1, MV_DBT(stash[0]));
}

static void emit_push(struct tr *t, unsigned i) {
  const struct mv_insn *in = &t->insn[i];
  unsigned size = in->op_size;
  unsigned reg = in->opreg.reg != MV_REG_NONE ? in->opreg.reg : in->rm.reg;
  if (in->has_mem) {
    int32_t from = mv_emit_access(t, i, 0);
    emit_mov_t0(t, false, MV_T1, from, size);
    emit_stash(t, i, 1);
    int32_t to = mv_emit_access(t, i, 1);
    emit_unstash(t, i, 1);
    emit_mov_t0(t, true, MV_T1, to, size);
    mv_emit_access_done(t, i, 1);
  } else {
    int32_t to = mv_emit_access(t, i, 0);
    if (reg == MV_REG_NONE) {
      emit_store_imm(t, to, in->imm, size);
    } else if (guest_scratch((uint8_t)reg)) {
      e_load(&t->e, MV_T1, MV_DBT_GPR(reg));
      emit_mov_t0(t, true, MV_T1, to, size);
    } else {
      emit_mov_t0(t, true, reg, to, size);
    }
    mv_emit_access_done(t, i, 0);
  }
  emit_add_rsp(t, -(int32_t)size);
}

static void emit_pop(struct tr *t, unsigned i) {
  const struct mv_insn *in = &t->insn[i];
  unsigned size = in->op_size;
  unsigned reg = in->opreg.reg != MV_REG_NONE ? in->opreg.reg : in->rm.reg;
  int32_t from = mv_emit_access(t, i, 0);
  if (in->has_mem) {
    emit_mov_t0(t, false, MV_T1, from, size);
    emit_stash(t, i, 1);
    int32_t to = mv_emit_access(t, i, 1);
    emit_unstash(t, i, 1);
    emit_mov_t0(t, true, MV_T1, to, size);
    mv_emit_access_done(t, i, 1);
    emit_add_rsp(t, (int32_t)size);
  } else if (guest_scratch((uint8_t)reg)) {
    if (size == 2)
      e_load(&t->e, MV_T1, MV_DBT_GPR(reg));
    emit_mov_t0(t, false, MV_T1, from, size);
    e_store(&t->e, MV_DBT_GPR(reg), MV_T1);
    emit_add_rsp(t, (int32_t)size);
  } else if (reg == MV_RSP) {
    if (size == 2) { /* POP SP: SP is moved first, then its low half written   */
      emit_add_rsp(t, 2);
      emit_mov_t0(t, false, MV_RSP, from, 2);
    } else {
      emit_mov_t0(t, false, MV_RSP, from, 8);
    }
  } else {
    emit_mov_t0(t, false, reg, from, size);
    emit_add_rsp(t, (int32_t)size);
  }
}

static void emit_leave(struct tr *t, unsigned i) {
  int32_t at = mv_emit_access(t, i, 0);
  e_lea(&t->e, MV_RSP, MV_RBP, MV_REG_NONE, 1, 8, false);
  emit_mov_t0(t, false, MV_RBP, at, 8);
}

/* ======================= branches ======================================= */

/* The place of `rel32` in the block is linked to guest address `rip`. */
static void link_from(struct tr *t, unsigned slot, uint64_t rip, uint8_t *rel32) {
  struct mv_link *l = &t->b->out[slot];
  l->rip = rip;
  l->patch = (uint32_t)(rel32 - t->x->rw);
  mv_add_cold(t, COLD_LINK, rel32, (uint32_t)(t->b - t->x->blocks) << 1 | slot);
}
static void emit_exit(struct tr *t, unsigned slot, uint64_t rip) {
  link_from(t, slot, rip, e_jmp(&t->e));
}

/* Not before an instruction that must run: MV_VAR_STEP looks afterwards. */
static void emit_poll(struct tr *t) {
  if (t->b->variant & MV_VAR_STEP)
    return;
  e_load(&t->e, MV_T1, MV_DBT(poll));
  e8(&t->e, 0x45), e8(&t->e, 0x8b), e8(&t->e, 0x3f); /* mov t1d, [t1]         */
}

/* T0 is the target. */
static void emit_indirect(struct tr *t) {
  struct mv_emit *e = &t->e;
  if (t->b->variant & MV_VAR_STEP || t->d->vm->dbt.no_chain) {
    e_jmp_gs(e, MV_DBT(tramp[MV_TRAMP_INDIRECT]));
    return;
  }
  e8(e, 0x45), e8(e, 0x0f), e8(e, 0xb7), e8(e, 0xfe); /* movzx t1d, t0w       */
  e8(e, 0x65), e8(e, 0x42), e8(e, 0xff);              /* jmp gs:[t1 * 8 + jc]             */
  e_modrm(e, 0, 4, 4);
  e8(e, 3 << 6 | (MV_T1 & 7) << 3 | 5);
  e32(e, MV_DBT(jc[0][0]) + priv_of(t) * MV_JC_SIZE * 8);
}

static void emit_push_rip(struct tr *t, unsigned i, unsigned k) {
  uint64_t ret = next_rip(t, i);
  int32_t at = mv_emit_access(t, i, k);
  if (fits32((int64_t)ret)) {
    emit_store_imm(t, at, (int64_t)ret, 8);
  } else {
    e_mov_imm(&t->e, MV_T1, ret);
    emit_mov_t0(t, true, MV_T1, at, 8);
  }
  mv_emit_access_done(t, i, k);
  emit_add_rsp(t, -8);
}

/* Scratch register `to` = target of an indirect jump or call. */
static void emit_target(struct tr *t, unsigned i, unsigned to) {
  const struct mv_insn *in = &t->insn[i];
  if (in->has_mem)
    emit_mov_t0(t, false, to, mv_emit_access(t, i, 0), 8);
  else if (guest_scratch(in->rm.reg))
    e_load(&t->e, to, MV_DBT_GPR(in->rm.reg));
  else
    e_mov_rr(&t->e, to, in->rm.reg);
}

static void emit_call_indirect(struct tr *t, unsigned i) {
  emit_poll(t);
  emit_target(t, i, MV_T1); /* T0 may be the push's                           */
  e_store(&t->e, MV_DBT(stash[1]), MV_T1);
  emit_push_rip(t, i, t->insn[i].has_mem ? 1 : 0);
  e_load(&t->e, MV_T0, MV_DBT(stash[1]));
  emit_indirect(t);
}

static void emit_ret(struct tr *t, unsigned i) {
  const struct mv_insn *in = &t->insn[i];
  emit_poll(t);
  emit_mov_t0(t, false, MV_T0, mv_emit_access(t, i, 0), 8);
  emit_add_rsp(t, 8 + (in->op == MV_OP_RET_IMM ? (int32_t)(in->imm & 0xffff) : 0));
  emit_indirect(t);
}

static void emit_cond(struct tr *t, unsigned i) {
  const struct mv_insn *in = &t->insn[i];
  uint64_t target = next_rip(t, i) + (uint64_t)in->imm;
  if (target <= rip_of(t, i))
    emit_poll(t);
  if (in->op == MV_OP_JCC) {
    link_from(t, 0, target, e_jcc(&t->e, in->cc));
  } else { /* LOOPcc, JRCXZ: rel8 only; it jumps over the other exit           */
    if (in->addr_size == 4)
      e8(&t->e, 0x67);
    e8(&t->e, in->opcode);
    e8(&t->e, 5);
    emit_exit(t, 1, next_rip(t, i));
    emit_exit(t, 0, target);
    return;
  }
  emit_exit(t, 1, next_rip(t, i));
}

static void emit_branch(struct tr *t, unsigned i) {
  const struct mv_insn *in = &t->insn[i];
  uint64_t target = next_rip(t, i) + (uint64_t)in->imm;
  switch (in->op) {
  case MV_OP_JMP_REL:
    if (target <= rip_of(t, i))
      emit_poll(t);
    emit_exit(t, 0, target);
    break;
  case MV_OP_CALL_REL:
    if (target <= rip_of(t, i)) /* endless recursion over a stack that is mapped in circles */
      emit_poll(t);
    emit_push_rip(t, i, 0);
    emit_exit(t, 0, target);
    break;
  case MV_OP_JMP_IND:
    emit_poll(t);
    emit_target(t, i, MV_T0);
    emit_indirect(t);
    break;
  case MV_OP_CALL_IND:
    emit_call_indirect(t, i);
    break;
  case MV_OP_RET:
  case MV_OP_RET_IMM:
    emit_ret(t, i);
    break;
  default:
    emit_cond(t, i);
  }
}

/* ======================= system instructions ============================ */

static void emit_helper(struct tr *t, unsigned i) {
  uint32_t site = mv_add_site(t, i, 0);
  t->x->helpers[t->x->nhelpers] = t->insn[i];
  t->x->sites[site].helper = t->x->nhelpers++;
  mv_emit_site(t, site);
  e_jmp_gs(&t->e, MV_DBT(tramp[MV_TRAMP_INSN]));
  t->x->sites[site].restart = here(t); /* where C goes on if it just goes on  */
  emit_exit(t, 0, next_rip(t, i));
}

/* movdqu/vmovdqu/movq between vector register `v` and d->vec[slot]. */
static void emit_vec(struct tr *t, unsigned i, bool store, unsigned v, unsigned slot, bool wide) {
  const struct mv_insn *in = &t->insn[i];
  struct mv_emit *e = &t->e;
  e8(e, 0x65);
  if (in->enc == MV_ENC_VEX) { /* VEX.F3.0F 6F/7F                             */
    e8(e, 0xc4);
    e8(e, (v >> 3 ? 0x61 : 0xe1));
    e8(e, 0x7a | (wide ? 4 : 0));
    e8(e, store ? 0x7f : 0x6f);
  } else {
    if (in->unit != MV_UNIT_MMX)
      e8(e, 0xf3);
    if (v >> 3)
      e8(e, 0x44);
    e8(e, 0x0f), e8(e, store ? 0x7f : 0x6f);
  }
  e_modrm(e, 0, v, 4);
  e8(e, 0x25);
  e32(e, MV_DBT(vec) + slot * 32);
}

/* Gathers and masked moves: C finds the vector operands in d->vec. */
static void emit_vector_helper(struct tr *t, unsigned i) {
  const struct mv_insn *in = &t->insn[i];
  const uint8_t *v = t->bytes[i] + in->opcode_off;
  bool vex = in->enc == MV_ENC_VEX, gather = in->cls == MV_CLASS_VSIB, wide = in->vex_l;
  bool long_vex = vex && in->opcode_off >= 3 && v[-3] == 0xc4;
  unsigned r = vex ? ~v[long_vex ? -2 : -1] >> 7 & 1 : in->rex >> 2 & 1;
  unsigned x = long_vex ? ~v[-2] >> 6 & 1 : 0;
  unsigned b = vex ? (long_vex ? ~v[-2] >> 5 & 1 : 0) : in->rex & 1;
  unsigned reg = r << 3 | (in->modrm >> 3 & 7), vvvv = vex ? ~v[-1] >> 3 & 15 : 0;
  unsigned rm = b << 3 | (in->modrm & 7);
  bool to_rdi = in->map == 1; /* MASKMOVDQU: data in reg, mask in rm          */
  bool store = to_rdi || in->opcode == 0x2e || in->opcode == 0x2f || in->opcode == 0x8e;

  emit_vec(t, i, true, reg, 0, vex && (wide || gather));
  if (gather) {
    unsigned index = x << 3 | (t->bytes[i][in->sib_off] >> 3 & 7);
    emit_vec(t, i, true, index, 1, true);
    emit_vec(t, i, true, vvvv, 2, true);
  } else {
    emit_vec(t, i, true, to_rdi ? rm : vvvv, 1, vex && wide);
  }
  uint32_t site = mv_add_site(t, i, 0);
  t->x->helpers[t->x->nhelpers] = *in;
  t->x->sites[site].helper = t->x->nhelpers++;
  mv_emit_site(t, site);
  e_jmp_gs(&t->e, MV_DBT(tramp[MV_TRAMP_INSN]));
  t->x->sites[site].restart = here(t);
  if (!store)
    emit_vec(t, i, false, reg, 0, wide);
  if (gather)
    emit_vec(t, i, false, vvvv, 2, true);
  emit_exit(t, 0, next_rip(t, i));
}

static void emit_raise(struct tr *t, unsigned i) {
  uint32_t site = mv_add_site(t, i, 0);
  e_mov_imm(&t->e, MV_T0, t->vector);
  mv_emit_site(t, site);
  e_jmp_gs(&t->e, MV_DBT(tramp[MV_TRAMP_RAISE]));
}

static void emit_swapgs(struct tr *t, unsigned i) {
  (void)i;
  uint32_t gs = MV_DBT(seg[0].base) + MV_SEG_GS * (uint32_t)sizeof(struct mv_seg);
  e_load(&t->e, MV_T0, gs);
  e_load(&t->e, MV_T1, MV_DBT(kernel_gs_base));
  e_store(&t->e, gs, MV_T1);
  e_store(&t->e, MV_DBT(kernel_gs_base), MV_T0);
}

/* mov dword gs:[off], reg32 and back */
static void emit_half(struct mv_emit *e, bool store, unsigned reg, uint32_t off) {
  e8(e, 0x65);
  e8(e, store ? 0x89 : 0x8b);
  e_modrm(e, 0, reg, 4);
  e8(e, 0x25);
  e32(e, off);
}

/* RDTSC without touching flags: EDX:EAX = host TSC + tsc_offset. */
static void emit_rdtsc(struct tr *t, unsigned i) {
  (void)i;
  struct mv_emit *e = &t->e;
  e8(e, 0x0f), e8(e, 0x31);
  emit_half(e, true, MV_RAX, MV_DBT(stash[0]));
  emit_half(e, true, MV_RDX, MV_DBT(stash[0]) + 4);
  e_load(e, MV_T0, MV_DBT(stash[0]));
  e_load(e, MV_T1, MV_DBT(tsc_offset));
  e_lea(e, MV_T0, MV_T0, MV_T1, 1, 0, false);
  e_store(e, MV_DBT(stash[0]), MV_T0);
  emit_half(e, false, MV_RAX, MV_DBT(stash[0]));
  emit_half(e, false, MV_RDX, MV_DBT(stash[0]) + 4);
}

/* ======================= a block ======================================== */

/* Goes on if RCX is zero, else to the returned rel32, with RCX as it was: it is
 * in T1. No flag is touched: whoever jumps here may need them, also if this
 * turns out to be the wrong place. */
static uint8_t *emit_unless_rcx_zero(struct mv_emit *e) {
  e8(e, 0xe3), e8(e, 8); /* jrcxz over the exit                               */
  e_mov_rr(e, MV_RCX, MV_T1);
  return e_jmp(e);
}

/* RCX = 0 if the mapping seen at the page of `gva` is number `codepage`. */
static void emit_mapping_differs(struct mv_emit *e, uint64_t gva, unsigned priv,
                                 uint32_t codepage) {
  uint32_t off =
      MV_DBT(itlb[0][0]) + (priv * MV_ITLB_SIZE + ((gva >> 12) & (MV_ITLB_SIZE - 1))) * 4;
  emit_half(e, false, MV_RCX, off);
  e_lea(e, MV_RCX, MV_RCX, MV_REG_NONE, 1, -(int32_t)codepage, true);
}

static uint8_t *emit_guard(struct mv_emit *e, uint64_t gva, unsigned priv, uint32_t codepage) {
  e_mov_rr(e, MV_T1, MV_RCX);
  emit_mapping_differs(e, gva, priv, codepage);
  uint8_t *miss = emit_unless_rcx_zero(e);
  e_mov_rr(e, MV_RCX, MV_T1);
  return miss;
}

static void emit_cold(struct tr *t) {
  struct mv_emit c = {.p = t->x->rw + t->x->cold};
  for (unsigned i = 0; i < t->ncold; i++) {
    struct cold *s = &t->cold[i];
    e_patch(s->from, c.p);
    mv_add_reloc(t, MV_RELOC_COLD, false, s->from, (uint32_t)(c.p - t->x->rw) - t->cold0);
    enum mv_tramp tramp = MV_TRAMP_MEM;
    if (s->kind == COLD_LAST) {
      uint8_t *miss = mv_emit_last_miss(t, &c, s);
      e_patch(miss, c.p);
      s->kind = COLD_MEM;
    }
    if (s->kind == COLD_MEM) {
      if (s->ea_known)
        e_mov_imm(&c, MV_T0, s->ea);
      else
        e_gs_base(&c, 0x33, MV_T0, MV_T1, s->tag_off);
      if (s->flags_saved)
        mv_emit_flags_restore(&c);
    } else if (s->kind == COLD_LINK) {
      t->b->out[s->arg & 1].stub = (uint32_t)(c.p - t->x->rw);
      tramp = MV_TRAMP_LINK;
    } else {
      tramp = MV_TRAMP_GUARD;
    }
    e_mov_imm(&c, MV_T1, s->arg);
    if (s->kind == COLD_LINK)
      mv_add_reloc(t, MV_RELOC_LINK, true, c.p - 4, s->arg & 1);
    else if (s->kind == COLD_MEM)
      mv_add_reloc(t, MV_RELOC_SITE, true, c.p - 4, s->arg - t->site0);
    e_jmp_gs(&c, MV_DBT(tramp[tramp]));
  }
  t->x->cold = (uint32_t)(c.p - t->x->rw);
}

static void emit_count(struct tr *t) {
  e_load(&t->e, MV_T1, MV_DBT(icount));
  e_lea(&t->e, MV_T1, MV_T1, MV_REG_NONE, 1, (int32_t)t->n, false);
  e_store(&t->e, MV_DBT(icount), MV_T1);
}

static void emit_nothing(struct tr *t, unsigned i) {
  (void)t, (void)i;
}

static void (*const emit_kind[KIND_COUNT])(struct tr *t, unsigned i) = {
    [KIND_COPY] = mv_emit_copied,
    [KIND_SKIP] = emit_nothing,
    [KIND_LEA] = mv_emit_lea,
    [KIND_PUSH] = emit_push,
    [KIND_POP] = emit_pop,
    [KIND_LEAVE] = emit_leave,
    [KIND_SWAPGS] = emit_swapgs,
    [KIND_RDTSC] = emit_rdtsc,
    [KIND_BRANCH] = emit_branch,
    [KIND_HELPER] = emit_helper,
    [KIND_VECTOR] = emit_vector_helper,
    [KIND_RAISE] = emit_raise,
};

/* Keeps the translation for later starts, if it is of the usual kind. */
static void save(struct tr *t) {
  struct mv_block *b = t->b;
  struct mv_fresh f = {.b = b,
                       .guest = t->page + (b->rip & 0xfff),
                       .cold = t->cold0,
                       .cold_end = t->x->cold,
                       .site = t->site0,
                       .nsites = t->x->nsites - t->site0,
                       .nrelocs = t->nreloc,
                       .has_helper =
                           t->kind[t->n - 1] == KIND_HELPER || t->kind[t->n - 1] == KIND_VECTOR,
                       .reloc = t->reloc};
  uint64_t off = b->peek_gpa & 0xfff;
  if (!t->x->saved || b->variant || b->crosses || b->failures)
    return;
  if (b->peek_len && (b->peek_gpa ^ b->gpa) >> 12) {
    f.peek_rip = t->x->codepages[b->codepage2].vpage + off;
    f.peek = mv_mmu_ram(t->d, b->peek_gpa, NULL);
  } else if (b->peek_len) {
    f.peek_rip = (b->rip & ~0xfffull) + off;
    f.peek = t->page + off;
  }
  mv_saved_add(t->x->saved, t->d, &f);
}

_Static_assert(MV_BLOCK_INSNS_MAX *INSN_ROOM + 128 <= MV_BLOCK_ROOM &&
                   COLD_MAX * 48 <= MV_BLOCK_ROOM,
               "has_room() keeps enough");

int mv_translate(struct mv_dbt *d, struct mv_block *b, const uint8_t *bytes, unsigned avail,
                 const uint8_t *bytes2) {
  struct tr t;
  t.d = d;
  t.x = d->exec;
  t.b = b;
  if (mv_plan_block(&t, bytes, avail, bytes2))
    return 1;
  t.e.p = t.x->rw + t.x->hot;
  t.hot0 = t.x->hot;
  t.cold0 = t.x->cold;
  t.site0 = t.x->nsites;
  t.nreloc = 0;
  b->code = t.x->hot;
  b->map = t.x->nmap;
  if (b->crosses && !(b->mode & MV_MODE_UNGUARDED)) { /* the second page is checked */
    uint8_t *miss = emit_guard(&t.e, (b->rip | 0xfff) + 1, priv_of(&t), b->codepage2);
    mv_add_cold(&t, COLD_GUARD, miss, (uint32_t)(b - t.x->blocks));
  }
  if (d->vm->count)
    emit_count(&t);
  for (unsigned i = 0; i < t.n; i++) {
    t.x->map[t.x->nmap++] = (struct mv_insn_map){.code = here(&t), .guest = t.off[i]};
    if (t.hoist[i])
      mv_emit_check(&t, i, t.hoist[i] - 1, 0);
    emit_kind[t.kind[i]](&t, i);
    if (here(&t) - t.x->map[t.x->nmap - 1].code > INSN_ROOM)
      __builtin_trap(); /* the block might not fit: better the VMM's end than that */
  }
  if (t.kind[t.n - 1] < KIND_BRANCH)
    emit_exit(&t, 0, next_rip(&t, t.n - 1));
  b->code_end = here(&t);
  t.x->hot = (b->code_end + 15) & ~15u;
  emit_cold(&t);
  save(&t);
  return 0;
}

/* ======================= entries ======================================== */

static unsigned priv_of_block(const struct mv_block *b) {
  return b->mode & MV_MODE_USER ? MV_PRIV_USER : MV_PRIV_KERNEL;
}

uint32_t mv_emit_guarded_entry(struct mv_dbt *d, struct mv_block *b) {
  struct mv_dbt_exec *x = d->exec;
  struct mv_emit e = {.p = x->rw + x->cold};
  uint32_t entry = x->cold;
  uint8_t *miss = emit_guard(&e, b->rip, priv_of_block(b), b->codepage);
  e_patch(e_jmp(&e), x->rw + b->code);
  e_patch(miss, e.p);
  e_mov_imm(&e, MV_T1, (uint64_t)(b - x->blocks));
  e_jmp_gs(&e, MV_DBT(tramp[MV_TRAMP_GUARD]));
  x->cold = (uint32_t)(e.p - x->rw);
  return entry;
}

uint32_t mv_emit_indirect_entry(struct mv_dbt *d, struct mv_block *b) {
  struct mv_dbt_exec *x = d->exec;
  struct mv_emit e = {.p = x->rw + x->cold};
  uint32_t entry = x->cold;
  uint8_t *other = NULL, *wrong;
  e_mov_rr(&e, MV_T1, MV_RCX);
  if (fits32((int64_t)-b->rip)) {
    e_lea(&e, MV_RCX, MV_T0, MV_REG_NONE, 1, (int32_t)-b->rip, false);
  } else {
    e_mov_imm(&e, MV_RCX, -b->rip);
    e_lea(&e, MV_RCX, MV_RCX, MV_T0, 1, 0, false);
  }
  wrong = emit_unless_rcx_zero(&e);
  if (!(b->mode & MV_MODE_UNGUARDED)) {
    emit_mapping_differs(&e, b->rip, priv_of_block(b), b->codepage);
    other = emit_unless_rcx_zero(&e);
  }
  e_mov_rr(&e, MV_RCX, MV_T1);
  e_patch(e_jmp(&e), x->rw + b->code);
  e_patch(wrong, e.p);
  if (other)
    e_patch(other, e.p);
  e_jmp_gs(&e, MV_DBT(tramp[MV_TRAMP_INDIRECT]));
  x->cold = (uint32_t)(e.p - x->rw);
  return entry;
}
