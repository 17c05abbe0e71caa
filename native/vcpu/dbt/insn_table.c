/*
 * The instruction table: a row for every encoding, and the index over them.
 *
 * The rows stand in insn_int.def (integer, system, x87), insn_vec.def (MMX to
 * AVX2) and insn_evex.def (AVX-512). These are read several times, each time
 * with other meanings of:
 *
 *   SPLIT(slot, KIND, name)  the slot leads to a new group of slots, chosen by
 *                            KIND (enum mv_split)
 *   LINK(slot, KIND, name)   the same, to a group that exists
 *   ROW(slot, mnemonic, class, op, feature, operand x4, gprs, flags, attributes)
 *   C(slot, mnemonic, feature, operand x4, gprs, flags, attributes)
 *                            a ROW of class COPY, op OTHER
 *   C2(slot, mnemonic, feature, feature for 256 bits, ...)
 *
 * slot:     M0(op), M0R(first, last)      one-byte map
 *           L(map, pp, op)                legacy, maps 1 (0F), 2 (0F38), 3 (0F3A)
 *           LA(map, op), LAR(map, first, last)   with any prefix
 *           LNB(map, op)                  with no prefix or 66
 *           V(map, pp, op)                VEX
 *           E(map, pp, op)                EVEX, also maps 5 and 6
 *           S(group, i), SR(group, i, j)  in a group; i is ModRM.reg (REG),
 *               0 memory 1 register (MOD), ModRM.rm (RM), W, 0 64-bit 1 else (MODE)
 * operands: as in SDM 2D A.2, in r(), w(), rw(), or adr() if it is no access;
 *           those that are encoded; implicit ones only as gprs
 * gprs:     implicit ones, R_(AX | DX) | W_(CX); rw_() is both
 * flags:    FL(read, killed, written besides)
 * attributes: A_* of insn_row.h
 *
 * A slot that two rows claim is a compile-time error (-Woverride-init).
 */
#include "insn_row.h"

/* ---- vocabulary of the .def files --------------------------------------- */
#define M0(op)       SLOT_M0 + (op)... SLOT_M0 + (op)
#define M0R(a, b)    SLOT_M0 + (a)... SLOT_M0 + (b)
#define L_(m, op)    (SLOT_LEGACY + ((m)-1) * 1024 + (op)*4)
#define L(m, pp, op) L_(m, op) + (pp)... L_(m, op) + (pp)
#define LA(m, op)    L_(m, op)... L_(m, op) + 3
#define LAR(m, a, b) L_(m, a)... L_(m, b) + 3
#define LNB(m, op)   L_(m, op) + NP... L_(m, op) + P66
#define V_(m, op)    (SLOT_VEX + ((m)-1) * 1024 + (op)*4)
#define V(m, pp, op) V_(m, op) + (pp)... V_(m, op) + (pp)
#define E_(m, op)    (SLOT_EVEX + ((m)-1) * 1024 + (op)*4)
#define E(m, pp, op) E_(m, op) + (pp)... E_(m, op) + (pp)
#define S(g, i)      SLOT_##g + (i)... SLOT_##g + (i)
#define SR(g, i, j)  SLOT_##g + (i)... SLOT_##g + (j)

enum {
  ARITH = MV_F_ARITH,
  CF = MV_F_CF,
  PF = MV_F_PF,
  AF = MV_F_AF,
  ZF = MV_F_ZF,
  SF = MV_F_SF,
  DF = MV_F_DF,
  OF = MV_F_OF,
  ALL = MV_F_ARITH | MV_F_DF
};
#define FL(r, k, w) ((uint64_t)(r) | (uint64_t)(k) << 16 | (uint64_t)((k) | (w)) << 32)
#define F_ARITH     FL(0, ARITH, 0)
#define F_CARRY     FL(CF, ARITH, 0)
#define F_INCDEC    FL(0, ARITH & ~CF, 0)
#define F_BT        FL(0, ARITH & ~ZF, 0)
#define F_STRING    FL(DF, 0, 0)
#define F_STRCMP    FL(DF, ARITH, 0)

