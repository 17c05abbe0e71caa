/*
 * A machine without a vCPU, for tests of the devices: RAM, two buses, an I/O
 * loop and interrupt lines that are only counted. Python plays the driver.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "mv/devices.h"
#include "mv/layout.h"

#define LINES   24
#define WRITTEN 65536
#define SINK    (1 << 20)
#define CLOSES  4096

struct rig {
  struct mv_mem mem;
  struct mv_bus mmio, pio;
  struct mv_loop *loop;
  struct mv_irqchip chip;
  int level[LINES];
  unsigned edges[LINES];
  pthread_mutex_t lock;
  unsigned nwritten;
  uint64_t written[WRITTEN][2];
  size_t sink_len;
  uint8_t sink[SINK];
  struct mv_pc_ports ports;
  int debug_exit, resets;
  uint32_t event;
  struct {
    int done, error;
  } closes[CLOSES];
  unsigned nends, next_end;
  struct {
    int in_fd, out_fd, tag;
  } ends[CLOSES];
  pthread_t thread;
};

static void set_level(void *ctx, unsigned gsi, int level) {
  struct rig *rig = ctx;
  pthread_mutex_lock(&rig->lock);
  if (level && !rig->level[gsi])
    rig->edges[gsi]++;
  rig->level[gsi] = level;
  pthread_mutex_unlock(&rig->lock);
}

static void written(void *ctx, uint64_t gpa, uint64_t len) {
  struct rig *rig = ctx;
  pthread_mutex_lock(&rig->lock);
  if (rig->nwritten < WRITTEN) {
    rig->written[rig->nwritten][0] = gpa;
    rig->written[rig->nwritten++][1] = len;
  }
  pthread_mutex_unlock(&rig->lock);
}

struct rig *rig_new(void) {
  struct rig *rig = calloc(1, sizeof(*rig));
  if (!rig)
    return NULL;
  signal(SIGPIPE, SIG_IGN);
  pthread_mutex_init(&rig->lock, NULL);
  rig->loop = mv_loop_new();
  rig->chip = (struct mv_irqchip){.set_level = set_level, .ctx = rig};
  rig->mem.written = written;
  rig->mem.written_ctx = rig;
  rig->debug_exit = -1;
  return rig;
}

void rig_free(struct rig *rig) {
  mv_loop_free(rig->loop);
  mv_mem_destroy(&rig->mem);
  free(rig);
}

int rig_add_ram(struct rig *rig, uint64_t gpa, uint64_t size) {
  return mv_mem_add(&rig->mem, gpa, size);
}
int rig_map_file(struct rig *rig, uint64_t gpa, int fd, uint64_t off, uint64_t len) {
  return mv_mem_map_file(&rig->mem, gpa, fd, off, len);
}
void *rig_ram(struct rig *rig, uint64_t gpa, uint64_t len) {
  return mv_mem_ptr(&rig->mem, gpa, len);
}
uint64_t rig_read(struct rig *rig, int port, uint64_t addr, unsigned len) {
  return mv_bus_read(port ? &rig->pio : &rig->mmio, addr, len);
}
void rig_write(struct rig *rig, int port, uint64_t addr, uint64_t value, unsigned len) {
  mv_bus_write(port ? &rig->pio : &rig->mmio, addr, value, len);
}
int rig_level(struct rig *rig, unsigned gsi) {
  return rig->level[gsi];
}
unsigned rig_edges(struct rig *rig, unsigned gsi) {
  return rig->edges[gsi];
}

/* Copies the reported ranges as (gpa, len) pairs, forgets them. */
unsigned rig_written(struct rig *rig, uint64_t *out, unsigned max) {
  pthread_mutex_lock(&rig->lock);
  unsigned n = rig->nwritten < max ? rig->nwritten : max;
  memcpy(out, rig->written, n * sizeof(rig->written[0]));
  rig->nwritten = 0;
  pthread_mutex_unlock(&rig->lock);
  return n;
}

