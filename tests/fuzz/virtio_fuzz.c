/*
 * Fuzzes the virtio transport, queues and devices through what a guest can
 * reach: registers and RAM. An input is a program of small operations, so that
 * random bytes get past negotiation; ASan and UBSan are the judges.
 *
 *   virtio_fuzz SECONDS SEED    random inputs; every other round a second
 *                               thread rewrites the rings meanwhile
 *   virtio_fuzz FILE            one input again
 * With clang it is a libFuzzer target: -DLIBFUZZER -fsanitize=fuzzer.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "mv/devices.h"
#include "mv/layout.h"

#define RAM     (1u << 20)
#define RINGS   0x1000u /* queue q of device d at RINGS + (d * 4 + q) * 0x1000 */
#define BUFFERS 0x20000u
#define DEVICES 4
#define SIZE    8u
#define INPUT   4096
#define PORT    700
#define PEERS   16

struct input {
  const uint8_t *data;
  size_t len;
};

struct machine {
  struct mv_mem mem;
  struct mv_bus mmio;
  struct mv_loop *loop;
  struct mv_irqchip chip;
  struct mv_virtio *dev[DEVICES];
  struct mv_vsock *vsock;
  uint8_t *ram;
  int console_in, console_out, image;
  int peer[PEERS];
  unsigned open, next_peer;
};

static uint8_t take8(struct input *in) {
  if (!in->len)
    return 0;
  in->len--;
  return *in->data++;
}
static uint32_t take32(struct input *in) {
  uint32_t v = take8(in);
  v |= take8(in) << 8;
  v |= take8(in) << 16;
  return v | (uint32_t)take8(in) << 24;
}

/* A number that is likely to matter, or any. */
static uint64_t take_value(struct input *in) {
  static const uint64_t values[] = {
      0,   1,       2,       3,           4,          7,         8,           15,
      16,  44,      64,      RAM - 16,    RAM - 1,    RAM,       0xffff,      0xffffffff,
      255, 0x80000, BUFFERS, 0xd0000000u, 0x40000000, 1 << 28,   1 << 29,     1ull << 32,
      45,  512,     4096,    65536,       ~0ull,      ~0ull - 7, BUFFERS + 1, 0x7fffffff};
  uint8_t kind = take8(in);
  return kind < 224 ? values[kind % (sizeof(values) / sizeof(values[0]))] : take32(in);
}

static void no_irq(void *ctx, unsigned gsi, int level) {
  (void)ctx, (void)gsi, (void)level;
}

static void on_close(void *ctx, int error) {
  (void)error;
  ((struct machine *)ctx)->open--;
}

/* A stream to one of our peers, of the kind that its number says. */
static int ends_open(struct machine *m, struct mv_vsock_ends *ends) {
  unsigned which = m->next_peer++ % PEERS;
  int pair[2];
  if (m->open >= 64)
    return -EMFILE;
  if (m->peer[which] >= 0)
    close(m->peer[which]);
  m->peer[which] = -1;
  if (which % 4 == 0) {
    ends->in_fd = open("/dev/zero", O_RDONLY | O_CLOEXEC);
    ends->out_fd = open("/dev/null", O_WRONLY | O_CLOEXEC);
  } else if (which % 4 == 1) {
    if (pipe2(pair, O_CLOEXEC | O_NONBLOCK))
      abort();
    fcntl(pair[1], F_SETPIPE_SZ, 4096);
    ends->out_fd = pair[1];
    m->peer[which] = pair[0];
  } else {
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
      abort();
    ends->in_fd = ends->out_fd = pair[1];
    m->peer[which] = pair[0];
    fcntl(pair[0], F_SETFL, O_NONBLOCK);
  }
  ends->on_close = on_close;
  ends->ctx = m;
  m->open++;
  return 0;
}

static int on_accept(void *ctx, uint32_t port, struct mv_vsock_ends *ends) {
  return port & 1 ? -ECONNREFUSED : ends_open(ctx, ends);
}

static void stop(void *loop) {
  mv_loop_stop(loop);
}
static void loop_step(struct machine *m) {
  mv_loop_post(m->loop, stop, m->loop);
  mv_loop_run(m->loop);
}

static struct mv_virtio_place place(struct machine *m, unsigned slot) {
  return (struct mv_virtio_place){.mem = &m->mem,
                                  .mmio = &m->mmio,
                                  .gpa = MV_VIRTIO_MMIO_GPA + slot * MV_VIRTIO_MMIO_STRIDE,
                                  .irq = {.chip = &m->chip, .gsi = slot},
                                  .loop = m->loop};
}

