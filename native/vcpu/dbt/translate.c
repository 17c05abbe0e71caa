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
#include "cache.h"
#include "emit.h"
#include "mv/features.h"

#define COLD_MAX     (4 * MV_BLOCK_INSNS_MAX + 8)
#define ACCESSES_MAX 2
#define RUN_SPAN_MAX 512

enum cold_kind { COLD_MEM, COLD_GUARD, COLD_LINK };

/* A stub to be emitted in the cold part when the block's hot part is done. */
struct cold {
  enum cold_kind kind;
  uint8_t *from; /* rel32 that jumps to it                                   */
  uint32_t arg;
  bool flags_saved;
  bool ea_known; /* else T0 ^ tag gives it back                              */
  uint64_t ea;
  uint32_t tag_off;
};

/* One memory access of an instruction, in the order in which they are made. */
struct access {
  uint8_t base;  /* simple: [base + off]; MV_REG_NONE: not simple           */
  int32_t off;   /* from the base register's value at the instruction       */
  uint16_t size; /* bytes                                                   */
  uint8_t acc;   /* MV_ACC_*                                                */
  bool modrm;    /* the ModRM operand, else the stack                       */
  bool starts;   /* makes the check                                         */
  int32_t at;    /* offset from T0 after the check                          */
  uint16_t run_size;
  uint8_t run_acc;
  int32_t run_lo;
};

struct tr {
  struct mv_dbt *d;
  struct mv_dbt_exec *x;
  struct mv_block *b;
  struct mv_emit e;
  const uint8_t *bytes[MV_BLOCK_INSNS_MAX];
  struct mv_insn insn[MV_BLOCK_INSNS_MAX];
  uint16_t off[MV_BLOCK_INSNS_MAX];
  uint16_t live[MV_BLOCK_INSNS_MAX + 1]; /* flags live before instruction i  */
  struct access acc[MV_BLOCK_INSNS_MAX][ACCESSES_MAX];
  uint8_t nacc[MV_BLOCK_INSNS_MAX];
  bool t0_busy[MV_BLOCK_INSNS_MAX]; /* T0 must survive the instruction       */
  unsigned n, ncold;
  struct cold cold[COLD_MAX];
  uint8_t crossing[2 * MV_INSN_MAX]; /* bytes of an instruction on two pages  */
};

static uint32_t here(struct tr *t) {
  return (uint32_t)(t->e.p - t->x->rw);
}
static unsigned priv_of(struct tr *t) {
  return t->b->mode & MV_MODE_USER ? MV_PRIV_USER : MV_PRIV_KERNEL;
}
static uint64_t rip_of(struct tr *t, unsigned i) {
  return t->b->rip + t->off[i];
}
static uint64_t next_rip(struct tr *t, unsigned i) {
  return rip_of(t, i) + t->insn[i].len;
}

/* ======================= looking at instructions ======================== */

static bool guest_scratch(uint8_t reg) {
  return reg == MV_T0 || reg == MV_T1;
}

/* Does the instruction name guest R14 (bit 0), R15 (bit 1) in a GPR place? */
static unsigned scratch_operands(const struct mv_insn *in) {
  const struct mv_gpr_ref *ref[4] = {&in->reg, &in->rm, &in->vvvv, &in->opreg};
  unsigned m = 0;
  for (int k = 0; k < 4; k++)
    if (ref[k]->reg == MV_T0 || ref[k]->reg == MV_T1)
      m |= 1u << (ref[k]->reg - MV_T0);
  return m;
}

/* The exception that an instruction raises for the mode it is in: a vector, or
 * -1 if it runs. SDM 2A §2.4 (exception types), 3A §2.5. */
static int refused(struct tr *t, const struct mv_insn *in) {
  if (in->cls == MV_CLASS_UD && in->op == MV_OP_HLT) /* over 15 bytes, see decode_block */
    return MV_EXC_GP;
  if (in->cls == MV_CLASS_UD || in->op == MV_OP_UD2 || !mv_feature_offered(in->feature))
    return MV_EXC_UD;
  if (!mv_feature_offered(in->feature2))
    return MV_EXC_UD;
  unsigned mode = t->b->mode;
  switch (in->unit) {
  case MV_UNIT_X87:
  case MV_UNIT_MMX:
  case MV_UNIT_FWAIT:
    return mode & MV_MODE_NOFPU ? MV_EXC_NM : -1;
  case MV_UNIT_SSE:
    return mode & MV_MODE_NOSSE ? MV_EXC_UD : mode & MV_MODE_NOFPU ? MV_EXC_NM : -1;
  case MV_UNIT_AVX:
  case MV_UNIT_AVX512:
    return mode & MV_MODE_NOAVX ? MV_EXC_UD : mode & MV_MODE_NOFPU ? MV_EXC_NM : -1;
  default:
    return -1;
  }
}

/* Instructions that C executes (mv_slow_insn). */
static bool by_helper(struct tr *t, const struct mv_insn *in) {
  bool user = t->b->mode & MV_MODE_USER;
  switch (in->cls) {
  case MV_CLASS_COPY:
    if (in->op == MV_OP_BT_MEM_REG)
      return in->has_mem && in->op_size == 2;
    return in->op == MV_OP_XLAT;
  case MV_CLASS_STACK:
    return in->op != MV_OP_PUSH && in->op != MV_OP_POP &&
           !(in->op == MV_OP_LEAVE && in->op_size == 8);
  case MV_CLASS_BRANCH:
    return in->op == MV_OP_JMP_FAR || in->op == MV_OP_CALL_FAR || in->op == MV_OP_RETF;
  case MV_CLASS_SYSTEM:
    if (in->op == MV_OP_RDTSC) /* CR4.TSD: a change of it empties the cache    */
      return user && t->d->cr4 & 1 << 2;
    return in->op != MV_OP_SWAPGS || user;
  default:
    return true;
  }
}

