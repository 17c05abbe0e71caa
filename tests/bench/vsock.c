/*
 * The vsock device alone: how fast bytes go between a descriptor of the host
 * and guest memory when the guest costs nothing.  This program is the guest: a
 * driver on a thread of its own, which notifies and takes interrupts as Linux
 * does (64 KiB packets out, 4 KiB buffers in, 256 KiB of credit).
 *
 *   vsock in|out FILE MIB    FILE read to, or written from, the guest; "-": a
 *                            pipe with a writer or reader at its other end
 * Prints wall and CPU seconds of the process.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "mv/devices.h"
#include "mv/layout.h"

#define RAM      (64u << 20)
#define SIZE     128u
#define RINGS    0x10000u
#define RX_BUFS  0x100000u
#define TX_BUFS  0x800000u
#define TX_SLOTS 16u
#define PACKET   65536u
#define WINDOW   (256u << 10)

enum { RX, TX, QUEUES = 3 };
enum { NEXT = 1, WRITE = 2 };

struct packet {
  uint64_t src_cid, dst_cid;
  uint32_t src_port, dst_port, len;
  uint16_t type, op;
  uint32_t flags, buf_alloc, fwd_cnt;
} __attribute__((packed));

struct guest {
  struct mv_mem mem;
  struct mv_bus mmio;
  struct mv_irqchip chip;
  struct mv_loop *loop;
  struct mv_vsock *vsock;
  uint8_t *ram;
  uint16_t avail[QUEUES], used[QUEUES];
  struct packet header; /* of what the guest sends */
  uint32_t sent, received, told, peer_alloc, peer_fwd;
};

static void no_irq(void *ctx, unsigned gsi, int level) {
  (void)ctx, (void)gsi, (void)level;
}

static uint8_t *ring(struct guest *g, unsigned q, unsigned off) {
  return g->ram + RINGS + q * 0x4000 + off;
}
static void reg(struct guest *g, unsigned off, uint64_t value) {
  mv_bus_write(&g->mmio, MV_VIRTIO_MMIO_GPA + off, value, 4);
}

static void put_desc(struct guest *g, unsigned q, unsigned i, uint64_t addr, uint32_t len,
                     uint16_t flags) {
  uint16_t next = i + 1;
  memcpy(ring(g, q, i * 16), &addr, 8);
  memcpy(ring(g, q, i * 16 + 8), &len, 4);
  memcpy(ring(g, q, i * 16 + 12), &flags, 2);
  memcpy(ring(g, q, i * 16 + 14), &next, 2);
}

/* Makes a chain available; notifies if the device asked for it. */
static void offer(struct guest *g, unsigned q, uint16_t head) {
  uint16_t event;
  memcpy(ring(g, q, 0x1004 + 2 * (g->avail[q] % SIZE)), &head, 2);
  __atomic_store_n((uint16_t *)ring(g, q, 0x1002), ++g->avail[q], __ATOMIC_SEQ_CST);
  memcpy(&event, ring(g, q, 0x2004 + 8 * SIZE), 2);
  if (g->avail[q] == (uint16_t)(event + 1))
    reg(g, 0x50, q);
}

static void send_packet(struct guest *g, uint16_t op, uint32_t len) {
  unsigned slot = g->avail[TX] % TX_SLOTS;
  uint32_t at = TX_BUFS + slot * (PACKET + 64);
  g->header.op = op;
  g->header.len = len;
  g->header.fwd_cnt = g->told = g->received;
  memcpy(g->ram + at, &g->header, sizeof(g->header));
  put_desc(g, TX, 2 * slot, at, sizeof(g->header), len ? NEXT : 0);
  put_desc(g, TX, 2 * slot + 1, at + 64, len, 0);
  offer(g, TX, 2 * slot);
  g->sent += len;
}

/* Takes the next packet if there is one; its buffer goes back. */
static bool receive(struct guest *g, struct packet *p) {
  uint32_t head;
  if (g->used[RX] == __atomic_load_n((uint16_t *)ring(g, RX, 0x2002), __ATOMIC_ACQUIRE))
    return false;
  memcpy(&head, ring(g, RX, 0x2004 + 8 * (g->used[RX]++ % SIZE)), 4);
  memcpy(p, g->ram + RX_BUFS + head * 4096, sizeof(*p));
  g->peer_alloc = p->buf_alloc;
  g->peer_fwd = p->fwd_cnt;
  offer(g, RX, head);
  return true;
}

