/* The host's TSC as a clock: ticks to nanoseconds and back. */
#ifndef MV_CLOCK_H
#define MV_CLOCK_H

#include <stdint.h>

/* Notes the time, once a process; the sooner, the better is the measurement. */
void mv_clock_start(void);
/* Frequency in Hz. The first call waits until MV_CLOCK_MIN_NS have passed
 * since mv_clock_start(). */
uint64_t mv_clock_hz(void);
/* Host TSC when mv_clock_start() was called. */
uint64_t mv_clock_origin(void);
#define MV_CLOCK_MIN_NS 2000000u

uint64_t mv_clock_ns(void); /* CLOCK_MONOTONIC                                 */
uint64_t mv_clock_to_ns(uint64_t ticks);
uint64_t mv_clock_to_ticks(uint64_t ns);
/* Nanoseconds are (ticks * mult) >> 32. */
uint64_t mv_clock_mult(void);

static inline uint64_t mv_clock_tsc(void) {
  uint32_t lo, hi;
  __asm__ volatile("rdtsc" : "=a"(lo), "=d"(hi));
  return lo | (uint64_t)hi << 32;
}

#endif