/* ---- the loop: a step at a time, or on a thread as in the VMM ------------ */

static void stop(void *ctx) {
  mv_loop_stop(ctx);
}

int rig_step(struct rig *rig) {
  int rc = mv_loop_post(rig->loop, stop, rig->loop);
  return rc ? rc : mv_loop_run(rig->loop);
}

static void *loop_main(void *ctx) {
  struct rig *rig = ctx;
  mv_loop_run(rig->loop);
  return NULL;
}

int rig_start(struct rig *rig) {
  return -pthread_create(&rig->thread, NULL, loop_main, rig);
}
void rig_stop(struct rig *rig) {
  mv_loop_stop(rig->loop);
  pthread_join(rig->thread, NULL);
}

/* ---- devices ---------------------------------------------------------------- */

static struct mv_virtio_place place(struct rig *rig, unsigned slot) {
  return (struct mv_virtio_place){
      .mem = &rig->mem,
      .mmio = &rig->mmio,
      .gpa = MV_VIRTIO_MMIO_GPA + slot * MV_VIRTIO_MMIO_STRIDE,
      .irq = {.chip = &rig->chip, .gsi = MV_GSI_VIRTIO + slot},
      .loop = rig->loop,
  };
}

static void sink(void *ctx, const void *data, size_t len) {
  struct rig *rig = ctx;
  if (len > SINK - rig->sink_len)
    len = SINK - rig->sink_len;
  memcpy(rig->sink + rig->sink_len, data, len);
  rig->sink_len += len;
}

size_t rig_sink(struct rig *rig, void *out, size_t max) {
  size_t n = rig->sink_len < max ? rig->sink_len : max;
  memcpy(out, rig->sink, n);
  rig->sink_len = 0;
  return n;
}

struct mv_virtio *rig_rng(struct rig *rig, unsigned slot) {
  struct mv_virtio *dev = NULL;
  struct mv_virtio_place at = place(rig, slot);
  errno = -mv_rng_new(&dev, &at);
  return dev;
}

/* out_fd -2: to the rig's sink. */
struct mv_virtio *rig_console(struct rig *rig, unsigned slot, int in_fd, int out_fd) {
  struct mv_virtio *dev = NULL;
  struct mv_virtio_place at = place(rig, slot);
  struct mv_console_config config = {
      .in_fd = in_fd,
      .out_fd = out_fd == -2 ? -1 : out_fd,
      .sink = out_fd == -2 ? sink : NULL,
      .sink_ctx = rig,
      .cols = 80,
      .rows = 25,
  };
  errno = -mv_console_new(&dev, &at, &config);
  return dev;
}

struct mv_virtio *rig_blk(struct rig *rig, unsigned slot, int fd, int read_only, const char *id) {
  struct mv_virtio *dev = NULL;
  struct mv_virtio_place at = place(rig, slot);
  struct mv_blk_config config = {.fd = fd, .read_only = read_only};
  strncpy(config.id, id, sizeof(config.id));
  errno = -mv_blk_new(&dev, &at, &config);
  return dev;
}

struct mv_vsock *rig_vsock(struct rig *rig, unsigned slot) {
  struct mv_vsock *vsock = NULL;
  struct mv_virtio_place at = place(rig, slot);
  errno = -mv_vsock_new(&vsock, &at, MV_VSOCK_GUEST_CID);
  return vsock;
}

int rig_notify_fd(struct rig *rig, struct mv_virtio *dev) {
  return mv_virtio_notify_fd(dev, rig->loop);
}

struct closing {
  struct rig *rig;
  int tag;
};

static void on_close(void *ctx, int error) {
  struct closing *closing = ctx;
  pthread_mutex_lock(&closing->rig->lock);
  closing->rig->closes[closing->tag].error = error;
  closing->rig->closes[closing->tag].done++;
  pthread_mutex_unlock(&closing->rig->lock);
  free(closing);
}