static bool ends_block(struct tr *t, const struct mv_insn *in) {
  return in->cls == MV_CLASS_BRANCH || by_helper(t, in);
}

/* Does the instruction leave T0 as it is, if it makes no check itself? */
static bool keeps_t0(struct tr *t, const struct mv_insn *in) {
  if (by_helper(t, in) || in->op == MV_OP_SWAPGS || in->op == MV_OP_RDTSC)
    return false;
  if (in->op == MV_OP_LEA)
    return scratch_operands(in) == 0 && !guest_scratch(in->base) && !guest_scratch(in->index);
  return scratch_operands(in) != 3;
}

/* ======================= planning memory checks ========================= */

static struct access *add_access(struct tr *t, unsigned i) {
  struct access *a = &t->acc[i][t->nacc[i]++];
  *a = (struct access){.base = MV_REG_NONE};
  return a;
}
static void add_stack_access(struct tr *t, unsigned i, unsigned base, int32_t off, unsigned size,
                             unsigned acc) {
  struct access *a = add_access(t, i);
  a->base = (uint8_t)base;
  a->off = off;
  a->size = (uint16_t)size;
  a->acc = (uint8_t)acc;
}
static void add_modrm_access(struct tr *t, unsigned i) {
  const struct mv_insn *in = &t->insn[i];
  struct access *a = add_access(t, i);
  a->modrm = true;
  a->size = in->mem_size;
  a->acc = in->mem_access;
  if (in->base <= 15 && in->index == MV_REG_NONE && in->segment == MV_REG_NONE &&
      in->addr_size == 8 && fits32(in->disp) && in->op != MV_OP_BT_MEM_REG) {
    a->base = in->base;
    a->off = (int32_t)in->disp;
  }
}

/* The accesses of instruction i, in program order. */
static void list_accesses(struct tr *t, unsigned i) {
  const struct mv_insn *in = &t->insn[i];
  int size = in->op_size;
  t->nacc[i] = 0;
  if (by_helper(t, in) || refused(t, in) >= 0)
    return;
  switch (in->op) {
  case MV_OP_PUSH:
    if (in->has_mem)
      add_modrm_access(t, i);
    add_stack_access(t, i, MV_RSP, -size, (unsigned)size, MV_ACC_W);
    return;
  case MV_OP_POP:
    add_stack_access(t, i, MV_RSP, 0, (unsigned)size, MV_ACC_R);
    if (in->has_mem) {
      add_modrm_access(t, i);
      if (in->base == MV_RSP) /* the address is made with RSP after the pop  */
        t->acc[i][1].off += size;
    }
    return;
  case MV_OP_LEAVE:
    add_stack_access(t, i, MV_RBP, 0, 8, MV_ACC_R);
    return;
  case MV_OP_CALL_IND:
    if (in->has_mem)
      add_modrm_access(t, i);
    /* fall through */
  case MV_OP_CALL_REL:
    add_stack_access(t, i, MV_RSP, -8, 8, MV_ACC_W);
    return;
  case MV_OP_RET:
  case MV_OP_RET_IMM:
    add_stack_access(t, i, MV_RSP, 0, 8, MV_ACC_R);
    return;
  default:
    if (in->has_mem && in->mem_access && in->mem_size)
      add_modrm_access(t, i);
  }
}

/* How an instruction moves register `base`: true and *by if by a constant. */
static bool moves_by(const struct mv_insn *in, unsigned base, int32_t *by) {
  *by = 0;
  if (!(in->gpr_written & 1u << base))
    return true;
  if (base == MV_RSP && in->op == MV_OP_PUSH)
    return *by = -(int32_t)in->op_size, true;
  if (base == MV_RSP && in->op == MV_OP_POP && in->opreg.reg != MV_RSP && in->rm.reg != MV_RSP)
    return *by = in->op_size, true;
  if (in->op_size != 8 || in->enc != MV_ENC_LEGACY || in->map != 0)
    return false;
  if ((in->opcode == 0x83 || in->opcode == 0x81) && in->modrm >> 6 == 3 && in->rm.reg == base) {
    if ((in->modrm >> 3 & 7) == 0) /* ADD                                    */
      return *by = (int32_t)in->imm, true;
    if ((in->modrm >> 3 & 7) == 5) /* SUB                                    */
      return *by = -(int32_t)in->imm, true;
  }
  if (in->op == MV_OP_LEA && in->reg.reg == base && in->base == base && in->index == MV_REG_NONE &&
      in->addr_size == 8)
    return *by = (int32_t)in->disp, true;
  return false;
}

struct run {
  struct access *first;
  unsigned base;
  int32_t delta; /* base register now, minus at the run's start              */
  int32_t lo, hi;
  unsigned first_insn, last_insn;
};

static void run_close(struct tr *t, struct run *r) {
  if (!r->first)
    return;
  r->first->run_lo = r->lo;
  r->first->run_size = (uint16_t)(r->hi - r->lo);
  for (unsigned i = r->first_insn; i <= r->last_insn; i++) {
    for (unsigned k = 0; k < t->nacc[i]; k++) {
      struct access *a = &t->acc[i][k];
      if (a >= r->first && a->base != MV_REG_NONE)
        a->at -= r->lo;
    }
    if (i < r->last_insn)
      t->t0_busy[i] = true;
  }
  r->first = NULL;
}

