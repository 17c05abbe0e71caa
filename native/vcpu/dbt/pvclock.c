/*
 * kvmclock: Documentation/virt/kvm/x86/msr.rst.
 *
 * The guest reads its TSC and scales it by what a page of its own memory says.
 * TSC and scale never change while a guest runs here, so the page is written
 * once, when the guest names it, and says that it is stable: all vCPUs tell
 * the same time, because they start from the same origin.
 */
#include <time.h>

#include "clock.h"
#include "system.h"

struct wall_clock {
  uint32_t version, sec, nsec;
};
_Static_assert(sizeof(struct wall_clock) == 12, "msr.rst, MSR_KVM_WALL_CLOCK_NEW");

/* Both are aligned to 4 bytes, msr.rst says; who names another address gets none. */
struct time_info {
  uint32_t version, pad0;
  uint64_t tsc_timestamp, system_time;
  uint32_t tsc_to_system_mul;
  int8_t tsc_shift;
  uint8_t flags, pad[2];
} __attribute__((packed, aligned(4)));
_Static_assert(sizeof(struct time_info) == 32, "msr.rst, MSR_KVM_SYSTEM_TIME_NEW");
enum { TSC_STABLE = 1 };

static uint64_t system_time(const struct mv_dbt *d, uint64_t guest_tsc) {
  return d->sys->clock_ns + mv_clock_to_ns(guest_tsc - d->sys->clock_tsc);
}

/* The scale as the page has it: (ticks << shift) * mul >> 32. */
static void set_scale(struct time_info *t) {
  uint64_t mult = mv_clock_mult();
  int shift = 0;
  for (; mult >> 32; shift++)
    mult >>= 1;
  for (; !(mult >> 31); shift--)
    mult <<= 1;
  t->tsc_to_system_mul = (uint32_t)mult;
  t->tsc_shift = (int8_t)shift;
}

/* A version is odd while its page is being written. */
static void begin_update(uint32_t *version) {
  __atomic_store_n(version, (*version + 1) | 1, __ATOMIC_SEQ_CST);
}
static void end_update(uint32_t *version) {
  __atomic_store_n(version, *version + 1, __ATOMIC_SEQ_CST);
}

void mv_pvclock_publish(struct mv_dbt *d, uint64_t gpa) {
  mv_dbt_fpu_save(d);
  struct time_info *t = mv_mem_ptr(&d->vm->mem, gpa, sizeof(*t));
  if (!t || (gpa & 3))
    return;
  begin_update(&t->version);
  t->tsc_timestamp = mv_system_tsc(d);
  t->system_time = system_time(d, t->tsc_timestamp);
  t->flags = TSC_STABLE;
  set_scale(t);
  end_update(&t->version);
  mv_mem_written(&d->vm->mem, gpa, sizeof(*t));
}

void mv_pvclock_adopt(struct mv_dbt *d, uint64_t gpa) {
  const struct time_info *t = mv_mem_ptr(&d->vm->mem, gpa, sizeof(*t));
  if (!t || (gpa & 3) || !t->tsc_to_system_mul)
    return;
  d->sys->clock_tsc = t->tsc_timestamp;
  d->sys->clock_ns = t->system_time;
}

/* The wall clock when the guest's system time was zero. */
void mv_pvclock_wall(struct mv_dbt *d, uint64_t gpa) {
  struct timespec now;
  mv_dbt_fpu_save(d);
  struct wall_clock *w = mv_mem_ptr(&d->vm->mem, gpa, sizeof(*w));
  if (!w || (gpa & 3))
    return;
  clock_gettime(CLOCK_REALTIME, &now);
  uint64_t ns =
      (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec - system_time(d, mv_system_tsc(d));
  begin_update(&w->version);
  w->sec = (uint32_t)(ns / 1000000000u);
  w->nsec = (uint32_t)(ns % 1000000000u);
  end_update(&w->version);
  mv_mem_written(&d->vm->mem, gpa, sizeof(*w));
}
