/*
 * String instructions (SDM 2B, MOVS/STOS/LODS/SCAS/CMPS/INS/OUTS), by page and
 * not by element: while source and destination stay in their pages the host's
 * own REP instruction does the work, overlap and flags included.
 *
 * Registers are kept up to date after each piece, so that a fault in the
 * middle, or an interrupt between pieces, leaves a state from which the
 * instruction goes on.
 */
#include "exec.h"
#include "system.h"

struct string_op {
  struct mv_dbt *d;
  const struct mv_insn *insn;
  unsigned size; /* of an element, bytes                                     */
  int64_t step;  /* size, or -size with DF                                   */
  bool rep;
  uint64_t mask; /* of the address size                                      */
  uint64_t src_base;
};

static uint64_t reg(const struct string_op *s, unsigned r) {
  return s->d->gpr[r] & s->mask;
}
static void advance(struct string_op *s, unsigned r, uint64_t n) {
  uint64_t v = s->d->gpr[r] + (uint64_t)s->step * n;
  s->d->gpr[r] = s->mask == ~0ull ? v : v & s->mask;
}
static uint64_t src(const struct string_op *s) {
  return s->src_base + reg(s, MV_RSI);
}
static uint64_t dst(const struct string_op *s) {
  return reg(s, MV_RDI);
}

/* Elements from `gva` to the end of its page. */
static uint64_t in_page(const struct string_op *s, uint64_t gva) {
  return (0x1000 - (gva & 0xfff)) / s->size;
}
static uint64_t min64(uint64_t a, uint64_t b) {
  return a < b ? a : b;
}

/* Host address for `n` elements in one page of plain RAM, or NULL. */
static uint8_t *host(struct string_op *s, uint64_t gva, unsigned access, bool *failed) {
  *failed = false;
  if (s->step < 0 || !in_page(s, gva))
    return NULL;
  return mv_mmu_host(s->d, gva, access, failed);
}

