/*
 * How fast the TSC runs.
 *
 * The kernel knows, but tells unprivileged processes only through interfaces
 * that are slow (perf), or absent. So it is measured against CLOCK_MONOTONIC_RAW:
 * one pair of readings when the VM is made, another when someone first needs
 * the figure, which is milliseconds later (the guest must have booted so far).
 * A pair is exact to some 20 ns, so that 2 ms give 10 ppm or better.
 */
#include "clock.h"

#include <stdatomic.h>
#include <time.h>

struct sample {
  uint64_t tsc, ns;
};

enum { IDLE, BUSY, DONE };
static struct sample origin;
static _Atomic int origin_state, rate_state;
static uint64_t rate_hz, ns_per_tick, ticks_per_ns; /* the latter two << 32      */

static uint64_t now(clockid_t id) {
  struct timespec t;
  clock_gettime(id, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* The tightest of some readings of clock between two readings of TSC. */
static struct sample take_sample(void) {
  struct sample best = {0, 0};
  uint64_t width = UINT64_MAX;
  for (int i = 0; i < 8; i++) {
    uint64_t before = mv_clock_tsc();
    uint64_t ns = now(CLOCK_MONOTONIC_RAW);
    uint64_t after = mv_clock_tsc();
    if (after - before < width) {
      width = after - before;
      best = (struct sample){before + width / 2, ns};
    }
  }
  return best;
}

/* 1: the caller does the work and then stores DONE; 0: it is done. */
static int begin_once(_Atomic int *state) {
  int idle = IDLE;
  if (atomic_load_explicit(state, memory_order_acquire) == DONE)
    return 0;
  if (atomic_compare_exchange_strong(state, &idle, BUSY))
    return 1;
  while (atomic_load_explicit(state, memory_order_acquire) != DONE)
    __builtin_ia32_pause();
  return 0;
}

void mv_clock_start(void) {
  if (!begin_once(&origin_state))
    return;
  origin = take_sample();
  atomic_store_explicit(&origin_state, DONE, memory_order_release);
}

/* a * b / c; by hand because libgcc's 128-bit division may use vector registers,
 * which are the guest's. */
static uint64_t mul_div(uint64_t a, uint64_t b, uint64_t c) {
  uint64_t lo, hi, q, r;
  __asm__("mulq %3" : "=a"(lo), "=d"(hi) : "a"(a), "r"(b) : "cc");
  __asm__("divq %4" : "=a"(q), "=d"(r) : "a"(lo), "d"(hi), "r"(c) : "cc");
  return q;
}

static void measure(void) {
  mv_clock_start();
  if (!begin_once(&rate_state))
    return;
  while (now(CLOCK_MONOTONIC_RAW) - origin.ns < MV_CLOCK_MIN_NS)
    __builtin_ia32_pause();
  struct sample s = take_sample();
  uint64_t ticks = s.tsc - origin.tsc, ns = s.ns - origin.ns;
  rate_hz = mul_div(ticks, 1000000000u, ns);
  ns_per_tick = mul_div(ns, 1ULL << 32, ticks);
  ticks_per_ns = mul_div(ticks, 1ULL << 32, ns);
  atomic_store_explicit(&rate_state, DONE, memory_order_release);
}

uint64_t mv_clock_hz(void) {
  measure();
  return rate_hz;
}

uint64_t mv_clock_mult(void) {
  measure();
  return ns_per_tick;
}

uint64_t mv_clock_origin(void) {
  mv_clock_start();
  return origin.tsc;
}

uint64_t mv_clock_ns(void) {
  return now(CLOCK_MONOTONIC);
}

uint64_t mv_clock_to_ns(uint64_t ticks) {
  measure();
  return (uint64_t)((unsigned __int128)ticks * ns_per_tick >> 32);
}

uint64_t mv_clock_to_ticks(uint64_t ns) {
  measure();
  return (uint64_t)((unsigned __int128)ns * ticks_per_ns >> 32);
}
