/*
 * The decoder: bytes to struct mv_insn.
 *
 * It reads prefixes, finds the opcode's row in the table (insn_row.h), reads
 * ModRM, SIB and displacement once, and then lets the row's operands say what
 * they are: registers, memory of some size, immediates. Nothing here knows an
 * instruction by name, but for NOP/PAUSE/XCHG, which share opcode 90.
 *
 * Bytes are read through need(), which stops at the end of what is there or at
 * the 15th byte, so that an instruction that continues on the next page gives
 * MV_DECODE_SHORT and the caller tries again with more.
 *
 * SDM 2A chapter 2 (format), 2.2.1 (REX), 2.3 (VEX), 2.7 (EVEX).
 */
#include <string.h>

#include "insn_row.h"

struct cursor {
  const uint8_t *bytes;
  unsigned pos, limit;
  uint8_t pp;                         /* mandatory prefix: NP, P66, PF3, PF2            */
  uint8_t rex_r, rex_x, rex_b, rex_w; /* from REX, VEX or EVEX, as 0 or 1               */
  uint8_t vvvv;                       /* register number (EVEX: 0..31)                  */
  uint8_t evex_r2;                    /* EVEX.R': register 16..31 in ModRM.reg          */
  uint8_t length;                     /* of vectors: 0, 1, 2 for 16, 32, 64 bytes       */
  bool modrm_read;
};

/* Bytes by size rule, operand size (1, 2, 4, 8) and vector length (16, 32, 64). */
#define ALWAYS(n)                                                                                  \
  {                                                                                                \
    {n, n, n}, {n, n, n}, {n, n, n}, {                                                             \
      n, n, n                                                                                      \
    }                                                                                              \
  }
#define BY_OP(a, b, c, d)                                                                          \
  {                                                                                                \
    {a, a, a}, {b, b, b}, {c, c, c}, {                                                             \
      d, d, d                                                                                      \
    }                                                                                              \
  }
#define BY_LEN(a, b, c)                                                                            \
  {                                                                                                \
    {a, b, c}, {a, b, c}, {a, b, c}, {                                                             \
      a, b, c                                                                                      \
    }                                                                                              \
  }
static const uint16_t size_table[SZ_COUNT][4][3] = {
    [SZ_b] = ALWAYS(1),
    [SZ_w] = ALWAYS(2),
    [SZ_d] = ALWAYS(4),
    [SZ_q] = ALWAYS(8),
    [SZ_dq] = ALWAYS(16),
    [SZ_qq] = ALWAYS(32),
    [SZ_t] = ALWAYS(10),
    [SZ_512] = ALWAYS(512),
    [SZ_v] = BY_OP(1, 2, 4, 8),
    [SZ_z] = BY_OP(1, 2, 4, 4),
    [SZ_y] = BY_OP(4, 4, 4, 8),
    [SZ_p] = BY_OP(3, 4, 6, 10),
    [SZ_s] = BY_OP(6, 6, 6, 10),
    [SZ_a] = BY_OP(2, 4, 8, 16),
    [SZ_x] = BY_LEN(16, 32, 64),
    [SZ_h] = BY_LEN(8, 16, 32),
    [SZ_f] = BY_LEN(4, 8, 16),
    [SZ_e] = BY_LEN(2, 4, 8),
    [SZ_xw] = {{8, 16, 32}, {8, 16, 32}, {8, 16, 32}, {16, 32, 64}},
    [SZ_dup] = BY_LEN(8, 32, 64),
    [SZ_env] = BY_OP(28, 14, 28, 28),
    [SZ_fsave] = BY_OP(108, 94, 108, 108),
    [SZ_v_w] = ALWAYS(2),
    [SZ_d_b] = ALWAYS(1),
    [SZ_d_w] = ALWAYS(2),
    [SZ_d_d] = ALWAYS(4),
};

/* Flags that condition cc reads, SDM 1 appendix B; odd ones are negations. */
static const uint16_t cc_flags[8] = {
    MV_F_OF, MV_F_CF, MV_F_ZF,           MV_F_CF | MV_F_ZF,
    MV_F_SF, MV_F_PF, MV_F_SF | MV_F_OF, MV_F_ZF | MV_F_SF | MV_F_OF,
};