enum {
  AX = 1 << 0,
  CX = 1 << 1,
  DX = 1 << 2,
  BX = 1 << 3,
  SP = 1 << 4,
  BP = 1 << 5,
  SI = 1 << 6,
  DI = 1 << 7,
  R11 = 1 << 11,
  LEGACY8 = 0xff
};
#define R_(m)  ((uint32_t)(m))
#define W_(m)  ((uint32_t)(m) << 16)
#define r_(m)  R_(m)
#define rw_(m) (R_(m) | W_(m))

#define adr(o) (o)
#define r(o)   ((o) | MV_ACC_R << OPND_ACCESS_SHIFT)
#define w(o)   ((o) | MV_ACC_W << OPND_ACCESS_SHIFT)
#define rw(o)  ((o) | MV_ACC_RW << OPND_ACCESS_SHIFT)
#define _      0

/* General registers and plain memory. Ea_b: register of size a, memory of b. */
#define Eb     OPND(E, GPR, b)
#define Ew     OPND(E, GPR, w)
#define Ev     OPND(E, GPR, v)
#define Ey     OPND(E, GPR, y)
#define Ez     OPND(E, GPR, z)
#define Ev_w   OPND(E, GPR, v_w)
#define Ed_b   OPND(E, GPR, d_b)
#define Ed_w   OPND(E, GPR, d_w)
#define Ed_d   OPND(E, GPR, d_d)
#define Gb     OPND(G, GPR, b)
#define Gw     OPND(G, GPR, w)
#define Gv     OPND(G, GPR, v)
#define Gy     OPND(G, GPR, y)
#define By     OPND(B, GPR, y)
#define Rv     OPND(U, GPR, v)
#define Ry     OPND(U, GPR, y)
#define Zb     OPND(Z, GPR, b)
#define Zv     OPND(Z, GPR, v)
#define Ib     OPND(I, NONE, b)
#define Iz     OPND(I, NONE, z)
#define Iv     OPND(I, NONE, v)
#define Ub     OPND(UI, NONE, b)
#define Uw     OPND(UI, NONE, w)
#define Jb     OPND(J, NONE, b)
#define Jz     OPND(J, NONE, z)
#define Ob     OPND(O, NONE, b)
#define Ov     OPND(O, NONE, v)
#define Ap     OPND(A, NONE, p)
#define Mb     OPND(M, NONE, b)
#define Mw     OPND(M, NONE, w)
#define Md     OPND(M, NONE, d)
#define Mq     OPND(M, NONE, q)
#define Mdq    OPND(M, NONE, dq)
#define Mt     OPND(M, NONE, t)
#define Mv     OPND(M, NONE, v)
#define My     OPND(M, NONE, y)
#define Mp     OPND(M, NONE, p)
#define Ms     OPND(M, NONE, s)
#define Ma     OPND(M, NONE, a)
#define Menv   OPND(M, NONE, env)
#define Mfsave OPND(M, NONE, fsave)
#define Mstate OPND(M, NONE, 0)
#define M512   OPND(M, NONE, 512)
#define Ust    OPND(U, NONE, t)
/* Vector registers; MX: memory of a vector instruction. */
#define Vx   OPND(G, XMM, x)
#define Hx   OPND(B, XMM, x)
#define Ux   OPND(U, XMM, x)
#define Lx   OPND(L, XMM, x)
#define Wx   OPND(E, XMM, x)
#define Wh   OPND(E, XMM, h)
#define Wf   OPND(E, XMM, f)
#define We   OPND(E, XMM, e)
#define Wb   OPND(E, XMM, b)
#define Ww   OPND(E, XMM, w)
#define Wd   OPND(E, XMM, d)
#define Wq   OPND(E, XMM, q)
#define Wy   OPND(E, XMM, y)
#define Wdq  OPND(E, XMM, dq)
#define Wdup OPND(E, XMM, dup)
#define MXx  OPND(M, XMM, x)
#define MXd  OPND(M, XMM, d)
#define MXq  OPND(M, XMM, q)
#define MXdq OPND(M, XMM, dq)
#define MXw  OPND(M, XMM, w)
#define MXqq OPND(M, XMM, qq)
#define Wqq  OPND(E, XMM, qq)
#define Wxw  OPND(E, XMM, xw)
#define Gd   OPND(G, GPR, d)
#define Rd   OPND(U, GPR, d)
/* Mask registers. */
#define Vk  OPND(G, K, 0)
#define Hk  OPND(B, K, 0)
#define Uk  OPND(U, K, 0)
#define WKb OPND(E, K, b)
#define WKw OPND(E, K, w)
#define WKd OPND(E, K, d)
#define WKq OPND(E, K, q)
#define MKb OPND(M, K, b)
#define MKw OPND(M, K, w)
#define MKd OPND(M, K, d)
#define MKq OPND(M, K, q)
#define VMy OPND(M, VSIB, y)
#define Pq  OPND(G, MMX, q)
#define Qd  OPND(E, MMX, d)
#define Qq  OPND(E, MMX, q)
#define Nq  OPND(U, MMX, q)
#define MPq OPND(M, MMX, q)

