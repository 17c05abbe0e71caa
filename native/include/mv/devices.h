/*
 * Constructors of every device, and what the VMM may say to each.
 *
 * Threads.  A device's registers are served on the vCPU threads; descriptors
 * are watched on the loop's thread.  Each device has one lock of its own
 * (mv_virtio.lock, mv_serial's), held for as long as a register access or a
 * descriptor event takes.  While it is held the device may call
 * mv_irqchip.set_level and mv_mem.written: these are leaves, they never call
 * a device and never wait for a vCPU.  Callbacks named below are called with
 * no device lock held, on the thread that is named there.
 *
 * Life.  Constructors are called before the vCPUs start; *_free after they
 * have stopped, on the loop's thread or when the loop has ended.  The process
 * ignores SIGPIPE.  A descriptor handed in belongs to the device from then on
 * (also when the call fails) and may be of any kind: see mv/fdio.h.
 */
#ifndef MV_DEVICES_H
#define MV_DEVICES_H

#include <stddef.h>
#include <stdint.h>

#include "mv/bus.h"
#include "mv/irq.h"
#include "mv/loop.h"
#include "mv/mem.h"
#include "mv/virtio.h"

/* Takes what a device says, all of it, at once. Any thread, must not block;
 * calls for one device never overlap. Called with the device's lock held: it
 * must not touch the device. */
typedef void (*mv_sink_fn)(void *ctx, const void *data, size_t len);

/* ---- 8250 serial port -------------------------------------------------- */
struct mv_serial;
struct mv_serial_config {
  uint16_t port;         /* MV_PORT_SERIAL                                  */
  struct mv_irqline irq; /* chip NULL: polled only (early console)          */
  mv_sink_fn sink;       /* NULL: output is dropped                         */
  void *sink_ctx;
  struct mv_loop *loop; /* needed for in_fd; else NULL                      */
  int in_fd;            /* the line's input, or -1                          */
};
int mv_serial_new(struct mv_serial **out, struct mv_bus *pio,
                  const struct mv_serial_config *config);
/* Types `len` bytes; returns how many fitted. Any thread. */
size_t mv_serial_input(struct mv_serial *serial, const void *data, size_t len);
void mv_serial_free(struct mv_serial *serial);

/* ---- ports with one meaning -------------------------------------------- */
/* isa-debug-exit, i8042 reset, CMOS: what a PC kernel pokes. Callbacks run on
 * the vCPU's thread; the caller keeps `ports` alive as long as the bus. */
struct mv_pc_ports {
  void (*debug_exit)(void *ctx, int status); /* status (v << 1) | 1, 0..255  */
  void (*reset)(void *ctx);                  /* the guest asks for a reset   */
  void (*event)(void *ctx, uint32_t value);  /* MV_PORT_EVENT, 32-bit writes */
  void *ctx;                                 /* any callback may be NULL     */
  uint8_t cmos_index;
};
int mv_pc_ports_add(struct mv_pc_ports *ports, struct mv_bus *pio);

/* ---- virtio devices ---------------------------------------------------- */
/* Where a virtio device stands in its machine. */
struct mv_virtio_place {
  struct mv_mem *mem;
  struct mv_bus *mmio;
  uint64_t gpa; /* MV_VIRTIO_MMIO_GPA + i * MV_VIRTIO_MMIO_STRIDE           */
  struct mv_irqline irq;
  struct mv_loop *loop;
};

/* Makes the device take QueueNotify from an eventfd that the loop watches.
 * Returns the descriptor, for KVM_IOEVENTFD at gpa + MV_VIRTIO_NOTIFY_OFFSET,
 * 4 bytes, no datamatch; the device keeps it. -errno. Without it (the
 * translator) a notification is served on the vCPU's thread. */
#define MV_VIRTIO_NOTIFY_OFFSET 0x50
int mv_virtio_notify_fd(struct mv_virtio *dev, struct mv_loop *loop);
/* Ends any virtio device made here. */
void mv_virtio_free(struct mv_virtio *dev);