static void machine_new(struct machine *m) {
  int in[2], out[2];
  memset(m, 0, sizeof(*m));
  for (unsigned i = 0; i < PEERS; i++)
    m->peer[i] = -1;
  m->chip.set_level = no_irq;
  m->loop = mv_loop_new();
  m->image = memfd_create("image", MFD_CLOEXEC);
  if (mv_mem_add(&m->mem, 0, RAM) || !m->loop || ftruncate(m->image, 1 << 20) ||
      pipe2(in, O_CLOEXEC | O_NONBLOCK) || pipe2(out, O_CLOEXEC | O_NONBLOCK))
    abort();
  m->console_in = in[1];
  m->console_out = out[0];
  m->ram = mv_mem_ptr(&m->mem, 0, RAM);
  struct mv_virtio_place at[DEVICES] = {place(m, 0), place(m, 1), place(m, 2), place(m, 3)};
  struct mv_console_config console = {.in_fd = in[0], .out_fd = out[1]};
  struct mv_blk_config blk = {.fd = m->image, .id = "fuzz"};
  if (mv_rng_new(&m->dev[0], &at[0]) || mv_console_new(&m->dev[1], &at[1], &console) ||
      mv_vsock_new(&m->vsock, &at[2], MV_VSOCK_GUEST_CID) || mv_blk_new(&m->dev[3], &at[3], &blk))
    abort();
  m->dev[2] = mv_vsock_virtio(m->vsock);
  mv_vsock_listen(m->vsock, PORT, on_accept, m);
}

static void machine_free(struct machine *m) {
  for (unsigned i = 0; i < DEVICES; i++)
    mv_virtio_free(m->dev[i]);
  if (m->open) /* every stream that was opened was closed, once */
    abort();
  close(m->console_in);
  close(m->console_out);
  for (unsigned i = 0; i < PEERS; i++)
    if (m->peer[i] >= 0)
      close(m->peer[i]);
  mv_loop_free(m->loop);
  mv_mem_destroy(&m->mem);
}

static void reg(struct machine *m, unsigned d, uint64_t off, uint64_t value) {
  mv_bus_write(&m->mmio, MV_VIRTIO_MMIO_GPA + d * MV_VIRTIO_MMIO_STRIDE + off, value, 4);
}

/* What a good driver does, up to DRIVER_OK. */
static void bring_up(struct machine *m, unsigned d, uint32_t features) {
  reg(m, d, 0x70, 0);
  reg(m, d, 0x70, 3);
  reg(m, d, 0x24, 0);
  reg(m, d, 0x20, features);
  reg(m, d, 0x24, 1);
  reg(m, d, 0x20, 1);
  reg(m, d, 0x70, 11);
  for (unsigned q = 0; q < 3; q++) {
    uint32_t at = RINGS + (d * 4 + q) * 0x1000;
    memset(m->ram + at, 0, 0x1000);
    reg(m, d, 0x30, q);
    reg(m, d, 0x38, SIZE);
    reg(m, d, 0x80, at);
    reg(m, d, 0x90, at + 0x400);
    reg(m, d, 0xa0, at + 0x800);
    reg(m, d, 0x44, 1);
  }
  reg(m, d, 0x70, 15);
}

static void put_desc(struct machine *m, struct input *in, uint32_t ring) {
  uint64_t addr = take_value(in), mid = take_value(in);
  uint8_t how = take8(in);
  uint32_t len = mid, at = ring + how % SIZE * 16;
  uint16_t flags = how >> 5, next = take8(in) % (SIZE + 1);
  if (addr < 1024) /* mostly a buffer that is one */
    addr = BUFFERS + addr * 4096;
  memcpy(m->ram + at, &addr, 8);
  memcpy(m->ram + at + 8, &len, 4);
  memcpy(m->ram + at + 12, &flags, 2);
  memcpy(m->ram + at + 14, &next, 2);
}

static void make_avail(struct machine *m, struct input *in, uint32_t ring) {
  uint16_t idx, head = 0;
  if (in->len)
    head = take8(in) % (SIZE + (take8(in) == 0));
  memcpy(&idx, m->ram + ring + 0x402, 2);
  memcpy(m->ram + ring + 0x404 + idx % SIZE * 2, &head, 2);
  idx += take8(in) < 254 ? 1 : take8(in);
  memcpy(m->ram + ring + 0x402, &idx, 2);
}

/* Writes descriptor i of a ring. */
static void desc_set(struct machine *m, uint32_t ring, unsigned i, uint64_t addr, uint32_t len,
                     uint16_t flags) {
  uint16_t next = i + 1;
  memcpy(m->ram + ring + i * 16, &addr, 8);
  memcpy(m->ram + ring + i * 16 + 8, &len, 4);
  memcpy(m->ram + ring + i * 16 + 12, &flags, 2);
  memcpy(m->ram + ring + i * 16 + 14, &next, 2);
}