/* What can be told of a row while compiling. */
#define HAS1(o, rc)           ((o) != 0 && OPND_CLASS(o) == RC_##rc)
#define HAS(rc, a, b, c, d)   (HAS1(a, rc) || HAS1(b, rc) || HAS1(c, rc) || HAS1(d, rc))
#define MODRM1(o)             (OPND_PLACE(o) >= PL_E && OPND_PLACE(o) <= PL_G)
#define ROW_MODRM(a, b, c, d) (MODRM1(a) || MODRM1(b) || MODRM1(c) || MODRM1(d) ? A_MODRM : 0)
/* The operand in a place; the second one of a kind of place. */
#define IS_RM(o)             (OPND_PLACE(o) >= PL_E && OPND_PLACE(o) <= PL_U)
#define IS_REG(o)            (OPND_PLACE(o) == PL_G)
#define IS_VVVV(o)           (OPND_PLACE(o) == PL_B)
#define IS_OPREG(o)          (OPND_PLACE(o) == PL_Z)
#define IS_TAIL(o)           (OPND_PLACE(o) >= PL_I)
#define PICK(is, a, b, c, d) (is(a) ? (a) : is(b) ? (b) : is(c) ? (c) : is(d) ? (d) : 0)
#define PICK2(is, a, b, c, d)                                                                      \
  (is(a) ? PICK(is, b, c, d, 0) : is(b) ? PICK(is, c, d, 0, 0) : is(c) ? PICK(is, d, 0, 0, 0) : 0)
#define ROW_BYTE(a)                                                                                \
  (OPND_SIZE(a) == SZ_b && (OPND_CLASS(a) == RC_GPR || OPND_PLACE(a) == PL_O) ? A_BYTE : 0)
#define FEAT_UNIT(f)                                                                               \
  ((f) == MV_FEAT_FPU                         ? MV_UNIT_X87                                        \
   : (f) == MV_FEAT_MMX                       ? MV_UNIT_MMX                                        \
   : (f) == MV_FEAT_SSE || (f) == MV_FEAT_AVX ? MV_UNIT_SSE                                        \
                                              : MV_UNIT_INT)
#define ROW_UNIT(f, attr, a, b, c, d)                                                              \
  ((attr)&A_INT                                    ? MV_UNIT_INT                                   \
   : (attr)&A_X87                                  ? MV_UNIT_X87                                   \
   : (attr)&A_FWAIT                                ? MV_UNIT_FWAIT                                 \
   : HAS(K, a, b, c, d)                            ? MV_UNIT_AVX512                                \
   : HAS(XMM, a, b, c, d) || HAS(VSIB, a, b, c, d) ? MV_UNIT_SSE                                   \
   : HAS(MMX, a, b, c, d) || (attr)&A_MMX          ? MV_UNIT_MMX                                   \
                                                   : FEAT_UNIT(f))

#define C(slot, name, feat, a, b, c, d, gprs, fl, attr)                                            \
  ROW_(slot, name, COPY, OTHER, feat, feat, a, b, c, d, gprs, fl, attr)
#define C2(slot, name, feat, feat1, a, b, c, d, gprs, fl, attr)                                    \
  ROW_(slot, name, COPY, OTHER, feat, feat1, a, b, c, d, gprs, fl, attr)
#define ROW(slot, name, cls, op, feat, a, b, c, d, gprs, fl, attr)                                 \
  ROW_(slot, name, cls, op, feat, feat, a, b, c, d, gprs, fl, attr)