enum prefix { NONE, SEG, OPSIZE, ADDRSIZE, LOCK, REPNE, REP, REX };
static const uint8_t prefixes[256] = {
    [0x26] = SEG,  [0x2e] = SEG,   [0x36] = SEG,    [0x3e] = SEG,
    [0x64] = SEG,  [0x65] = SEG,   [0x66] = OPSIZE, [0x67] = ADDRSIZE,
    [0xf0] = LOCK, [0xf2] = REPNE, [0xf3] = REP,    [0x40 ... 0x4f] = REX,
};

/* May n more bytes be read? */
static inline bool have(const struct cursor *c, unsigned n) {
  return c->limit - c->pos >= n;
}

static enum mv_decode_status stopped(struct mv_insn *out, const struct cursor *c) {
  out->len = c->limit;
  return c->limit == MV_INSN_MAX ? MV_DECODE_TOO_LONG : MV_DECODE_SHORT;
}

static enum mv_decode_status undefined(struct mv_insn *out, const struct cursor *c) {
  out->cls = MV_CLASS_UD;
  out->len = c->pos;
  return MV_DECODE_UD;
}

static void set_segment(struct mv_insn *out, uint8_t byte) {
  if (byte == 0x64 || byte == 0x65)
    out->segment = byte == 0x64 ? MV_SEG_FS : MV_SEG_GS;
  else if (out->mode != MV_MODE_64)
    out->segment = byte >> 3 & 3; /* 26, 2E, 36, 3E: ES, CS, SS, DS */
}

/* Legacy prefixes and REX, SDM 2A 2.1.1, 2.2.1. Leaves the cursor at the
 * opcode. A REX that another prefix follows is ignored; of F2 and F3 the last
 * one counts. */
static bool read_prefixes(struct mv_insn *out, struct cursor *c) {
  for (;;) {
    if (!have(c, 1))
      return false;
    uint8_t byte = c->bytes[c->pos];
    enum prefix kind = prefixes[byte];
    if (kind == NONE || (kind == REX && out->mode != MV_MODE_64))
      return true;
    c->pos++;
    if (kind == REX) {
      out->rex = byte;
      continue;
    }
    out->rex = 0;
    switch (kind) {
    case SEG:
      set_segment(out, byte);
      break;
    case OPSIZE:
      out->opsize = true;
      break;
    case ADDRSIZE:
      out->addrsize = true;
      break;
    case LOCK:
      out->lock = true;
      break;
    default:
      out->rep = kind == REP;
      out->repne = kind == REPNE;
    }
  }
}

/* What VEX and EVEX share: the opcode; outside 64-bit mode eight registers. */
static void finish_vex(struct mv_insn *out, struct cursor *c) {
  c->rex_w = out->vex_w;
  c->pp = out->vex_pp;
  c->length = out->vex_l;
  if (out->mode != MV_MODE_64) {
    c->vvvv &= ~8u;
    c->rex_r = c->rex_x = c->rex_b = 0;
  }
  out->opcode_off = c->pos;
  out->opcode = c->bytes[c->pos++];
}

/* VEX, SDM 2A 2.3.5; the cursor is behind C4 or C5. */
static bool read_vex(struct mv_insn *out, struct cursor *c, bool three) {
  if (!have(c, three ? 3 : 2))
    return false;
  uint8_t b1 = c->bytes[c->pos++];
  uint8_t b2 = three ? c->bytes[c->pos++] : b1;
  out->enc = MV_ENC_VEX;
  out->map = three ? b1 & 31 : 1;
  out->vex_w = three ? b2 >> 7 : 0;
  out->vex_l = b2 >> 2 & 1;
  out->vex_pp = b2 & 3;
  c->vvvv = ~b2 >> 3 & 15;
  c->rex_r = ~b1 >> 7 & 1;
  c->rex_x = three ? ~b1 >> 6 & 1 : 0;
  c->rex_b = three ? ~b1 >> 5 & 1 : 0;
  finish_vex(out, c);
  return true;
}