static void run_start(struct run *r, struct access *a, unsigned i) {
  *r = (struct run){.first = a,
                    .base = a->base,
                    .lo = a->off,
                    .hi = a->off + a->size,
                    .first_insn = i,
                    .last_insn = i};
  a->starts = true;
  a->at = a->off;
  a->run_acc = a->acc;
}

/* Takes access `a` into the run if it fits. */
static bool run_join(struct run *r, struct access *a, unsigned i) {
  if (!r->first || a->base != r->base)
    return false;
  int32_t at = a->off + r->delta, lo = at < r->lo ? at : r->lo;
  int32_t hi = at + a->size > r->hi ? at + a->size : r->hi;
  if (hi - lo > RUN_SPAN_MAX)
    return false;
  r->lo = lo;
  r->hi = hi;
  a->at = at;
  r->first->run_acc |= a->acc;
  r->last_insn = i;
  return true;
}

/* Decides which accesses share a check. */
static void plan_runs(struct tr *t) {
  struct run r = {0};
  bool coalesce = !t->b->variant && !t->d->vm->dbt.no_coalesce && !t->b->failures;
  for (unsigned i = 0; i < t->n; i++) {
    const struct mv_insn *in = &t->insn[i];
    list_accesses(t, i);
    if (!keeps_t0(t, in))
      run_close(t, &r);
    for (unsigned k = 0; k < t->nacc[i]; k++) {
      struct access *a = &t->acc[i][k];
      if (coalesce && run_join(&r, a, i))
        continue;
      run_close(t, &r);
      a->starts = true;
      if (a->base != MV_REG_NONE)
        run_start(&r, a, i);
    }
    if (!r.first)
      continue;
    int32_t by;
    if (in->op == MV_OP_LEAVE && r.base == MV_RBP) { /* RSP = RBP + 8 now     */
      r.base = MV_RSP;
      r.delta += 8;
    } else if (moves_by(in, r.base, &by)) {
      r.delta -= -by;
    } else {
      run_close(t, &r);
    }
  }
  run_close(t, &r);
}

/* ======================= emitting memory checks ========================= */

static struct cold *add_cold(struct tr *t, enum cold_kind kind, uint8_t *from, uint32_t arg) {
  struct cold *c = &t->cold[t->ncold++];
  *c = (struct cold){.kind = kind, .from = from, .arg = arg};
  return c;
}

static uint32_t add_site(struct tr *t, unsigned i, uint32_t restart) {
  struct mv_site *s = &t->x->sites[t->x->nsites];
  *s = (struct mv_site){.block = (uint32_t)(t->b - t->x->blocks),
                        .restart = restart,
                        .guest = t->off[i],
                        .insn = (uint8_t)i};
  return t->x->nsites++;
}

static void emit_flags_save(struct mv_emit *e) {
  e_store(e, MV_DBT(save_rax), MV_RAX);
  e8(e, 0x9f); /* lahf                                                       */
  e8(e, 0x0f), e8(e, 0x90), e8(e, 0xc0); /* seto al                          */
}
static void emit_flags_restore(struct mv_emit *e) {
  e8(e, 0x04), e8(e, 0x7f); /* add al, 0x7f: overflows if AL is 1            */
  e8(e, 0x9e);              /* sahf                                          */
  e_load(e, MV_RAX, MV_DBT(save_rax));
}

/* A register of an address as it is in the host: the guest's R14, R15 are
 * loaded into the scratch register of the same number. */
static void emit_address_regs(struct tr *t, const struct mv_insn *in) {
  if (guest_scratch(in->base))
    e_load(&t->e, in->base, MV_DBT_GPR(in->base));
  if (guest_scratch(in->index) && in->index != in->base)
    e_load(&t->e, in->index, MV_DBT_GPR(in->index));
}

/* T0 = segment base + effective address of the ModRM operand of insn i.
 * `add`: what POP [rsp] adds. Touches T1, no flags. */
static void emit_ea(struct tr *t, unsigned i, int32_t add) {
  const struct mv_insn *in = &t->insn[i];
  struct mv_emit *e = &t->e;
  bool addr32 = in->addr_size == 4;
  bool seg = in->segment == MV_SEG_FS || in->segment == MV_SEG_GS;
  uint32_t seg_off = seg ? MV_DBT(seg[0].base) + in->segment * (uint32_t)sizeof(struct mv_seg) : 0;
  uint64_t ea = (uint64_t)in->disp + (in->base == MV_REG_RIP ? next_rip(t, i) : 0);
  if (addr32)
    ea = (uint32_t)ea;

  if (in->base == MV_REG_RIP || (in->base == MV_REG_NONE && in->index == MV_REG_NONE)) {
    if (seg && fits32((int64_t)ea)) { /* the kernel's per-CPU variables       */
      e_load(e, MV_T0, seg_off);
      if (ea)
        e_lea(e, MV_T0, MV_T0, MV_REG_NONE, 1, (int32_t)ea, false);
      return;
    }
    e_mov_imm(e, MV_T0, ea);
  } else if (seg && !addr32 && in->index == MV_REG_NONE && !guest_scratch(in->base)) {
    e_load(e, MV_T0, seg_off);
    e_lea(e, MV_T0, MV_T0, in->base == MV_RSP ? MV_REG_NONE : in->base, 1, (int32_t)in->disp,
          false);
    if (in->base == MV_RSP) /* RSP cannot be an index                        */
      e_lea(e, MV_T0, MV_RSP, MV_T0, 1, 0, false);
    return;
  } else {
    emit_address_regs(t, in);
    e_lea(e, MV_T0, in->base, in->index, in->scale, (int32_t)in->disp + add, addr32);
  }
  if (seg) {
    e_load(e, MV_T1, seg_off);
    e_lea(e, MV_T0, MV_T0, MV_T1, 1, 0, false);
  }
}

