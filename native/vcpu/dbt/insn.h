/*
 * One decoded x86-64 instruction, and the table that it comes from.
 *
 * The table (insn_table.c) has a row for every encoding; the decoder, the
 * translator, traces and the generated tests all read it.  Most rows are of
 * class COPY: the translator emits the guest's own bytes, with only the
 * memory operand and registers that it keeps for itself rewritten, so what a
 * row must tell exactly is: length, operands, memory width and direction,
 * GPRs read and written, flags read and written.
 */
#ifndef MV_INSN_H
#define MV_INSN_H

#include <stdbool.h>
#include <stdint.h>

#include "mv/features.h"

#define MV_INSN_MAX 15

/* What the translator does with an instruction (mv_op below says which one). */
enum mv_class {
  MV_CLASS_UD,     /* undefined, or not offered in CPUID: raises #UD        */
  MV_CLASS_COPY,   /* emit as it is; at most one memory operand: ModRM      */
  MV_CLASS_STACK,  /* PUSH, POP, ENTER, LEAVE, PUSHF, POPF                  */
  MV_CLASS_BRANCH, /* JMP, Jcc, CALL, RET, LOOP, JRCXZ: near                */
  MV_CLASS_STRING, /* MOVS, STOS, LODS, SCAS, CMPS, INS, OUTS, with REP     */
  MV_CLASS_SYSTEM, /* privileged or of system state: a helper does it       */
  MV_CLASS_VSIB,   /* gathers: many memory operands                        */
  MV_CLASS_XSAVE,  /* FXSAVE/XSAVE family: memory of a size set at run time */
  MV_CLASS_MASKED, /* VMASKMOV, VPMASKMOV, MASKMOVDQU/Q; EVEX memory operand
                      with a mask: masked elements do not fault             */
};

/* The instructions that someone must recognise by name; all others are
 * MV_OP_OTHER and are known by their row alone. */
enum mv_op {
  MV_OP_OTHER = 0,
  /* branches */
  MV_OP_JMP_REL,
  MV_OP_JMP_IND,
  MV_OP_JMP_FAR,
  MV_OP_JCC,
  MV_OP_CALL_REL,
  MV_OP_CALL_IND,
  MV_OP_CALL_FAR,
  MV_OP_RET,
  MV_OP_RET_IMM,
  MV_OP_RETF,
  MV_OP_LOOP,
  MV_OP_LOOPE,
  MV_OP_LOOPNE,
  MV_OP_JRCXZ,
  /* stack */
  MV_OP_PUSH,
  MV_OP_POP,
  MV_OP_PUSHF,
  MV_OP_POPF,
  MV_OP_ENTER,
  MV_OP_LEAVE,
  MV_OP_PUSHA,
  MV_OP_POPA,
  MV_OP_PUSH_SEG,
  MV_OP_POP_SEG,
  /* string */
  MV_OP_MOVS,
  MV_OP_STOS,
  MV_OP_LODS,
  MV_OP_SCAS,
  MV_OP_CMPS,
  MV_OP_INS,
  MV_OP_OUTS,
  /* system */
  MV_OP_HLT,
  MV_OP_CLI,
  MV_OP_STI,
  MV_OP_IN,
  MV_OP_OUT,
  MV_OP_INT,
  MV_OP_INT3,
  MV_OP_INT1,
  MV_OP_INTO,
  MV_OP_IRET,
  MV_OP_SYSCALL,
  MV_OP_SYSRET,
  MV_OP_SYSENTER,
  MV_OP_SYSEXIT,
  MV_OP_MOV_CR_READ,
  MV_OP_MOV_CR_WRITE,
  MV_OP_MOV_DR_READ,
  MV_OP_MOV_DR_WRITE,
  MV_OP_CLTS,
  MV_OP_LMSW,
  MV_OP_SMSW,
  MV_OP_LGDT,
  MV_OP_SGDT,
  MV_OP_LIDT,
  MV_OP_SIDT,
  MV_OP_LLDT,
  MV_OP_SLDT,
  MV_OP_LTR,
  MV_OP_STR,
  MV_OP_LAR,
  MV_OP_LSL,
  MV_OP_VERR,
  MV_OP_VERW,
  MV_OP_MOV_SEG_READ,
  MV_OP_MOV_SEG_WRITE,
  MV_OP_LXS, /* LSS, LFS, LGS, LDS, LES */
  MV_OP_RDMSR,
  MV_OP_WRMSR,
  MV_OP_RDTSC,
  MV_OP_RDTSCP,
  MV_OP_RDPMC,
  MV_OP_RDPID,
  MV_OP_CPUID,
  MV_OP_INVLPG,
  MV_OP_INVPCID,
  MV_OP_INVD,
  MV_OP_WBINVD,
  MV_OP_SWAPGS,
  MV_OP_RDFSBASE,
  MV_OP_RDGSBASE,
  MV_OP_WRFSBASE,
  MV_OP_WRGSBASE,
  MV_OP_XGETBV,
  MV_OP_XSETBV,
  MV_OP_STAC,
  MV_OP_CLAC,
  MV_OP_MONITOR,
  MV_OP_MWAIT,
  MV_OP_VMCALL,
  MV_OP_VMMCALL,
  /* state save */
  MV_OP_FXSAVE,
  MV_OP_FXRSTOR,
  MV_OP_XSAVE,
  MV_OP_XSAVEC,
  MV_OP_XSAVEOPT,
  MV_OP_XSAVES,
  MV_OP_XRSTOR,
  MV_OP_XRSTORS,
  /* copied, but the translator wants to know */
  MV_OP_LEA,
  MV_OP_NOP,
  MV_OP_XLAT,
  MV_OP_CMPXCHG,
  MV_OP_XCHG,
  MV_OP_STD,
  MV_OP_CLD,
  MV_OP_FNSTENV,
  MV_OP_FNSAVE,
  MV_OP_FLDENV,
  MV_OP_FRSTOR,
  MV_OP_MOV,
  MV_OP_BT_MEM_REG, /* BT/BTS/BTR/BTC m, r: the bit offset moves the address */
  MV_OP_CLFLUSH,    /* CLFLUSH/CLFLUSHOPT/CLWB/PREFETCH*: address, no access */
  MV_OP_PREFETCH,
  MV_OP_UD2,
  MV_OP_COUNT
};