/* EVEX, SDM 2A 2.7.1; the cursor is behind 62. */
static bool read_evex(struct mv_insn *out, struct cursor *c) {
  if (!have(c, 4))
    return false;
  uint8_t p0 = c->bytes[c->pos++], p1 = c->bytes[c->pos++], p2 = c->bytes[c->pos++];
  out->enc = MV_ENC_EVEX;
  /* Two fixed bits: a wrong one makes it a map that does not exist. */
  out->map = p0 & 8 || !(p1 & 4) ? 0 : p0 & 7;
  out->vex_w = p1 >> 7;
  out->vex_l = p2 >> 5 & 3;
  out->vex_pp = p1 & 3;
  out->evex_aaa = p2 & 7;
  out->evex_z = p2 >> 7;
  out->evex_b = p2 >> 4 & 1;
  c->vvvv = (~p1 >> 3 & 15) | (~p2 & 8) << 1;
  c->rex_r = ~p0 >> 7 & 1;
  c->rex_x = ~p0 >> 6 & 1;
  c->rex_b = ~p0 >> 5 & 1;
  c->evex_r2 = ~p0 >> 4 & 1;
  finish_vex(out, c);
  return true;
}

/* Legacy opcode in one of the four maps. */
static bool read_opcode(struct mv_insn *out, struct cursor *c, uint8_t byte) {
  if (byte == 0x0f) {
    if (!have(c, 1))
      return false;
    byte = c->bytes[c->pos++];
    out->map = 1;
    if (byte == 0x38 || byte == 0x3a) {
      if (!have(c, 1))
        return false;
      out->map = byte == 0x38 ? 2 : 3;
      byte = c->bytes[c->pos++];
    }
  }
  out->opcode_off = c->pos - 1;
  out->opcode = byte;
  c->rex_r = out->rex >> 2 & 1;
  c->rex_x = out->rex >> 1 & 1;
  c->rex_b = out->rex & 1;
  c->rex_w = out->rex >> 3 & 1;
  c->pp = out->rep ? PF3 : out->repne ? PF2 : out->opsize ? P66 : NP;
  return true;
}

/* The slot of the opcode. */
static unsigned first_slot(const struct mv_insn *out, const struct cursor *c) {
  if (out->enc == MV_ENC_LEGACY && out->map == 0)
    return SLOT_M0 + out->opcode;
  static const uint16_t bases[] = {SLOT_LEGACY, SLOT_VEX, SLOT_EVEX};
  unsigned base = bases[out->enc];
  return base + (out->map - 1) * 1024 + out->opcode * 4 + c->pp;
}

static bool read_modrm(struct mv_insn *out, struct cursor *c) {
  if (!have(c, 1))
    return false;
  out->modrm_off = c->pos;
  out->modrm = c->bytes[c->pos++];
  c->modrm_read = true;
  return true;
}

/* Follows groups to the row's number (0: undefined). False: out of bytes. */
static bool find_row(struct mv_insn *out, struct cursor *c, unsigned *row) {
  unsigned entry = mv_index[first_slot(out, c)];
  while (entry >> SPLIT_SHIFT) {
    enum mv_split kind = entry >> SPLIT_SHIFT;
    unsigned slot = SLOT_GROUPS + (entry & SPLIT_MASK);
    if (kind <= SPLIT_RM && !c->modrm_read && !read_modrm(out, c))
      return false;
    switch (kind) {
    case SPLIT_REG:
      slot += out->modrm >> 3 & 7;
      break;
    case SPLIT_MOD:
      slot += out->modrm >> 6 == 3;
      break;
    case SPLIT_RM:
      slot += out->modrm & 7;
      break;
    case SPLIT_W:
      slot += c->rex_w;
      break;
    case SPLIT_MODE:
      slot += out->mode != MV_MODE_64;
      break;
    default: /* 90: NOP, PAUSE, XCHG r8, rAX */
      slot += c->rex_b ? 2 : out->rep;
    }
    entry = mv_index[slot];
  }
  *row = entry;
  return true;
}

static int64_t read_signed(const uint8_t *p, unsigned len) {
  int8_t b;
  int16_t w;
  int32_t d;
  int64_t q;
  switch (len) {
  case 1:
    return memcpy(&b, p, 1), b;
  case 2:
    return memcpy(&w, p, 2), w;
  case 4:
    return memcpy(&d, p, 4), d;
  default:
    return memcpy(&q, p, 8), q;
  }
}