/* T1 = the bit offset of BT and friends; RAX may be away (emit_flags_save). */
static void emit_bit_index(struct tr *t, unsigned i) {
  unsigned reg = t->insn[i].reg.reg;
  if (guest_scratch((uint8_t)reg))
    e_load(&t->e, MV_T1, MV_DBT_GPR(reg));
  else if (reg == MV_RAX && t->live[i] & MV_F_ARITH)
    e_load(&t->e, MV_T1, MV_DBT(save_rax));
  else
    e_mov_rr(&t->e, MV_T1, reg);
}

/* BT/BTS/BTR/BTC m, r: the bit offset moves the address by whole operands.
 * SDM 2A §3.1.1.9. Clobbers flags; T1 too. */
static void emit_bit_offset(struct tr *t, unsigned i) {
  const struct mv_insn *in = &t->insn[i];
  struct mv_emit *e = &t->e;
  unsigned shift = in->op_size == 8 ? 6 : 5;
  emit_bit_index(t, i);
  if (in->op_size == 4) { /* movsxd t1, t1d                                  */
    e_rexw(e, MV_T1, 0, MV_T1);
    e8(e, 0x63);
    e_modrm(e, 3, MV_T1, MV_T1);
  }
  e_rexw(e, 0, 0, MV_T1); /* sar t1, shift                                   */
  e8(e, 0xc1);
  e_modrm(e, 3, 7, MV_T1);
  e8(e, shift);
  e_lea(e, MV_T0, MV_T0, MV_T1, in->op_size, 0, false);
}

/* The check of an operand at a constant address: the TLB entry is known. */
static void emit_check_const(struct tr *t, struct access *a, struct cold *c, uint64_t ea) {
  struct mv_emit *e = &t->e;
  unsigned index = (ea >> 12) & (MV_TLB_SIZE - 1);
  uint32_t entry = MV_DBT(tlb[0][0]) +
                   (priv_of(t) * MV_TLB_SIZE + index) * (uint32_t)sizeof(struct mv_tlb_entry);
  uint64_t page = ea & ~0xfffull;
  uint32_t tag = entry + (a->run_acc & MV_ACC_W ? 8 : 0);
  if (fits32((int64_t)page)) { /* cmp qword gs:[tag], imm32                   */
    e8(e, 0x65), e8(e, 0x48), e8(e, 0x81);
    e_modrm(e, 0, 7, 4);
    e8(e, 0x25);
    e32(e, tag);
    e32(e, (uint32_t)page);
  } else {
    e_mov_imm(e, MV_T0, page);
    e_gs_abs(e, 0x3b, MV_T0, tag);
  }
  c->ea_known = true;
  c->ea = ea;
  c->from = e_jcc(e, 5);
  e_load(e, MV_T0, entry + (uint32_t)offsetof(struct mv_tlb_entry, hva));
  a->at = (int32_t)(ea & 0xfff);
}

static void emit_check_tlb(struct tr *t, struct access *a, struct cold *c, unsigned size) {
  struct mv_emit *e = &t->e;
  uint32_t tlb =
      MV_DBT(tlb[0][0]) + priv_of(t) * MV_TLB_SIZE * (uint32_t)sizeof(struct mv_tlb_entry);
  uint32_t tag = tlb + (a->run_acc & MV_ACC_W ? 8 : 0);
  e_mov_rr(e, MV_T1, MV_T0);
  e8(e, 0x49), e8(e, 0xc1), e8(e, 0xef), e8(e, 12 - 5); /* shr t1, 7          */
  e8(e, 0x41), e8(e, 0x81), e8(e, 0xe7);                /* and t1d, imm32     */
  e32(e, (MV_TLB_SIZE - 1) << 5);
  e_gs_base(e, 0x33, MV_T0, MV_T1, tag); /* xor t0, gs:[t1 + tag]             */
  e8(e, 0x49), e8(e, 0x81), e8(e, 0xfe); /* cmp t0, 4096 - size               */
  e32(e, 4096 - size);
  c->tag_off = tag;
  c->from = e_jcc(e, 7); /* ja                                               */
  e_gs_base(e, 0x03, MV_T0, MV_T1, tlb + (uint32_t)offsetof(struct mv_tlb_entry, hva));
}

/* In a bounce block C checks, reads the operand and puts it into d->bounce. */
static void emit_bounce_in(struct tr *t, unsigned i, struct access *a) {
  uint32_t site = add_site(t, i, 0);
  t->x->sites[site].size = a->size;
  t->x->sites[site].access = a->run_acc;
  t->x->sites[site].align = t->insn[i].mem_align;
  e_mov_imm(&t->e, MV_T1, site);
  e_jmp_gs(&t->e, MV_DBT(tramp[MV_TRAMP_BOUNCE_IN]));
  t->x->sites[site].restart = here(t);
  e_mov_imm(&t->e, MV_T0, (uint64_t)(uintptr_t)t->d->bounce);
  a->at = 0;
}