enum { MV_MODE_64, MV_MODE_32, MV_MODE_16 };
enum { MV_ENC_LEGACY, MV_ENC_VEX, MV_ENC_EVEX };
enum { MV_ACC_R = 1, MV_ACC_W = 2, MV_ACC_RW = 3 };
enum {
  MV_SEG_ES,
  MV_SEG_CS,
  MV_SEG_SS,
  MV_SEG_DS,
  MV_SEG_FS,
  MV_SEG_GS,
  MV_SEG_LDTR,
  MV_SEG_TR,
  MV_SEG_COUNT
};
/* Arithmetic flags, at their RFLAGS bits. */
enum {
  MV_F_CF = 0x001,
  MV_F_PF = 0x004,
  MV_F_AF = 0x010,
  MV_F_ZF = 0x040,
  MV_F_SF = 0x080,
  MV_F_DF = 0x400,
  MV_F_OF = 0x800,
  MV_F_ARITH = 0x8d5
};

/* Whose state an instruction uses: CR0.TS/EM, CR4.OSFXSR/OSXSAVE and XCR0 may
 * forbid it (SDM 3A 2.5, 13.1). SSE also stands for MMX's use of XMM state. */
enum {
  MV_UNIT_INT,
  MV_UNIT_X87,
  MV_UNIT_MMX,
  MV_UNIT_SSE,
  MV_UNIT_AVX,
  MV_UNIT_AVX512,
  MV_UNIT_FWAIT
};

#define MV_REG_NONE 0xff /* no register in this place                       */
#define MV_REG_RIP  0xfe /* base of a RIP-relative operand                  */

/* A register number (0..15) in one of the instruction's GPR places. */
struct mv_gpr_ref {
  uint8_t reg;    /* 0..15, or MV_REG_NONE if this place holds no GPR        */
  uint8_t access; /* MV_ACC_*; a partial (8/16-bit) write is MV_ACC_W too,
                     `size` tells that the rest of the register is kept      */
  uint8_t size;   /* bytes: 1, 2, 4, 8                                       */
  bool high8;     /* AH, CH, DH, BH: reg is 0..3                             */
};

