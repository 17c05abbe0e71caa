/*
 * The host's silicon as oracle for user-level instructions: the same bytes, registers and memory
 * run natively (in a forked child, under signal handlers) and in ring 3 of a vCPU.
 *
 * Both worlds are alike: the same virtual addresses with the same rights, and every byte of the
 * code pages that is not the case's is INT3, so that a case ends with an exception in any case.
 */
#ifndef MV_SILICON_H
#define MV_SILICON_H

#include <stdint.h>

#include "mv/testapi.h"

/* Virtual addresses. What lies between is not mapped; nor is it in the host, whose heap, if the
 * program has a fixed address, begins somewhere in the first GiB. */
#define MV_SI_BASE       0x60000000ULL
#define MV_SI_CODE       0x60000000ULL /* execute, read                            */
#define MV_SI_CODE_SIZE  0x2000ULL
#define MV_SI_DATA       0x60010000ULL /* read, write; GS base points at it        */
#define MV_SI_DATA_SIZE  0x2000ULL
#define MV_SI_RO         0x60020000ULL /* read                                     */
#define MV_SI_RO_SIZE    0x1000ULL
#define MV_SI_STACK      0x60030000ULL /* read, write                              */
#define MV_SI_STACK_SIZE 0x1000ULL
/* In the guest, address a lies at gpa a - MV_SI_BASE + MV_SI_GPA. */
#define MV_SI_GPA 0x400000ULL

#define MV_SI_XSAVE    2688 /* bytes of an XSAVE image up to the ZMM registers        */
#define MV_SI_CODE_MAX 1024

struct mv_si_state {
  uint64_t gpr[16]; /* in the order of their numbers                         */
  uint64_t rip, rflags;
  uint8_t xsave[MV_SI_XSAVE]; /* standard format; header as hardware has it  */
  uint8_t data[MV_SI_DATA_SIZE];
  uint8_t stack[MV_SI_STACK_SIZE];
};

struct mv_si_case {
  struct mv_si_state in;
  uint8_t code[MV_SI_CODE_MAX]; /* at in.rip                                 */
  uint32_t code_len;
};

/* Each case ends with an exception: #BP if the instruction did what it does. */
struct mv_si_result {
  struct mv_si_state out; /* xsave as mv_si_normalise() leaves it            */
  uint32_t ran;           /* 0: never came back                              */
  uint32_t vector, error;
  uint32_t reserved;
  uint64_t cr2; /* #PF: the address; else 0                                  */
};

/* Runs cases natively. The n-th that kills or hangs the child has ran == 0, as
 * have those behind it. 0 or -errno. */
int mv_si_native(const struct mv_si_case *cases, unsigned n, struct mv_si_result *results);
/* Runs cases on a vCPU whose state (but for what a case sets) and tables are
 * set up; an exception pushes vector and error code on the ring 0 stack and
 * writes the exit port. 0 or -errno. */
int mv_si_guest(struct mv_test *t, const struct mv_si_case *cases, unsigned n,
                struct mv_si_result *results);
/* Brings an XSAVE image into one form: components in their initial state are
 * written out; what is not comparable (x87 instruction and data pointers and
 * opcode, MXCSR_MASK, software's bytes, header) is zero. */
void mv_si_normalise(uint8_t xsave[MV_SI_XSAVE]);
/* One encoding of the instruction table in 64-bit mode: what a test fills up with registers,
 * addresses and immediates. */
struct mv_si_encoding {
  uint16_t row;
  uint8_t enc; /* MV_ENC_*                                               */
  uint8_t pp;  /* mandatory (or operand size) prefix: 0, 66, F3, F2      */
  uint8_t map; /* 0..3; EVEX also 5, 6                                   */
  uint8_t opcode;
  uint8_t modrm;     /* reg, and with mod 3 rm, are as the row wants them      */
  uint8_t w, l;      /* REX.W or VEX.W, VEX.L'L                                */
  uint8_t vvvv, aaa; /* VEX's third register, EVEX's mask register          */
  uint8_t b;         /* REX.B: makes XCHG of NOP                            */
  uint8_t has_mem;
};
/* Every row in each operand size, vector length, register and memory form.
 * Returns their number; fills at most `max`. */
unsigned mv_si_encodings(struct mv_si_encoding *out, unsigned max);

/* Is a feature (enum mv_feature) offered to guests of the translator? */
int mv_si_feature_offered(uint32_t feature);

#endif