static void fill_ends(struct rig *rig, struct mv_vsock_ends *ends, int in_fd, int out_fd, int tag) {
  struct closing *closing = malloc(sizeof(*closing));
  *closing = (struct closing){rig, tag};
  ends->in_fd = in_fd;
  ends->out_fd = out_fd;
  ends->on_close = on_close;
  ends->ctx = closing;
}

int64_t rig_connect(struct rig *rig, struct mv_vsock *vsock, uint32_t port, int in_fd, int out_fd,
                    const void *prefix, size_t prefix_len, int tag) {
  struct mv_vsock_ends ends = {.prefix = prefix, .prefix_len = prefix_len};
  fill_ends(rig, &ends, in_fd, out_fd, tag);
  int64_t id = mv_vsock_connect(vsock, port, &ends);
  if (id < 0)
    free(ends.ctx);
  return id;
}

/* How often on_close was called for a tag; its error. */
int rig_closed(struct rig *rig, int tag, int *error) {
  pthread_mutex_lock(&rig->lock);
  int done = rig->closes[tag].done;
  *error = rig->closes[tag].error;
  pthread_mutex_unlock(&rig->lock);
  return done;
}

/* Ends for the next connections that the guest makes; without: refused. */
void rig_offer(struct rig *rig, int in_fd, int out_fd, int tag) {
  rig->ends[rig->nends].in_fd = in_fd;
  rig->ends[rig->nends].out_fd = out_fd;
  rig->ends[rig->nends++].tag = tag;
}

static int on_accept(void *ctx, uint32_t guest_port, struct mv_vsock_ends *ends) {
  (void)guest_port;
  struct rig *rig = ctx;
  if (rig->next_end == rig->nends)
    return -ECONNREFUSED;
  unsigned i = rig->next_end++;
  fill_ends(rig, ends, rig->ends[i].in_fd, rig->ends[i].out_fd, rig->ends[i].tag);
  return 0;
}

int rig_listen(struct rig *rig, struct mv_vsock *vsock, uint32_t port) {
  return mv_vsock_listen(vsock, port, on_accept, rig);
}

struct mv_serial *rig_serial(struct rig *rig, int in_fd) {
  struct mv_serial *serial = NULL;
  struct mv_serial_config config = {
      .port = MV_PORT_SERIAL,
      .irq = {.chip = &rig->chip, .gsi = MV_GSI_SERIAL},
      .sink = sink,
      .sink_ctx = rig,
      .loop = rig->loop,
      .in_fd = in_fd,
  };
  errno = -mv_serial_new(&serial, &rig->pio, &config);
  return serial;
}

static void on_debug_exit(void *ctx, int status) {
  ((struct rig *)ctx)->debug_exit = status;
}
static void on_reset(void *ctx) {
  ((struct rig *)ctx)->resets++;
}
static void on_event(void *ctx, uint32_t value) {
  ((struct rig *)ctx)->event = value;
}

int rig_pc_ports(struct rig *rig) {
  rig->ports = (struct mv_pc_ports){
      .debug_exit = on_debug_exit, .reset = on_reset, .event = on_event, .ctx = rig};
  return mv_pc_ports_add(&rig->ports, &rig->pio);
}
int rig_debug_exit(struct rig *rig) {
  return rig->debug_exit;
}
int rig_resets(struct rig *rig) {
  return rig->resets;
}
uint32_t rig_event(struct rig *rig) {
  return rig->event;
}

/* ---- a bus of nothing but names, for tests of the bus --------------------- */

static uint64_t name_read(void *dev, uint64_t off, unsigned len) {
  return (uint64_t)(uintptr_t)dev << 32 | off << 8 | len;
}
static const struct mv_io_ops name_ops = {.read = name_read};
int rig_bus_add(struct rig *rig, uint64_t base, uint64_t size, uintptr_t name) {
  return mv_bus_add(&rig->mmio, base, size, &name_ops, (void *)name);
}
