/*
 * A block on its way from guest code to host code, as the translator's files
 * share it:
 *   plan.c       decodes; decides what each instruction is, which flags are
 *                live, which memory accesses share a TLB check
 *   check.c      memory operands: effective address, TLB check, bounce
 *   copy.c       instructions emitted as they are, but for R14, R15, memory
 *   translate.c  all the others, and the block around them
 */
#ifndef MV_TRANSLATE_H
#define MV_TRANSLATE_H

#include "cache.h"
#include "emit.h"
#include "saved.h"

/* The most host code that an instruction takes, hot and cold apart: two checks of up to 140 bytes,
 * their values kept and fetched, the instruction itself, a poll, two exits. FNSAVE is the fattest
 * of one check. mv_translate() sees to it. */
#define INSN_ROOM    480
#define COLD_MAX     (4 * MV_BLOCK_INSNS_MAX + 8)
#define ACCESSES_MAX 2
#define RUN_SPAN_MAX 512

enum cold_kind { COLD_MEM, COLD_LAST, COLD_GUARD, COLD_LINK };

/* A stub to be emitted in the cold part when the block's hot part is done. */
struct cold {
  enum cold_kind kind;
  uint8_t *from; /* rel32 that jumps to it                                   */
  uint32_t arg;
  bool flags_saved;
  bool ea_known; /* else T0 ^ tag gives it back                              */
  uint64_t ea;
  uint32_t tag_off;
  /* COLD_LAST: the last page is another one, look into the TLB              */
  uint32_t last;
  uint16_t size;
  uint8_t *resume;
};

/* One memory access of an instruction, in the order in which they are made. */
struct access {
  uint8_t base;  /* simple: [base + off]; MV_REG_NONE: not simple           */
  int32_t off;   /* from the base register's value at the instruction       */
  uint16_t size; /* bytes                                                   */
  uint8_t acc;   /* MV_ACC_*                                                */
  bool modrm;    /* the ModRM operand, else the stack                       */
  bool starts;   /* makes the check                                         */
  bool checked;  /* the check is made already (tr.hoist)                     */
  int32_t at;    /* offset from T0 after the check                          */
  uint16_t run_size;
  uint8_t run_acc;
  int32_t run_lo;
  int32_t moved; /* what the base register moves by from the check to the
                    instruction, if the check is made earlier (tr.hoist)     */
};

/* What is done with an instruction. */
enum kind {
  KIND_COPY,
  KIND_SKIP, /* NOPs, prefetches, cache-line flushes                          */
  KIND_LEA,
  KIND_PUSH,
  KIND_POP,
  KIND_LEAVE,
  KIND_SWAPGS,
  KIND_RDTSC,
  KIND_BRANCH, /* from here on: ends a block                                  */
  KIND_HELPER, /* C executes it                                               */
  KIND_VECTOR, /* likewise, with vector operands                              */
  KIND_RAISE,  /* raises tr.vector                                            */
  KIND_COUNT
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
  uint8_t kind[MV_BLOCK_INSNS_MAX];  /* enum kind                              */
  uint8_t vector;                    /* that the last instruction raises       */
  bool t0_busy[MV_BLOCK_INSNS_MAX];  /* T0 must survive the instruction       */
  uint8_t hoist[MV_BLOCK_INSNS_MAX]; /* 1 + the later instruction whose first
                                        access is checked before this one    */
  const uint8_t *page;               /* the block's first page               */
  unsigned n, ncold;
  /* for saved.c: where this run's numbers stand in the code                   */
  uint32_t hot0, cold0, site0;
  unsigned nreloc;
  struct mv_reloc reloc[2 * COLD_MAX + 8];
  struct cold cold[COLD_MAX];
  uint8_t crossing[2 * MV_INSN_MAX]; /* bytes of an instruction on two pages  */
};

static inline uint32_t here(struct tr *t) {
  return (uint32_t)(t->e.p - t->x->rw);
}
static inline unsigned priv_of(struct tr *t) {
  return t->b->mode & MV_MODE_USER ? MV_PRIV_USER : MV_PRIV_KERNEL;
}
static inline uint64_t rip_of(struct tr *t, unsigned i) {
  return t->b->rip + t->off[i];
}
static inline uint64_t next_rip(struct tr *t, unsigned i) {
  return rip_of(t, i) + t->insn[i].len;
}
static inline bool flags_live(struct tr *t, unsigned i) {
  return (t->live[i] & MV_F_ARITH) != 0;
}
static inline bool guest_scratch(uint8_t reg) {
  return reg == MV_T0 || reg == MV_T1;
}

/* plan.c: decodes a block and fills all but e, ncold and cold. 0; 1: the first
 * instruction goes on in the second page, whose bytes are not given. */
int mv_plan_block(struct tr *t, const uint8_t *bytes, unsigned avail, const uint8_t *bytes2);
/* Does the instruction name guest R14 (bit 0), R15 (bit 1) in a GPR place? */
unsigned mv_scratch_operands(const struct mv_insn *in);

/* check.c */
/* The cold part of a check against a last page; returns the place of the rel32
 * that goes to mv_slow_mem()'s stub. */
uint8_t *mv_emit_last_miss(struct tr *t, struct mv_emit *c, const struct cold *s);
struct cold *mv_add_cold(struct tr *t, enum cold_kind kind, uint8_t *from, uint32_t arg);
uint32_t mv_add_site(struct tr *t, unsigned i, uint32_t restart);
/* Emits `mov t1, number` as an argument for C, in the hot part. */
void mv_emit_site(struct tr *t, uint32_t site);
void mv_add_reloc(struct tr *t, enum mv_reloc_kind kind, bool cold, const uint8_t *at,
                  uint32_t value);
void mv_emit_flags_save(struct mv_emit *e);
void mv_emit_flags_restore(struct mv_emit *e);
/* Guest R14 and R15 that an address names, into the same host registers. */
void mv_emit_address_regs(struct tr *t, const struct mv_insn *in);
/* T1 = the bit offset of BT and friends. */
void mv_emit_bit_index(struct tr *t, unsigned i);
/* Makes the check of instruction i's first access before instruction `at`. */
void mv_emit_check(struct tr *t, unsigned at, unsigned i, unsigned k);
/* After this T0 + the returned offset is the host address of access k of
 * instruction i. */
int32_t mv_emit_access(struct tr *t, unsigned i, unsigned k);
/* After the instruction: in a bounce block, C writes the operand back. */
void mv_emit_access_done(struct tr *t, unsigned i, unsigned k);

/* copy.c */
void mv_emit_copied(struct tr *t, unsigned i);
void mv_emit_lea(struct tr *t, unsigned i);

#endif
