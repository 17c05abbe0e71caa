/* The low-level test API: a VM of one vCPU around a device that logs. See mv/testapi.h. */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "mv/layout.h"
#include "mv/testapi.h"
#include "mv/vm.h"

struct mv_test {
  struct mv_vm vm;
  struct mv_vcpu *vcpu;
  struct mv_test_access log[MV_TEST_LOG_MAX];
  unsigned nlog;
  bool done; /* MV_PORT_DEBUG_EXIT was written                              */

  /* The watchdog of a run with a deadline. */
  pthread_mutex_t lock;
  pthread_cond_t over_changed;
  struct timespec deadline;
  bool over, late;
};

static void log_access(struct mv_test *t, struct mv_test_access access) {
  if (t->nlog < MV_TEST_LOG_MAX)
    t->log[t->nlog++] = access;
}

static uint64_t pattern(uint64_t addr, unsigned len) {
  uint64_t value = 0;
  for (unsigned i = 0; i < len; i++)
    value |= (uint64_t)(uint8_t)(addr + i) << (8 * i);
  return value;
}

static uint64_t port_read(void *dev, uint64_t off, unsigned len) {
  uint64_t value = pattern(off, len);
  log_access(dev, (struct mv_test_access){off, value, MV_TEST_PORT, len, false});
  return value;
}

static void port_write(void *dev, uint64_t off, uint64_t value, unsigned len) {
  struct mv_test *t = dev;
  if (off == MV_PORT_DEBUG_EXIT) {
    t->done = true;
    mv_vcpu_kick(t->vcpu);
    return;
  }
  log_access(t, (struct mv_test_access){off, value, MV_TEST_PORT, len, true});
}

static uint64_t mmio_read(void *dev, uint64_t off, unsigned len) {
  uint64_t addr = MV_TEST_MMIO_GPA + off, value = pattern(addr, len);
  log_access(dev, (struct mv_test_access){addr, value, MV_TEST_MMIO, len, false});
  return value;
}

static void mmio_write(void *dev, uint64_t off, uint64_t value, unsigned len) {
  log_access(dev, (struct mv_test_access){MV_TEST_MMIO_GPA + off, value, MV_TEST_MMIO, len, true});
}

static const struct mv_io_ops port_ops = {port_read, port_write};
static const struct mv_io_ops mmio_ops = {mmio_read, mmio_write};

static const struct mv_vcpu_ops *find_backend(const char *name) {
  if (!strcmp(name, mv_kvm_ops.name))
    return &mv_kvm_ops;
  return strcmp(name, mv_dbt_ops.name) ? NULL : &mv_dbt_ops;
}

static int build(struct mv_test *t, const struct mv_vcpu_ops *ops, uint64_t ram_size) {
  int err = mv_mem_add(&t->vm.mem, 0, ram_size);
  if (!err)
    err = mv_vm_init(&t->vm, ops);
  if (err)
    return err;
  err = mv_bus_add(&t->vm.pio, 0, 0x10000, &port_ops, t);
  if (!err)
    err = mv_bus_add(&t->vm.mmio, MV_TEST_MMIO_GPA, MV_TEST_MMIO_SIZE, &mmio_ops, t);
  if (!err)
    err = mv_vm_add_vcpu(&t->vm, &t->vcpu);
  if (err)
    mv_vm_destroy(&t->vm);
  return err;
}

int mv_test_new(struct mv_test **out, const struct mv_test_config *config, const char **failed) {
  const struct mv_vcpu_ops *ops = find_backend(config->backend);
  if (!ops) {
    *failed = "no such backend";
    return -EINVAL;
  }
  struct mv_test *t = calloc(1, sizeof *t);
  if (!t) {
    *failed = "memory";
    return -ENOMEM;
  }
  t->vm.has_bus = true;
  t->vm.hlt_exits = config->hlt_exits;
  t->vm.count = config->count;
  t->vm.handover = config->handover;
  t->vm.dbt = config->dbt;
  t->vm.ncpus = 1;
  int err = build(t, ops, config->ram_size);
  if (err) {
    *failed = t->vm.failed ? t->vm.failed : "guest memory";
    mv_mem_destroy(&t->vm.mem);
    free(t);
    return err;
  }
  pthread_condattr_t attr;
  pthread_condattr_init(&attr);
  pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
  pthread_cond_init(&t->over_changed, &attr);
  pthread_condattr_destroy(&attr);
  pthread_mutex_init(&t->lock, NULL);
  *out = t;
  return 0;
}

