/*
 * An alarm clock that calls a function near a deadline, from a thread of its
 * own. To move the deadline back costs no system call: the alarm then rings
 * early, and who is woken sets it again.
 */
#ifndef MV_ALARM_H
#define MV_ALARM_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct mv_alarm {
  _Atomic uint64_t wanted; /* CLOCK_MONOTONIC ns, UINT64_MAX: none             */
  _Atomic uint64_t armed;  /* what the thread sleeps until                    */
  _Atomic uint32_t word;   /* futex: changes when the thread must look        */
  _Atomic bool stop;
  bool running;
  void (*ring)(void *ctx);
  void *ctx;
  pthread_t thread;
};

/* 0 or -errno. */
int mv_alarm_start(struct mv_alarm *a, void (*ring)(void *ctx), void *ctx);
void mv_alarm_stop(struct mv_alarm *a);
/* Rings at `when` (UINT64_MAX: not at all), perhaps earlier. One thread calls it. */
void mv_alarm_set(struct mv_alarm *a, uint64_t when);
static inline bool mv_alarm_is_set(struct mv_alarm *a) {
  return atomic_load(&a->wanted) != UINT64_MAX;
}

#endif
