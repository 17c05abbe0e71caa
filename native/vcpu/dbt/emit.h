/*
 * Writing host instructions.  Only the few forms that the translator adds to
 * the guest's own code; names follow the Intel syntax, destination first.
 *
 * R14 and R15 are the translator's scratch registers T0 and T1 while guest
 * code runs (the guest's own live in mv_dbt.gpr); GS points at struct mv_dbt.
 */
#ifndef MV_EMIT_H
#define MV_EMIT_H

#include <stdint.h>
#include <string.h>

#include "dbt.h"

#define MV_T0           MV_R14
#define MV_T1           MV_R15
#define MV_DBT(field)   ((uint32_t)offsetof(struct mv_dbt, field))
#define MV_DBT_GPR(reg) (MV_DBT(gpr) + 8u * (reg))

struct mv_emit {
  uint8_t *p; /* next byte, in the writable view of the code cache           */
};

static inline void e8(struct mv_emit *e, unsigned v) {
  *e->p++ = (uint8_t)v;
}
static inline void e16(struct mv_emit *e, unsigned v) {
  __builtin_memcpy(e->p, &(uint16_t){(uint16_t)v}, 2);
  e->p += 2;
}
static inline void e32(struct mv_emit *e, uint32_t v) {
  __builtin_memcpy(e->p, &v, 4);
  e->p += 4;
}
static inline void e64(struct mv_emit *e, uint64_t v) {
  __builtin_memcpy(e->p, &v, 8);
  e->p += 8;
}

static inline bool fits32(int64_t v) {
  return v == (int32_t)v;
}

/* REX.W with the high bits of reg (R), index (X) and base (B). */
static inline void e_rexw(struct mv_emit *e, unsigned reg, unsigned index, unsigned base) {
  e8(e, 0x48 | (reg >> 3) << 2 | (index >> 3) << 1 | base >> 3);
}
static inline void e_modrm(struct mv_emit *e, unsigned mod, unsigned reg, unsigned rm) {
  e8(e, mod << 6 | (reg & 7) << 3 | (rm & 7));
}

/* The bytes of `v`, lowest first, `n` of them: one store and one addition. Up to
 * eight bytes are written; what is beyond n is overwritten by what follows. */
static inline void e_bytes(struct mv_emit *e, uint64_t v, unsigned n) {
  uint8_t *p = e->p;
  __builtin_memcpy(p, &v, 8);
  e->p = p + n;
}

/* n bytes (1..15) from `src`, of which no byte past the n-th is read. */
static inline void e_copy(struct mv_emit *e, const uint8_t *src, unsigned n) {
  uint8_t *p = e->p;
  if (n >= 8) {
    __builtin_memcpy(p, src, 8);
    __builtin_memcpy(p + n - 8, src + n - 8, 8);
  } else if (n >= 4) {
    __builtin_memcpy(p, src, 4);
    __builtin_memcpy(p + n - 4, src + n - 4, 4);
  } else {
    p[0] = src[0];
    p[n / 2] = src[n / 2];
    p[n - 1] = src[n - 1];
  }
  e->p = p + n;
}

/* op reg64, gs:[off] or op gs:[off], reg64, by opcode (8B load, 89 store...):
 * 65, REX.W, opcode, ModRM 00 reg 100, SIB 25 (no base, no index), disp32. */
static inline void e_gs_abs(struct mv_emit *e, unsigned opcode, unsigned reg, uint32_t off) {
  uint64_t head = 0x65 | (0x48 | (reg >> 3) << 2) << 8 | opcode << 16 |
                  (uint64_t)((reg & 7) << 3 | 4) << 24 | 0x25ull << 32;
  uint8_t *p = e->p;
  __builtin_memcpy(p, &head, 8);
  __builtin_memcpy(p + 5, &off, 4);
  e->p = p + 9;
}
static inline void e_load(struct mv_emit *e, unsigned reg, uint32_t off) {
  e_gs_abs(e, 0x8b, reg, off);
}
static inline void e_store(struct mv_emit *e, uint32_t off, unsigned reg) {
  e_gs_abs(e, 0x89, reg, off);
}
/* op reg64, gs:[base + off]; base is T0 or T1: never needs a SIB. */
static inline void e_gs_base(struct mv_emit *e, unsigned opcode, unsigned reg, unsigned base,
                             uint32_t off) {
  uint64_t head = 0x65 | (0x48 | (reg >> 3) << 2 | base >> 3) << 8 | opcode << 16 |
                  (uint64_t)(0x80 | (reg & 7) << 3 | (base & 7)) << 24 | (uint64_t)off << 32;
  e_bytes(e, head, 8);
}