/* A request in good form: readable bytes, a writable buffer, a byte's more. */
static void good_request(struct machine *m, struct input *in, unsigned d, unsigned q) {
  uint32_t ring = RINGS + (d * 4 + q) * 0x1000, buf = BUFFERS + 0x20000 + d * 0x10000;
  struct input zero = {.len = 0};
  if (d == 3) {
    uint32_t kind = take8(in) % 15, sector = take_value(in);
    memset(m->ram + buf, 0, 64);
    memcpy(m->ram + buf, &kind, 4);
    memcpy(m->ram + buf + 8, &sector, 4);
    memcpy(m->ram + buf + 16, &sector, 4);
    m->ram[buf + 24] = take8(in);
    m->ram[buf + 28] = take8(in) % 3;
    desc_set(m, ring, 0, buf, kind > 8 ? 32 : kind == 1 ? 16 + 1024 : 16, 1);
    desc_set(m, ring, 1, buf + 4096, kind ? 24 : 1024, 3);
    desc_set(m, ring, 2, buf + 8192, 1, 2);
  } else {
    bool to_guest = d == 0 || q == 0;
    desc_set(m, ring, 0, buf, take_value(in) % 4096, to_guest ? 3 : 1);
    desc_set(m, ring, 1, buf + 4096, 4096, to_guest ? 2 : 0);
  }
  unsigned n = take8(in) % SIZE;
  for (unsigned i = 0; i < n; i++)
    make_avail(m, &zero, ring);
  reg(m, d, 0x50, q);
}

/* A whole vsock packet from the guest, nearly right. */
static void send_packet(struct machine *m, struct input *in) {
  struct {
    uint64_t src, dst;
    uint32_t sport, dport, len;
    uint16_t type, op;
    uint32_t flags, alloc, fwd;
  } __attribute__((packed)) hdr = {.src = 3, .dst = 2, .type = 1};
  uint32_t ring = RINGS + (2 * 4 + 1) * 0x1000, buf = BUFFERS + 0x8000;
  hdr.sport = take8(in) % 8;
  hdr.dport = take8(in) & 1 ? PORT : 0x40000000 + take8(in) % 8;
  hdr.op = take8(in) % 9;
  hdr.flags = take8(in) % 5;
  hdr.len = hdr.op == 5 ? take_value(in) : 0;
  if (hdr.len > 32768 && take8(in))
    hdr.len = 1000;
  hdr.alloc = take8(in) & 3 ? 1 << 18 : take_value(in);
  hdr.fwd = take8(in) & 3 ? 0 : take_value(in);
  memcpy(m->ram + buf, &hdr, sizeof(hdr));
  uint64_t addr = buf;
  uint32_t len = 44 + (hdr.len < 70000 ? hdr.len : 0);
  memcpy(m->ram + ring, &addr, 8);
  memcpy(m->ram + ring + 8, &len, 4);
  memset(m->ram + ring + 12, 0, 4);
  struct input zero = {.len = 0};
  make_avail(m, &zero, ring);
  reg(m, 2, 0x50, 1);
}

/* The user's programs: connect, write, read, go away. */
static void host_acts(struct machine *m, struct input *in) {
  static uint8_t bytes[40000];
  uint8_t what = take8(in), which = take8(in) % PEERS;
  int peer = m->peer[which];
  if (what < 64) {
    if (write(m->console_in, bytes, what) < 0 && errno != EAGAIN)
      abort();
  } else if (what < 128) {
    struct mv_vsock_ends ends = {.in_fd = -1, .out_fd = -1, .prefix = "hello"};
    ends.prefix_len = what & 4;
    if (ends_open(m, &ends) == 0 && mv_vsock_connect(m->vsock, what % 8, &ends) < 0)
      m->open--;
  } else if (what < 160) {
    mv_vsock_close(m->vsock, what % 32);
  } else if (peer >= 0 && what < 200) {
    if (write(peer, bytes, what * 200) < 0) /* full, or a pipe's reading end */
      return;
  } else if (peer >= 0 && what < 240) {
    if (read(peer, bytes, sizeof(bytes)) < 0)
      return;
  } else if (peer >= 0) {
    close(peer);
    m->peer[which] = -1;
  }
}

