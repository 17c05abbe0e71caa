/*
 * See alarm.h. `wanted` and `armed` are Dekker's pair: the setter stores
 * wanted, then loads armed; the thread stores armed, then loads wanted. All are
 * sequentially consistent, so that one of them sees the other.
 */
#include "alarm.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>

#include "clock.h"

/* The raw system call: the setter runs while vector registers are the guest's,
 * which libc need not respect. */
static long futex(_Atomic uint32_t *word, int op, uint32_t value, const struct timespec *timeout) {
  register long r10 __asm__("r10") = (long)timeout;
  register long r8 __asm__("r8") = 0;
  register long r9 __asm__("r9") = FUTEX_BITSET_MATCH_ANY;
  long ret;
  __asm__ volatile("syscall"
                   : "=a"(ret)
                   : "a"(SYS_futex), "D"(word), "S"(op), "d"(value), "r"(r10), "r"(r8), "r"(r9)
                   : "rcx", "r11", "memory");
  return ret;
}

static void sleep_until(struct mv_alarm *a, uint32_t seen, uint64_t when) {
  struct timespec t = {.tv_sec = (time_t)(when / 1000000000u),
                       .tv_nsec = (long)(when % 1000000000u)};
  futex(&a->word, FUTEX_WAIT_BITSET_PRIVATE, seen, when == UINT64_MAX ? NULL : &t);
}

static void *alarm_thread(void *arg) {
  struct mv_alarm *a = arg;
  while (!atomic_load(&a->stop)) {
    uint32_t seen = atomic_load(&a->word);
    uint64_t when = atomic_load(&a->wanted);
    if (when != UINT64_MAX && mv_clock_ns() >= when) {
      /* Only this deadline is over; a newer one stays. */
      if (atomic_compare_exchange_strong(&a->wanted, &when, UINT64_MAX))
        a->ring(a->ctx);
      continue;
    }
    atomic_store(&a->armed, when);
    if (atomic_load(&a->wanted) == when && !atomic_load(&a->stop))
      sleep_until(a, seen, when);
    atomic_store(&a->armed, UINT64_MAX);
  }
  return NULL;
}

static void wake(struct mv_alarm *a) {
  atomic_fetch_add(&a->word, 1);
  futex(&a->word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL);
}

int mv_alarm_start(struct mv_alarm *a, void (*ring)(void *ctx), void *ctx) {
  pthread_attr_t attr;
  sigset_t all, old;
  atomic_store(&a->wanted, UINT64_MAX);
  atomic_store(&a->armed, UINT64_MAX);
  atomic_store(&a->stop, false);
  a->ring = ring;
  a->ctx = ctx;
  pthread_attr_init(&attr);
  pthread_attr_setstacksize(&attr, 64 << 10);
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &old);
  int err = pthread_create(&a->thread, &attr, alarm_thread, a);
  pthread_sigmask(SIG_SETMASK, &old, NULL);
  pthread_attr_destroy(&attr);
  a->running = err == 0;
  return -err;
}

void mv_alarm_stop(struct mv_alarm *a) {
  if (!a->running)
    return;
  atomic_store(&a->stop, true);
  wake(a);
  pthread_join(a->thread, NULL);
  a->running = false;
}

void mv_alarm_set(struct mv_alarm *a, uint64_t when) {
  atomic_store(&a->wanted, when);
  if (when < atomic_load(&a->armed))
    wake(a);
}