/* After this T0 + the returned offset is the host address of access k of
 * instruction i. */
static int32_t emit_access(struct tr *t, unsigned i, unsigned k) {
  struct access *a = &t->acc[i][k];
  const struct mv_insn *in = &t->insn[i];
  struct mv_emit *e = &t->e;
  if (!a->starts)
    return a->at;

  uint32_t restart = here(t);
  unsigned size = a->size;
  bool live = (t->live[i] & MV_F_ARITH) != 0;
  bool constant = false;
  uint64_t ea = 0;
  if (a->base != MV_REG_NONE) {
    size = a->run_size;
    if (guest_scratch(a->base))
      e_load(e, MV_T0, MV_DBT_GPR(a->base));
    e_lea(e, MV_T0, guest_scratch(a->base) ? MV_T0 : a->base, MV_REG_NONE, 1, a->run_lo, false);
  } else {
    a->run_acc = a->acc;
    if (in->segment == MV_REG_NONE && in->index == MV_REG_NONE && in->op != MV_OP_BT_MEM_REG &&
        (in->base == MV_REG_RIP || in->base == MV_REG_NONE)) {
      ea = (uint64_t)in->disp + (in->base == MV_REG_RIP ? next_rip(t, i) : 0);
      if (in->addr_size == 4)
        ea = (uint32_t)ea;
      constant = (ea & 0xfff) + size <= 4096 && !(t->b->variant & MV_VAR_BOUNCE);
    }
    if (!constant)
      emit_ea(t, i, a->modrm && in->op == MV_OP_POP && in->base == MV_RSP ? in->op_size : 0);
  }
  /* Flags that the bit offset clobbers are saved before it. */
  if (live && !(t->b->variant & MV_VAR_BOUNCE))
    emit_flags_save(e);
  if (in->op == MV_OP_BT_MEM_REG && a->modrm) {
    if (live && t->b->variant & MV_VAR_BOUNCE)
      emit_flags_save(e);
    emit_bit_offset(t, i);
    if (live && t->b->variant & MV_VAR_BOUNCE)
      emit_flags_restore(e);
  }
  if (t->b->variant & MV_VAR_BOUNCE) {
    emit_bounce_in(t, i, a);
    return a->at;
  }

  uint32_t site = add_site(t, i, restart);
  struct mv_site *s = &t->x->sites[site];
  s->size = (uint16_t)size;
  s->access = a->run_acc;
  s->flags = size != a->size || a->run_acc != a->acc ? MV_SITE_COALESCED : 0;
  s->align = in->mem_align;
  struct cold *c = add_cold(t, COLD_MEM, NULL, site);
  c->flags_saved = live;
  if (constant)
    emit_check_const(t, a, c, ea);
  else
    emit_check_tlb(t, a, c, size);
  if (live)
    emit_flags_restore(e);
  return a->at;
}

/* After the instruction: in a bounce block, C writes the operand back. */
static void emit_access_done(struct tr *t, unsigned i, unsigned k) {
  if (!(t->b->variant & MV_VAR_BOUNCE) || !(t->acc[i][k].run_acc & MV_ACC_W))
    return;
  uint32_t site = add_site(t, i, 0);
  t->x->sites[site].size = t->acc[i][k].size;
  e_mov_imm(&t->e, MV_T1, site);
  e_jmp_gs(&t->e, MV_DBT(tramp[MV_TRAMP_BOUNCE_OUT]));
  t->x->sites[site].restart = here(t);
}

/* ======================= copying instructions =========================== */

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
  unsigned esc = escape[in->map & 3], i = 0;
  for (; i < in->opcode_off - esc; i++) {
    uint8_t p = bytes[i];
    if (p == 0x66 || p == 0xf2 || p == 0xf3 || p == 0xf0)
      e8(e, p);
  }
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
  for (unsigned k = 0; k < in->imm_len; k++)
    e8(&t->e, bytes[in->imm_off + k]);
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
  unsigned use = scratch_operands(in);
  unsigned borrow = MV_REG_NONE;

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
  for (unsigned k = 0; k < 2; k++) {
    bool read, written;
    scratch_use(in, MV_T0 + k, &read, &written);
    if (use & 1u << k && read)
      e_load(e, w.gpr[k], MV_DBT_GPR(MV_T0 + k));
  }
  emit_rewritten(t, i, &w);
  for (unsigned k = 0; k < 2; k++) {
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
    emit_flags_save(e);
  emit_bit_index(t, i);
  e8(e, 0x41), e8(e, 0x83); /* and t1d, bits - 1                              */
  e_modrm(e, 3, 4, MV_T1);
  e8(e, bits - 1);
  if (live)
    emit_flags_restore(e);
  struct mv_insn copy = *in;
  struct mv_insn *slot = &t->insn[i];
  slot->reg.reg = MV_T1;
  struct rewrite w = {.mem = true, .base = MV_T0, .disp = at, .gpr = {MV_T1, MV_T1}};
  emit_rewritten(t, i, &w);
  *slot = copy;
}