static bool read_disp(struct mv_insn *out, struct cursor *c, unsigned len) {
  if (!have(c, len))
    return false;
  out->disp_off = c->pos;
  out->disp_len = len;
  out->disp = read_signed(c->bytes + c->pos, len);
  c->pos += len;
  return true;
}

/* 16-bit addressing, SDM 2A table 2-1. */
static bool read_memory16(struct mv_insn *out, struct cursor *c) {
  static const uint8_t bases[8] = {3, 3, 5, 5, 6, 7, 5, 3};
  static const uint8_t indexes[4] = {6, 7, 6, 7};
  unsigned mod = out->modrm >> 6, rm = out->modrm & 7;
  if (mod == 0 && rm == 6)
    return read_disp(out, c, 2);
  out->base = bases[rm];
  if (rm < 4)
    out->index = indexes[rm];
  return mod == 0 || read_disp(out, c, mod);
}

/* 32- and 64-bit addressing, SDM 2A tables 2-2, 2-3, 2-5, 2-7. */
static bool read_memory(struct mv_insn *out, struct cursor *c, bool vsib) {
  unsigned mod = out->modrm >> 6, rm = out->modrm & 7, base = rm;
  if (rm == 4) {
    if (!have(c, 1))
      return false;
    out->sib_off = c->pos;
    uint8_t sib = c->bytes[c->pos++];
    unsigned index = (sib >> 3 & 7) | c->rex_x << 3;
    base = sib & 7;
    if (index != 4 || vsib) {
      out->index = index;
      if (vsib && out->enc == MV_ENC_EVEX &&
          out->mode == MV_MODE_64) { /* V' is the index's fifth bit */
        out->index |= c->vvvv & 16;
        c->vvvv &= 15;
      }
      out->scale = 1u << (sib >> 6);
    }
  }
  if (mod == 0 && base == 5) {
    if (rm == 5 && out->mode == MV_MODE_64)
      out->base = MV_REG_RIP;
    return read_disp(out, c, 4);
  }
  out->base = base | c->rex_b << 3;
  return mod == 0 || read_disp(out, c, mod == 1 ? 1 : 4);
}

/* Operand and address size, SDM 1 3.6, SDM 2A 2.2.1.2, 2.2.1.7. */
static unsigned operand_size(const struct mv_insn *out, const struct cursor *c, uint64_t attr) {
  if (attr & A_BYTE)
    return 1;
  if (out->mode != MV_MODE_64) {
    if (attr & (A_CR | A_DR))
      return 4;
    if (out->enc != MV_ENC_LEGACY)
      return c->rex_w && !(attr & A_GPR) ? 8 : 4;
    return out->opsize == (out->mode == MV_MODE_32) ? 2 : 4;
  }
  if (attr & A_F64)
    return 8;
  if (c->rex_w)
    return attr & A_MAX4 ? 4 : 8;
  if (out->opsize)
    return 2;
  return attr & A_D64 ? 8 : 4;
}

static unsigned address_size(const struct mv_insn *out) {
  if (out->mode == MV_MODE_64)
    return out->addrsize ? 4 : 8;
  return out->addrsize == (out->mode == MV_MODE_32) ? 2 : 4;
}

/* Places a general register of the given number. */
static void place_gpr(struct mv_insn *out, struct mv_gpr_ref *ref, unsigned reg, unsigned operand,
                      unsigned size) {
  ref->access = OPND_ACCESS(operand);
  ref->size = size;
  if (size == 1 && !out->rex && out->enc == MV_ENC_LEGACY && reg >= 4 && reg < 8) {
    ref->high8 = true;
    reg -= 4;
  }
  ref->reg = reg;
  unsigned bit = 1u << reg;
  if (ref->access & MV_ACC_R)
    out->gpr_read |= bit;
  if (ref->access & MV_ACC_W) {
    out->gpr_written |= bit;
    if (size < 4)
      out->gpr_read |= bit; /* the rest is kept */
  }
}