void mv_test_free(struct mv_test *t) {
  mv_vm_destroy(&t->vm);
  mv_mem_destroy(&t->vm.mem);
  pthread_cond_destroy(&t->over_changed);
  pthread_mutex_destroy(&t->lock);
  free(t);
}

uint8_t *mv_test_ram(struct mv_test *t) {
  return t->vm.mem.slot[0].hva;
}

void mv_test_ram_written(struct mv_test *t, uint64_t gpa, uint64_t len) {
  mv_mem_written(&t->vm.mem, gpa, len);
}

int mv_test_get_state(struct mv_test *t, struct mv_vcpu_state *out) {
  return mv_vcpu_get_state(t->vcpu, out);
}

int mv_test_set_state(struct mv_test *t, const struct mv_vcpu_state *in) {
  return mv_vcpu_set_state(t->vcpu, in);
}

void mv_test_long_mode(struct mv_vcpu_state *s, uint64_t rip, uint64_t cr3, uint64_t gdt) {
  mv_state_long_mode(s, rip, cr3, gdt);
}

/* ---- run ---------------------------------------------------------------- */

static void *watch(void *arg) {
  struct mv_test *t = arg;
  int err = 0;
  pthread_mutex_lock(&t->lock);
  while (!t->over && err != ETIMEDOUT)
    err = pthread_cond_timedwait(&t->over_changed, &t->lock, &t->deadline);
  t->late = !t->over;
  if (t->late)
    mv_vcpu_kick(t->vcpu);
  pthread_mutex_unlock(&t->lock);
  return NULL;
}

static struct timespec in_ms(uint32_t ms) {
  struct timespec at;
  clock_gettime(CLOCK_MONOTONIC, &at);
  at.tv_sec += ms / 1000;
  at.tv_nsec += (ms % 1000) * 1000000L;
  if (at.tv_nsec >= 1000000000L)
    at.tv_sec++, at.tv_nsec -= 1000000000L;
  return at;
}

int mv_test_run(struct mv_test *t, uint32_t timeout_ms, struct mv_exit_info *out) {
  pthread_t watchdog;
  t->done = t->over = t->late = false;
  t->deadline = in_ms(timeout_ms);
  int err = -pthread_create(&watchdog, NULL, watch, t);
  if (err) {
    *out = (struct mv_exit_info){.reason = MV_EXIT_ERROR, .error = err};
    return MV_TEST_EXIT;
  }
  mv_vcpu_run(t->vcpu, out);
  pthread_mutex_lock(&t->lock);
  t->over = true;
  pthread_cond_signal(&t->over_changed);
  pthread_mutex_unlock(&t->lock);
  pthread_join(watchdog, NULL);
  if (t->done)
    return MV_TEST_DONE;
  if (out->reason != MV_EXIT_KICKED)
    return MV_TEST_EXIT;
  return t->late ? MV_TEST_TIMEOUT : MV_TEST_KICKED;
}

void mv_test_kick(struct mv_test *t) {
  mv_vcpu_kick(t->vcpu);
}

int mv_test_hand_over(struct mv_test *t) {
  return mv_vcpu_hand_over(t->vcpu);
}

void mv_test_irq(struct mv_test *t, unsigned gsi, int level) {
  t->vm.irqchip.set_level(t->vm.irqchip.ctx, gsi, level);
}

unsigned mv_test_log(struct mv_test *t, struct mv_test_access out[MV_TEST_LOG_MAX]) {
  unsigned n = t->nlog;
  memcpy(out, t->log, n * sizeof *out);
  t->nlog = 0;
  return n;
}

void mv_test_stats(struct mv_test *t, struct mv_vcpu_stats *out) {
  *out = t->vcpu->stats;
}

const char *mv_test_failed(struct mv_test *t) {
  return t->vm.failed ? t->vm.failed : "";
}