struct mv_insn {
  uint8_t len;
  uint8_t cls; /* enum mv_class                                              */
  uint8_t op;  /* enum mv_op                                                 */
  uint8_t enc; /* MV_ENC_*                                                   */
  uint8_t map; /* 0: one byte, 1: 0F, 2: 0F38, 3: 0F3A; EVEX also 5, 6       */
  uint8_t opcode;
  uint8_t mode;

  /* prefixes */
  bool opsize, addrsize, lock, rep, repne; /* 66, 67, F0, F3, F2 present; of F3
                                              and F2 the last alone          */
  uint8_t segment;                         /* override: MV_SEG_*, or MV_REG_NONE.
                                              In 64-bit mode only FS and GS.  */
  uint8_t rex;                             /* the REX byte, or 0             */
  uint8_t vex_l, vex_pp, vex_w;            /* VEX/EVEX fields                */
  uint8_t evex_aaa, evex_z, evex_b;

  uint8_t op_size;   /* operand size in bytes: 1, 2, 4, 8                     */
  uint8_t addr_size; /* 2, 4, 8                                             */
  uint8_t cc;        /* condition 0..15 of Jcc, SETcc, CMOVcc                */

  /* where things lie in the bytes; offset 0: absent                        */
  uint8_t opcode_off; /* of the last opcode byte                             */
  uint8_t modrm_off, sib_off, disp_off, imm_off;
  uint8_t disp_len, imm_len; /* imm_len counts all immediate bytes           */
  uint8_t modrm;

  /* GPR places. `opreg`: a register in the opcode's low 3 bits.             */
  struct mv_gpr_ref reg, rm, vvvv, opreg;
  /* The memory operand given by ModRM (or moffs: base and index NONE).      */
  bool has_mem;
  uint8_t mem_access;         /* MV_ACC_*; 0: address only (LEA, INVLPG, PREFETCH)    */
  uint16_t mem_size;          /* bytes accessed; 0: depends on state (XSAVE). Class
                                 VSIB: of one element; MASKED: if nothing is masked  */
  uint8_t mem_align;          /* 16/32/64 if the instruction demands it (#GP)        */
  uint8_t base, index, scale; /* registers or MV_REG_NONE; scale 1, 2, 4, 8.
                                 Class VSIB: index is a vector register 0..31 */
  int64_t disp;               /* EVEX disp8*N already multiplied             */
  /* First immediate. Data and branch displacements are sign-extended (truncate
   * to the operand's size); control bytes, shift counts, ports, vectors and
   * RET's and ENTER's sizes are zero-extended. */
  int64_t imm;
  int64_t imm2; /* ENTER's second, far pointer's selector      */

  /* GPRs read or written, bit per register: places, base and index of memory,
   * and implicit ones. A register that keeps a part of its old value (8- and
   * 16-bit writes) or may keep all of it counts as read too. */
  uint16_t gpr_read, gpr_written;
  /* Flags (MV_F_*): read; certainly overwritten whatever the operands
   * (undefined counts); possibly written.                                   */
  uint16_t flags_read, flags_killed, flags_written;
  uint8_t feature;  /* enum mv_feature: the CPUID bit that offers it          */
  uint8_t feature2; /* also needed (AVX, AVX512VL), or MV_FEAT_BASE           */
  uint8_t unit;     /* MV_UNIT_*                                             */
  uint16_t row;     /* index into the table, for names and tests             */
};

enum mv_decode_status {
  MV_DECODE_OK = 0,
  MV_DECODE_SHORT,    /* needs more bytes than `avail` (next page)            */
  MV_DECODE_TOO_LONG, /* over 15 bytes: #GP                                  */
  MV_DECODE_UD,       /* no such instruction (also bad LOCK): #UD; len is set
                         as far as known                                     */
};

/* Decodes the instruction at bytes[0..avail). Never reads past avail. */
enum mv_decode_status mv_decode(struct mv_insn *out, const uint8_t *bytes, unsigned avail,
                                int mode);
/* Mnemonic of a row, for traces and tests. */
const char *mv_insn_name(const struct mv_insn *insn);

#endif