/* ---- pass 1: number the groups' slots ------------------------------------ */
enum { SIZE_REG = 8, SIZE_MOD = 2, SIZE_RM = 8, SIZE_W = 2, SIZE_MODE = 2, SIZE_N90 = 3 };
#define ROW_(...)
#define LINK(...)
#define SPLIT(slot, kind, name) SLOT_##name, SLOT_##name##_last = SLOT_##name + SIZE_##kind - 1,
enum {
  SLOT_GROUPS_before = SLOT_GROUPS - 1,
#include "insn_int.def"
#include "insn_vec.def"
#include "insn_evex.def"
  SLOT_COUNT
};
#undef ROW_
#undef LINK
#undef SPLIT
_Static_assert(SLOT_COUNT - SLOT_GROUPS <= SPLIT_MASK, "a group's number fits its field");

/* ---- pass 2: the index. Rows are numbered by __COUNTER__, from 1. --------- */
#define LINK(slot, kind, name) [slot] = SPLIT_##kind << SPLIT_SHIFT | (SLOT_##name - SLOT_GROUPS),
#define SPLIT                  LINK
#define ROW_(slot, ...)        [slot] = __COUNTER__ - INDEX_BASE,
enum { INDEX_BASE = __COUNTER__ };
const uint16_t mv_index[SLOT_COUNT] = {
#include "insn_int.def"
#include "insn_vec.def"
#include "insn_evex.def"
};
#undef ROW_
#undef LINK
#undef SPLIT

/* ---- pass 3: the rows ------------------------------------------------------ */
#define SPLIT(...)
#define LINK(...)
#define ROW_(slot, nm, cl, o, feat, feat1, a, b, c, d, gprs, fl, at)                               \
  [__COUNTER__ - ROWS_BASE] = {                                                                    \
      .attr = (at) | ROW_MODRM(a, b, c, d) | ROW_BYTE(a) | (HAS(GPR, a, b, c, d) ? A_GPR : 0),     \
      .rm = PICK(IS_RM, a, b, c, d),                                                               \
      .reg = PICK(IS_REG, a, b, c, d),                                                             \
      .vvvv = PICK(IS_VVVV, a, b, c, d),                                                           \
      .opreg = PICK(IS_OPREG, a, b, c, d),                                                         \
      .tail = PICK(IS_TAIL, a, b, c, d),                                                           \
      .tail2 = PICK2(IS_TAIL, a, b, c, d),                                                         \
      .gpr_read = (uint16_t)(gprs),                                                                \
      .gpr_written = (gprs) >> 16,                                                                 \
      .flags_read = (uint16_t)(fl),                                                                \
      .flags_killed = (uint16_t)((uint64_t)(fl) >> 16),                                            \
      .flags_written = (uint16_t)((uint64_t)(fl) >> 32),                                           \
      .cls = MV_CLASS_##cl,                                                                        \
      .op = MV_OP_##o,                                                                             \
      .unit = ROW_UNIT(MV_FEAT_##feat, at, a, b, c, d),                                            \
      .feature = {MV_FEAT_##feat, MV_FEAT_##feat1},                                                \
  },
enum { ROWS_BASE = __COUNTER__ };
const struct mv_row mv_rows[] = {
#include "insn_int.def"
#include "insn_vec.def"
#include "insn_evex.def"
};
#undef ROW_
const unsigned mv_row_count = sizeof(mv_rows) / sizeof(mv_rows[0]);

/* ---- pass 4: their names, apart because only traces and tests look -------- */
#define ROW_(slot, nm, ...) [__COUNTER__ - NAMES_BASE] = nm,
enum { NAMES_BASE = __COUNTER__ };
static const char names[][20] = {
#include "insn_int.def"
#include "insn_vec.def"
#include "insn_evex.def"
};
_Static_assert(sizeof(names) / sizeof(names[0]) == sizeof(mv_rows) / sizeof(mv_rows[0]),
               "every row has a name");
_Static_assert(sizeof(mv_rows) / sizeof(mv_rows[0]) <= SPLIT_MASK, "a row's number fits a slot");

const char *mv_insn_name(const struct mv_insn *insn) {
  return insn->row && insn->row < mv_row_count ? names[insn->row] : "(bad)";
}