static inline void e_mov_rr(struct mv_emit *e, unsigned dst, unsigned src) {
  e_bytes(e,
          (0x48 | (src >> 3) << 2 | dst >> 3) | 0x89 << 8 |
              (0xc0 | (src & 7) << 3 | (dst & 7)) << 16,
          3);
}
static inline void e_mov_imm(struct mv_emit *e, unsigned reg, uint64_t v) {
  if (v <= UINT32_MAX) { /* mov r32, imm32                                   */
    if (reg >= 8)
      e8(e, 0x41);
    e8(e, 0xb8 | (reg & 7));
    e32(e, (uint32_t)v);
  } else if (fits32((int64_t)v)) {
    e_rexw(e, 0, 0, reg);
    e8(e, 0xc7);
    e_modrm(e, 3, 0, reg);
    e32(e, (uint32_t)v);
  } else {
    e_rexw(e, 0, 0, reg);
    e8(e, 0xb8 | (reg & 7));
    e64(e, v);
  }
}
/* ModRM, SIB and displacement of [base + index*scale + disp]. */
static inline void e_mem(struct mv_emit *e, unsigned reg, unsigned base, unsigned index,
                         unsigned scale, int32_t disp) {
  unsigned ss = scale == 8 ? 3 : scale == 4 ? 2 : scale == 2 ? 1 : 0;
  if (base == MV_REG_NONE) { /* [index*scale + disp32] or [disp32]          */
    e_modrm(e, 0, reg, 4);
    e8(e, ss << 6 | (index == MV_REG_NONE ? 4 : index & 7) << 3 | 5);
    e32(e, (uint32_t)disp);
    return;
  }
  unsigned mod = disp == 0 && (base & 7) != 5 ? 0 : disp == (int8_t)disp ? 1 : 2;
  if (index != MV_REG_NONE || (base & 7) == 4) {
    e_modrm(e, mod, reg, 4);
    e8(e, ss << 6 | (index == MV_REG_NONE ? 4 : index & 7) << 3 | (base & 7));
  } else {
    e_modrm(e, mod, reg, base);
  }
  if (mod == 1)
    e8(e, (uint8_t)disp);
  else if (mod == 2)
    e32(e, (uint32_t)disp);
}
static inline unsigned rex_of(unsigned reg) {
  return reg == MV_REG_NONE ? 0 : reg;
}
/* lea dst, [base + index*scale + disp]; addr32: the result is cut to 32 bits. */
static inline void e_lea(struct mv_emit *e, unsigned dst, unsigned base, unsigned index,
                         unsigned scale, int32_t disp, bool addr32) {
  e8(e, (addr32 ? 0x40 : 0x48) | (dst >> 3) << 2 | (rex_of(index) >> 3) << 1 | rex_of(base) >> 3);
  e8(e, 0x8d);
  e_mem(e, dst, base, index, scale, disp);
}
/* mov reg64, [base + disp] and back. */
static inline void e_mov_load(struct mv_emit *e, unsigned reg, unsigned base, int32_t disp) {
  e_rexw(e, reg, 0, base);
  e8(e, 0x8b);
  e_mem(e, reg, base, MV_REG_NONE, 1, disp);
}
static inline void e_mov_store(struct mv_emit *e, unsigned base, int32_t disp, unsigned reg) {
  e_rexw(e, reg, 0, base);
  e8(e, 0x89);
  e_mem(e, reg, base, MV_REG_NONE, 1, disp);
}
/* jmp gs:[off] */
static inline void e_jmp_gs(struct mv_emit *e, uint32_t off) {
  e_bytes(e, 0x2524ff65u | (uint64_t)off << 32, 8);
}
/* jcc / jmp rel32 with the displacement still to come: its place. */
static inline uint8_t *e_jcc(struct mv_emit *e, unsigned cc) {
  e8(e, 0x0f);
  e8(e, 0x80 | cc);
  e32(e, 0);
  return e->p - 4;
}
static inline uint8_t *e_jmp(struct mv_emit *e) {
  e8(e, 0xe9);
  e32(e, 0);
  return e->p - 4;
}
/* Makes the rel32 at `at` jump to `to` (both in the writable view). */
static inline void e_patch(uint8_t *at, const uint8_t *to) {
  int32_t rel = (int32_t)(to - (at + 4));
  __builtin_memcpy(at, &rel, 4);
}

#endif