static void bring_up(struct guest *g) {
  reg(g, 0x70, 3);
  reg(g, 0x24, 1);
  reg(g, 0x20, 1);
  reg(g, 0x24, 0);
  reg(g, 0x20, 3u << 28);
  reg(g, 0x70, 11);
  for (unsigned q = 0; q < QUEUES; q++) {
    reg(g, 0x30, q);
    reg(g, 0x38, SIZE);
    reg(g, 0x80, RINGS + q * 0x4000);
    reg(g, 0x90, RINGS + q * 0x4000 + 0x1000);
    reg(g, 0xa0, RINGS + q * 0x4000 + 0x2000);
    reg(g, 0x44, 1);
  }
  reg(g, 0x70, 15);
  for (unsigned i = 0; i < SIZE; i++) {
    put_desc(g, RX, i, RX_BUFS + i * 4096, 4096, WRITE);
    offer(g, RX, i);
  }
}

static void *loop_main(void *ctx) {
  mv_loop_run(ctx);
  return NULL;
}

/* The program at the other end of the pipe. */
static void *feeder(void *ctx) {
  static uint8_t bytes[1 << 20];
  while (write((int)(intptr_t)ctx, bytes, sizeof(bytes)) > 0)
    ;
  return NULL;
}
static void *eater(void *ctx) {
  static uint8_t bytes[1 << 20];
  while (read((int)(intptr_t)ctx, bytes, sizeof(bytes)) > 0)
    ;
  return NULL;
}

static int host_end(const char *file, bool out) {
  pthread_t thread;
  int ends[2];
  if (strcmp(file, "-") != 0)
    return open(file, (out ? O_WRONLY : O_RDONLY) | O_CLOEXEC);
  if (pipe(ends) ||
      pthread_create(&thread, NULL, out ? eater : feeder, (void *)(intptr_t)ends[!out]))
    return -1;
  return ends[out];
}

static double seconds(clockid_t clock) {
  struct timespec t;
  clock_gettime(clock, &t);
  return t.tv_sec + t.tv_nsec / 1e9;
}

/* Moves `total` bytes. A guest that waits sleeps a little, as in HLT. */
static void transfer(struct guest *g, bool out, uint64_t total) {
  uint64_t moved = 0;
  while (moved < total) {
    bool idle = true;
    for (struct packet p; receive(g, &p); idle = false) {
      if (p.op == 5) {
        g->received += p.len;
        moved += p.len;
      }
      if (g->received - g->told >= WINDOW / 2)
        send_packet(g, 6, 0);
    }
    while (out && moved < total && g->sent - g->peer_fwd <= WINDOW - PACKET) {
      send_packet(g, 5, PACKET);
      moved += PACKET;
      idle = false;
    }
    if (idle)
      usleep(20);
  }
}

int main(int argc, char **argv) {
  static struct guest g;
  struct packet request;
  pthread_t thread;
  if (argc != 4)
    return 2;
  bool out = strcmp(argv[1], "out") == 0;
  int fd = host_end(argv[2], out);
  signal(SIGPIPE, SIG_IGN);
  g.chip.set_level = no_irq;
  g.loop = mv_loop_new();
  struct mv_virtio_place at = {&g.mem, &g.mmio, MV_VIRTIO_MMIO_GPA, {&g.chip, 0}, g.loop};
  if (fd < 0 || !g.loop || mv_mem_add(&g.mem, 0, RAM) ||
      mv_vsock_new(&g.vsock, &at, MV_VSOCK_GUEST_CID))
    return 1;
  g.ram = mv_mem_ptr(&g.mem, 0, RAM);
  bring_up(&g);
  struct mv_vsock_ends ends = {.in_fd = out ? -1 : fd, .out_fd = out ? fd : -1};
  if (mv_vsock_connect(g.vsock, MV_VSOCK_AGENT_PORT, &ends) < 0 ||
      pthread_create(&thread, NULL, loop_main, g.loop))
    return 1;
  while (!receive(&g, &request))
    usleep(20);
  g.header = (struct packet){.src_cid = MV_VSOCK_GUEST_CID,
                             .dst_cid = MV_VSOCK_HOST_CID,
                             .src_port = MV_VSOCK_AGENT_PORT,
                             .dst_port = request.src_port,
                             .type = 1,
                             .buf_alloc = WINDOW};
  double wall = seconds(CLOCK_MONOTONIC), cpu = seconds(CLOCK_PROCESS_CPUTIME_ID);
  send_packet(&g, 2, 0);
  transfer(&g, out, strtoull(argv[3], NULL, 0) << 20);
  printf("%f %f\n", seconds(CLOCK_MONOTONIC) - wall, seconds(CLOCK_PROCESS_CPUTIME_ID) - cpu);
  fflush(stdout);
  _exit(0);
}