static void rep_movs(uint8_t *to, const uint8_t *from, uint64_t n, unsigned size) {
  switch (size) {
  case 1:
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
    break;
  case 2:
    __asm__ volatile("rep movsw" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
    break;
  case 4:
    __asm__ volatile("rep movsl" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
    break;
  default:
    __asm__ volatile("rep movsq" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
  }
}

static void rep_stos(uint8_t *to, uint64_t v, uint64_t n, unsigned size) {
  switch (size) {
  case 1:
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(n) : "a"(v) : "memory");
    break;
  case 2:
    __asm__ volatile("rep stosw" : "+D"(to), "+c"(n) : "a"(v) : "memory");
    break;
  case 4:
    __asm__ volatile("rep stosl" : "+D"(to), "+c"(n) : "a"(v) : "memory");
    break;
  default:
    __asm__ volatile("rep stosq" : "+D"(to), "+c"(n) : "a"(v) : "memory");
  }
}

/* One piece: *done elements, at most `n`. 0 or -1. */
static int movs(struct string_op *s, uint64_t n, uint64_t *done) {
  bool failed;
  uint8_t *from = host(s, src(s), MV_ACC_R, &failed), *to;
  if (failed)
    return -1;
  to = from ? host(s, dst(s), MV_ACC_W, &failed) : NULL;
  if (failed)
    return -1;
  if (to) {
    *done = min64(n, min64(in_page(s, src(s)), in_page(s, dst(s))));
    rep_movs(to, from, *done, s->size);
  } else {
    uint64_t v;
    *done = 1;
    if (mv_mmu_read(s->d, src(s), &v, s->size, MV_AS_CPL) ||
        mv_mmu_write(s->d, dst(s), &v, s->size, MV_AS_CPL))
      return -1;
  }
  advance(s, MV_RSI, *done);
  advance(s, MV_RDI, *done);
  return 0;
}

static int stos(struct string_op *s, uint64_t n, uint64_t *done) {
  bool failed;
  uint8_t *to = host(s, dst(s), MV_ACC_W, &failed);
  if (failed)
    return -1;
  if (to) {
    *done = min64(n, in_page(s, dst(s)));
    rep_stos(to, s->d->gpr[MV_RAX], *done, s->size);
  } else {
    *done = 1;
    if (mv_mmu_write(s->d, dst(s), &s->d->gpr[MV_RAX], s->size, MV_AS_CPL))
      return -1;
  }
  advance(s, MV_RDI, *done);
  return 0;
}

static int lods(struct string_op *s, uint64_t n, uint64_t *done) {
  uint64_t v = 0;
  (void)n;
  *done = 1;
  if (mv_mmu_read(s->d, src(s), &v, s->size, MV_AS_CPL))
    return -1;
  mv_gpr_put(s->d, MV_RAX, v, s->size);
  advance(s, MV_RSI, 1);
  return 0;
}

/* Flags of CMP a, b of `size` bytes. */
static void set_cmp_flags(struct mv_dbt *d, uint64_t a, uint64_t b, unsigned size) {
  uint64_t fl;
  unsigned shift = 64 - 8 * size;
  /* AF is of the low nibble: taken from the unshifted subtraction.           */
  __asm__("cmp %2, %1\n\tpushfq\n\tpopq %0" : "=r"(fl) : "r"(a << shift), "r"(b << shift) : "cc");
  uint64_t af = ((a ^ b ^ (a - b)) & 0x10);
  uint64_t low = (a - b) & 0xff;
  uint64_t pf = __builtin_parity((unsigned)low) ? 0 : MV_F_PF;
  d->flags =
      (d->flags & ~(uint64_t)MV_F_ARITH) | (fl & (MV_F_CF | MV_F_ZF | MV_F_SF | MV_F_OF)) | af | pf;
}

static uint64_t trunc_to(uint64_t v, unsigned size) {
  return size == 8 ? v : v & ((1ull << 8 * size) - 1);
}

/* Compares up to n elements; stops early as REPE (equal) or REPNE says. */
static int scas(struct string_op *s, uint64_t n, uint64_t *done) {
  uint64_t want = trunc_to(s->d->gpr[MV_RAX], s->size), v = 0;
  bool failed, until_equal = s->insn->repne;
  uint8_t *p = host(s, dst(s), MV_ACC_R, &failed);
  if (failed)
    return -1;
  n = p ? min64(n, in_page(s, dst(s))) : 1;
  for (*done = 0; *done < n;) {
    v = 0;
    if (p)
      __builtin_memcpy(&v, p + *done * s->size, s->size);
    else if (mv_mmu_read(s->d, dst(s), &v, s->size, MV_AS_CPL))
      return -1;
    (*done)++;
    if ((v == want) == until_equal)
      break;
  }
  set_cmp_flags(s->d, want, v, s->size);
  advance(s, MV_RDI, *done);
  return 0;
}

static int cmps(struct string_op *s, uint64_t n, uint64_t *done) {
  uint64_t a = 0, b = 0;
  bool failed, until_equal = s->insn->repne;
  uint8_t *p = host(s, src(s), MV_ACC_R, &failed), *q;
  if (failed)
    return -1;
  q = p ? host(s, dst(s), MV_ACC_R, &failed) : NULL;
  if (failed)
    return -1;
  n = q ? min64(n, min64(in_page(s, src(s)), in_page(s, dst(s)))) : 1;
  for (*done = 0; *done < n;) {
    a = b = 0;
    if (q) {
      __builtin_memcpy(&a, p + *done * s->size, s->size);
      __builtin_memcpy(&b, q + *done * s->size, s->size);
    } else if (mv_mmu_read(s->d, src(s), &a, s->size, MV_AS_CPL) ||
               mv_mmu_read(s->d, dst(s), &b, s->size, MV_AS_CPL)) {
      return -1;
    }
    (*done)++;
    if ((a == b) == until_equal)
      break;
  }
  set_cmp_flags(s->d, a, b, s->size);
  advance(s, MV_RSI, *done);
  advance(s, MV_RDI, *done);
  return 0;
}

static int ins(struct string_op *s, uint64_t n, uint64_t *done) {
  uint16_t port = (uint16_t)s->d->gpr[MV_RDX];
  uint64_t v = 0, gpa;
  (void)n;
  *done = 1;
  if (mv_system_port_check(s->d, port, s->size) ||
      mv_mmu_translate(s->d, dst(s), MV_ACC_W, MV_AS_CPL, &gpa) ||
      mv_mmu_translate(s->d, dst(s) + s->size - 1, MV_ACC_W, MV_AS_CPL, &gpa))
    return -1;
  mv_dbt_port_io(s->d, port, &v, s->size, false);
  mv_mmu_write(s->d, dst(s), &v, s->size, MV_AS_CPL);
  advance(s, MV_RDI, 1);
  return 0;
}

static int outs(struct string_op *s, uint64_t n, uint64_t *done) {
  uint16_t port = (uint16_t)s->d->gpr[MV_RDX];
  uint64_t v = 0;
  (void)n;
  *done = 1;
  if (mv_system_port_check(s->d, port, s->size) ||
      mv_mmu_read(s->d, src(s), &v, s->size, MV_AS_CPL))
    return -1;
  mv_dbt_port_io(s->d, port, &v, s->size, true);
  advance(s, MV_RSI, 1);
  return 0;
}

typedef int string_fn(struct string_op *s, uint64_t n, uint64_t *done);
static string_fn *const functions[MV_OP_COUNT] = {
    [MV_OP_MOVS] = movs, [MV_OP_STOS] = stos, [MV_OP_LODS] = lods, [MV_OP_SCAS] = scas,
    [MV_OP_CMPS] = cmps, [MV_OP_INS] = ins,   [MV_OP_OUTS] = outs,
};

/* Does a compare that ended a piece end the instruction? */
static bool compare_ends(const struct string_op *s) {
  bool zf = s->d->flags & MV_F_ZF;
  if (s->insn->op != MV_OP_SCAS && s->insn->op != MV_OP_CMPS)
    return false;
  return zf == s->insn->repne;
}

int mv_string_exec(struct mv_dbt *d, const struct mv_insn *insn) {
  struct string_op s = {.d = d, .insn = insn, .size = insn->op_size};
  s.step = d->flags & MV_FL_DF ? -(int64_t)s.size : s.size;
  s.rep = insn->rep || insn->repne;
  s.mask = insn->addr_size == 8 ? ~0ull : insn->addr_size == 4 ? 0xffffffffull : 0xffffull;
  if (insn->segment == MV_SEG_FS || insn->segment == MV_SEG_GS)
    s.src_base = d->seg[insn->segment].base;
  uint64_t left = s.rep ? reg(&s, MV_RCX) : 1, done;
  while (left) {
    if (functions[insn->op](&s, left, &done))
      return -1;
    left -= done;
    if (s.rep)
      d->gpr[MV_RCX] = left;
    if (!left || (s.rep && compare_ends(&s)))
      break;
    if (atomic_load_explicit(&d->exec->poked, memory_order_relaxed))
      return 0; /* d->rip stays: it goes on after the interrupt                */
    if (d->exec->exit->reason != MV_EXIT_NONE)
      return 0;
  }
  d->rip += insn->len;
  return 0;
}