static void place_memory(struct mv_insn *out, const struct mv_row *row, unsigned operand,
                         unsigned size) {
  out->has_mem = true;
  out->mem_access = OPND_ACCESS(operand);
  if (out->evex_b) { /* broadcast of one element */
    if (row->attr & A_BCST)
      size = out->vex_w ? 8 : 4;
    else
      size = 2;
  }
  out->mem_size = size;
  if (row->attr & A_ALIGN)
    out->mem_align = size;
  else if (row->attr & A_AL16)
    out->mem_align = 16;
  else if (row->attr & A_AL64)
    out->mem_align = 64;
  else if (out->enc == MV_ENC_LEGACY && size == 16 && OPND_CLASS(operand) == RC_XMM &&
           !(row->attr & A_UNAL))
    out->mem_align = 16;
}

/* Immediate bytes; the first go to imm, the next to imm2. */
static bool read_imm(struct mv_insn *out, struct cursor *c, unsigned len, bool is_signed) {
  if (!have(c, len))
    return false;
  int64_t v = read_signed(c->bytes + c->pos, len);
  if (!is_signed && len < 8)
    v &= (INT64_C(1) << len * 8) - 1;
  if (out->imm_off) {
    out->imm2 = v;
  } else {
    out->imm_off = c->pos;
    out->imm = v;
  }
  out->imm_len += len;
  c->pos += len;
  return true;
}

/* Register size of an operand whose memory size differs. */
static unsigned register_size(const struct mv_insn *out, unsigned rule, unsigned size) {
  if (rule == SZ_v_w)
    return out->op_size;
  return rule >= SZ_d_b ? 4 : size;
}

/* The greatest register that VEX.vvvv may name. */
static unsigned max_vvvv(const struct mv_insn *out, unsigned operand) {
  if (OPND_CLASS(operand) == RC_K || out->mode != MV_MODE_64)
    return 7;
  return OPND_CLASS(operand) == RC_GPR ? 15 : 31;
}

/* ModRM.rm: memory, or a register. False: the row has no such form. */
static inline bool read_rm(struct mv_insn *out, const struct cursor *c, const struct mv_row *row,
                           unsigned size_log2) {
  unsigned operand = row->rm, rule = OPND_SIZE(operand);
  unsigned size = size_table[rule][size_log2][c->length];
  if (out->modrm < 0xc0 && !(row->attr & A_NOMOD)) {
    place_memory(out, row, operand, size);
    return OPND_PLACE(operand) != PL_U;
  }
  if (OPND_CLASS(operand) == RC_GPR)
    place_gpr(out, &out->rm, (out->modrm & 7) | c->rex_b << 3, operand,
              register_size(out, rule, size));
  return OPND_PLACE(operand) != PL_M;
}

/* VEX.vvvv. False: there is no such register. */
static bool read_vvvv(struct mv_insn *out, struct cursor *c, const struct mv_row *row,
                      unsigned size_log2) {
  unsigned operand = row->vvvv;
  if (c->vvvv > max_vvvv(out, operand))
    return false;
  if (OPND_CLASS(operand) == RC_GPR)
    place_gpr(out, &out->vvvv, c->vvvv, operand,
              size_table[OPND_SIZE(operand)][size_log2][c->length]);
  c->vvvv = 0; /* used: see check_vex() */
  return true;
}

/* An operand behind ModRM. False: out of bytes. */
static bool read_tail(struct mv_insn *out, struct cursor *c, const struct mv_row *row,
                      unsigned operand, unsigned size_log2) {
  unsigned size = size_table[OPND_SIZE(operand)][size_log2][0];
  switch ((enum mv_place)OPND_PLACE(operand)) {
  case PL_I:
  case PL_J:
    return read_imm(out, c, size, true);
  case PL_UI:
    return read_imm(out, c, size, false);
  case PL_L:
    return read_imm(out, c, 1, false);
  case PL_O:
    place_memory(out, row, operand, size);
    return read_disp(out, c, out->addr_size);
  default: /* PL_A */
    return read_imm(out, c, size - 2, false) && read_imm(out, c, 2, false);
  }
}