static void emit_lea(struct tr *t, unsigned i) {
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
  emit_address_regs(t, in);
  if (guest_scratch(dst) && in->op_size == 2 && dst != in->base && dst != in->index)
    e_load(e, dst, MV_DBT_GPR(dst));
  for (unsigned k = 0; k < in->len; k++)
    e8(e, t->bytes[i][k]);
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
    int32_t from = emit_access(t, i, 0);
    emit_mov_t0(t, false, MV_T1, from, size);
    emit_stash(t, i, 1);
    int32_t to = emit_access(t, i, 1);
    emit_unstash(t, i, 1);
    emit_mov_t0(t, true, MV_T1, to, size);
    emit_access_done(t, i, 1);
  } else {
    int32_t to = emit_access(t, i, 0);
    if (reg == MV_REG_NONE) {
      emit_store_imm(t, to, in->imm, size);
    } else if (guest_scratch((uint8_t)reg)) {
      e_load(&t->e, MV_T1, MV_DBT_GPR(reg));
      emit_mov_t0(t, true, MV_T1, to, size);
    } else {
      emit_mov_t0(t, true, reg, to, size);
    }
    emit_access_done(t, i, 0);
  }
  emit_add_rsp(t, -(int32_t)size);
}

static void emit_pop(struct tr *t, unsigned i) {
  const struct mv_insn *in = &t->insn[i];
  unsigned size = in->op_size;
  unsigned reg = in->opreg.reg != MV_REG_NONE ? in->opreg.reg : in->rm.reg;
  int32_t from = emit_access(t, i, 0);
  if (in->has_mem) {
    emit_mov_t0(t, false, MV_T1, from, size);
    emit_stash(t, i, 1);
    int32_t to = emit_access(t, i, 1);
    emit_unstash(t, i, 1);
    emit_mov_t0(t, true, MV_T1, to, size);
    emit_access_done(t, i, 1);
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
  int32_t at = emit_access(t, i, 0);
  e_lea(&t->e, MV_RSP, MV_RBP, MV_REG_NONE, 1, 8, false);
  emit_mov_t0(t, false, MV_RBP, at, 8);
}

/* ======================= branches ======================================= */

/* The place of `rel32` in the block is linked to guest address `rip`. */
static void link_from(struct tr *t, unsigned slot, uint64_t rip, uint8_t *rel32) {
  struct mv_link *l = &t->b->out[slot];
  l->rip = rip;
  l->patch = (uint32_t)(rel32 - t->x->rw);
  add_cold(t, COLD_LINK, rel32, (uint32_t)(t->b - t->x->blocks) << 1 | slot);
}
static void emit_exit(struct tr *t, unsigned slot, uint64_t rip) {
  link_from(t, slot, rip, e_jmp(&t->e));
}

static void emit_poll(struct tr *t) {
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
  int32_t at = emit_access(t, i, k);
  if (fits32((int64_t)ret)) {
    emit_store_imm(t, at, (int64_t)ret, 8);
  } else {
    e_mov_imm(&t->e, MV_T1, ret);
    emit_mov_t0(t, true, MV_T1, at, 8);
  }
  emit_access_done(t, i, k);
  emit_add_rsp(t, -8);
}

/* Scratch register `to` = target of an indirect jump or call. */
static void emit_target(struct tr *t, unsigned i, unsigned to) {
  const struct mv_insn *in = &t->insn[i];
  if (in->has_mem)
    emit_mov_t0(t, false, to, emit_access(t, i, 0), 8);
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
  emit_mov_t0(t, false, MV_T0, emit_access(t, i, 0), 8);
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
  uint32_t site = add_site(t, i, 0);
  t->x->helpers[t->x->nhelpers] = t->insn[i];
  t->x->sites[site].helper = t->x->nhelpers++;
  e_mov_imm(&t->e, MV_T1, site);
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
  uint32_t site = add_site(t, i, 0);
  t->x->helpers[t->x->nhelpers] = *in;
  t->x->sites[site].helper = t->x->nhelpers++;
  e_mov_imm(&t->e, MV_T1, site);
  e_jmp_gs(&t->e, MV_DBT(tramp[MV_TRAMP_INSN]));
  t->x->sites[site].restart = here(t);
  if (!store)
    emit_vec(t, i, false, reg, 0, wide);
  if (gather)
    emit_vec(t, i, false, vvvv, 2, true);
  emit_exit(t, 0, next_rip(t, i));
}

static void emit_raise(struct tr *t, unsigned i, unsigned vector) {
  uint32_t site = add_site(t, i, 0);
  e_mov_imm(&t->e, MV_T0, vector);
  e_mov_imm(&t->e, MV_T1, site);
  e_jmp_gs(&t->e, MV_DBT(tramp[MV_TRAMP_RAISE]));
}

static void emit_swapgs(struct tr *t) {
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
static void emit_rdtsc(struct tr *t) {
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

static void emit_plain(struct tr *t, unsigned i) {
  const struct mv_insn *in = &t->insn[i];
  if (in->op == MV_OP_NOP || in->op == MV_OP_PREFETCH || in->op == MV_OP_CLFLUSH)
    return;
  if (in->op == MV_OP_LEA) {
    emit_lea(t, i);
  } else if (t->nacc[i]) {
    int32_t at = emit_access(t, i, 0);
    if (in->op == MV_OP_BT_MEM_REG)
      emit_bit_op(t, i, at);
    else
      emit_copy(t, i, true, at);
    if (in->op == MV_OP_FNSTENV || in->op == MV_OP_FNSAVE)
      emit_hide_fip(t, i, at);
    emit_access_done(t, i, 0);
  } else {
    emit_copy(t, i, false, 0);
  }
}

static void emit_insn(struct tr *t, unsigned i) {
  const struct mv_insn *in = &t->insn[i];
  int vector = refused(t, in);
  if (vector >= 0)
    emit_raise(t, i, (unsigned)vector);
  else if (in->cls == MV_CLASS_VSIB || in->cls == MV_CLASS_MASKED)
    emit_vector_helper(t, i);
  else if (by_helper(t, in))
    emit_helper(t, i);
  else if (in->cls == MV_CLASS_BRANCH)
    emit_branch(t, i);
  else if (in->op == MV_OP_PUSH)
    emit_push(t, i);
  else if (in->op == MV_OP_POP)
    emit_pop(t, i);
  else if (in->op == MV_OP_LEAVE)
    emit_leave(t, i);
  else if (in->op == MV_OP_SWAPGS)
    emit_swapgs(t);
  else if (in->op == MV_OP_RDTSC)
    emit_rdtsc(t);
  else
    emit_plain(t, i);
}

/* Which flags are live before each instruction; backwards. */
static void flow_flags(struct tr *t) {
  uint16_t live = MV_F_ARITH | MV_F_DF;
  bool all = t->d->vm->dbt.no_flags_live;
  t->live[t->n] = live;
  for (unsigned i = t->n; i-- > 0;) {
    const struct mv_insn *in = &t->insn[i];
    if (ends_block(t, in) && in->cls != MV_CLASS_BRANCH)
      live = MV_F_ARITH | MV_F_DF;
    else
      live = (uint16_t)((live & ~in->flags_killed) | in->flags_read);
    t->live[i] = all ? MV_F_ARITH | MV_F_DF : live;
  }
  t->b->flags_live_in = (t->live[0] & MV_F_ARITH) != 0;
}

/* Decodes up to a branch, the end of the page or the limit. 0; 1: needs the
 * second page. */
static int decode_block(struct tr *t, const uint8_t *bytes, unsigned avail, const uint8_t *bytes2) {
  unsigned limit = t->d->vm->dbt.max_insns, at = 0;
  if (!limit || limit > MV_BLOCK_INSNS_MAX)
    limit = MV_BLOCK_INSNS_MAX;
  if (t->b->variant)
    limit = 1;
  t->b->gpa2 = 0;
  while (t->n < limit && at < avail) {
    struct mv_insn *in = &t->insn[t->n];
    enum mv_decode_status st = mv_decode(in, bytes + at, avail - at, MV_MODE_64);
    t->bytes[t->n] = bytes + at;
    if (st == MV_DECODE_SHORT) {
      if (t->n) /* it begins the next block                                   */
        break;
      if (!bytes2)
        return 1;
      __builtin_memcpy(t->crossing, bytes + at, avail - at);
      __builtin_memcpy(t->crossing + (avail - at), bytes2, MV_INSN_MAX);
      st = mv_decode(in, t->crossing, MV_INSN_MAX, MV_MODE_64);
      t->bytes[t->n] = t->crossing;
      t->b->gpa2 = 1;
    }
    if (st != MV_DECODE_OK) { /* #UD, or #GP for more than 15 bytes           */
      *in = (struct mv_insn){.cls = MV_CLASS_UD, .len = 1};
      in->reg.reg = in->rm.reg = in->vvvv.reg = in->opreg.reg = MV_REG_NONE;
      in->base = in->index = in->segment = MV_REG_NONE;
      in->op = st == MV_DECODE_TOO_LONG ? MV_OP_HLT : MV_OP_OTHER;
    }
    t->off[t->n++] = (uint16_t)at;
    at += in->len;
    if (ends_block(t, in) || in->cls == MV_CLASS_UD || t->b->gpa2 || refused(t, in) >= 0)
      break;
  }
  t->b->guest_len = (uint16_t)at;
  t->b->ninsns = (uint8_t)t->n;
  return 0;
}

/* Compares the number of the mapping seen at a page with the block's own; goes
 * on if they are equal, else jumps to the returned rel32. */
static uint8_t *emit_guard(struct mv_emit *e, uint64_t gva, unsigned priv, uint32_t codepage,
                           bool flags_live) {
  uint32_t off =
      MV_DBT(itlb[0][0]) + (priv * MV_ITLB_SIZE + ((gva >> 12) & (MV_ITLB_SIZE - 1))) * 4;
  if (!flags_live) {
    e8(e, 0x65), e8(e, 0x81); /* cmp dword gs:[off], codepage                 */
    e_modrm(e, 0, 7, 4);
    e8(e, 0x25);
    e32(e, off);
    e32(e, codepage);
    return e_jcc(e, 5);
  }
  e_mov_rr(e, MV_T1, MV_RCX);
  emit_half(e, false, MV_RCX, off);
  e_lea(e, MV_RCX, MV_RCX, MV_REG_NONE, 1, -(int32_t)codepage, true);
  e8(e, 0xe3), e8(e, 8); /* jrcxz over the exit                               */
  e_mov_rr(e, MV_RCX, MV_T1);
  uint8_t *miss = e_jmp(e);
  e_mov_rr(e, MV_RCX, MV_T1);
  return miss;
}

static void emit_cold(struct tr *t) {
  struct mv_emit c = {.p = t->x->rw + t->x->cold};
  for (unsigned i = 0; i < t->ncold; i++) {
    struct cold *s = &t->cold[i];
    e_patch(s->from, c.p);
    enum mv_tramp tramp = MV_TRAMP_MEM;
    if (s->kind == COLD_MEM) {
      if (s->ea_known)
        e_mov_imm(&c, MV_T0, s->ea);
      else
        e_gs_base(&c, 0x33, MV_T0, MV_T1, s->tag_off);
      if (s->flags_saved)
        emit_flags_restore(&c);
    } else if (s->kind == COLD_LINK) {
      t->b->out[s->arg & 1].stub = (uint32_t)(c.p - t->x->rw);
      tramp = MV_TRAMP_LINK;
    } else {
      tramp = MV_TRAMP_GUARD;
    }
    e_mov_imm(&c, MV_T1, s->arg);
    e_jmp_gs(&c, MV_DBT(tramp[tramp]));
  }
  t->x->cold = (uint32_t)(c.p - t->x->rw);
}

static void emit_count(struct tr *t) {
  e_load(&t->e, MV_T1, MV_DBT(icount));
  e_lea(&t->e, MV_T1, MV_T1, MV_REG_NONE, 1, (int32_t)t->n, false);
  e_store(&t->e, MV_DBT(icount), MV_T1);
}

int mv_translate(struct mv_dbt *d, struct mv_block *b, const uint8_t *bytes, unsigned avail,
                 const uint8_t *bytes2) {
  struct tr t;
  t.d = d, t.x = d->exec, t.b = b, t.n = 0, t.ncold = 0;
  if (decode_block(&t, bytes, avail, bytes2))
    return 1;
  __builtin_memset(t.t0_busy, 0, sizeof t.t0_busy);
  flow_flags(&t);
  plan_runs(&t);

  t.e.p = t.x->rw + t.x->hot;
  b->code = t.x->hot;
  b->map = t.x->nmap;
  if (b->gpa2 && !(b->mode & MV_MODE_UNGUARDED)) /* the second page is checked */
    add_cold(
        &t, COLD_GUARD,
        emit_guard(&t.e, b->rip + b->guest_len - 1, priv_of(&t), b->codepage2, b->flags_live_in),
        (uint32_t)(b - t.x->blocks));
  if (d->vm->count)
    emit_count(&t);
  for (unsigned i = 0; i < t.n; i++) {
    t.x->map[t.x->nmap++] = (struct mv_insn_map){.code = here(&t), .guest = t.off[i]};
    emit_insn(&t, i);
  }
  const struct mv_insn *last = &t.insn[t.n - 1];
  if (!ends_block(&t, last) && refused(&t, last) < 0)
    emit_exit(&t, 0, next_rip(&t, t.n - 1));
  b->code_end = here(&t);
  t.x->hot = (b->code_end + 15) & ~15u;
  emit_cold(&t);
  return 0;
}

/* ======================= entries ======================================== */

uint32_t mv_emit_guarded_entry(struct mv_dbt *d, struct mv_block *b) {
  struct mv_dbt_exec *x = d->exec;
  struct mv_emit e = {.p = x->rw + x->cold};
  unsigned priv = b->mode & MV_MODE_USER ? MV_PRIV_USER : MV_PRIV_KERNEL;
  uint8_t *miss = emit_guard(&e, b->rip, priv, b->codepage, b->flags_live_in);
  e_patch(e_jmp(&e), x->rw + b->code);
  e_patch(miss, e.p);
  e_mov_imm(&e, MV_T1, (uint64_t)(b - x->blocks));
  e_jmp_gs(&e, MV_DBT(tramp[MV_TRAMP_GUARD]));
  uint32_t entry = x->cold;
  x->cold = (uint32_t)(e.p - x->rw);
  return entry;
}

uint32_t mv_emit_indirect_entry(struct mv_dbt *d, struct mv_block *b) {
  struct mv_dbt_exec *x = d->exec;
  struct mv_emit e = {.p = x->rw + x->cold};
  uint32_t to =
      b->mode & MV_MODE_UNGUARDED ? b->code : mv_cache_guarded_entry(d, (uint32_t)(b - x->blocks));
  e.p = x->rw + x->cold;
  uint32_t entry = x->cold;
  uint8_t *miss;
  if (!b->flags_live_in) {
    if (fits32((int64_t)b->rip)) {
      e8(&e, 0x49), e8(&e, 0x81); /* cmp t0, imm32                            */
      e_modrm(&e, 3, 7, MV_T0);
      e32(&e, (uint32_t)b->rip);
    } else {
      e_mov_imm(&e, MV_T1, b->rip);
      e_rexw(&e, MV_T1, 0, MV_T0); /* cmp t0, t1                              */
      e8(&e, 0x39);
      e_modrm(&e, 3, MV_T1, MV_T0);
    }
    miss = e_jcc(&e, 5);
    e_patch(e_jmp(&e), x->rw + to);
  } else { /* RCX = T0 - rip, JRCXZ                                            */
    e_mov_rr(&e, MV_T1, MV_RCX);
    e_mov_imm(&e, MV_RCX, -b->rip);
    e_lea(&e, MV_RCX, MV_RCX, MV_T0, 1, 0, false);
    e8(&e, 0xe3), e8(&e, 8);
    e_mov_rr(&e, MV_RCX, MV_T1);
    miss = e_jmp(&e);
    e_mov_rr(&e, MV_RCX, MV_T1);
    e_patch(e_jmp(&e), x->rw + to);
  }
  e_patch(miss, e.p);
  e_jmp_gs(&e, MV_DBT(tramp[MV_TRAMP_INDIRECT]));
  x->cold = (uint32_t)(e.p - x->rw);
  return entry;
}
