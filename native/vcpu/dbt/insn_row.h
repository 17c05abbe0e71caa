/*
 * The instruction table as decode.c sees it (private to the two files).
 *
 * Finding a row: the prefix, opcode map and opcode select a slot of mv_index.
 * A slot holds a row's number, or it sends the decoder on to a group of
 * further slots, chosen by ModRM.reg, mod, rm, by W or by the mode. No path is
 * longer than four steps.
 */
#ifndef MV_INSN_ROW_H
#define MV_INSN_ROW_H

#include <stdint.h>

#include "insn.h"

/* Mandatory prefix, in the numbering of VEX.pp. */
enum { NP, P66, PF3, PF2 };

/* How a slot chooses among the slots of its group. */
enum mv_split { SPLIT_NONE, SPLIT_REG, SPLIT_MOD, SPLIT_RM, SPLIT_W, SPLIT_MODE, SPLIT_N90 };
#define SPLIT_SHIFT 13
#define SPLIT_MASK  ((1u << SPLIT_SHIFT) - 1)

/* Top-level slots: one a one-byte opcode, four (by pp) an opcode elsewhere. */
enum {
  SLOT_M0 = 0,
  SLOT_LEGACY = SLOT_M0 + 256,        /* maps 1..3                           */
  SLOT_VEX = SLOT_LEGACY + 3 * 1024,  /* maps 1..3                           */
  SLOT_EVEX = SLOT_VEX + 3 * 1024,    /* maps 1..6                           */
  SLOT_GROUPS = SLOT_EVEX + 6 * 1024, /* the groups' slots follow            */
};

/* Where an operand comes from; letters as in SDM 2D appendix A.2.1. */
enum mv_place {
  PL_NONE,
  PL_E,  /* ModRM.rm: register or memory                                     */
  PL_M,  /* ModRM.rm: memory only                                            */
  PL_U,  /* ModRM.rm: register only (R, N, U in the manual)                  */
  PL_G,  /* ModRM.reg                                                        */
  PL_B,  /* VEX.vvvv (B, H)                                                  */
  PL_Z,  /* low bits of the opcode                                           */
  PL_I,  /* immediate, sign-extended                                         */
  PL_UI, /* immediate, zero-extended                                         */
  PL_J,  /* branch displacement                                              */
  PL_O,  /* absolute offset, no ModRM                                        */
  PL_A,  /* far pointer                                                      */
  PL_L,  /* register in an immediate's bits 4..7                             */
};
enum mv_regclass { RC_NONE, RC_GPR, RC_XMM, RC_MMX, RC_K, RC_VSIB };

/* Sizes of operands; most names are the manual's. */
enum mv_size {
  SZ_0, /* none, or of a size that depends on state                        */
  SZ_b, /* 1, 2, 4, 8, 16, 32, 10, 512 bytes                               */
  SZ_w,
  SZ_d,
  SZ_q,
  SZ_dq,
  SZ_qq,
  SZ_t,
  SZ_512,
  SZ_v, /* operand size                                                    */
  SZ_z, /* operand size, at most 4                                         */
  SZ_y, /* 8 with W, else 4                                                */
  SZ_p, /* far pointer                                                     */
  SZ_s, /* descriptor table register                                       */
  SZ_a, /* BOUND's pair                                                    */
  SZ_x, /* vector length; half, quarter, eighth of it                      */
  SZ_h,
  SZ_f,
  SZ_e,
  SZ_xw,  /* half a vector (W0), a whole one (W1)                            */
  SZ_dup, /* MOVDDUP: 8, 32, 64                                              */
  SZ_env, /* x87 environment, x87 state                                      */
  SZ_fsave,
  SZ_v_w, /* register of operand size, memory of 2                           */
  SZ_d_b, /* register of 4, memory of 1, 2, 4                                */
  SZ_d_w,
  SZ_d_d,
  SZ_COUNT
};

/* An operand in 16 bits: place 0..3, class 4..6, size 7..12, access 13..14. */
#define OPND(place, rc, sz) (PL_##place | RC_##rc << 4 | SZ_##sz << 7)
#define OPND_PLACE(o)       ((o)&15)
#define OPND_CLASS(o)       ((o) >> 4 & 7)
#define OPND_SIZE(o)        ((o) >> 7 & 63)
#define OPND_ACCESS(o)      ((o) >> 13 & 3)
#define OPND_ACCESS_SHIFT   13