/* The row's operands, in the order of their bytes. */
static inline enum mv_decode_status read_operands(struct mv_insn *out, struct cursor *c,
                                                  const struct mv_row *row) {
  unsigned size_log2 = __builtin_ctz(out->op_size);
  if (row->rm && !read_rm(out, c, row, size_log2))
    return MV_DECODE_UD;
  if (OPND_CLASS(row->reg) == RC_GPR) {
    if (c->evex_r2)
      return MV_DECODE_UD; /* no register 16..31 */
    place_gpr(out, &out->reg, (out->modrm >> 3 & 7) | c->rex_r << 3, row->reg,
              size_table[OPND_SIZE(row->reg)][size_log2][0]);
  } else if (OPND_CLASS(row->reg) == RC_K && (c->rex_r || c->evex_r2)) {
    return MV_DECODE_UD;
  }
  if (row->opreg)
    place_gpr(out, &out->opreg, (out->opcode & 7) | c->rex_b << 3, row->opreg,
              size_table[OPND_SIZE(row->opreg)][size_log2][0]);
  if (row->vvvv && !read_vvvv(out, c, row, size_log2))
    return MV_DECODE_UD;
  if (row->tail && !read_tail(out, c, row, row->tail, size_log2))
    return MV_DECODE_SHORT;
  if (row->tail2 && !read_tail(out, c, row, row->tail2, size_log2))
    return MV_DECODE_SHORT;
  return MV_DECODE_OK;
}

/* VSIB: an index, registers that differ (SDM 2C VGATHER*, VSCATTER*). */
static bool check_vsib(const struct mv_insn *out, const struct cursor *c) {
  unsigned reg = (out->modrm >> 3 & 7) | c->rex_r << 3 | c->evex_r2 << 4;
  if (!out->sib_off)
    return false;
  if (out->enc == MV_ENC_EVEX)
    return out->mem_access == MV_ACC_W || reg != out->index;
  unsigned mask = ~c->bytes[out->opcode_off - 1] >> 3 & (out->mode == MV_MODE_64 ? 15 : 7);
  return reg != out->index && reg != mask && mask != out->index;
}

/* The row's demands on W, L and vvvv, SDM 2A 2.3, 2.7.11. */
static bool check_vex(const struct mv_insn *out, const struct cursor *c, uint64_t attr) {
  if ((attr & A_W0 && out->vex_w) || (attr & A_W1 && !out->vex_w))
    return false;
  if ((attr & A_L0 && c->length) || (attr & A_L1 && c->length != 1))
    return false;
  if ((attr & A_L12 && !c->length) || (attr & A_L2 && c->length != 2))
    return false;
  if (c->vvvv)
    return false; /* no operand took it */
  return out->cls != MV_CLASS_VSIB || check_vsib(out, c);
}

/* Complex arithmetic: the destination is none of the sources (SDM 2C VFMULCPH). */
static bool check_distinct(const struct mv_insn *out, const struct cursor *c) {
  unsigned reg = (out->modrm >> 3 & 7) | c->rex_r << 3 | c->evex_r2 << 4;
  unsigned rm = (out->modrm & 7) | c->rex_b << 3 | c->rex_x << 4;
  const uint8_t *p = c->bytes + out->opcode_off - 2;
  unsigned vvvv = (~p[0] >> 3 & 15) | (~p[1] & 8) << 1;
  if (out->mode != MV_MODE_64)
    vvvv &= 7;
  return reg != vvvv && (out->has_mem || reg != rm);
}

/* Demands on the mask, broadcast and rounding, SDM 2A 2.7.5 to 2.7.8, 2.7.11. */
static bool check_evex(const struct mv_insn *out, const struct cursor *c, uint64_t attr) {
  if (attr & A_DISTINCT && !check_distinct(out, c))
    return false;
  if (out->evex_aaa ? !(attr & A_K) : (attr & A_KREQ) != 0)
    return false;
  if (out->evex_z && (!out->evex_aaa || !(attr & A_Z) || out->mem_access & MV_ACC_W))
    return false;
  if (!out->evex_b)
    return true;
  if (out->has_mem)
    return attr & (A_BCST | A_BCST2);
  return attr & (A_ER | A_SAE);
}

