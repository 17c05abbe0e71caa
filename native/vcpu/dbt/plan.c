/*
 * Planning a block: what its instructions are, which flags are live between
 * them, which memory accesses share a check. No code is emitted here.
 *
 * Accesses off the same base register, one after the other, form a run that is
 * checked once, at its first access, for all the bytes between its lowest and
 * highest. RSP is followed through PUSH, POP and additions of constants.
 */
#include "translate.h"
#include "mv/features.h"

#define PEEK_INSNS 8 /* of the code after a block, for its flags              */

/* ======================= looking at instructions ======================== */

unsigned mv_scratch_operands(const struct mv_insn *in) {
  const struct mv_gpr_ref *ref[4] = {&in->reg, &in->rm, &in->vvvv, &in->opreg};
  unsigned m = 0;
  if (!((in->gpr_read | in->gpr_written) >> MV_T0))
    return 0;
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

/* What is done with the instruction. *vector: what it raises, if it does. */
static enum kind kind_of(struct tr *t, const struct mv_insn *in, uint8_t *vector) {
  int v = refused(t, in);
  if (v >= 0) {
    *vector = (uint8_t)v;
    return KIND_RAISE;
  }
  if (in->cls == MV_CLASS_VSIB || in->cls == MV_CLASS_MASKED)
    return KIND_VECTOR;
  if (by_helper(t, in))
    return KIND_HELPER;
  if (in->cls == MV_CLASS_BRANCH)
    return KIND_BRANCH;
  switch (in->op) {
  case MV_OP_PUSH:
    return KIND_PUSH;
  case MV_OP_POP:
    return KIND_POP;
  case MV_OP_LEAVE:
    return KIND_LEAVE;
  case MV_OP_SWAPGS:
    return KIND_SWAPGS;
  case MV_OP_RDTSC:
    return KIND_RDTSC;
  case MV_OP_LEA:
    return KIND_LEA;
  case MV_OP_NOP:
  case MV_OP_PREFETCH:
  case MV_OP_CLFLUSH:
    return KIND_SKIP;
  default:
    return KIND_COPY;
  }
}

/* Does the instruction leave T0 as it is, if it makes no check itself? */
static bool keeps_t0(struct tr *t, unsigned i) {
  const struct mv_insn *in = &t->insn[i];
  switch (t->kind[i]) {
  case KIND_COPY:
    return mv_scratch_operands(in) != 3;
  case KIND_LEA:
    return mv_scratch_operands(in) == 0 && !guest_scratch(in->base) && !guest_scratch(in->index);
  case KIND_SWAPGS:
  case KIND_RDTSC:
    return false;
  default:
    return t->kind[i] <= KIND_BRANCH;
  }
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
  if (t->kind[i] > KIND_BRANCH)
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
      struct access *to = &t->acc[i][1];
      if (in->base == MV_RSP && to->base == MV_RSP) { /* RSP after the pop   */
        if (to->off > INT32_MAX - size)
          to->base = MV_REG_NONE;
        else
          to->off += size;
      }
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
static bool moves_by(const struct mv_insn *in, unsigned base, int64_t *by) {
  *by = 0;
  if (!(in->gpr_written & 1u << base))
    return true;
  if (base == MV_RSP && in->op == MV_OP_PUSH)
    return *by = -(int64_t)in->op_size, true;
  if (base == MV_RSP && in->op == MV_OP_POP && in->opreg.reg != MV_RSP && in->rm.reg != MV_RSP)
    return *by = in->op_size, true;
  if (in->op_size != 8 || in->enc != MV_ENC_LEGACY || in->map != 0)
    return false;
  if ((in->opcode == 0x83 || in->opcode == 0x81) && in->modrm >> 6 == 3 && in->rm.reg == base) {
    if ((in->modrm >> 3 & 7) == 0) /* ADD                                    */
      return *by = in->imm, true;
    if ((in->modrm >> 3 & 7) == 5) /* SUB                                    */
      return *by = -in->imm, true;
  }
  if (in->op == MV_OP_LEA && in->reg.reg == base && in->base == base && in->index == MV_REG_NONE &&
      in->addr_size == 8)
    return *by = in->disp, true;
  return false;
}

/* Distances are the guest's to choose: they are added up in 64 bits, and a sum
 * that leaves the middle of 32 bits ends a run (out_of_reach). */
struct run {
  struct access *first;
  unsigned base;
  int64_t delta; /* base register now, minus at the run's start              */
  int64_t lo, hi;
  unsigned first_insn, last_insn;
};

static void run_close(struct tr *t, struct run *r) {
  if (!r->first)
    return;
  r->first->run_lo = (int32_t)r->lo;
  r->first->run_size = (uint16_t)(r->hi - r->lo);
  for (unsigned i = r->first_insn; i <= r->last_insn; i++) {
    for (unsigned k = 0; k < t->nacc[i]; k++) {
      struct access *a = &t->acc[i][k];
      if (a >= r->first && a->base != MV_REG_NONE)
        a->at -= (int32_t)r->lo;
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
                    .hi = (int64_t)a->off + a->size,
                    .first_insn = i,
                    .last_insn = i};
  a->starts = true;
  a->at = a->off;
  a->run_acc = a->acc;
}

static bool out_of_reach(int64_t distance) {
  return distance < INT32_MIN / 2 || distance > INT32_MAX / 2;
}

/* Takes access `a` into the run if it fits. */
static bool run_join(struct run *r, struct access *a, unsigned i) {
  if (!r->first || a->base != r->base)
    return false;
  int64_t at = a->off + r->delta, lo = at < r->lo ? at : r->lo;
  int64_t hi = at + a->size > r->hi ? at + a->size : r->hi;
  if (out_of_reach(at) || hi - lo > RUN_SPAN_MAX)
    return false;
  r->lo = lo;
  r->hi = hi;
  a->at = (int32_t)at;
  r->first->run_acc |= a->acc;
  r->last_insn = i;
  return true;
}

/* May the check of an access move up over instruction p? *moved: what its base
 * register moves by there. */
static bool hoists_over(struct tr *t, unsigned p, const struct access *a, const struct mv_insn *in,
                        int64_t *moved) {
  if (t->nacc[p] || t->kind[p] > KIND_LEA || !keeps_t0(t, p))
    return false;
  *moved = 0;
  if (a->base != MV_REG_NONE)
    return moves_by(&t->insn[p], a->base, moved);
  unsigned used = (in->base <= 15 ? 1u << in->base : 0) | (in->index <= 15 ? 1u << in->index : 0);
  return !(t->insn[p].gpr_written & used);
}

/* Where flags are live at an access, makes its check earlier, where they are
 * not: above a CMP whose flags a branch after the access reads. */
static void hoist_check(struct tr *t, unsigned i) {
  struct access *a = &t->acc[i][0];
  const struct mv_insn *in = &t->insn[i];
  int64_t moved = 0, by;
  if (!a->starts || !flags_live(t, i) || in->op == MV_OP_BT_MEM_REG)
    return;
  for (unsigned j = i; j > 0 && hoists_over(t, j - 1, a, in, &by);) {
    j--;
    moved += by;
    if (out_of_reach(moved) || out_of_reach(a->run_lo))
      return;
    if (flags_live(t, j))
      continue;
    t->hoist[j] = (uint8_t)(i + 1);
    a->moved = (int32_t)moved;
    for (; j < i; j++)
      t->t0_busy[j] = true;
    return;
  }
}

/* Decides which accesses share a check. */
static void plan_runs(struct tr *t) {
  struct run r = {0};
  bool coalesce = !t->b->variant && !t->d->vm->dbt.no_coalesce && !t->b->failures;
  for (unsigned i = 0; i < t->n; i++) {
    const struct mv_insn *in = &t->insn[i];
    if (!keeps_t0(t, i))
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
    int64_t by;
    if (in->op == MV_OP_LEAVE && r.base == MV_RBP) { /* RSP = RBP + 8 now     */
      r.base = MV_RSP;
      r.delta += 8;
    } else if (moves_by(in, r.base, &by)) {
      r.delta += by;
    } else {
      run_close(t, &r);
    }
  }
  run_close(t, &r);
  for (unsigned i = 1; coalesce && i < t->n; i++)
    if (t->nacc[i])
      hoist_check(t, i);
}

/* ======================= flags, decoding ================================ */

/* Bytes of code at `rip` that the block may be made to depend on: of its own
 * page, or of one other global kernel page. NULL: none. */
static const uint8_t *peek_bytes(struct tr *t, uint64_t rip, uint64_t *gpa) {
  struct mv_block *b = t->b;
  uint64_t off = rip & 0xfff;
  if ((rip ^ b->rip) >> 12 == 0) {
    *gpa = (b->gpa & ~0xfffull) + off;
    if (b->peek_len && (b->peek_gpa ^ *gpa) >> 12)
      return NULL;
    return t->page + off;
  }
  struct mv_walk w;
  if (!(b->mode & MV_MODE_UNGUARDED) || b->peek_len || !mv_cache_probe_global(t->d, rip, &w))
    return NULL;
  *gpa = w.gpa;
  b->codepage2 = mv_cache_codepage(t->d, rip & ~0xfffull, w.gpa & ~0xfffull, b->mode);
  return w.hva + off;
}

/* The block depends on these bytes, too. */
static void peek_note(struct mv_block *b, uint64_t gpa, unsigned len) {
  uint64_t lo = b->peek_len && b->peek_gpa < gpa ? b->peek_gpa : gpa;
  uint64_t end = gpa + len, old = b->peek_gpa + b->peek_len;
  b->peek_len = (uint16_t)((b->peek_len && old > end ? old : end) - lo);
  b->peek_gpa = lo;
}

/* Arithmetic flags that the code at `rip` may read before it overwrites them:
 * none, or (not known) all. */
static uint16_t peek_flags(struct tr *t, uint64_t rip) {
  uint64_t gpa;
  const uint8_t *p = peek_bytes(t, rip, &gpa);
  unsigned at = 0, avail = 0x1000 - (rip & 0xfff);
  uint16_t open = MV_F_ARITH;
  struct mv_insn in;
  for (unsigned n = 0; p && n < PEEK_INSNS; n++) {
    if (mv_decode(&in, p + at, avail - at, MV_MODE_64) != MV_DECODE_OK ||
        (in.cls != MV_CLASS_COPY && in.cls != MV_CLASS_STACK) || in.flags_read & open)
      break;
    at += in.len;
    open &= (uint16_t)~in.flags_killed;
    if (open)
      continue;
    peek_note(t->b, gpa, at);
    return 0;
  }
  return MV_F_ARITH;
}

/* Flags live at the end of the block. */
static uint16_t flags_after(struct tr *t) {
  const struct mv_insn *in = &t->insn[t->n - 1];
  uint64_t next = next_rip(t, t->n - 1), target = next + (uint64_t)in->imm;
  if (t->b->variant || t->b->crosses || t->kind[t->n - 1] > KIND_BRANCH)
    return MV_F_ARITH;
  if (t->kind[t->n - 1] < KIND_BRANCH)
    return peek_flags(t, next);
  switch (in->op) {
  case MV_OP_JMP_REL:
  case MV_OP_CALL_REL:
    return peek_flags(t, target);
  case MV_OP_JCC:
    return peek_flags(t, target) | peek_flags(t, next);
  default:
    return MV_F_ARITH;
  }
}

/* Which flags are live before each instruction, given those at the end. */
static void flow_flags(struct tr *t, uint16_t live) {
  live |= MV_F_DF;
  t->live[t->n] = live;
  for (unsigned i = t->n; i-- > 0;) {
    const struct mv_insn *in = &t->insn[i];
    if (t->kind[i] > KIND_BRANCH)
      live = MV_F_ARITH | MV_F_DF;
    else
      live = (uint16_t)((live & ~in->flags_killed) | in->flags_read);
    t->live[i] = live;
  }
}

/* Looks past the end of the block only if a memory check would gain by it. */
static void plan_flags(struct tr *t) {
  flow_flags(t, MV_F_ARITH);
  if (t->d->vm->dbt.no_flags_live) {
    for (unsigned i = 0; i < t->n; i++)
      t->live[i] = MV_F_ARITH | MV_F_DF;
    return;
  }
  for (unsigned i = 0; i < t->n; i++) {
    if (!t->nacc[i] || !flags_live(t, i))
      continue;
    if (!flags_after(t))
      flow_flags(t, 0);
    return;
  }
}

/* Decodes up to a branch, the end of the page or the limit. 0; 1: needs the
 * second page. */
static int decode_block(struct tr *t, const uint8_t *bytes, unsigned avail, const uint8_t *bytes2) {
  unsigned limit = t->d->vm->dbt.max_insns, at = 0;
  if (!limit || limit > MV_BLOCK_INSNS_MAX)
    limit = MV_BLOCK_INSNS_MAX;
  if (t->b->variant)
    limit = 1;
  t->b->crosses = false;
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
      t->b->crosses = true;
    }
    if (st != MV_DECODE_OK) { /* #UD, or #GP for more than 15 bytes: all bytes count */
      unsigned len = t->b->crosses || avail - at > MV_INSN_MAX ? MV_INSN_MAX : avail - at;
      *in = (struct mv_insn){.cls = MV_CLASS_UD, .len = (uint8_t)len};
      in->reg.reg = in->rm.reg = in->vvvv.reg = in->opreg.reg = MV_REG_NONE;
      in->base = in->index = in->segment = MV_REG_NONE;
      in->op = st == MV_DECODE_TOO_LONG ? MV_OP_HLT : MV_OP_OTHER;
    }
    t->kind[t->n] = (uint8_t)kind_of(t, in, &t->vector);
    t->off[t->n++] = (uint16_t)at;
    at += in->len;
    if (t->kind[t->n - 1] >= KIND_BRANCH || t->b->crosses)
      break;
  }
  t->b->guest_len = (uint16_t)at;
  t->b->ninsns = (uint8_t)t->n;
  return 0;
}

int mv_plan_block(struct tr *t, const uint8_t *bytes, unsigned avail, const uint8_t *bytes2) {
  t->n = t->ncold = 0;
  if (decode_block(t, bytes, avail, bytes2))
    return 1;
  t->page = bytes - (t->b->rip & 0xfff);
  __builtin_memset(t->t0_busy, 0, t->n);
  __builtin_memset(t->hoist, 0, t->n);
  for (unsigned i = 0; i < t->n; i++)
    list_accesses(t, i);
  plan_flags(t);
  plan_runs(t);
  return 0;
}
