/*
 * The low-level test API: one vCPU of either backend, in process, with memory, registers and
 * code of the caller's choosing (Python: microvm.testing.vcpu).
 *
 * RAM is [0, ram_size). Every port, and MMIO at MV_TEST_MMIO_GPA, belongs to a test device: it
 * logs each access; byte i of a read is the low byte of (address + i). A write to
 * MV_PORT_DEBUG_EXIT ends the run; code after it must wait there ("jmp ."), because the vCPU may
 * go on for a few instructions.
 */
#ifndef MV_TESTAPI_H
#define MV_TESTAPI_H

#include <stdbool.h>
#include <stdint.h>

#include "mv/vcpu.h"

#define MV_TEST_MMIO_GPA  0xd0000000ULL
#define MV_TEST_MMIO_SIZE 0x100000ULL
#define MV_TEST_LOG_MAX   1024

struct mv_test_config {
  const char *backend; /* "kvm" or "dbt"                                    */
  uint64_t ram_size;   /* bytes, whole pages                                */
  bool hlt_exits;      /* HLT ends the run; then KVM has no APIC            */
  bool count;          /* count guest instructions                          */
  uint8_t handover;    /* enum mv_handover                                  */
  struct mv_dbt_options dbt;
};

enum { MV_TEST_PORT = 0, MV_TEST_MMIO = 1 };

struct mv_test_access {
  uint64_t addr, value;
  uint8_t space; /* MV_TEST_PORT or MV_TEST_MMIO                            */
  uint8_t len, is_write;
};

struct mv_test;

/* 0, or -errno and *failed says what failed. */
int mv_test_new(struct mv_test **out, const struct mv_test_config *config, const char **failed);
void mv_test_free(struct mv_test *t);
/* Guest RAM, ram_size bytes. Whoever writes it while the vCPU has run says so. */
uint8_t *mv_test_ram(struct mv_test *t);
void mv_test_ram_written(struct mv_test *t, uint64_t gpa, uint64_t len);
int mv_test_get_state(struct mv_test *t, struct mv_vcpu_state *out);
int mv_test_set_state(struct mv_test *t, const struct mv_vcpu_state *in);
/* See mv_state_long_mode(). */
void mv_test_long_mode(struct mv_vcpu_state *s, uint64_t rip, uint64_t cr3, uint64_t gdt);

enum mv_test_end {
  MV_TEST_DONE = 1,    /* MV_PORT_DEBUG_EXIT was written                    */
  MV_TEST_EXIT = 2,    /* *out says why                                     */
  MV_TEST_KICKED = 3,  /* mv_test_kick()                                    */
  MV_TEST_TIMEOUT = 4, /* `timeout_ms` have passed                          */
};
/* Runs the vCPU. Returns enum mv_test_end. */
int mv_test_run(struct mv_test *t, uint32_t timeout_ms, struct mv_exit_info *out);
/* Ends a run. Any thread. */
void mv_test_kick(struct mv_test *t);
/* Hands the vCPU from KVM to the translator, for good. 0 or -errno. */
int mv_test_hand_over(struct mv_test *t);
/* Level of an interrupt line. Any thread. */
void mv_test_irq(struct mv_test *t, unsigned gsi, int level);
/* Copies the log, oldest first, and empties it. Returns the number of accesses;
 * what came after the first MV_TEST_LOG_MAX is not in it. */
unsigned mv_test_log(struct mv_test *t, struct mv_test_access out[MV_TEST_LOG_MAX]);
void mv_test_stats(struct mv_test *t, struct mv_vcpu_stats *out);
const char *mv_test_failed(struct mv_test *t);

#endif
