/*
 * Every encoding of the instruction table, found by trying all of them.
 *
 * Prefix, map, opcode, ModRM, W and L are counted through; the decoder says which row each is.
 * The first of each kind (row, operand size, vector length, register or memory form) is kept.
 */
#include <stdlib.h>
#include <string.h>

#include "dbt/insn.h"
#include "dbt/insn_row.h"
#include "mv/silicon.h"

static unsigned put_legacy(const struct mv_si_encoding *e, uint8_t *bytes) {
  static const uint8_t prefix[4] = {0, 0x66, 0xf3, 0xf2};
  unsigned n = 0;
  if (e->pp)
    bytes[n++] = prefix[e->pp];
  if (e->w || e->b)
    bytes[n++] = 0x40 | e->w << 3 | e->b;
  if (e->map)
    bytes[n++] = 0x0f;
  if (e->map > 1)
    bytes[n++] = e->map == 2 ? 0x38 : 0x3a;
  bytes[n++] = e->opcode;
  bytes[n++] = e->modrm;
  return n;
}

/* Three-byte VEX, SDM 2A §2.3.5; R, X, B and vvvv are inverted. */
static unsigned put_vex(const struct mv_si_encoding *e, uint8_t *bytes) {
  bytes[0] = 0xc4;
  bytes[1] = 0xe0 | e->map;
  bytes[2] = e->w << 7 | (~e->vvvv & 0xf) << 3 | e->l << 2 | e->pp;
  bytes[3] = e->opcode;
  bytes[4] = e->modrm;
  return 5;
}

/* EVEX, SDM 2A §2.7.1. */
static unsigned put_evex(const struct mv_si_encoding *e, uint8_t *bytes) {
  bytes[0] = 0x62;
  bytes[1] = 0xf0 | e->map;
  bytes[2] = e->w << 7 | (~e->vvvv & 0xf) << 3 | 1 << 2 | e->pp;
  bytes[3] = e->l << 5 | 1 << 3 | e->aaa;
  bytes[4] = e->opcode;
  bytes[5] = e->modrm;
  return 6;
}

struct search {
  struct mv_si_encoding *out;
  unsigned n, max;
  uint32_t *seen; /* a row: which kinds are known                           */
};

/* A number below 32 for what makes two encodings of a row different for a test. */
static unsigned kind_of(const struct mv_insn *insn) {
  unsigned size = insn->op_size >= 8 ? 3 : insn->op_size >> 1;
  unsigned length = insn->enc == MV_ENC_LEGACY ? insn->opsize : insn->vex_l & 3;
  return size | length << 2 | insn->has_mem << 4;
}

static void try(struct search *s, struct mv_si_encoding e) {
  uint8_t bytes[MV_INSN_MAX] = {0};
  struct mv_insn insn;
  static unsigned (*const put[])(const struct mv_si_encoding *, uint8_t *) = {
      [MV_ENC_LEGACY] = put_legacy, [MV_ENC_VEX] = put_vex, [MV_ENC_EVEX] = put_evex};
  put[e.enc](&e, bytes);
  if (mv_decode(&insn, bytes, sizeof bytes, MV_MODE_64) != MV_DECODE_OK || !insn.row)
    return;
  uint32_t bit = 1u << kind_of(&insn);
  if (s->seen[insn.row] & bit)
    return;
  s->seen[insn.row] |= bit;
  e.row = insn.row;
  e.has_mem = insn.has_mem;
  if (s->n < s->max)
    s->out[s->n] = e;
  s->n++;
}

/* Bytes that are prefixes in a place of an opcode in 64-bit mode. */
static bool is_prefix(unsigned map, unsigned opcode) {
  static const uint8_t prefixes[] = {0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x66, 0x67,
                                     0xf0, 0xf2, 0xf3, 0x62, 0xc4, 0xc5, 0x0f};
  if (map)
    return map == 1 && (opcode == 0x38 || opcode == 0x3a);
  return (opcode & 0xf0) == 0x40 || memchr(prefixes, opcode, sizeof prefixes);
}

unsigned mv_si_encodings(struct mv_si_encoding *out, unsigned max) {
  struct search s = {.out = out, .max = max, .seen = calloc(mv_row_count, sizeof(uint32_t))};
  if (!s.seen)
    return 0;
  for (unsigned i = 0; i < 3u << 24; i++) {
    struct mv_si_encoding e = {.modrm = i, .opcode = i >> 8, .w = i >> 16 & 1, .l = i >> 17 & 3};
    e.pp = i >> 19 & 3;
    e.map = i >> 21 & 7;
    e.enc = i >> 24;
    static const uint8_t lengths[] = {[MV_ENC_LEGACY] = 1, [MV_ENC_VEX] = 2, [MV_ENC_EVEX] = 3};
    static const uint8_t maps[] = {
        [MV_ENC_LEGACY] = 0x0f, [MV_ENC_VEX] = 0x0e, [MV_ENC_EVEX] = 0x6e};
    /* Of the memory forms only [rax] and, for rows that want it, a SIB byte. */
    bool odd_memory = e.modrm < 0xc0 && (e.modrm & 7) != 0 && (e.modrm & 0xc7) != 4;
    if (odd_memory || (e.modrm >= 0x40 && e.modrm < 0xc0) || e.l >= lengths[e.enc] ||
        !(maps[e.enc] >> e.map & 1) || (e.enc == MV_ENC_LEGACY && is_prefix(e.map, e.opcode)))
      continue;
    try(&s, e);
    if (e.enc == MV_ENC_LEGACY) {
      e.b = 1;
      try(&s, e);
      continue;
    }
    e.vvvv = 2; /* gathers want three registers that differ                 */
    try(&s, e);
    e.vvvv = 0, e.aaa = 1; /* ... and those of EVEX a mask                  */
    try(&s, e);
  }
  free(s.seen);
  return s.n;
}