static void operate(struct machine *m, struct input *in) {
  uint8_t op = take8(in), d = take8(in) % DEVICES, q = take8(in) % 4;
  uint32_t ring = RINGS + (d * 4 + q) * 0x1000;
  uint64_t base = MV_VIRTIO_MMIO_GPA + d * MV_VIRTIO_MMIO_STRIDE;
  switch (op % 32) {
  case 0:
    mv_bus_write(&m->mmio, base + take8(in) % 64 * 4, take_value(in), 4);
    break;
  case 1:
    mv_bus_write(&m->mmio, base + take_value(in) % 0x1000, take_value(in), 1u << q);
    break;
  case 2:
    mv_bus_read(&m->mmio, base + take_value(in) % 0x1000, 1u << q);
    break;
  case 3 ... 5:
    put_desc(m, in, op & 128 ? BUFFERS : ring);
    make_avail(m, in, ring);
    reg(m, d, 0x50, q);
    break;
  case 6:
    m->ram[ring + take32(in) % 0x1000] = take8(in);
    break;
  case 7 ... 9:
    host_acts(m, in);
    break;
  case 10 ... 15:
    good_request(m, in, d, q % 3);
    break;
  case 16 ... 23:
    send_packet(m, in);
    break;
  case 24 ... 27: { /* a broken device comes back */
    uint64_t status = mv_bus_read(&m->mmio, base + 0x70, 4);
    if (status != 15 || op == 24)
      bring_up(m, d, op & 64 ? take_value(in) : op & 32 ? 1 << 28 | 1 << 29 : 0);
    if (d == 2) { /* receive buffers */
      struct input eight = {.data = (const uint8_t *)"\7\7\7\7", .len = 4};
      good_request(m, &eight, 2, 0);
    }
    break;
  }
  default:
    loop_step(m);
    break;
  }
}

/* Another CPU of the guest: swaps bytes of the rings and buffers. */
struct scribbler {
  uint8_t *ram;
  pthread_t thread;
  bool stop;
};

static void *scribble(void *ctx) {
  struct scribbler *s = ctx;
  uint32_t at = 1;
  while (!__atomic_load_n(&s->stop, __ATOMIC_RELAXED)) {
    at = at * 1664525 + 1013904223;
    volatile uint8_t *p = s->ram + RINGS + at % 0x10000, *q = s->ram + RINGS + at % 0xfff0;
    uint8_t byte = *p;
    *p = *q;
    *q = byte;
  }
  return NULL;
}

static void scribble_start(struct scribbler *s, uint8_t *ram) {
  s->ram = ram;
  if (pthread_create(&s->thread, NULL, scribble, s))
    s->ram = NULL;
}

static void scribble_stop(struct scribbler *s) {
  if (!s->ram)
    return;
  __atomic_store_n(&s->stop, true, __ATOMIC_RELAXED);
  pthread_join(s->thread, NULL);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len) {
  struct input in = {data, len};
  struct machine m;
  struct scribbler scribbler = {.ram = NULL};
  signal(SIGPIPE, SIG_IGN);
  machine_new(&m);
  if (take8(&in) & 1)
    scribble_start(&scribbler, m.ram);
  for (unsigned d = 0; d < DEVICES; d++)
    bring_up(&m, d, 1 << 28 | 1 << 29);
  while (in.len)
    operate(&m, &in);
  loop_step(&m);
  scribble_stop(&scribbler);
  machine_free(&m);
  return 0;
}

#ifndef LIBFUZZER
static struct {
  uint8_t data[INPUT];
  const char *crash; /* where the input is kept while it runs */
} round_;

static uint64_t random64(uint64_t *state) { /* xorshift64* */
  *state ^= *state >> 12;
  *state ^= *state << 25;
  *state ^= *state >> 27;
  return *state * 0x2545f4914f6cdd1dull;
}

static int replay(const char *path) {
  static uint8_t data[1 << 20];
  FILE *f = fopen(path, "rb");
  if (!f)
    return 2;
  size_t len = fread(data, 1, sizeof(data), f);
  fclose(f);
  return LLVMFuzzerTestOneInput(data, len);
}

int main(int argc, char **argv) {
  if (argc == 2)
    return replay(argv[1]);
  if (argc != 3)
    return 2;
  double seconds = atof(argv[1]);
  uint64_t state = strtoull(argv[2], NULL, 0) * 2 + 1;
  unsigned long rounds = 0;
  struct timespec begin, now;
  clock_gettime(CLOCK_MONOTONIC, &begin);
  do {
    for (unsigned i = 0; i < INPUT; i += 8) {
      uint64_t v = random64(&state);
      memcpy(round_.data + i, &v, 8);
    }
    FILE *f = fopen("virtio_fuzz.input", "wb"); /* what to replay after a crash */
    if (f) {
      fwrite(round_.data, 1, INPUT, f);
      fclose(f);
    }
    LLVMFuzzerTestOneInput(round_.data, INPUT);
    rounds++;
    clock_gettime(CLOCK_MONOTONIC, &now);
  } while (now.tv_sec - begin.tv_sec + (now.tv_nsec - begin.tv_nsec) / 1e9 < seconds);
  remove("virtio_fuzz.input");
  printf("%lu rounds of %d bytes\n", rounds, INPUT);
  return 0;
}
#endif