/* Rounding control takes the place of L: the length is then the greatest. */
static bool set_length(struct mv_insn *out, struct cursor *c, uint64_t attr) {
  bool memory = out->modrm >> 6 != 3;
  if (out->evex_b && !memory && attr & (A_ER | A_SAE))
    c->length = 2;
  if (c->length > 2)
    return false;
  if (attr & A_LIG)
    c->length = 0;
  return true;
}

/* What EVEX adds once the operands are known: compressed disp8 (SDM 2A 2.7.5),
 * and that masked-off elements do not fault. */
static void finish_evex(struct mv_insn *out, uint64_t attr) {
  if (!out->has_mem)
    return;
  unsigned scale = out->mem_size;
  if (attr & A_ELEM)
    scale = out->vex_w ? 8 : 4;
  else if (attr & A_ELEMBW)
    scale = out->vex_w ? 2 : 1;
  if (out->disp_len == 1)
    out->disp *= scale;
  if (out->evex_aaa && out->cls == MV_CLASS_COPY)
    out->cls = MV_CLASS_MASKED;
}

/* Demands on ModRM.reg, on the mode and on LOCK. */
static bool check_legacy(const struct mv_insn *out, const struct cursor *c, uint64_t attr) {
  unsigned reg = out->modrm >> 3 & 7;
  if (attr & (out->mode == MV_MODE_64 ? A_I64 : A_O64))
    return false;
  if (attr & A_SEG && (reg > 5 || (reg == 1 && attr & A_NOCS)))
    return false;
  if (attr & A_CR && !(1u << (reg | c->rex_r << 3) & 0x11d)) /* 0, 2, 3, 4, 8 */
    return false;
  if (attr & A_DR && c->rex_r)
    return false;
  return !out->lock || (attr & A_LOCK && out->has_mem);
}

/* A shift by an immediate leaves the flags alone if the masked count is 0; RCL
 * and RCR of 8 and 16 bits (the ones that read CF) count modulo 9 and 17 besides. */
static void set_shift_flags(struct mv_insn *out, const struct mv_row *row) {
  unsigned count = out->imm & (out->op_size == 8 ? 63 : 31);
  if (row->flags_read && out->op_size <= 2)
    count %= 8 * out->op_size + 1;
  out->flags_killed = out->flags_written = count ? row->flags_written : 0;
  if (!count)
    out->flags_read = 0;
}

/* Flags and implicit registers. */
static void set_effects(struct mv_insn *out, const struct mv_row *row) {
  out->flags_read = row->flags_read;
  out->flags_killed = row->flags_killed;
  out->flags_written = row->flags_written;
  if (row->attr & A_CC) {
    out->cc = out->opcode & 15;
    out->flags_read |= cc_flags[out->cc >> 1];
  }
  if (row->attr & A_SHIFT)
    set_shift_flags(out, row);
  out->gpr_read |= row->gpr_read;
  out->gpr_written |= row->gpr_written;
  if (out->op_size < 4)
    out->gpr_read |= row->gpr_written; /* the rest is kept */
  if (row->attr & A_STRING && (out->rep || out->repne)) {
    out->flags_killed = 0; /* RCX may be 0 */
    out->gpr_read |= 1u << 1 | row->gpr_written;
    out->gpr_written |= 1u << 1;
  }
  if (out->base < 16)
    out->gpr_read |= 1u << out->base;
  if (out->index < 16 && row->cls != MV_CLASS_VSIB)
    out->gpr_read |= 1u << out->index;
}

/* Unit and features of the encoding at hand. */
static void set_feature(struct mv_insn *out, const struct cursor *c, const struct mv_row *row) {
  out->unit = row->unit;
  if (out->enc == MV_ENC_EVEX) {
    out->unit = MV_UNIT_AVX512;
    out->feature = row->feature[out->vex_w];
    bool scalar = row->attr & (A_LIG | A_L0);
    out->feature2 = scalar || c->length == 2 ? MV_FEAT_AVX512F : MV_FEAT_AVX512VL;
    return;
  }
  out->feature = row->feature[out->vex_l];
  if (out->enc == MV_ENC_VEX && out->unit == MV_UNIT_SSE) {
    out->unit = MV_UNIT_AVX;
    out->feature2 = MV_FEAT_AVX;
  }
}