int mv_rng_new(struct mv_virtio **out, const struct mv_virtio_place *at);

/* One hvc port. Output goes to `sink` if set, else to out_fd; if that does
 * not keep up, 64 KiB are held and then the guest waits. */
struct mv_console_config {
  int in_fd, out_fd; /* or -1                                               */
  mv_sink_fn sink;
  void *sink_ctx;
  uint16_t cols, rows; /* 0: unknown                                        */
};
int mv_console_new(struct mv_virtio **out, const struct mv_virtio_place *at,
                   const struct mv_console_config *config);
/* Tells the guest a new size of the window. Any thread. */
void mv_console_resize(struct mv_virtio *dev, uint16_t cols, uint16_t rows);

/* A raw image: a file or block device whose size is a multiple of 512. */
struct mv_blk_config {
  int fd;
  bool read_only;
  char id[20]; /* GET_ID's answer, NUL padded                               */
};
int mv_blk_new(struct mv_virtio **out, const struct mv_virtio_place *at,
               const struct mv_blk_config *config);

/* ---- vsock ------------------------------------------------------------- */
struct mv_vsock;

/* The host's side of one stream. Bytes from in_fd go to the guest, bytes from
 * the guest to out_fd. EOF on in_fd: the guest reads EOF. The guest ends its
 * side or resets it: all it sent is written, then out_fd is closed. out_fd's reader goes
 * away: the guest's next write fails. in_fd == out_fd: a socket, of which
 * each direction is shut down by itself. in_fd -1: nothing is sent after the
 * prefix and the guest is not told EOF; out_fd -1: what comes is dropped. */
struct mv_vsock_ends {
  int in_fd, out_fd;
  const void *prefix; /* sent first; copied; may be NULL                    */
  size_t prefix_len;  /* at most MV_VSOCK_PREFIX_MAX                        */
  /* Once, on the loop's thread, when the stream is gone and both descriptors
   * are closed. 0: the guest closed it; -ECONNREFUSED: nobody listens there;
   * -ECONNRESET: the guest reset the stream, or itself; -ECANCELED:
   * mv_vsock_close; -EPROTO: the guest broke the protocol; another -errno:
   * out_fd could not be written (-EPIPE: its reader went away). May be NULL. */
  void (*on_close)(void *ctx, int error);
  void *ctx;
};
#define MV_VSOCK_PREFIX_MAX  4096
#define MV_VSOCK_STREAMS_MAX 1024

int mv_vsock_new(struct mv_vsock **out, const struct mv_virtio_place *at, uint32_t guest_cid);
struct mv_virtio *mv_vsock_virtio(struct mv_vsock *vsock); /* for free, notify_fd */
/* Connects to a guest port. Loop's thread. Returns an id > 0 for
 * mv_vsock_close, -EMFILE (too many streams), -EINVAL, -ENOMEM; then on_close
 * is not called. The request waits until the guest's driver is up. */
int64_t mv_vsock_connect(struct mv_vsock *vsock, uint32_t guest_port,
                         const struct mv_vsock_ends *ends);
/* Resets a stream. Loop's thread. on_close follows from the loop. */
void mv_vsock_close(struct mv_vsock *vsock, int64_t id);
/* The vCPUs have stopped for good: ends all streams as if the guest had reset
 * them, which writes what it sent before. Loop's thread. */
void mv_vsock_guest_gone(struct mv_vsock *vsock);
/* Serves a host port: for each connection of the guest `accept` fills *ends
 * (given with -1, -1 and nothing else) and returns 0, or -errno: refused.
 * Loop's thread. Returns 0, -EADDRINUSE, -ENOSPC (16 ports). */
typedef int (*mv_vsock_accept_fn)(void *ctx, uint32_t guest_port, struct mv_vsock_ends *ends);
int mv_vsock_listen(struct mv_vsock *vsock, uint32_t host_port, mv_vsock_accept_fn accept,
                    void *ctx);
#endif