/* Attributes of a row. */
#define A_BYTE     (1ull << 0)  /* operand size 1                                  */
#define A_LOCK     (1ull << 1)  /* LOCK is legal with a memory destination         */
#define A_D64      (1ull << 2)  /* 64-bit mode: operand size 8, or 2 with 66       */
#define A_F64      (1ull << 3)  /* 64-bit mode: operand size 8 always              */
#define A_I64      (1ull << 4)  /* undefined in 64-bit mode                        */
#define A_O64      (1ull << 5)  /* defined in 64-bit mode only                     */
#define A_CC       (1ull << 6)  /* condition in the opcode's low bits              */
#define A_SHIFT    (1ull << 7)  /* flags are written unless the immediate count is 0 */
#define A_STRING   (1ull << 8)  /* REP counts in RCX and may run no time at all    */
#define A_MAX4     (1ull << 9)  /* operand size is at most 4                       */
#define A_SEG      (1ull << 10) /* ModRM.reg is a segment register                 */
#define A_NOCS     (1ull << 11) /* ... that is not CS                              */
#define A_NOMOD    (1ull << 12) /* ModRM.mod is ignored: a register                */
#define A_CR       (1ull << 13) /* ModRM.reg is a control register                 */
#define A_DR       (1ull << 14) /* ModRM.reg is a debug register                   */
#define A_W0       (1ull << 15) /* VEX.W, EVEX.W must be 0                         */
#define A_W1       (1ull << 16) /* must be 1                                       */
#define A_L0       (1ull << 17) /* VEX.L must be 0                                 */
#define A_L1       (1ull << 18) /* must be 1                                       */
#define A_LIG      (1ull << 19) /* is ignored: scalar                              */
#define A_UNAL     (1ull << 20) /* legacy SSE without alignment check              */
#define A_ALIGN    (1ull << 21) /* memory must be aligned to its size              */
#define A_AL16     (1ull << 22) /* ... to 16                                       */
#define A_AL64     (1ull << 23) /* ... to 64                                       */
#define A_MODRM    (1ull << 24) /* an operand needs ModRM (set by the row macros)  */
#define A_GPR      (1ull << 25) /* an operand is a general register (likewise)     */
#define A_K        (1ull << 26) /* EVEX: takes a mask                              */
#define A_Z        (1ull << 27) /* EVEX: ... zeroing too                           */
#define A_KREQ     (1ull << 28) /* EVEX: the mask must not be k0                   */
#define A_BCST     (1ull << 29) /* EVEX: broadcast of 4 (W0) or 8 bytes (W1)       */
#define A_BCST2    (1ull << 30) /* EVEX: broadcast of 2 bytes                      */
#define A_ER       (1ull << 31) /* EVEX: embedded rounding                         */
#define A_SAE      (1ull << 32) /* EVEX: suppresses exceptions                     */
#define A_L12      (1ull << 33) /* EVEX: 256 or 512 bits                           */
#define A_L2       (1ull << 34) /* EVEX: 512 bits                                  */
#define A_ELEM     (1ull << 35) /* EVEX: disp8 counts elements of 4 or 8 bytes     */
#define A_ELEMBW   (1ull << 36) /* EVEX: ... of 1 or 2                             */
#define A_DISTINCT (1ull << 37) /* EVEX: destination and sources must differ       */
/* Used by the row macros alone, to find the unit. */
#define A_INT   (1ull << 60) /* unit INT in spite of its feature                 */
#define A_FWAIT (1ull << 61)
#define A_MMX   (1ull << 62) /* unit MMX without an operand that says so         */
#define A_X87   (1ull << 63) /* unit X87 in spite of its feature                 */

/* Those that check_legacy() looks at. */
#define A_CHECKED (A_I64 | A_O64 | A_SEG | A_CR | A_DR)

struct mv_row {
  uint64_t attr;
  uint16_t rm, reg, vvvv, opreg;  /* operands by place: E M U, G, B, Z          */
  uint16_t tail, tail2;           /* what follows ModRM: I UI J L O A            */
  uint16_t gpr_read, gpr_written; /* implicit ones                           */
  uint16_t flags_read, flags_killed, flags_written;
  uint8_t cls, op, unit;
  uint8_t feature[2]; /* for VEX.L 0 and 1, EVEX.W 0 and 1                   */
};

extern const uint16_t mv_index[];
/* Row 0 is "undefined". */
extern const struct mv_row mv_rows[];
extern const unsigned mv_row_count;

#endif