/* Everything behind the opcode, as the row says. */
static enum mv_decode_status read_row(struct mv_insn *out, struct cursor *c,
                                      const struct mv_row *row) {
  out->cls = row->cls;
  out->op = row->op;
  out->op_size = operand_size(out, c, row->attr);
  if (row->attr & A_MODRM && !c->modrm_read && !read_modrm(out, c))
    return stopped(out, c);
  if (out->enc == MV_ENC_EVEX && !set_length(out, c, row->attr))
    return undefined(out, c);
  set_feature(out, c, row);
  if (c->modrm_read && out->modrm >> 6 != 3 && !(row->attr & A_NOMOD)) {
    bool ok = out->addr_size == 2 ? read_memory16(out, c)
                                  : read_memory(out, c, row->cls == MV_CLASS_VSIB);
    if (!ok)
      return stopped(out, c);
  }
  enum mv_decode_status s = read_operands(out, c, row);
  if (s != MV_DECODE_OK)
    return s == MV_DECODE_SHORT ? stopped(out, c) : undefined(out, c);
  out->len = c->pos;
  if ((row->attr & A_CHECKED || out->lock) && !check_legacy(out, c, row->attr))
    return undefined(out, c);
  if (out->enc != MV_ENC_LEGACY && !check_vex(out, c, row->attr))
    return undefined(out, c);
  if (out->enc == MV_ENC_EVEX) {
    if (!check_evex(out, c, row->attr))
      return undefined(out, c);
    finish_evex(out, row->attr);
  }
  set_effects(out, row);
  return MV_DECODE_OK;
}

/* Is the byte before the cursor a VEX or EVEX prefix? Outside 64-bit mode C4, C5
 * and 62 are LES, LDS and BOUND unless a register form follows. */
static bool is_vex(const struct mv_insn *out, const struct cursor *c, uint8_t byte) {
  return (byte == 0xc4 || byte == 0xc5 || byte == 0x62) &&
         (out->mode == MV_MODE_64 || (have(c, 1) && c->bytes[c->pos] >= 0xc0));
}

/* An instruction about which nothing is known. It is copied in words: a call of
 * memset() would cost more than the copy. */
static void begin(struct mv_insn *out, int mode) {
  static const union {
    struct mv_insn insn;
    uint64_t word[sizeof(struct mv_insn) / 8];
  } blank = {.insn = {.segment = MV_REG_NONE,
                      .reg = {.reg = MV_REG_NONE},
                      .rm = {.reg = MV_REG_NONE},
                      .vvvv = {.reg = MV_REG_NONE},
                      .opreg = {.reg = MV_REG_NONE},
                      .base = MV_REG_NONE,
                      .index = MV_REG_NONE,
                      .scale = 1}};
  _Static_assert(sizeof(struct mv_insn) % 8 == 0, "copied in words of 8 bytes");
  uint64_t *to = (uint64_t *)out;
#pragma GCC unroll 16
  for (unsigned i = 0; i < sizeof(blank) / 8; i++)
    to[i] = blank.word[i];
  out->mode = mode;
}

enum mv_decode_status mv_decode(struct mv_insn *out, const uint8_t *bytes, unsigned avail,
                                int mode) {
  struct cursor c = {.bytes = bytes, .limit = avail < MV_INSN_MAX ? avail : MV_INSN_MAX};
  begin(out, mode);
  if (!read_prefixes(out, &c))
    return stopped(out, &c);
  out->addr_size = address_size(out);
  uint8_t byte = bytes[c.pos++];
  if (is_vex(out, &c, byte)) {
    if (!(byte == 0x62 ? read_evex(out, &c) : read_vex(out, &c, byte == 0xc4)))
      return stopped(out, &c);
    if (out->rex || out->opsize || out->rep || out->repne || out->lock)
      return undefined(out, &c);
    if (out->map < 1 || out->map > (byte == 0x62 ? 6 : 3))
      return undefined(out, &c);
  } else if (!read_opcode(out, &c, byte)) {
    return stopped(out, &c);
  }
  unsigned row;
  if (!find_row(out, &c, &row))
    return stopped(out, &c);
  if (!row)
    return undefined(out, &c);
  out->row = row;
  return read_row(out, &c, &mv_rows[row]);
}
